"""Record: what a run tells while it goes, kept in its folder: metrics.jsonl, report.html, and curves for TensorBoard where they are wanted."""

import logging
import time
from pathlib import Path
from typing import Any

from pipeline.training.curves import Curves
from pipeline.training.journal import Journal
from pipeline.training.page import Facts, write_page
from pipeline.training.watch import collapse

log = logging.getLogger(__name__)

PAGE_EVERY_S = 20.0
PAGE_SHARE = 0.02
"""Of the run's time that the page may take, as journals become long."""


class Record:
    """For the first worker alone."""

    def __init__(self, journal: Path, facts: Facts, *, tensorboard: bool) -> None:
        self._journal, self._folder, self._facts, self._tensorboard = Journal(journal), journal.parent, facts, tensorboard
        self._curves: Curves | None = None
        self._first: dict[str, Any] | None = None
        self._warned: set[str] = set()
        self._due = 0.0

    def begin(self, step: int, *, workers: int) -> None:
        """Go on at a step: lines of what will be done again are taken out, here and from the curves."""
        before = self._journal.lines()
        done = max((line["step"] + 1 for line in before if "loss" in line), default=0)
        self._journal.begin(step)
        kept = self._journal.lines()
        if self._tensorboard:
            self._curves = Curves(self._folder, step, kept)
        self._first = next((line for line in kept if "loss" in line), None)
        name = "resumed" if any("event" in line for line in before) else "begun"
        self.event(name, step, workers=workers, again=max(0, done - step))

    def event(self, name: str, step: int, **about: int) -> None:
        """Something that happened to the run."""
        self._add({"step": step, "event": name, "time": round(time.time(), 3), **about})
        self.write("running")

    def held_out(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation after so many steps."""
        self._add({"step": step, "held_out": metrics})
        self.write("running")

    def step(self, line: dict[str, Any]) -> None:
        """A step's line. New signs of collapse are logged."""
        self._add(line)
        # What is wrong before anything was learnt is no collapse.
        found = {} if self._first is None else collapse(self._first, line)
        self._first = self._first or line
        for name, warning in found.items():
            if name not in self._warned:
                log.warning("step %d: %s", line["step"], warning)
                self._warned.add(name)
        if time.monotonic() > self._due:
            self.write("running")

    def write(self, status: str) -> None:
        """Write the page."""
        started = time.monotonic()
        write_page(self._folder, self._facts, self._journal.lines(), status=status)
        now = time.monotonic()
        self._due = now + max(PAGE_EVERY_S, (now - started) / PAGE_SHARE)

    def close(self) -> None:
        """Close the curves' file."""
        if self._curves is not None:
            self._curves.close()

    def _add(self, line: dict[str, Any]) -> None:
        self._journal.add(line)
        if self._curves is not None:
            self._curves.add(line)
