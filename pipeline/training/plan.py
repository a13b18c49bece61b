"""The data plan: which rows the batch of a step holds. A function of (settings, sources, step) and of nothing else.

So its position is the step, a run goes on at any step at once, and the batch is the same whatever number of workers share it. Worker r of W takes
rows r, r + W, r + 2W, ... of the batch: their numbers of rows differ by at most one, and so do their lengths where rows are sorted by length.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pydantic

from pipeline.config import ConfigError, Model
from pipeline.pairs.keys import hash64
from pipeline.training.order import Clashes, Epochs, Source
from pipeline.training.turns import PERIOD, counts_of, ordinals, shares_of, turns_of

EPOCHS_KEPT = 2
"""Orders kept for each data set: a block may take from two epochs."""


class Mixture(Model):
    """How batches are made of data sets."""

    batch_size: int = pydantic.Field(gt=0)
    """Rows of a batch, of all workers together."""
    seed: int = 0
    """Another seed is another order."""
    batches: Literal["homogeneous", "interleaved"] = "homogeneous"
    """homogeneous: the rows of a batch are of one data set. interleaved: blocks of `interleave` rows of several. Rows of one group or document are
    kept out of one block; where a batch has two blocks of a data set, and between data sets, the loss's masks alone tell them."""
    interleave: int = pydantic.Field(default=64, gt=0)
    """Rows of a data set that stand together in an interleaved batch; divides batch_size."""
    temperature: float = pydantic.Field(default=1.0, gt=0)
    """1: data sets by their weights; higher: more equal."""
    bucket_batches: int = pydantic.Field(default=16, gt=0)
    """Rows are sorted by length among so many blocks at a time, so that rows of like length meet; 1: not sorted. More saves padding, and draws
    less freely."""

    @property
    def block(self) -> int:
        """Rows that a batch takes of a data set at once."""
        return self.batch_size if self.batches == "homogeneous" else self.interleave


@dataclass(frozen=True)
class Draw:
    """B rows: number of the data set int32, row in it int64, its epoch int64, each (B,)."""

    dataset: np.ndarray
    row: np.ndarray
    epoch: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def part(self, rank: int, num_ranks: int) -> "Draw":
        """The rows of one worker. Raises ConfigError if there are fewer rows than workers: a loss needs one at least on each."""
        if len(self) < num_ranks:
            raise ConfigError(
                f"batch_size={len(self)} is less than {num_ranks} workers; each needs a row: raise batch_size, or lower the number of workers"
            )
        return Draw(self.dataset[rank::num_ranks], self.row[rank::num_ranks], self.epoch[rank::num_ranks])


class Plan:
    """Batches of several data sets. Setting up an epoch of a data set sorts its rows once; a batch then takes slices. Safe in several threads."""

    def __init__(self, sources: Sequence[Source], mixture: Mixture) -> None:
        """Raises ConfigError if the settings do not fit the data sets."""
        self.mixture = mixture
        # By name: the order in which a job file lists its data sets decides nothing.
        self.sources = sorted(sources, key=lambda source: source.name)
        _check(self.sources, mixture)
        weights = [float(len(source)) if source.weight is None else source.weight for source in self.sources]
        self.shares = shares_of(weights, mixture.temperature)
        self._counts = counts_of(self.shares)
        first = np.argsort([hash64(str(mixture.seed), source.name) for source in self.sources], kind="stable")
        self._turns = first[turns_of(self._counts[first])]
        self._ordinals = ordinals(self._turns)
        settings = (mixture.seed, mixture.block, mixture.bucket_batches)
        self._epochs = [Epochs(source, *settings, Clashes(source)) for source in self.sources]
        self._orders: list[dict[int, np.ndarray]] = [{} for _ in self.sources]
        self._ordering = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of the data sets, in the order of their numbers in a Draw."""
        return [source.name for source in self.sources]

    def steps(self, epochs: float) -> int:
        """Steps in which as many rows are drawn as all data sets together have, times `epochs`; at least 1."""
        return max(1, round(epochs * sum(map(len, self.sources)) / self.mixture.batch_size))

    def epochs_at(self, step: int) -> dict[str, float]:
        """How often each data set was gone through before a step."""
        rounds, rest = divmod(step * self._blocks, PERIOD)
        had = rounds * self._counts + np.bincount(self._turns[:rest], minlength=len(self.sources))
        return {source.name: float(had[i] * self.mixture.block / len(source)) for i, source in enumerate(self.sources)}

    def batch(self, step: int) -> Draw:
        """The rows of the batch of a step, from 0, of all workers."""
        parts = [self._block(turn) for turn in range(step * self._blocks, (step + 1) * self._blocks)]
        return Draw(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps, before the batch of `step` is drawn; JSON types."""
        return {"step": step, "settings": self.mixture.model_dump(), "sources": dict(self._digests)}

    def resume(self, position: dict[str, Any]) -> int:
        """The step to go on with. Raises ConfigError naming what is not as it was: the batches before would have been others."""
        now = self.position(position["step"])
        for part in ("settings", "sources"):
            before, after = position[part], now[part]
            changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
            if changed:
                raise ConfigError(
                    f"the checkpoint at step {position['step']} was made with another plan: {part} differ in {', '.join(changed)}; "
                    "restore them, or start a new run from the checkpoint's weights"
                )
        return int(position["step"])

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {source.name: _digest(source) for source in self.sources}

    @property
    def _blocks(self) -> int:
        return self.mixture.batch_size // self.mixture.block

    def _block(self, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rounds, at = divmod(turn, PERIOD)
        dataset = int(self._turns[at])
        size, num = self.mixture.block, len(self.sources[dataset])
        start = (rounds * int(self._counts[dataset]) + int(self._ordinals[at])) * size
        epoch, first = divmod(start, num)
        rows = self._order(dataset, epoch)[first : first + size]
        epochs = np.full(size, epoch, np.int64)
        if len(rows) < size:
            epochs[len(rows) :] = epoch + 1
            rows = np.concatenate([rows, self._order(dataset, epoch + 1)[: size - len(rows)]])
        return np.full(size, dataset, np.int32), rows, epochs

    def _order(self, dataset: int, epoch: int) -> np.ndarray:
        kept = self._orders[dataset]
        with self._ordering:
            if epoch not in kept:
                while len(kept) >= EPOCHS_KEPT:
                    kept.pop(min(kept))
                kept[epoch] = self._epochs[dataset].order(epoch)
            return kept[epoch]


def _check(sources: Sequence[Source], mixture: Mixture) -> None:
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"data sets {', '.join(names)}: give at least one, each with a name of its own")
    block = mixture.block
    if mixture.batch_size % block:
        raise ConfigError(
            f"interleave={block} does not divide batch_size={mixture.batch_size}; nearest: batch_size={mixture.batch_size // block * block or block}"
        )
    for source in sources:
        if len(source) < block:
            what = "batch_size" if mixture.batches == "homogeneous" else "interleave"
            raise ConfigError(
                f"data set {source.name!r} has {len(source)} rows and a batch takes {block} of it, so rows would meet themselves; lower {what} to at "
                f"most {len(source)}{', or set batches: interleaved' if what == 'batch_size' else ''}"
            )


def _digest(source: Source) -> str:
    """Of all that the order of a source depends on."""
    digest = hashlib.blake2b(repr(source.weight).encode(), digest_size=16)
    for part in (source.row_keys, source.costs, source.clash_rows, source.clash_keys):
        digest.update(b"-" if part is None else str(part.dtype).encode() + np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
