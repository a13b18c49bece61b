"""The layout of a tiled TIFF: where each stored tile of each level lies in the file. Nothing is decoded."""

import hashlib
import logging
import struct
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from pipeline.slides import Level

JPEG = 7
RGB, YCBCR = 2, 6
ICC_TAG = 34675
SAME_SHAPE = 0.02
"""How far the aspect ratio of a level may be from level 0's. Label and macro pictures are further off."""
MAX_TILE_PX = 2**26
TAIL_BYTES = 2**20
"""Stored bytes of the smallest level that the fingerprint reads."""


@dataclass(frozen=True, eq=False)
class Stored:
    """One level as it lies in the file: tiles row by row, of `tile_width` x `tile_height` px; the last of a row or column is padded."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: np.ndarray
    """int64 (number of tiles,)."""
    lengths: np.ndarray
    """int64 (number of tiles,), bytes. 0: the tile was never scanned."""
    compression: int
    photometric: int
    tables: bytes | None
    """JPEG tables that all tiles share."""
    plain: bool
    """8 bits, three samples, interleaved."""

    @property
    def sound(self) -> bool:
        """Whether its numbers can be a level's at all."""
        sides = (self.width, self.height, self.tile_width, self.tile_height)
        return (
            all(0 < side < 2**31 for side in sides) and self.tile_width * self.tile_height <= MAX_TILE_PX and len(self.offsets) == len(self.lengths)
        )

    @property
    def across(self) -> int:
        """Tiles in a row."""
        return -(-self.width // self.tile_width)


@dataclass(frozen=True)
class Layout:
    """A TIFF slide. `levels` is empty if level 0 is not stored in tiles."""

    kind: str
    """aperio, ome, ndpi, philips, other (a vendor's own arrangement), generic."""
    levels: tuple[Stored, ...]
    description: str
    resolution: tuple[float, float, int] | None
    """Pixels per unit in x and y, and the unit: 2 inch, 3 centimetre."""
    compression: str
    icc: bool
    fingerprint: str


def read_layout(file: str | IO[bytes], *, size: int) -> Layout | None:
    """The layout of a TIFF of `size` bytes, by path or open file; None if it is none, or its directories are damaged beyond use."""
    import tifffile

    # It logs as an error what is answered here: where a cut file ends.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        with tifffile.TiffFile(file) as tiff:
            return _layout(tiff, size)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, struct.error):
        # What a parser meets in a file that is cut, or in bytes that only begin like a TIFF; a disk or a store that fails raises OSError.
        return None


def _layout(tiff: Any, size: int) -> Layout | None:
    first = tiff.pages[0]
    kind = _kind(tiff, first)
    pages = [first, *_smaller(tiff, first, kind)] if first.is_tiled else []
    levels = tuple(_stored(page) for page in pages)
    if levels and not levels[0].sound:
        return None
    return Layout(
        kind=kind,
        levels=levels,
        description=first.description,
        resolution=_resolution(first),
        compression=str(getattr(first.compression, "name", first.compression)),
        icc=ICC_TAG in first.tags,
        fingerprint=_fingerprint(tiff, first, pages, size),
    )


def _kind(tiff: Any, first: Any) -> str:
    if first.description.startswith("Aperio"):
        return "aperio"
    if tiff.is_ome:
        return "ome"
    if tiff.is_ndpi:
        return "ndpi"
    if tiff.is_philips:
        return "philips"
    # Vendors whose tiles overlap or belong to several scans.
    own = first.is_scn or first.is_bif or first.is_qpi or first.software.startswith(("Trestle", "MedScan")) or b"iScan" in _xmp(first)
    return "other" if own else "generic"


def _xmp(page: Any) -> bytes:
    tag = page.tags.get(700)
    return bytes(tag.value) if tag is not None and isinstance(tag.value, bytes) else b""


def _smaller(tiff: Any, first: Any, kind: str) -> list[Any]:
    """Pages of the smaller levels, largest first."""
    others = list(first.pages or []) if kind == "ome" else []
    if not others:
        others = list(_readable(tiff))
    shape = first.imagewidth / first.imagelength
    levels = [page for page in others if page.is_tiled and page.imagewidth < first.imagewidth and _alike(page, shape)]
    return sorted(levels, key=lambda page: -page.imagewidth)


def _readable(tiff: Any) -> Any:
    """The pages after the first, up to where a cut file ends."""
    index = 1
    while True:
        try:
            page = tiff.pages[index].aspage()
            sound = page.imagewidth > 0 and page.imagelength > 0 and (not page.is_tiled or _stored(page).sound)
        except Exception:
            return
        if sound:
            yield page
        index += 1


def _alike(page: Any, shape: float) -> bool:
    # A px more or less is much for a level of few px.
    slack = SAME_SHAPE + 1 / page.imagelength + 1 / page.imagewidth
    return bool(abs(page.imagewidth / page.imagelength / shape - 1) <= slack)


def _stored(page: Any) -> Stored:
    return Stored(
        width=page.imagewidth,
        height=page.imagelength,
        tile_width=page.tilewidth,
        tile_height=page.tilelength,
        offsets=np.array(page.dataoffsets, np.int64),
        lengths=np.array(page.databytecounts, np.int64),
        compression=int(page.compression),
        photometric=int(page.photometric),
        tables=page.jpegtables,
        plain=page.bitspersample == 8
        and page.samplesperpixel == 3
        and int(page.planarconfig or 1) == 1
        and (page.imagedepth, page.tiledepth) == (1, 1),
    )


def _resolution(page: Any) -> tuple[float, float, int] | None:
    try:
        (x, x_of), (y, y_of) = page.tags[282].value, page.tags[283].value
        return x / x_of, y / y_of, int(page.tags[296].value) if 296 in page.tags else 2
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _fingerprint(tiff: Any, first: Any, pages: list[Any], size: int) -> str:
    digest = hashlib.sha256(f"{size} {first.imagewidth} {first.imagelength} {_resolution(first)} {first.description}".encode())
    for page in pages or [first]:
        digest.update(np.array(page.dataoffsets, "<i8").tobytes() + np.array(page.databytecounts, "<i8").tobytes())
    left = TAIL_BYTES
    smallest = (pages or [first])[-1]
    for offset, length in zip(smallest.dataoffsets, smallest.databytecounts, strict=True):
        taken = min(length, left)
        if taken <= 0:
            break
        tiff.filehandle.seek(offset)
        digest.update(tiff.filehandle.read(taken))
        left -= taken
    return digest.hexdigest()


def as_levels(levels: tuple[Stored, ...]) -> tuple[Level, ...]:
    """Their sizes and downsamples."""
    width, height = levels[0].width, levels[0].height
    return tuple(Level(level.width, level.height, (width / level.width + height / level.height) / 2) for level in levels)


def fits(levels: tuple[Stored, ...]) -> str | None:
    """Why stored tiles cannot be decoded one by one with libjpeg-turbo, or None if they can."""
    if not levels:
        return "level 0 is not stored in tiles"
    for number, level in enumerate(levels):
        if level.compression != JPEG:
            return f"level {number} is stored with TIFF compression {level.compression}, not JPEG"
        if not level.plain or level.photometric not in (RGB, YCBCR):
            return f"level {number} is not 8-bit RGB"
        if len(level.offsets) != level.across * -(-level.height // level.tile_height) or len(level.lengths) != len(level.offsets):
            return f"level {number} lists {len(level.offsets)} tiles, which is not what its size needs"
        if number > 0 and not level.lengths.all():
            return f"level {number} has tiles that were never stored"
    return None
