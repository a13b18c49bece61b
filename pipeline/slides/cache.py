"""Slides of an object store on a local disk: a folder of bounded size that processes share, the least recently used out first.

Each slide has a folder and a lock file. Who reads a slide holds its lock shared; who copies or removes one holds it alone, so a
slide in use is never removed, and two processes that want the same one copy it once. The locks end with their process: what a
killed copy leaves behind is removed by the next who holds its lock.

A copy may take hours, so nobody's patience is measured here: `alive` is called whenever one has got on, also by who waits for it.
"""

import contextlib
import fcntl
import hashlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.slides import BadSlide
from pipeline.stores import filesystem

WAIT_S = 3600.0
"""Longest wait for room while all that is cached is in use."""
POLL_S = 0.2
ALONE = "copying.lock"
"""Held while room is made, so that two processes do not count the same room."""


class Entry:
    """A cached slide, safe from removal until `release`. `path`: of the file to open."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def release(self) -> None:
        """Give the slide free for removal."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class SlideCache:
    """At most `max_bytes` of slides in `folder`, which is made if need be."""

    def __init__(self, folder: Path | str, *, max_bytes: int, alive: Callable[[], None] = lambda: None) -> None:
        """`alive` is called, from any thread, while a wait is no hang: bytes of a slide arrive, or others use all the room."""
        self.folder = Path(folder).absolute()
        self.max_bytes = max_bytes
        self._alive = alive

    def hold(self, uri: str, storage_options: dict[str, Any]) -> Entry:
        """The slide at `uri` with all files that belong to it, copied if it is not here in this version.

        Raises BadSlide: `missing`, `unsupported` (a folder without DICOM), `too_large` for the cache.
        """
        store, path = filesystem(uri, storage_options)
        files = _files(store, path, uri)
        key = hashlib.sha256(repr([uri, [(name, size, version) for name, size, version in files]]).encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            lock = self._shared(key)
            whole = self.folder / key
            if whole.exists():
                os.utime(self._lock_file(key))
                return Entry(whole / files[0][0], lock)
            os.close(lock)
            with self._exclusive(key) as mine:
                if mine and not whole.exists():
                    self._copy(key, store, path, files, uri)
            if not mine:  # another one looks, copies or reads by now: look again, not at the same moment as it does
                time.sleep(random.uniform(0, POLL_S))

    def _copy(self, key: str, store: Any, path: str, files: list[tuple[str, int, str]], uri: str) -> None:
        whole, part = self.folder / key, self.folder / f"{key}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            self._make_room(key, part, sum(size for _, size, _ in files), uri)
            above = path.rpartition("/")[0]
            with self._told(key, part):
                for name, size, _ in files:
                    target = part / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    store.get_file(f"{above}/{name}", str(target))
                    if target.stat().st_size != size:
                        raise BadSlide("missing", f"{uri}: {name} changed while it was copied; run again when it is complete")
            part.rename(whole)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _make_room(self, key: str, part: Path, size: int, uri: str) -> None:
        """Remove slides that nobody reads until `size` fits, and take that room by `part`/.size."""
        if size > self.max_bytes:
            raise BadSlide("too_large", f"{uri} has {size} bytes; the cache {self.folder} holds {self.max_bytes}; raise its bound")
        until = time.monotonic() + WAIT_S
        while True:
            self._got_on(key)
            with self._alone():
                if self._remove_until(self.max_bytes - size):
                    part.mkdir()
                    (part / ".size").write_text(str(size))
                    return
            if time.monotonic() > until:
                raise BadSlide("too_large", f"{uri}: for {WAIT_S:.0f} s the cache {self.folder} was full of slides in use; raise its bound")
            time.sleep(POLL_S)

    def _remove_until(self, bound: int) -> bool:
        """Whether what is cached fits `bound` after removing what nobody uses, longest unused first."""
        held = {lock: _bytes(lock.with_suffix("")) + _bytes(lock.with_suffix(".part")) for lock in self.folder.glob("*.lock") if lock.name != ALONE}
        total = sum(held.values())
        for lock in sorted(held, key=lambda lock: lock.stat().st_mtime_ns):
            if total <= bound:
                break
            if held[lock] and self._removed(lock.stem):
                total -= held[lock]
        return total <= bound

    def _removed(self, key: str) -> bool:
        with self._exclusive(key) as mine:
            if mine:
                whole, part = self.folder / key, self.folder / f"{key}.part"
                shutil.rmtree(part, ignore_errors=True)
                if whole.exists():
                    whole.rename(part)  # a process that is killed while it removes must not leave half a slide under a whole one's name
                    shutil.rmtree(part, ignore_errors=True)
            return mine

    def _lock_file(self, key: str) -> Path:
        return self.folder / f"{key}.lock"

    def _open_lock(self, key: str) -> int:
        # Lock files stay: removing one while another process waits for it would split the lock in two.
        return os.open(self._lock_file(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _shared(self, key: str) -> int:
        """The slide's lock, held with others. Waits while somebody copies or removes it."""
        file = self._open_lock(key)
        moved = None
        try:
            while not _flock(file, fcntl.LOCK_SH):
                before, moved = moved, os.fstat(file).st_mtime_ns
                if moved != before:
                    self._alive()
                time.sleep(POLL_S)
        except BaseException:
            os.close(file)
            raise
        return file

    @contextlib.contextmanager
    def _exclusive(self, key: str) -> Iterator[bool]:
        """Hold the slide's lock alone; gives False if others hold it. Never waits: who has copied a slide reads it, maybe for hours."""
        file = self._open_lock(key)
        try:
            yield _flock(file, fcntl.LOCK_EX)
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _told(self, key: str, part: Path) -> Iterator[None]:
        """Say so as `part` grows. By its size, as not every store tells how far a copy is."""
        done = threading.Event()

        def watch() -> None:
            size = 0
            while not done.wait(POLL_S):
                before, size = size, _there(part)
                if size != before:
                    self._got_on(key)

        watcher = threading.Thread(target=watch, name="copy-watch", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _got_on(self, key: str) -> None:
        """Say so here, and by the lock file's time to who waits for the lock."""
        os.utime(self._lock_file(key))
        self._alive()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        file = os.open(self.folder / ALONE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _flock(file: int, how: int) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bytes(folder: Path) -> int:
    """What a slide takes, or has announced that it will take; of one that is half removed, what is left."""
    try:
        return int((folder / ".size").read_text())
    except (OSError, ValueError):
        return _there(folder)


def _there(folder: Path) -> int:
    """Bytes of a folder's files; 0 if it is gone, or goes this moment."""
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return 0


def _files(store: Any, path: str, uri: str) -> list[tuple[str, int, str]]:
    """Name below the slide's folder, bytes and version of each file that belongs to a slide; the one to open first."""
    above, _, name = path.rpartition("/")
    lower = name.lower()
    try:
        found = store.info(path)
        if found["type"] != "file":  # the folder of a DICOM series
            files = [file for file in _below(store, path) if file[0].lower().endswith(".dcm")]
            if not files:
                raise BadSlide("unsupported", f"{uri} is a folder without DICOM files (.dcm); name a slide's file")
            return [(f"{name}/{file}", size, version) for file, size, version in files]
        first = (name, int(found["size"]), _version(found))
        if lower.endswith(".mrxs"):
            return [first, *((f"{name[:-5]}/{file}", size, version) for file, size, version in _below(store, f"{above}/{name[:-5]}"))]
        if lower.endswith(".dcm"):
            return [first, *(file for file in _below(store, above) if file[0] != name and "/" not in file[0] and file[0].lower().endswith(".dcm"))]
    except FileNotFoundError as error:
        raise BadSlide("missing", f"{uri}: {error}") from error
    if lower.endswith((".vms", ".vmu")):
        raise BadSlide("unsupported", f"{uri} names other files; copy the slide's folder to a disk")
    return [first]


def _below(store: Any, folder: str) -> list[tuple[str, int, str]]:
    found = store.find(folder, detail=True)
    return [(key[len(folder) :].strip("/"), int(info["size"]), _version(info)) for key, info in sorted(found.items()) if info["type"] == "file"]


def _version(info: dict[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("LastModified") or info.get("mtime") or "")
