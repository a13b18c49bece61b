"""uint8 pixels to what a vision model is given: they cross to the device as bytes and become numbers there."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Pixels:
    """Normalisation by `mean` and `std` of a channel, both as shares of 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def batch(self, images: list[np.ndarray], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """uint8 images (h, w, 3) of one size to (N, 3, h, w) on the device; computed in float32, handed over as `dtype`."""
        if device.type == "cpu":
            return self._on_cpu(images).to(dtype)
        scale, shift = (values.to(device).view(1, 3, 1, 1) for values in self._affine())
        pixels = torch.from_numpy(np.stack(images)).to(device, non_blocking=True).permute(0, 3, 1, 2)
        # In place after one conversion: several times the speed of (pixels / 255 - mean) / std.
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).sub_(shift).to(dtype)

    def _on_cpu(self, images: list[np.ndarray]) -> torch.Tensor:
        """The same numbers, image by image: each is finished while it is in the processor's cache."""
        scale, shift = (values.view(3, 1, 1) for values in self._affine())
        batch = torch.empty(len(images), 3, *images[0].shape[:2])
        for target, image in zip(batch, images, strict=True):
            target.numpy()[:] = image.transpose(2, 0, 1)
            target.mul_(scale).sub_(shift)
        return batch

    def _affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return 1 / (255 * std), mean / std
