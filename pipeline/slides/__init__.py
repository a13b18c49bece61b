"""Whole slides: what a slide is, what may be wrong with one, and how its pixels are asked for.

`pipeline.slides.opening.open_slide` opens one. Coordinates are pixels of level 0 of the full image, x to the right and y down.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class BadSlide(Exception):
    """A slide that cannot be used as a whole.

    `reason`: missing, empty, unreadable (damaged, or no slide at all), unsupported (a slide that no reader here opens), too_large
    (does not fit the cache). `detail` says what exactly was wrong.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class BadTile(Exception):
    """A region that cannot be read truthfully: its stored data are damaged. The slide's other regions can still be read."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


@dataclass(frozen=True)
class Level:
    """One resolution of the pyramid. `downsample`: how many px of level 0 one px covers, exact as a float, never rounded."""

    width: int
    height: int
    downsample: float


@dataclass(frozen=True)
class SlideInfo:
    """What a slide says of itself, and what reads it."""

    vendor: str
    width: int
    height: int
    levels: tuple[Level, ...]
    """Finest first."""
    mpp_x: float | None
    """Microns per px of level 0; None if the slide does not say, or says what cannot be true."""
    mpp_y: float | None
    mpp_source: str | None
    """Where it is from: user, openslide, a vendor's key, tiff, objective (an estimate)."""
    mpp_flags: tuple[str, ...]
    """What was odd about it: anisotropic, disagrees, implausible."""
    objective: float | None
    bounds: tuple[int, int, int, int] | None
    """x, y, width, height of the part that was scanned."""
    tile_width: int | None
    """Of the stored tiles of level 0."""
    tile_height: int | None
    compression: str | None
    icc: bool
    """Whether there is a colour profile; it is not applied."""
    content_fp: str
    """Changes when the file is replaced, not when it is moved."""
    reader: str
    """Name, version and way of decoding: vectors depend on it."""
    notes: tuple[str, ...] = ()
    """What a person should know, such as why the fast reader was not used."""


class Slide(Protocol):
    """An open slide. Threads may share it."""

    @property
    def info(self) -> SlideInfo: ...

    def read(self, place: tuple[int, int], *, level: int, size: tuple[int, int]) -> np.ndarray:
        """RGBA uint8 (height, width, 4) of `size` (width, height) px of `level`, from `place` (x, y) in px of level 0.

        Outside the slide, and where nothing was scanned, alpha is 0. Raises BadTile.
        """
        ...

    def close(self) -> None: ...
