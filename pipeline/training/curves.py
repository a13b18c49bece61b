"""Curves of a run for TensorBoard: event files in the folder `tensorboard` of the run's. One process writes them."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError

FOLDER = "tensorboard"
SECTIONS = {"loss": "train", "learning_rate": "train", "gradient_norm": "train"}
"""Where a number of a journal's line is shown; others are signs of collapse."""


def check_tensorboard() -> None:
    """Raises ConfigError if the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("run.tensorboard needs another package: pip install 'tessera[tensorboard]'; or set it to false: report.html has the curves")


class Curves:
    """Adds lines of a journal to a run's curves.

    A run that goes on at `step` hides what an earlier attempt wrote from that step on, as TensorBoard's own `purge_step` does; `lines` are those
    that the journal has kept, of which the last evaluation stands at that very step, and so is written again.
    """

    def __init__(self, folder: Path, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / FOLDER), purge_step=step)  # type: ignore[no-untyped-call]
        for line in lines:
            if line["step"] == step:
                self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """One line's numbers and histograms, on the disk when this returns: what a kill leaves is as long as the journal."""
        step = line["step"]
        for name, value in line.get("held_out", {}).items():
            self._writer.add_scalar(f"held_out/{name}", value, step)
        if "loss" in line:
            for name, value in line.items():
                if isinstance(value, float) and name not in ("seconds", "waited"):
                    self._writer.add_scalar(f"{SECTIONS.get(name, 'collapse')}/{name}", value, step)
            for name, counts in line["similarities"].items():
                self._histogram(f"similarities/{name}", counts, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _histogram(self, tag: str, counts: Sequence[int], step: int) -> None:
        bins = len(counts)
        limits = [-1 + 2 * (place + 1) / bins for place in range(bins)]
        middles = [limit - 1 / bins for limit in limits]
        total = sum(count * at for count, at in zip(counts, middles, strict=True))
        squares = sum(count * at * at for count, at in zip(counts, middles, strict=True))
        self._writer.add_histogram_raw(
            tag, min=-1.0, max=1.0, num=sum(counts), sum=total, sum_squares=squares, bucket_limits=limits, bucket_counts=counts, global_step=step
        )
