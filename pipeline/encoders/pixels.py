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
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        pixels = torch.from_numpy(np.stack(images)).to(device, non_blocking=True).permute(0, 3, 1, 2)
        # In place after one conversion: several times the speed of (pixels / 255 - mean) / std.
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / (255 * std)).sub_(mean / std).to(dtype)
