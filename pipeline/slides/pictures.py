"""A picture of one slide, from its row alone: the thumbnail with outlines of tissue, holes, ink and tiles, and a scale bar.

Tiles that are kept stand in full colour, all else is faded; tiles with some tissue that were left out are marked.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.slides.cutting import OVERVIEW_UM, resized
from pipeline.slides.opencv import cv2
from pipeline.slides.tiling import cut_of, grid_name, mask_of
from pipeline.slides.tissue import pen
from pipeline.tiles import Grid, WrongScale, kept, lay

Colour = tuple[int, int, int]
TISSUE: Colour = (0, 122, 92)
HOLE: Colour = (34, 98, 196)
INK: Colour = (205, 0, 150)
LEFT_OUT: Colour = (214, 112, 0)
TEXT, PAPER = (40, 42, 46), (255, 255, 255)
FADE = 0.5
LEAST_TILE_PX = 10
"""Tiles smaller than this on the picture get no borders: they would hide what they are about."""
LEGEND_PX, LEAST_WIDTH, MARGIN = 58, 640, 14
QUALITY = 88


@dataclass(frozen=True)
class _Cells:
    """Which tile each px of the picture lies in. `left_out`: has tissue, and is not kept."""

    kept: np.ndarray
    left_out: np.ndarray
    borders: np.ndarray
    num_kept: int
    num_left_out: int


def picture(slide: Mapping[str, Any], grids: Sequence[Grid], *, px: int = 1024) -> bytes | None:
    """A JPEG whose slide has a longer side of `px`; None if nothing of the slide could be seen.

    `slide`: its row, `schemas.slides.SLIDE`. The tiles drawn are those of the first grid that fits the slide.
    """
    data: bytes | None = slide["thumbnail"]
    if data is None or slide["mpp"] is None:
        return data
    seen = _thumbnail(data, px)
    scale = seen.shape[1] / slide["width"]
    ink = _ink(seen, slide["mpp"] / scale)
    image = seen.copy()
    said = [f"{slide['tissue_mm2']:.2f} mm2 tissue"] if slide["tissue_mm2"] is not None else []
    if slide["mask"] is not None:
        for grid in grids:
            cells = _cells(slide, grid, seen.shape[:2])
            if cells is not None:
                image = _with_tiles(image, cells)
                said.append(f"{grid_name(grid)}: {cells.num_kept:,} tiles kept, {cells.num_left_out:,} with too little tissue left out")
                break
    image[ink] = (0.4 * image[ink] + 0.6 * np.array(INK)).astype(np.uint8)
    _outlines(image, slide["contour"], scale, thickness=2 if slide["mpp"] / scale < 8 else 1)
    return _with_legend(image, said, um_per_px=slide["mpp"] / scale, ink=bool(ink.any()))


def _thumbnail(data: bytes, px: int) -> np.ndarray:
    """The stored thumbnail, its longer side `px`: RGB."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    factor = px / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return np.array(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))


def _ink(seen: np.ndarray, um_per_px: float) -> np.ndarray:
    """Ink, looked for no finer than in a survey: it would find other things there."""
    factor = min(1.0, um_per_px / OVERVIEW_UM)
    height, width = seen.shape[:2]
    small = resized(seen, (max(1, round(width * factor)), max(1, round(height * factor))))
    ink = pen(small, um_per_px=um_per_px / factor).astype(np.uint8)
    whole: np.ndarray = cv2.resize(ink, (width, height), interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)
    return whole


def _cells(slide: Mapping[str, Any], grid: Grid, shape: tuple[int, ...]) -> _Cells | None:
    """The tiles of a grid on a picture of `shape` (height, width); None if the slide is too coarse for the grid."""
    try:
        cut = cut_of(slide, grid)
    except WrongScale:
        return None
    size, bounds = (slide["width"], slide["height"]), tuple(slide["bounds"]) if slide["bounds"] else None
    tiles = lay(cut, size=size, mask=mask_of(slide), bounds=bounds)  # type: ignore[arg-type]
    wanted = kept(grid, tiles)
    partly = ~wanted & (tiles.tissue_fraction > 0)
    rows, cols = int(tiles.row[-1]) + 1, int(tiles.col[-1]) + 1
    height, width = shape
    # A px lies in the last tile that begins before it; -1, before the first, is the row and column of zeros added at the end.
    row = np.searchsorted(tiles.y[::cols], (np.arange(height) + 0.5) * size[1] / height, side="right") - 1
    col = np.searchsorted(tiles.x[:cols], (np.arange(width) + 0.5) * size[0] / width, side="right") - 1
    of_px = np.ix_(row, col)
    whole, part = (np.pad(values.reshape(rows, cols), ((0, 1), (0, 1)))[of_px] for values in (wanted, partly))
    borders = np.zeros(shape, bool)
    if cut.footprint_l0 * width / size[0] >= LEAST_TILE_PX:
        borders[np.diff(row, prepend=row[0]) != 0] = True
        borders[:, np.diff(col, prepend=col[0]) != 0] = True
    return _Cells(whole, part, borders, int(wanted.sum()), int(partly.sum()))


def _with_tiles(image: np.ndarray, cells: _Cells) -> np.ndarray:
    """The picture with all but the kept tiles faded, and borders of the tiles that hold tissue."""
    strength = np.where(cells.kept, 1.0, FADE)[..., None]
    faded = image * strength + 255 * (1 - strength)
    if not cells.borders.any():
        faded[cells.left_out] = 0.65 * faded[cells.left_out] + 0.35 * np.array(LEFT_OUT)
    for area, colour, share in ((cells.kept, TISSUE, 0.45), (cells.left_out, LEFT_OUT, 0.8)):
        around: np.ndarray = cv2.dilate(area.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & cells.borders
        faded[around] = (1 - share) * faded[around] + share * np.array(colour)
    drawn: np.ndarray = faded.astype(np.uint8)
    return drawn


def _outlines(image: np.ndarray, contour: str | None, scale: float, *, thickness: int) -> None:
    """Draw the outlines of a slide's row onto the picture."""
    for feature in json.loads(contour)["features"] if contour else []:
        for index, ring in enumerate(feature["geometry"]["coordinates"]):
            # Sixteenths of a px, which OpenCV calls a shift of 4; px are drawn around their middle.
            points = np.rint((np.array(ring) * scale - 0.5) * 16).astype(np.int32)
            cv2.polylines(image, [points], True, HOLE if index else TISSUE, 1 if index else thickness, cv2.LINE_AA, 4)


def _with_legend(image: np.ndarray, said: Sequence[str], *, um_per_px: float, ink: bool) -> bytes:
    """The picture over a line of counts, a line that explains the colours, and the scale bar: JPEG."""
    height, width = image.shape[:2]
    sheet = Image.new("RGB", (max(width, LEAST_WIDTH), height + LEGEND_PX), PAPER)
    sheet.paste(Image.fromarray(image), ((sheet.width - width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    draw.text((MARGIN, height + 8), "   ".join(said), TEXT, font=font)
    left: float = MARGIN
    keys = [("tissue, kept tiles", TISSUE), ("hole", HOLE), ("left out", LEFT_OUT), *([("ink", INK)] if ink else [])]
    for name, colour in keys:
        draw.rectangle((left, height + 35, left + 10, height + 45), fill=colour)
        draw.text((left + 15, height + 32), name, TEXT, font=font)
        left += 15 + draw.textlength(name, font=font) + 16
    _scale_bar(draw, (sheet.width - MARGIN, height + 40), width, um_per_px)
    target = io.BytesIO()
    sheet.save(target, "JPEG", quality=QUALITY, subsampling=0)  # subsampled colour washes thin lines out
    return target.getvalue()


def _scale_bar(draw: ImageDraw.ImageDraw, right: tuple[int, int], width: int, um_per_px: float) -> None:
    """A round length, at most a fifth of the picture, ending at `right`."""
    most = width * um_per_px / 5
    um = max((digit * 10.0**power for power in range(7) for digit in (1, 2, 5) if digit * 10.0**power <= most), default=1.0)
    x, y = right
    start = x - um / um_per_px
    draw.line((start, y, x, y), TEXT, 3)
    for end in (start, x):
        draw.line((end, y - 5, end, y + 5), TEXT, 1)
    font = ImageFont.load_default(13)
    name = f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} um"
    draw.text((start - 8, y), name, TEXT, font=font, anchor="rm")
