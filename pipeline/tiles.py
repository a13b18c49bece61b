"""Slide arithmetic: which level and which square of a slide a tile of a given physical size is, and how much tissue it holds.

Pure numpy. Lengths are px of level 0 of the full image unless a name says otherwise. A tile covers the same microns on every
slide: nothing is rounded to a magnification, and no tolerance changes what a tile covers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pydantic

from pipeline.config import Model

PIXELS = "JPEG by libjpeg-turbo, accurate DCT and upsampling; no colour profile; area means when shrinking; on the slide's white; version 1"
"""How a slide's stored data become a tile's pixels, by every reader: part of an encoder's fingerprint. Tests hold the readers to it, bit by bit."""

LEVEL_TOLERANCE = 0.01
"""Share by which a level may be too coarse and still be read: such a tile is enlarged by at most this much, and covers what it should."""


class WrongScale(Exception):
    """A slide that cannot give tiles of this grid: says what it has and what would help."""


class Grid(Model):
    """Which tiles are cut out of every slide."""

    mpp: float = pydantic.Field(gt=0)
    """Microns per px of a tile. 0.5 is what most pathology encoders were trained at, and what is called 20x."""
    tile_px: int = pydantic.Field(default=256, gt=0)
    """Side of a tile in its own px: it covers mpp * tile_px microns."""
    overlap_px: int = pydantic.Field(default=0, ge=0)
    """Px that a tile shares with its neighbour."""
    allow_upsample: bool = False
    """Whether a slide that is coarser than `mpp` is enlarged. Enlarging invents detail; without it such a slide is refused."""
    resample: Literal["exact", "never"] = "exact"
    """exact: pixels are resampled so that every slide's tiles cover the same microns. never: pixels of the nearest level as they are; what they
    cover differs by slide, within `max_mpp_error`, and stands in `mpp_effective`."""
    max_mpp_error: float = pydantic.Field(default=0.05, ge=0, lt=1)
    """For resample=never: largest share by which the nearest level may differ from `mpp`; a slide beyond it is refused."""
    min_tissue_fraction: float = pydantic.Field(default=0.25, ge=0, le=1)
    """Tiles with a smaller share of tissue are left out; at 0 all are kept. The share stands on every row, so start low and filter."""
    min_valid_fraction: float = pydantic.Field(default=0.5, ge=0, le=1)
    """Tiles with a smaller share inside the slide are left out; what lies outside is filled with the slide's white."""

    @pydantic.model_validator(mode="after")
    def _check_overlap(self) -> "Grid":
        if self.overlap_px >= self.tile_px:
            raise ValueError(f"overlap_px={self.overlap_px} must be smaller than tile_px={self.tile_px}")
        return self


@dataclass(frozen=True)
class Cut:
    """How one slide gives the tiles of one grid."""

    tile_px: int
    level: int
    downsample: float
    """Of `level`."""
    mpp: float
    """Of level 0."""
    footprint: float
    """Side of a tile, exact."""
    stride: float
    """From one tile to the next, exact."""
    upsampled: bool
    """Whether the slide is coarser than the grid asks for."""

    @property
    def footprint_l0(self) -> int:
        """Side of a tile in whole px of level 0."""
        return round(self.footprint)

    @property
    def read_px(self) -> int:
        """Side of a tile in px of `level`: what is read, and then resampled to `tile_px`."""
        return round(self.footprint / self.downsample)

    @property
    def mpp_effective(self) -> float:
        """Microns that one px of a tile covers; differs from the grid's by the rounding of the footprint alone, unless resample=never."""
        return self.mpp * self.footprint_l0 / self.tile_px


def mean_mpp(mpp_x: float, mpp_y: float) -> float:
    """One mpp for a slide whose px are not square: the geometric mean, so that areas are right."""
    return math.sqrt(mpp_x * mpp_y)


def level_for(downsamples: Sequence[float], ratio: float) -> int | None:
    """Index of the coarsest level that is still as fine as `ratio` px of level 0, or LEVEL_TOLERANCE coarser; None if not even level 0 is.

    `downsamples`: px of level 0 that one px of each level covers, finest first, never rounded: 3.999 cut down to 3 reads a third too much.
    """
    fine = [level for level, downsample in enumerate(downsamples) if downsample <= ratio * (1 + LEVEL_TOLERANCE)]
    return max(fine, key=lambda level: downsamples[level], default=None)


def cut_for(grid: Grid, *, mpp: float, downsamples: Sequence[float]) -> Cut:
    """How a slide of `mpp` microns per px at level 0 gives the tiles of `grid`.

    Raises WrongScale: coarser than the grid and enlarging is not allowed, or no level is near enough for resample=never.
    """
    if grid.resample == "never":
        return _unresampled(grid, mpp=mpp, downsamples=downsamples)
    ratio = grid.mpp / mpp
    level = level_for(downsamples, ratio)
    if level is None and not grid.allow_upsample:
        raise WrongScale(
            f"the slide has {mpp:.4g} microns per px at its finest, the grid asks for {grid.mpp:.4g}: enlarging invents detail; "
            f"ask for mpp={mpp:.4g} or more, or set allow_upsample: true"
        )
    level, upsampled = (0, True) if level is None else (level, False)
    stride = (grid.tile_px - grid.overlap_px) * ratio
    return Cut(grid.tile_px, level, downsamples[level], mpp, grid.tile_px * ratio, stride, upsampled)


def _unresampled(grid: Grid, *, mpp: float, downsamples: Sequence[float]) -> Cut:
    level = min(range(len(downsamples)), key=lambda level: abs(math.log(downsamples[level] * mpp / grid.mpp)))
    downsample = downsamples[level]
    error = downsample * mpp / grid.mpp - 1
    if abs(error) > grid.max_mpp_error:
        raise WrongScale(
            f"the nearest level has {downsample * mpp:.4g} microns per px, {error:+.1%} from the {grid.mpp:.4g} asked for; with resample: never "
            f"at most {grid.max_mpp_error:.1%} is allowed (max_mpp_error); use resample: exact"
        )
    return Cut(grid.tile_px, level, downsample, mpp, grid.tile_px * downsample, (grid.tile_px - grid.overlap_px) * downsample, False)


@dataclass(frozen=True)
class Tiles:
    """Tiles of one grid on one slide, row by row from the top; each array (N,)."""

    row: np.ndarray
    col: np.ndarray
    x: np.ndarray
    """Left edge, int64."""
    y: np.ndarray
    """Top edge, int64."""
    valid_fraction: np.ndarray
    """Share of the tile that lies inside the slide, float64."""
    tissue_fraction: np.ndarray
    """Share of the tile that is tissue, float64; what lies outside the slide is not."""

    def __len__(self) -> int:
        return len(self.x)

    def where(self, wanted: np.ndarray) -> "Tiles":
        """Those that `wanted`, a bool or index array, selects."""
        return replace(self, **{name: values[wanted] for name, values in vars(self).items()})


def lay(cut: Cut, *, size: tuple[int, int], mask: np.ndarray, bounds: tuple[int, int, int, int] | None = None) -> Tiles:
    """Every tile that touches the slide.

    `size`: (width, height) of the slide. `mask`: bool (h, w), spans the whole slide whatever its own resolution. `bounds`: x, y, width,
    height of the scanned part: the grid starts at its corner, else at (0, 0), so a tile is the same whatever the tissue's outline.
    """
    left, top, width, height = bounds or (0, 0, *size)
    xs, ys = origins(width, cut.stride) + left, origins(height, cut.stride) + top
    side = cut.footprint_l0
    valid = np.outer(_inside(ys, side, (top, top + height)), _inside(xs, side, (left, left + width)))
    row, col = np.divmod(np.arange(len(xs) * len(ys)), len(xs))
    return Tiles(row, col, xs[col], ys[row], valid.ravel(), tissue_fraction(mask, (xs, ys), side=side, size=size).ravel())


def kept(grid: Grid, tiles: Tiles) -> np.ndarray:
    """Which tiles the grid keeps: bool (N,)."""
    wanted: np.ndarray = (tiles.tissue_fraction >= grid.min_tissue_fraction) & (tiles.valid_fraction >= grid.min_valid_fraction)
    return wanted


def origins(extent: int, stride: float) -> np.ndarray:
    """Where tiles begin along one axis of `extent` px: int64, strictly inside. Each product is rounded, so no error builds up."""
    starts: np.ndarray = np.rint(np.arange(math.ceil(extent / stride) + 1) * stride).astype(np.int64)
    inside: np.ndarray = starts[starts < extent]
    return inside


def _inside(starts: np.ndarray, side: int, span: tuple[int, int]) -> np.ndarray:
    """Share of each [start, start + side) that lies within `span`."""
    overlap = np.minimum(starts + side, span[1]) - np.maximum(starts, span[0])
    share: np.ndarray = overlap.clip(0) / side
    return share


def tissue_fraction(mask: np.ndarray, places: tuple[np.ndarray, np.ndarray], *, side: int, size: tuple[int, int]) -> np.ndarray:
    """Share of tissue in the tiles that begin at every (x, y) of two axes: float64 (len(ys), len(xs)).

    Exact, mask pixels that a tile's edge cuts counted by the part inside: the integral of a mask is linear in x and in y within a
    mask pixel, so interpolating it between pixel corners is not an approximation. `places`: (xs, ys); `size`: (width, height) of the slide.
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.uint32)
    np.cumsum(np.cumsum(mask, axis=0, dtype=np.uint32), axis=1, dtype=np.uint32, out=integral[1:, 1:])
    (xs, ys), (width, height) = places, size
    left, right = (_between(integral, (xs + edge) * mask.shape[1] / width, axis=1) for edge in (0, side))
    columns = right - left
    top, bottom = (_between(columns, (ys + edge) * mask.shape[0] / height, axis=0) for edge in (0, side))
    area = side * mask.shape[0] / height * side * mask.shape[1] / width
    # Rounded, so that an error in the last digit does not decide whether a tile of just the least share is kept.
    fraction: np.ndarray = ((bottom - top) / area).round(9).clip(0, 1)
    return fraction


def _between(integral: np.ndarray, at: np.ndarray, *, axis: int) -> np.ndarray:
    """The integral along `axis` at fractional positions, float64; constant beyond its ends."""
    at = at.clip(0, integral.shape[axis] - 1)
    below = np.minimum(at.astype(np.int64), integral.shape[axis] - 2)
    share = (at - below).reshape([-1 if dimension == axis else 1 for dimension in range(2)])
    first, second = (np.take(integral, below + step, axis=axis).astype(np.float64) for step in (0, 1))
    between: np.ndarray = first + (second - first) * share
    return between


def parents(tiles: Tiles, *, fine: Cut, coarse: Cut, size: tuple[int, int], bounds: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """(row, col) in the coarser grid of the tile that holds each tile's centre: int64 (N, 2). Where grids overlap, the one centred nearest.

    The parent need not be kept: it may hold too little tissue.
    """
    left, top, width, height = bounds or (0, 0, *size)
    rows = _parent(tiles.y - top + fine.footprint / 2, coarse, len(origins(height, coarse.stride)))
    cols = _parent(tiles.x - left + fine.footprint / 2, coarse, len(origins(width, coarse.stride)))
    return np.stack([rows, cols], axis=1)


def _parent(centres: np.ndarray, coarse: Cut, count: int) -> np.ndarray:
    nearest: np.ndarray = np.floor((centres - coarse.footprint / 2) / coarse.stride + 0.5).astype(np.int64).clip(0, count - 1)
    return nearest
