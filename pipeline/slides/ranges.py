"""Bytes of one file by offset: of a local one, or of an object in a store, where each read is one request."""

import io
import os
from collections import OrderedDict
from typing import IO, Any, Protocol

from pipeline.slides import BadTile

BLOCK_BYTES = 2**16
BLOCKS = 64


class Ranges(Protocol):
    """A file that is read by offset, from several threads."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Fewer bytes than `length` at the file's end. Raises BadTile if the file has changed since it was opened."""
        ...

    def close(self) -> None: ...


class LocalFile:
    """A file on a disk."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size, self._changed = self._state()

    def read(self, offset: int, length: int) -> bytes:
        """As Ranges.read."""
        data = os.pread(self._file, length, offset)
        # Afterwards: a write before this moment, that these bytes may be of, is seen.
        if self._state() != (self.size, self._changed):
            raise BadTile("the file was changed while it was read; run again when it is complete")
        return data

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        """Give the file back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class StoredObject:
    """An object in a store, by fsspec."""

    def __init__(self, store: Any, path: str, *, size: int) -> None:
        self._store = store
        self._path = path
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """As Ranges.read: one request. A store that cannot be reached raises what fsspec raises."""
        end = min(offset + length, self.size)
        return bytes(self._store.cat_file(self._path, start=offset, end=end)) if end > offset else b""

    def close(self) -> None:
        """Nothing to give back: connections are the store's."""


class Window(io.RawIOBase):
    """Ranges as a file for a parser of headers: it reads in blocks and keeps a few, as headers are read in many small steps."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._place = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._ranges.size}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._bytes(self._place, min(len(view), max(0, self._ranges.size - self._place)))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _bytes(self, offset: int, length: int) -> bytes:
        if length > BLOCK_BYTES:  # an index of tiles: one request
            return self._ranges.read(offset, length)
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        joined = b"".join(self._block(number) for number in range(first, last + 1))
        start = offset - first * BLOCK_BYTES
        return joined[start : start + length]

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            self._blocks[number] = self._ranges.read(number * BLOCK_BYTES, BLOCK_BYTES)
            if len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


def window(ranges: Ranges) -> IO[bytes]:
    """Ranges as a file for tifffile."""
    return Window(ranges)  # type: ignore[return-value]
