"""Whole slides: what a slide is, what may be wrong with one, and how its pixels are asked for.

`pipeline.slides.opening.open_slide` opens one. Coordinates are pixels of level 0 of the full image, x to the right and y down.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.tiles import mean_mpp


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
    """Where it is from: user, openslide (its code for the vendor), a vendor's own key such as aperio.MPP, tiff (resolution tags),
    objective (an estimate)."""
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
    """Changes when the file is replaced, not when it is moved or copied, also to an object store: `pipeline.slides.describe`."""
    reader: str
    """Name and version of what reads this slide. Readers give the same pixels (`pipeline.tiles.PIXELS`); all the same, a tile counts as
    changed when a new look at its slide finds another reader or version: rather embedded once too often than pixels mixed unnoticed."""
    notes: tuple[str, ...] = ()
    """What a person should know, such as why the fast reader was not used."""

    @property
    def mpp(self) -> float | None:
        """The scale to work with: the geometric mean of mpp_x and mpp_y."""
        return None if self.mpp_x is None or self.mpp_y is None else mean_mpp(self.mpp_x, self.mpp_y)


class Slide(Protocol):
    """An open slide. Threads may share it."""

    @property
    def info(self) -> SlideInfo: ...

    def read(self, place: tuple[int, int], *, level: int, size: tuple[int, int]) -> np.ndarray:
        """RGBA uint8 (height, width, 4) of `size` (width, height) px of `level`, from `place` (x, y) in px of level 0.

        The region begins at the whole px of the level nearest to `place`, so that nothing is interpolated. Outside the slide, and
        where nothing was scanned, alpha is 0. Raises BadTile.
        """
        ...

    def read_rgb(self, place: tuple[int, int], *, level: int, size: tuple[int, int], white: tuple[int, int, int]) -> np.ndarray:
        """The same as RGB uint8 (height, width, 3) on a ground of `white`: what the transparent parts show."""
        ...

    def close(self) -> None: ...
