"""The fast reader: stored JPEG tiles of a TIFF, found by offset and decoded one by one, with the last few kept.

The same pixels as OpenSlide's at about five times its speed per core (`python -m benchmarks.slide_reading`), and stricter: a tile
that is half gone is a BadTile and not a picture.
"""

import threading
from collections import OrderedDict
from math import floor

import numpy as np

from pipeline.slides import BadTile, SlideInfo
from pipeline.slides.jpeg import decode, preamble
from pipeline.slides.opencv import cv2
from pipeline.slides.ranges import Ranges
from pipeline.slides.tiff import Stored

CACHE_BYTES = 64 * 2**20
"""Decoded tiles kept per open slide: 341 of 256 px. Two rows of tiles suffice to decode each only once on a shifted grid."""
Key = tuple[int, int]
"""Level and number of a stored tile."""


class TiledJpeg:
    """A Slide over the stored tiles of `levels`."""

    def __init__(self, ranges: Ranges, levels: tuple[Stored, ...], info: SlideInfo) -> None:
        self.info = info
        self._ranges = ranges
        self._levels = levels
        self._before = [preamble(level) for level in levels]
        self._dense = [bool(level.lengths.all()) for level in levels]
        tile_bytes = max(level.tile_width * level.tile_height * 3 for level in levels)
        self._kept = _Kept(min(CACHE_BYTES // tile_bytes, sum(len(level.offsets) for level in levels)) or 1, tile_bytes)

    def read(self, place: tuple[int, int], *, level: int, size: tuple[int, int]) -> np.ndarray:
        """As Slide.read. The region begins at the whole px of `level` that is nearest to `place`: nothing is interpolated."""
        return self._filled(np.zeros((size[1], size[0], 4), np.uint8), place, level)

    def read_rgb(self, place: tuple[int, int], *, level: int, size: tuple[int, int], white: tuple[int, int, int]) -> np.ndarray:
        """As Slide.read_rgb."""
        region = np.empty((size[1], size[0], 3), np.uint8)
        if not self._covers(place, level, size):
            region[:] = white
        return self._filled(region, place, level)

    def _covers(self, place: tuple[int, int], level: int, size: tuple[int, int]) -> bool:
        """Whether the slide has every px of a region."""
        stored, downsample = self._levels[level], self.info.levels[level].downsample
        ends = (place[0] / downsample + size[0] + 1, place[1] / downsample + size[1] + 1)
        return self._dense[level] and min(place) >= 0 and ends[0] <= stored.width and ends[1] <= stored.height

    def _filled(self, region: np.ndarray, place: tuple[int, int], level: int) -> np.ndarray:
        """`region`, RGBA or RGB, with what is stored of it."""
        stored, downsample = self._levels[level], self.info.levels[level].downsample
        left, top = floor(place[0] / downsample + 0.5), floor(place[1] / downsample + 0.5)
        height, width = region.shape[:2]
        if left >= stored.width or top >= stored.height:
            return region
        first_column, last_column = max(left, 0) // stored.tile_width, (min(left + width, stored.width) - 1) // stored.tile_width
        first_row, last_row = max(top, 0) // stored.tile_height, (min(top + height, stored.height) - 1) // stored.tile_height
        for row in range(first_row, last_row + 1):
            for column in range(first_column, last_column + 1):
                self._paste(level, column, row, region=region, left=left, top=top)
        return region

    def _paste(self, level: int, column: int, row: int, *, region: np.ndarray, left: int, top: int) -> None:
        """Copy what a stored tile has of `region`, whose corner is at `left`, `top`; nothing if the tile was never scanned."""
        stored = self._levels[level]
        index = row * stored.across + column
        length = int(stored.lengths[index])
        if length == 0:
            return
        x, y = column * stored.tile_width, row * stored.tile_height
        right, bottom = min(x + stored.tile_width, stored.width), min(y + stored.tile_height, stored.height)
        x0, x1, y0, y1 = max(x, left), min(right, left + region.shape[1]), max(y, top), min(bottom, top + region.shape[0])
        target = region[y0 - top : y1 - top, x0 - left : x1 - left]
        part = (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
        if self._kept.copy((level, index), part, target):
            return
        where = f"tile {column}, {row} of level {level}"
        offset = int(stored.offsets[index])
        if offset < 0 or offset + length > self._ranges.size:
            raise BadTile(f"{where}: the file ends before it; it has {self._ranges.size} bytes, and the tile is at {offset} to {offset + length}")
        memory = self._kept.room()
        tile = memory[: stored.tile_height * stored.tile_width * 3].reshape(stored.tile_height, stored.tile_width, 3)
        try:
            self._decode((offset, length), self._before[level], into=tile, where=where)
            _put(tile[part], target)
        except BaseException:
            self._kept.give_back(memory)
            raise
        self._kept.keep((level, index), memory, tile)

    def _decode(self, place: tuple[int, int], before: bytes, *, into: np.ndarray, where: str) -> None:
        """Decode what is stored at `place` (offset, length), after another reading if it comes damaged: that may pass, and damage is written down."""
        data = self._ranges.read(*place)
        try:
            decode(data, before, into=into, where=where)
        except BadTile:
            again = self._ranges.read(*place)
            if again == data:
                raise
            decode(again, before, into=into, where=where)

    def close(self) -> None:
        """Give the file and the kept tiles back."""
        self._ranges.close()
        self._kept = _Kept(0, 0)


class _Kept:
    """The last decoded tiles, in memory that is used again and again: fresh memory costs a page fault every 4 KiB, half as
    much time as the decoding. Tiles are copied under the lock, so that none is overwritten meanwhile."""

    def __init__(self, num_tiles: int, tile_bytes: int) -> None:
        self._tile_bytes = tile_bytes
        self._tiles: OrderedDict[Key, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        # One block, touched as it fills: numpy asks the system for huge pages.
        self._free: list[np.ndarray] = list(np.empty((num_tiles, tile_bytes), np.uint8)[::-1])
        self._lock = threading.Lock()

    def copy(self, key: Key, part: tuple[slice, slice], target: np.ndarray) -> bool:
        """Whether the tile was here, and `part` of it is copied."""
        with self._lock:
            found = self._tiles.get(key)
            if found is None:
                return False
            self._tiles.move_to_end(key)
            _put(found[1][part], target)
            return True

    def room(self) -> np.ndarray:
        """Memory for a tile, of the one that was used least recently if need be; to be given to `keep` or `give_back`."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._tiles:
                _, (memory, _) = self._tiles.popitem(last=False)
                return memory
        return np.empty(self._tile_bytes, np.uint8)  # more threads than tiles are kept

    def keep(self, key: Key, memory: np.ndarray, tile: np.ndarray) -> None:
        """The `tile` in `memory` is whole."""
        with self._lock:
            if key in self._tiles:  # another thread was faster
                self._free.append(memory)
            else:
                self._tiles[key] = memory, tile

    def give_back(self, memory: np.ndarray) -> None:
        """No tile came of it."""
        with self._lock:
            self._free.append(memory)


def _put(part: np.ndarray, target: np.ndarray) -> None:
    """RGB into RGB, or into opaque RGBA."""
    if target.shape[2] == 3:
        target[:] = part
    else:
        cv2.cvtColor(part, cv2.COLOR_RGB2RGBA, dst=target)
