"""The fast reader: stored JPEG tiles of a TIFF, found by offset and decoded one by one, with the last few kept.

The same pixels as OpenSlide's at about five times its speed per core (`python -m benchmarks.slide_reading`), and stricter: a tile
that is half gone is a BadTile and not a picture.
"""

import threading
from collections import OrderedDict

import numpy as np

from pipeline.slides import BadTile, SlideInfo
from pipeline.slides.jpeg import decode, preamble
from pipeline.slides.ranges import Ranges
from pipeline.slides.tiff import Stored

CACHE_BYTES = 64 * 2**20
"""Decoded tiles kept per open slide: 256 of 256 px. Two rows of tiles suffice to decode each only once on a shifted grid."""


class TiledJpeg:
    """A Slide over the stored tiles of `levels`."""

    def __init__(self, ranges: Ranges, levels: tuple[Stored, ...], info: SlideInfo) -> None:
        self.info = info
        self._ranges = ranges
        self._levels = levels
        self._before = [preamble(level) for level in levels]
        self._tiles: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._held = 0

    def read(self, place: tuple[int, int], *, level: int, size: tuple[int, int]) -> np.ndarray:
        """As Slide.read. The region begins at the whole px of `level` that is nearest to `place`: nothing is interpolated."""
        stored, downsample = self._levels[level], self.info.levels[level].downsample
        left, top = (int(np.floor(p / downsample + 0.5)) for p in place)
        width, height = size
        region = np.zeros((height, width, 4), np.uint8)
        x0, x1 = max(left, 0), min(left + width, stored.width)
        y0, y1 = max(top, 0), min(top + height, stored.height)
        if x0 >= x1 or y0 >= y1:
            return region
        inside = region[y0 - top : y1 - top, x0 - left : x1 - left]
        for row in range(y0 // stored.tile_height, (y1 - 1) // stored.tile_height + 1):
            for column in range(x0 // stored.tile_width, (x1 - 1) // stored.tile_width + 1):
                tile = self._tile(level, column, row)
                if tile is not None:
                    _paste(tile, inside, (column * stored.tile_width - x0, row * stored.tile_height - y0))
        return region

    def _tile(self, level: int, column: int, row: int) -> np.ndarray | None:
        """The pixels of one stored tile, from the last few or the file; None if it was never scanned."""
        stored = self._levels[level]
        index = row * stored.across + column
        with self._lock:
            tile = self._tiles.get((level, index))
            if tile is not None:
                self._tiles.move_to_end((level, index))
                return tile
        length = int(stored.lengths[index])
        if length == 0:
            return None
        where = f"tile {column}, {row} of level {level}"
        data = self._ranges.read(int(stored.offsets[index]), length)
        if len(data) < length:
            raise BadTile(f"{where}: the file ends before it; {len(data)} of {length} bytes are there")
        tile = decode(data, self._before[level], width=stored.tile_width, height=stored.tile_height, where=where)
        self._keep((level, index), tile)
        return tile

    def _keep(self, key: tuple[int, int], tile: np.ndarray) -> None:
        with self._lock:
            if key in self._tiles:  # another thread was faster
                return
            self._tiles[key] = tile
            self._held += tile.nbytes
            while self._held > CACHE_BYTES and len(self._tiles) > 1:
                self._held -= self._tiles.popitem(last=False)[1].nbytes

    def close(self) -> None:
        """Give the file and the kept tiles back."""
        self._ranges.close()
        with self._lock:
            self._tiles.clear()
            self._held = 0


def _paste(tile: np.ndarray, region: np.ndarray, at: tuple[int, int]) -> None:
    """The part of `tile` that lies in `region`, whose own corner is at 0, 0."""
    x, y = at
    height, width = region.shape[:2]
    part = tile[max(0, -y) : height - y, max(0, -x) : width - x]
    region[max(0, y) : max(0, y) + part.shape[0], max(0, x) : max(0, x) + part.shape[1]] = part
