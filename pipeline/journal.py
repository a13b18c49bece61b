"""Finding the item that kills its worker: a journal per chunk that outlives the process, and a watchdog for hangs.

Ray retries a task whose worker died without limit, so a decompression bomb that slips through, a segfault in a native decoder or a
hanging read would stop a job for ever. The journal counts the tries of a chunk. From the second try on the chunk has the
process for itself, and the items in flight are named before they are touched; after another death those are tried one
by one; one whose process dies twice while it is alone there is `dead`: it becomes a reject row, and the chunk goes on
without it. Twice, because machines are taken away and processes killed for reasons that are not the item's.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from pipeline.table.stage import Staging

MAX_BARREN_TRIES = 8
"""Tries of a chunk that may end in the worker's death without naming an item; then the chunk fails."""


@dataclass
class _State:
    tries: int = 0
    suspects: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    """Suspects whose process has died once while they were alone in it."""
    dead: list[str] = field(default_factory=list)
    in_flight: list[list[str]] = field(default_factory=list)


class Journal:
    """What has happened to one chunk in one run so far, across the deaths of its workers. `name` says which chunk and run."""

    def __init__(self, staging: Staging, name: str, watchdog: "Watchdog") -> None:
        self._staging, self._name, self._watchdog = staging, f"attempts/{name}", watchdog
        self._lock = threading.Lock()
        data = staging.get(self._name)
        self._state = _State(**json.loads(data)) if data else _State()

    def begin(self) -> None:
        """Count one more try, and draw the conclusions from how the last one ended."""
        state = self._state
        state.tries += 1
        in_flight = [i for ids in state.in_flight for i in ids]
        state.suspects += [i for i in in_flight if i not in state.suspects]
        if len(in_flight) == 1:
            (state.dead if in_flight[0] in state.alone else state.alone).append(in_flight[0])
        state.in_flight = []
        state.suspects = [i for i in state.suspects if i not in state.dead]
        self._write()

    @property
    def dead(self) -> frozenset[str]:
        """Items that killed their worker."""
        return frozenset(self._state.dead)

    @property
    def suspects(self) -> frozenset[str]:
        """Items to be tried one by one, alone in the process."""
        return frozenset(self._state.suspects)

    @property
    def hopeless(self) -> bool:
        """Whether the chunk keeps killing its worker and no item explains it."""
        return self._state.tries > MAX_BARREN_TRIES + 3 * len(self._state.dead)

    @property
    def tries(self) -> int:
        """How often the chunk was begun."""
        return self._state.tries

    @contextlib.contextmanager
    def flight(self, ids: list[str]) -> Iterator[None]:
        """Hold `ids` responsible if the process dies in this block (named on disk from the second try on)."""
        with self._lock:
            self._state.in_flight.append(ids)
            if self._state.tries > 1:
                self._write()
        try:
            yield
        finally:
            with self._lock:
                self._state.in_flight.remove(ids)

    @contextlib.contextmanager
    def watch(self, ids: list[str], seconds: float) -> Iterator[None]:
        """End the process, and hold `ids` responsible, if this block takes longer than `seconds`."""
        token = self._watchdog.start(self, ids, time.monotonic() + seconds)
        try:
            yield
        finally:
            self._watchdog.stop(token)

    def accuse(self, ids: list[str]) -> None:
        """Write down that `ids` hang: the process is about to be ended because of them."""
        self._state.in_flight = [ids]
        if len(ids) == 1:
            self._state.alone += ids  # nobody else can have ended the process
        self._write()

    def end(self) -> None:
        """The chunk is done: forget it."""
        self._staging.delete(self._name)

    def _write(self) -> None:
        self._staging.put(self._name, json.dumps(asdict(self._state)).encode())


class Watchdog:
    """Ends this process when watched work is overdue: threads that hang in native code cannot be stopped otherwise."""

    TICK_S = 0.5

    def __init__(self) -> None:
        self._watched: dict[int, tuple[Journal, list[str], float]] = {}
        self._next = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def start(self, journal: Journal, ids: list[str], deadline: float) -> int:
        """Begin to watch; returns a token for `stop`."""
        with self._lock:
            self._next += 1
            self._watched[self._next] = (journal, ids, deadline)
            return self._next

    def stop(self, token: int) -> None:
        """End one watch."""
        with self._lock:
            self._watched.pop(token, None)

    def _run(self) -> None:
        while True:
            time.sleep(self.TICK_S)
            with self._lock:
                watched = list(self._watched.values())
            if not watched:
                faulthandler.cancel_dump_traceback_later()
                continue
            now = time.monotonic()
            for journal, ids, deadline in watched:
                if deadline < now:
                    journal.accuse(ids)
                    os._exit(1)
            # Native code that hangs holding the interpreter's lock stops this thread too; faulthandler's timer runs in C.
            slack = max(deadline for _, _, deadline in watched) - now + 10
            faulthandler.dump_traceback_later(slack, exit=True, file=sys.__stderr__ or sys.stderr)
