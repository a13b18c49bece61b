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
Key = tuple[int, int]
"""Level and number of a stored tile."""


class TiledJpeg:
    """A Slide over the stored tiles of `levels`."""

    def __init__(self, ranges: Ranges, levels: tuple[Stored, ...], info: SlideInfo) -> None:
        self.info = info
        self._ranges = ranges
        self._levels = levels
        self._before = [preamble(level) for level in levels]
        tile_bytes = max(level.tile_width * level.tile_height * 4 for level in levels)
        self._kept = _Kept(min(CACHE_BYTES // tile_bytes, sum(len(level.offsets) for level in levels)) or 1, tile_bytes)

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
                self._paste(level, (column, row), inside, (column * stored.tile_width - x0, row * stored.tile_height - y0))
        return region

    def _paste(self, level: int, place: tuple[int, int], region: np.ndarray, at: tuple[int, int]) -> None:
        """Copy the stored tile in column and row `place`, whose corner is at `at` of `region`; nothing if it was never scanned."""
        stored = self._levels[level]
        index = place[1] * stored.across + place[0]
        length = int(stored.lengths[index])
        shape = (stored.tile_height, stored.tile_width, 4)
        if length == 0 or self._kept.paste((level, index), shape, region, at):
            return
        where = f"tile {place[0]}, {place[1]} of level {level}"
        data = self._ranges.read(int(stored.offsets[index]), length)
        if len(data) < length:
            raise BadTile(f"{where}: the file ends before it; {len(data)} of {length} bytes are there")
        memory = self._kept.room()
        try:
            tile = _view(memory, shape)
            decode(data, self._before[level], into=tile, where=where)
            _copy(tile, region, at)
        except BaseException:
            self._kept.give_back(memory)
            raise
        self._kept.keep((level, index), memory)

    def close(self) -> None:
        """Give the file and the kept tiles back."""
        self._ranges.close()
        self._kept = _Kept(0, 0)


class _Kept:
    """The last decoded tiles, in memory that is used again and again: fresh memory costs a page fault every 4 KiB, half as
    much time as the decoding. Tiles are copied under the lock, so that none is overwritten meanwhile."""

    def __init__(self, num_tiles: int, tile_bytes: int) -> None:
        self._tile_bytes = tile_bytes
        self._tiles: OrderedDict[Key, np.ndarray] = OrderedDict()
        # One block, touched as it fills: numpy asks the system for huge pages.
        self._free: list[np.ndarray] = list(np.empty((num_tiles, tile_bytes), np.uint8)[::-1])
        self._lock = threading.Lock()

    def paste(self, key: Key, shape: tuple[int, ...], region: np.ndarray, at: tuple[int, int]) -> bool:
        """Whether the tile was here, and is copied."""
        with self._lock:
            memory = self._tiles.get(key)
            if memory is None:
                return False
            self._tiles.move_to_end(key)
            _copy(_view(memory, shape), region, at)
            return True

    def room(self) -> np.ndarray:
        """Memory for a tile, of the one that was used least recently if need be; to be given to `keep` or `give_back`."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._tiles:
                _, memory = self._tiles.popitem(last=False)
                return memory
        return np.empty(self._tile_bytes, np.uint8)  # more threads than tiles are kept

    def keep(self, key: Key, memory: np.ndarray) -> None:
        """The tile in `memory` is whole."""
        with self._lock:
            if key in self._tiles:  # another thread was faster
                self._free.append(memory)
            else:
                self._tiles[key] = memory

    def give_back(self, memory: np.ndarray) -> None:
        """No tile came of it."""
        with self._lock:
            self._free.append(memory)


def _view(memory: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return memory[: shape[0] * shape[1] * shape[2]].reshape(shape)


def _copy(tile: np.ndarray, region: np.ndarray, at: tuple[int, int]) -> None:
    """The part of `tile` that lies in `region`, whose own corner is at 0, 0."""
    x, y = at
    height, width = region.shape[:2]
    part = tile[max(0, -y) : height - y, max(0, -x) : width - x]
    region[max(0, y) : max(0, y) + part.shape[0], max(0, x) : max(0, x) + part.shape[1]] = part
