"""Progress of a run on stderr: a live bar on a terminal, a plain line every ten seconds in a log."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0


class Meter:
    """Counts items done and rejected out of `total`, and shows them. `done`: those that were done before."""

    def __init__(self, total: int, *, what: str, done: int = 0) -> None:
        self._total, self._what, self._before = total, what, done
        self._done, self._rejected, self._note = done, 0, ""
        self._started = self._shown = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task(what, total=total, completed=done, rate="", rejected="", note="") if self._bar else None

    def __enter__(self) -> "Meter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, done: int, *, rejected: int) -> None:
        """`done` more items are through, `rejected` of them as rejects."""
        self._done += done
        self._rejected += rejected
        self._show()

    def at(self, done: int, *, note: str) -> None:
        """So many items are through, fewer than before if some are done again; `note` stands beside them."""
        self._done, self._note = done, note
        self._show()

    def _show(self) -> None:
        rate = max(0, self._done - self._before) / max(1e-9, time.monotonic() - self._started)
        if self._bar and self._task is not None:
            rejects = f"{self._rejected} rejected" if self._rejected else ""
            self._bar.update(self._task, completed=self._done, rate=f"{rate:,.0f}/s", rejected=rejects, note=self._note)
        elif time.monotonic() - self._shown >= LINE_EVERY_S:
            self._shown = time.monotonic()
            left = (self._total - self._done) / rate if rate else 0.0
            more = f", {self._note}" if self._note else ""
            log.info("%s: %d of %d, %.1f/s, %d rejected, about %.0f s left%s", self._what, self._done, self._total, rate, self._rejected, left, more)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[rejected]}", style="red"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
