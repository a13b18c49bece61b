"""Open slides, a few at a time in each process: how they are opened, and that each is the slide that was surveyed."""

import contextlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from pipeline.config import Model
from pipeline.readers import UnitChanged
from pipeline.slides import BadSlide, Slide
from pipeline.slides.cache import SlideCache
from pipeline.slides.opening import open_slide

OPEN_AT_ONCE = 4
"""Slides that a process holds open: the two that its chunks are of, and some that may come again."""


class Cache(Model):
    """Where slides of an object store are copied to, if they cannot be read by ranges."""

    folder: str | None = None
    """On every machine that reads slides; none: a folder among its temporary files."""
    max_gb: pydantic.PositiveFloat = 50
    """So many gigabytes at most; what was used last stays."""

    def build(self) -> SlideCache:
        """The cache."""
        folder = Path(self.folder) if self.folder else Path(tempfile.gettempdir()) / "tessera-slides"
        return SlideCache(folder, max_bytes=int(self.max_gb * 1e9))


@dataclass
class _Held:
    lock: threading.Lock = field(default_factory=threading.Lock)
    slide: Slide | None = None
    users: int = 0


class Handles:
    """Slides by their rows in the slides table. Called from many threads; pickles without what is open."""

    def __init__(self, cache: Cache, storage_options: dict[str, Any] | None) -> None:
        self._cache, self._storage_options = cache, storage_options
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, str], _Held] = OrderedDict()

    def __reduce__(self) -> tuple[type["Handles"], tuple[Cache, dict[str, Any] | None]]:
        return Handles, (self._cache, self._storage_options)

    @contextlib.contextmanager
    def hold(self, row: Mapping[str, Any]) -> Iterator[Slide]:
        """The open slide of a SLIDE row. Raises UnitChanged if it is gone, or is not what was surveyed."""
        key = (row["id"], row["content_fp"])
        with self._lock:
            held = self._held.setdefault(key, _Held())
            self._held.move_to_end(key)
            held.users += 1
        try:
            with held.lock:  # whoever comes second waits until it is open
                if held.slide is None:
                    held.slide = self._open(row)
            yield held.slide
        finally:
            with self._lock:
                held.users -= 1
            self._close_some()

    def _open(self, row: Mapping[str, Any]) -> Slide:
        uri = row["id"]
        try:
            slide = open_slide(uri, storage_options=self._storage_options, cache=self._cache.build())
        except BadSlide as bad:
            raise UnitChanged(f"{uri}: it could be opened when it was surveyed, and now it is {bad.reason} ({bad.detail}); run again") from bad
        found = (slide.info.content_fp, slide.info.reader)
        if found != (row["content_fp"], row["reader"]):
            slide.close()
            what = "its content" if found[0] != row["content_fp"] else f"its reader ({found[1]}, then {row['reader']})"
            raise UnitChanged(f"{uri}: {what} is another one than when it was surveyed; run again, the new one will be surveyed")
        return slide

    def _close_some(self) -> None:
        """Close what was not used for longest. Never what a thread is reading."""
        with self._lock:
            idle = [key for key, held in self._held.items() if held.users == 0]
            doomed = [self._held.pop(key) for key in idle[: max(0, len(self._held) - OPEN_AT_ONCE)]]
        for held in doomed:
            if held.slide is not None:
                held.slide.close()

    def forget(self, uri: str) -> None:
        """Close a slide that is not what it was; a thread that is still reading it keeps it."""
        with self._lock:
            doomed = [self._held.pop(key) for key, held in list(self._held.items()) if key[0] == uri and held.users == 0]
        for held in doomed:
            if held.slide is not None:
                held.slide.close()
