"""Open slides, a few at a time in each process: how they are opened, and that each is the slide that was surveyed."""

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from pipeline.config import Model
from pipeline.readers import UnitChanged
from pipeline.slides import BadSlide, Slide
from pipeline.slides.cache import SlideCache
from pipeline.slides.opening import open_slide


class Cache(Model):
    """Where slides of an object store are copied to, if they cannot be read by ranges."""

    folder: str | None = None
    """On every machine that reads slides; none: a folder among its temporary files."""
    max_gb: pydantic.PositiveFloat = 50
    """So many gigabytes at most; what was used last stays."""

    def build(self, alive: Callable[[], None]) -> SlideCache:
        """The cache. `alive`: see SlideCache."""
        folder = Path(self.folder) if self.folder else Path(tempfile.gettempdir()) / "tessera-slides"
        return SlideCache(folder, max_bytes=int(self.max_gb * 1e9), alive=alive)


@dataclass
class _Held:
    slide: Slide | None = None
    users: int = 0


class Handles:
    """Slides by their rows in the slides table. Called from many threads; pickles without what is open.

    What nobody uses stays open until another slide is opened: it may hold room in the cache that this one waits for.
    """

    def __init__(self, cache: Cache, storage_options: dict[str, Any] | None) -> None:
        self._cache, self._storage_options = cache, storage_options
        self._lock = threading.Lock()
        self._held: dict[tuple[str, str], _Held] = {}
        self._opening = 0

    def __reduce__(self) -> tuple[type["Handles"], tuple[Cache, dict[str, Any] | None]]:
        return Handles, (self._cache, self._storage_options)

    @contextlib.contextmanager
    def hold(self, row: Mapping[str, Any], alive: Callable[[], None] = lambda: None) -> Iterator[Slide]:
        """The open slide of a SLIDE row. `alive` is called while it is copied. Raises UnitChanged if it is gone, or is not what was surveyed."""
        key = (row["id"], row["content_fp"])
        with self._lock:
            held = self._held.setdefault(key, _Held())
            held.users += 1
        try:
            yield held.slide or self._opened(held, row, alive)
        finally:
            with self._lock:
                held.users -= 1
            self._close_idle()

    def _opened(self, held: _Held, row: Mapping[str, Any], alive: Callable[[], None]) -> Slide:
        """Open a slide. Not under a lock, which others would wait for while it is copied: of two that open it one is closed again."""
        with self._lock:
            self._opening += 1
        try:
            self._close_idle()
            slide = self._open(row, alive)
        finally:
            with self._lock:
                self._opening -= 1
        with self._lock:
            if held.slide is None:
                held.slide = slide
        if held.slide is not slide:
            slide.close()
        return held.slide

    def _open(self, row: Mapping[str, Any], alive: Callable[[], None]) -> Slide:
        uri = row["id"]
        try:
            slide = open_slide(uri, storage_options=self._storage_options, cache=self._cache.build(alive))
        except BadSlide as bad:
            raise UnitChanged(f"{uri}: it could be opened when it was surveyed, and now it is {bad.reason} ({bad.detail}); run again") from bad
        found = (slide.info.content_fp, slide.info.reader)
        if found != (row["content_fp"], row["reader"]):
            slide.close()
            what = "its content" if found[0] != row["content_fp"] else f"its reader ({found[1]}, then {row['reader']})"
            raise UnitChanged(f"{uri}: {what} is another one than when it was surveyed; run again, the new one will be surveyed")
        return slide

    def _close_idle(self) -> None:
        """While a slide is being opened, close what no thread reads."""
        with self._lock:
            idle = [key for key, held in self._held.items() if held.users == 0] if self._opening else []
            doomed = [self._held.pop(key) for key in idle]
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
