"""Decoded images to the size a model wants: open_clip's own geometry, through torch's resize of uint8.

torch's antialiased resize gives Pillow's pixels (mean error 0.003 of 255) at about a sixth of its time, and Pillow's
resize is what a CPU spends most of its time on when it embeds images.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from pipeline.config import ConfigError

EXTREME = 100
"""How many times longer than what the crop keeps an image may be; what is beyond is cut off before it is scaled."""


@dataclass(frozen=True)
class Resize:
    """How an image becomes `height` x `width`.

    `mode`: shortest (the short side fits, the rest is cropped), longest (the long side fits, the rest is filled with
    `fill`) or squash (both sides fit, the aspect changes). Of an image more than `EXTREME` times as long as the crop,
    shortest takes the middle `EXTREME` parts for the whole: 1 x 65,500 px would else be 9.9 GB on their way to 224 x 224.
    """

    height: int
    width: int
    mode: Literal["shortest", "longest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill: int = 0

    @classmethod
    def of(cls, preprocess: dict[str, Any]) -> "Resize":
        """From open_clip's preprocess configuration: size, resize_mode, interpolation, fill_color."""
        size = preprocess["size"]
        height, width = (size, size) if isinstance(size, int) else size
        mode, interpolation = preprocess["resize_mode"], preprocess["interpolation"]
        if mode not in ("shortest", "longest", "squash") or interpolation not in ("bicubic", "bilinear", "random"):
            raise ConfigError(f"this model's images need resize_mode={mode!r} with interpolation={interpolation!r}, which is not implemented")
        # "random" is a setting of training; open_clip then uses bicubic at inference, as it does wherever target and crop differ.
        bilinear = interpolation == "bilinear" and not (mode == "shortest" and height != width)
        return cls(height, width, mode, "bilinear" if bilinear else "bicubic", preprocess["fill_color"])

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) to uint8 (height, width, 3); an image of that size already comes back as it is."""
        if image.shape[:2] == (self.height, self.width):
            return image
        image = self._without_ends(image)
        if not image.flags.writeable:  # torch warns that it cannot share read-only memory
            image = image.copy()
        # The batch dimension first: torch then knows the image as channels-last and leaves it so, at half the time.
        pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        size = self._scaled(image.shape[0], image.shape[1])
        # Pillow 13 (python-pillow/Pillow#9549) does the vertical pass first where that saves work; each pass rounds to
        # whole levels, so the other order differs by one level in a sixth of the pixels. torch goes horizontally first.
        if image.shape[0] - size[0] > 2 * max(0, image.shape[1] - size[1]):
            pixels = self._resample(pixels, (size[0], image.shape[1]))
        pixels = self._resample(pixels, size)
        return self._crop_or_pad(pixels[0].permute(1, 2, 0).numpy())

    def _without_ends(self, image: np.ndarray) -> np.ndarray:
        """The image, or where the short side is to fit its middle, about the same centre: see `EXTREME`."""
        height, width = image.shape[:2]
        ratio = min(height / self.height, width / self.width)
        rows, columns = (math.ceil(EXTREME * ratio * target) for target in (self.height, self.width))
        if self.mode != "shortest" or (height <= rows and width <= columns):
            return image
        return image[_middle(height, rows), _middle(width, columns)].copy()

    def _resample(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if size == tuple(pixels.shape[2:]):
            return pixels
        return torch.nn.functional.interpolate(pixels, size, mode=self.interpolation, antialias=True)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Size before cropping or padding, rounded as torchvision and open_clip do."""
        if self.mode == "squash":
            return self.height, self.width
        if self.mode == "shortest" and self.height == self.width:
            short, long = min(height, width), max(height, width)
            scaled = int(self.width * long / short)  # torchvision cuts off, open_clip's own resize below rounds
            return (scaled, self.width) if height > width else (self.height, scaled)
        ratios = height / self.height, width / self.width
        ratio = min(ratios) if self.mode == "shortest" else max(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _crop_or_pad(self, pixels: np.ndarray) -> np.ndarray:
        missing_height, missing_width = max(0, self.height - pixels.shape[0]), max(0, self.width - pixels.shape[1])
        if missing_height or missing_width:
            margins = [(missing // 2, (missing + 1) // 2) for missing in (missing_height, missing_width)]
            pixels = np.pad(pixels, [*margins, (0, 0)], constant_values=self.fill)
        top = round((pixels.shape[0] - self.height) / 2)
        left = round((pixels.shape[1] - self.width) / 2)
        return np.ascontiguousarray(pixels[top : top + self.height, left : left + self.width])


def _middle(side: int, most: int) -> slice:
    """The middle `most` pixels of a side, or one more, so that the centre stays where it is."""
    if side <= most:
        return slice(None)
    cut = (side - most) // 2
    return slice(cut, side - cut)
