"""The reference reader: OpenSlide, for every format that it knows. A handle that has met an error is dead, and is replaced here."""

import os
import threading
from typing import Any

import numpy as np

from pipeline.config import ConfigError
from pipeline.slides import BadSlide, BadTile, SlideInfo
from pipeline.slides.cutting import on_white


def openslide() -> Any:
    """The module. Raises ConfigError with the command that installs it."""
    try:
        import openslide
    except ImportError as error:
        raise ConfigError(f'slides need a package that is not installed ({error}); pip install "tessera[slides]"') from error
    return openslide


def open_native(path: str) -> Any:
    """An OpenSlide handle, or None if OpenSlide knows no such format. Raises BadSlide `unreadable`, or `unsupported`."""
    module = openslide()
    try:
        return module.OpenSlide(path)
    except module.OpenSlideUnsupportedFormatError:
        return None
    except module.OpenSlideError as error:
        said = str(error)
        raise BadSlide("unsupported" if "nsupported" in said else "unreadable", f"OpenSlide: {said}") from error


class Native:
    """A Slide by OpenSlide. Threads share the handle."""

    def __init__(self, path: str, handle: Any, info: SlideInfo) -> None:
        self.info = info
        self._path = path
        self._handle = handle
        self._state = _state(path)
        self._lock = threading.Lock()

    def read(self, place: tuple[int, int], *, level: int, size: tuple[int, int]) -> np.ndarray:
        """As Slide.read. The region begins at the whole px of `level` that is nearest to `place`.

        Between whole px OpenSlide interpolates, which blurs; where a level's downsample is not whole, a little of that is left.
        """
        downsample = self.info.levels[level].downsample
        x, y = (round(np.floor(p / downsample + 0.5) * downsample) for p in place)
        handle = self._handle
        try:
            pixels = _read(handle, (x, y), level, size)
        except openslide().OpenSlideError:
            pixels = self._again((x, y), level, size)
        if _state(self._path) != self._state:
            raise BadTile("the file was changed while it was read; run again when it is complete")
        return pixels

    def read_rgb(self, place: tuple[int, int], *, level: int, size: tuple[int, int], white: tuple[int, int, int]) -> np.ndarray:
        """As Slide.read_rgb."""
        return on_white(self.read(place, level=level, size=size), white)

    def _again(self, place: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        """By a handle of its own: after an error a handle fails for every thread, also for those whose region is sound."""
        fresh = self._reopened()
        try:
            pixels = _read(fresh, place, level, size)
        except openslide().OpenSlideError as error:
            raise BadTile(f"{size[0]}x{size[1]} px at {place[0]}, {place[1]} of level {level}: {error}") from error
        finally:
            # Dead too if this was the region's fault; then the next read opens another. The old one is not closed, as other
            # threads may be in it; it goes when the last of them has left.
            with self._lock:
                self._handle = fresh
        return pixels

    def _reopened(self) -> Any:
        module = openslide()
        try:
            return module.OpenSlide(self._path)
        except (module.OpenSlideError, OSError) as error:
            raise BadTile(f"the slide can no longer be opened: {error}") from error

    def close(self) -> None:
        """Give the file back once no thread is in it."""
        self._handle = None


def _read(handle: Any, place: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(handle.read_region(place, level, size))


def _state(path: str) -> tuple[int, int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns
