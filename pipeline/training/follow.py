"""Progress of a run on stderr, in the process that started it: what the first worker writes into the journal is read as it grows."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.progress import Meter

LOOK_EVERY_S = 1.0


class Tail:
    """Whole lines of a journal that are new since the last look; all of it again once it is another file."""

    def __init__(self, path: Path, *, end: bool) -> None:
        """`end`: begin after what is there."""
        self._path, self._file, self._offset = path, -1, 0
        if end:
            self.lines()

    def lines(self) -> list[dict[str, Any]]:
        """The new ones."""
        try:
            with self._path.open("rb") as file:
                number = os.fstat(file.fileno()).st_ino
                if number != self._file:
                    self._file, self._offset = number, 0
                file.seek(self._offset)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole) + len(end)
        return [json.loads(line) for line in whole.splitlines()]


@contextlib.contextmanager
def followed(journal: Path, *, steps: int, batch_size: int) -> Iterator[None]:
    """Show progress while the block runs."""
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(Tail(journal, end=True), over, steps, batch_size), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)


def _follow(tail: Tail, over: threading.Event, steps: int, batch_size: int) -> None:
    with contextlib.ExitStack() as stack:
        meter: Meter | None = None
        while not over.wait(LOOK_EVERY_S):
            found = tail.lines()
            started = [line for line in found if line.get("event") in ("begun", "resumed")]
            if started and meter is None:
                # Not before: the time that Ray and the workers take to start says nothing about the rest.
                meter = stack.enter_context(Meter(steps * batch_size, what="training, rows", done=started[-1]["step"] * batch_size))
            losses = [line for line in found if "loss" in line]
            if meter is not None and losses:
                meter.at((losses[-1]["step"] + 1) * batch_size, note=f"step {losses[-1]['step'] + 1}, loss {losses[-1]['loss']:.4f}")
