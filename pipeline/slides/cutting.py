"""Pixels of a slide at a physical size: one tile, or the whole slide small. RGB on the slide's white, never on black."""

from dataclasses import dataclass

import numpy as np

from pipeline.slides import BadTile, Level, Slide
from pipeline.slides.opencv import cv2
from pipeline.tiles import Cut, WrongScale, level_for

OVERVIEW_UM = 8.0
"""Microns per px of an overview: what hs2p and we look for tissue at. A slide is then some 9,000 x 3,000 px at most."""
MAX_OVERVIEW_PX = 2**27
BLOCK_PX = 2048
"""Side of what is read at once for an overview, in px of the level."""
LEAST_BLOCK_PX = 256
"""A damaged block is not divided further than this, the side of a stored tile."""
WHITE = (255, 255, 255)


def tile_pixels(slide: Slide, place: tuple[int, int], *, cut: Cut, white: tuple[int, int, int] = WHITE) -> np.ndarray:
    """One tile: uint8 (P, P, 3) from `place` (x, y), px of level 0. What lies outside the slide is `white`. Raises BadTile."""
    rgb = slide.read_rgb(place, level=cut.level, size=(cut.read_px, cut.read_px), white=white)
    return resized(rgb, (cut.tile_px, cut.tile_px))


def on_white(rgba: np.ndarray, white: tuple[int, int, int] = WHITE) -> np.ndarray:
    """Straight-alpha RGBA (H, W, 4) on an opaque ground: uint8 (H, W, 3)."""
    alpha = rgba[..., 3]
    lowest = alpha.min() if alpha.size else 255
    rgb: np.ndarray = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    if lowest == 255:
        return rgb
    share = alpha[..., None].astype(np.uint16)
    ground = np.array(white, np.uint16)
    return ((rgb * share + ground * (255 - share) + 127) // 255).astype(np.uint8)


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To `size` (width, height): each pixel the mean of the area it covers when shrinking, linear when enlarging."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    smaller = image.shape[1] >= size[0] and image.shape[0] >= size[1]
    result: np.ndarray = cv2.resize(image, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return result


@dataclass(frozen=True)
class Overview:
    """A whole slide, small."""

    rgb: np.ndarray
    """uint8 (H, W, 3), on white."""
    outside: np.ndarray
    """bool (H, W): where nothing was scanned."""
    unread: np.ndarray
    """bool (H, W): where no level of the slide could be read; white in `rgb`."""
    um_per_px: float
    """Nominal: the picture spans the slide exactly, so a side is off by less than half a px."""
    size: tuple[int, int]
    """(width, height) of the slide, px of level 0."""


def overview(slide: Slide, *, mpp: float, um_per_px: float = OVERVIEW_UM) -> Overview:
    """The whole slide at `um_per_px`, or as it is where it is coarser than that. Damage costs only the damaged part.

    Raises WrongScale if the slide would be larger than a slide can be: its `mpp` cannot be true.
    """
    info = slide.info
    um_per_px = max(um_per_px, mpp)
    width, height = (max(1, round(side * mpp / um_per_px)) for side in (info.width, info.height))
    if width * height > MAX_OVERVIEW_PX:
        raise WrongScale(
            f"at {mpp:.4g} microns per px the slide would be {info.width * mpp / 1000:.0f} x {info.height * mpp / 1000:.0f} mm, which no slide is; "
            f"state its true mpp"
        )
    level = level_for([level.downsample for level in info.levels], um_per_px / mpp) or 0
    outside, unread = np.zeros((2, height, width), bool)
    made = Overview(np.full((height, width, 3), 255, np.uint8), outside, unread, um_per_px, (info.width, info.height))
    step = max(1, int(BLOCK_PX * width / info.levels[level].width))
    for top in range(0, height, step):
        for left in range(0, width, step):
            _fill(made, slide, block=(left, top, min(left + step, width), min(top + step, height)), level=level)
    return made


def _fill(made: Overview, slide: Slide, *, block: tuple[int, int, int, int], level: int) -> None:
    """Draw one block (left, top, right, bottom) of the overview from `level`; where that is damaged, from smaller blocks, then finer levels."""
    left, top, right, bottom = block
    stored = slide.info.levels[level]
    x, y, x_end, y_end = _source(block, made, stored)
    try:
        place = (round(x * made.size[0] / stored.width), round(y * made.size[1] / stored.height))
        rgba = slide.read(place, level=level, size=(x_end - x, y_end - y))
    except BadTile:
        if max(x_end - x, y_end - y) > LEAST_BLOCK_PX and max(right - left, bottom - top) > 1:
            for part in _quarters(block):
                _fill(made, slide, block=part, level=level)
        elif level > 0:
            _fill(made, slide, block=block, level=level - 1)
        else:
            made.unread[top:bottom, left:right] = True
        return
    size = (right - left, bottom - top)
    made.rgb[top:bottom, left:right] = resized(on_white(rgba), size)
    made.outside[top:bottom, left:right] = resized(np.ascontiguousarray(rgba[..., 3]), size) < 128


def _source(block: tuple[int, int, int, int], made: Overview, stored: Level) -> tuple[int, int, int, int]:
    """The block in px of a level; at least one px."""
    height, width = made.unread.shape
    left, top, right, bottom = block
    x, y = left * stored.width // width, top * stored.height // height
    return x, y, max(x + 1, right * stored.width // width), max(y + 1, bottom * stored.height // height)


def _quarters(block: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    left, top, right, bottom = block
    x, y = (left + right) // 2, (top + bottom) // 2
    parts = [(left, top, x, y), (x, top, right, y), (left, y, x, bottom), (x, y, right, bottom)]
    return [part for part in parts if part[0] < part[2] and part[1] < part[3]]
