"""Finding the item that kills its worker: a journal per chunk that outlives the process, and a watchdog for hangs.

Ray retries a task whose worker died without limit, so a decompression bomb that slips through, a segfault in a native decoder or a
hanging read would stop a job for ever. The journal counts the tries of a chunk. From the second try on the chunk has the
process for itself, and the items in flight are named before they are touched; after another death those are tried one
by one; one whose process dies twice while it is alone there is `dead`: it becomes a reject row, and the chunk goes on
without it. Twice, because machines are taken away and processes killed for reasons that are not the item's.

The watchdog ends the process when one piece of work is overdue: an item's decoding after `limits.item_timeout_s`; what is done
for many items together (fetching, reading from a container, a call of the encoder, staging) after that time for each, but for
16 at most. Of the encoder's calls only the oldest is timed, from when it became the oldest: the others may be waiting for it.
So a hang holds a worker up for 16 times `item_timeout_s` at most, then for once that time at each of two tries alone, which
make the item a reject; a hang that is no item's (reading, staging) fails its chunk after `MAX_BARREN_TRIES`. A process that
was stopped, or starved of its processors, is not overdue: the watchdog counts only time in which it runs itself. Nor is a container
that is being copied to this machine, as long as bytes arrive.
"""

import contextlib
import faulthandler
import functools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
    def watch(self, ids: list[str], seconds: float, *, shared: bool = False) -> Iterator[Callable[[], None]]:
        """End the process, and hold `ids` responsible (none: nobody), if this block takes longer than `seconds`.

        Gives a function that starts the time anew, for work whose progress can be seen. `shared`: the block may wait for others
        like it, so only the oldest of them in this process is timed.
        """
        token = self._watchdog.start(_Watch(self, ids, seconds, shared))
        try:
            yield functools.partial(self._watchdog.renew, token)
        finally:
            self._watchdog.stop(token)

    def accuse(self, ids: list[str]) -> None:
        """Write down that `ids` hang: the process is about to be ended because of them."""
        self._state.in_flight = [ids]
        self._write()

    def end(self) -> None:
        """The chunk is done: forget it."""
        self._staging.delete(self._name)

    def _write(self) -> None:
        self._staging.put(self._name, json.dumps(asdict(self._state)).encode())


@dataclass
class _Watch:
    journal: Journal
    ids: list[str]
    seconds: float
    shared: bool
    deadline: float = math.inf
    """In the watchdog's time; infinite while it waits for an older one."""


class Watchdog:
    """Ends this process when watched work is overdue: threads that hang in native code cannot be stopped otherwise."""

    TICK_S = 0.5

    def __init__(self) -> None:
        self._watches: dict[int, _Watch] = {}  # the oldest first
        self._next = 0
        self._now = 0.0
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def start(self, watch: _Watch) -> int:
        """Begin to watch; returns a token for `stop`."""
        if not watch.shared:
            watch.deadline = self._deadline(watch)
        with self._lock:
            self._next += 1
            self._watches[self._next] = watch
            return self._next

    def stop(self, token: int) -> None:
        """End one watch."""
        with self._lock:
            self._watches.pop(token, None)

    def renew(self, token: int) -> None:
        """Start the time of a watch anew, if it is not over."""
        with self._lock:
            watch = self._watches.get(token)
            if watch is not None:
                watch.deadline = self._deadline(watch)

    def _deadline(self, watch: _Watch) -> float:
        return self._now + self.TICK_S + watch.seconds  # a tick more, because the watchdog's time moves by ticks

    def _run(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(self.TICK_S)
            now = time.monotonic()
            # No more than two ticks: when it is this late, the whole process was stopped or starved.
            self._now += min(now - before, 2 * self.TICK_S)
            before = now
            self._look()

    def _look(self) -> None:
        with self._lock:
            watches = list(self._watches.values())
        oldest = next((watch for watch in watches if watch.shared), None)
        if oldest is not None and oldest.deadline == math.inf:
            oldest.deadline = self._deadline(oldest)
        timed = [watch for watch in watches if watch.deadline < math.inf]
        if not timed:
            faulthandler.cancel_dump_traceback_later()
            return
        # Native code that hangs holding the interpreter's lock stops this thread too, and a store that hangs the writing below;
        # faulthandler's timer runs in C.
        slack = max(0.0, max(watch.deadline for watch in timed) - self._now) + 10
        faulthandler.dump_traceback_later(slack, exit=True, file=sys.__stderr__ or sys.stderr)
        for watch in timed:
            if watch.deadline < self._now:
                watch.journal.accuse(watch.ids)
                os._exit(1)
