"""Feed: what a worker computes at a step: the rows that the plan draws, read, decoded, and prepared by the model; some steps ahead of it."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.pairs.prepared import Prepared
from pipeline.training import Notes
from pipeline.training.batches import Choice, Told, collate, read, source_of
from pipeline.training.plan import Mixture, Plan
from pipeline.training.settings import Feeding
from pipeline.training.trainable import Trainable


@dataclass(frozen=True)
class Part:
    """A data set of a run, and its share of the batches. It pickles."""

    prepared: Prepared
    weight: float | None = None


@dataclass(frozen=True)
class Ready:
    """A worker's rows of a step, prepared by the model."""

    queries: list[Any]
    positives: list[Any]
    negatives: list[list[Any]]
    notes: Notes
    row_keys: list[int]
    """Hashes of the rows' ids, those of rejected rows included."""
    rejects: pa.Table


def plan_of(parts: Sequence[Part], mixture: Mixture) -> Plan:
    """Raises ConfigError if the mixture does not fit the data sets."""
    return Plan([source_of(part.prepared, part.weight) for part in parts], mixture)


class Feed:
    """Batches for one worker of several, of steps before `steps`. Holds threads that work ahead: use it with `with`."""

    def __init__(self, parts: Sequence[Part], mixture: Mixture, choice: Choice, *, rank: int, num_ranks: int, steps: int, feeding: Feeding) -> None:
        self.plan = plan_of(parts, mixture)
        self._steps, self._feeding = steps, feeding
        # The plan keeps the orders of its last epochs.
        self._drawing = threading.Lock()
        self._datasets = {part.prepared.name: part.prepared for part in parts}
        self._choice, self._rank, self._num_ranks = choice, rank, num_ranks
        self._ahead: dict[int, Future[Ready]] = {}

    def __enter__(self) -> "Feed":
        self._threads = ThreadPoolExecutor(self._feeding.threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def at(self, step: int, model: Trainable) -> Ready:
        """The rows of a step. Those of the next ones are begun with."""
        wanted = range(step, min(self._steps, step + 1 + self._feeding.ahead))
        self._ahead = {each: self._ahead.get(each) or self._threads.submit(self._made, each, model) for each in wanted}
        return self._ahead.pop(step).result()

    def _made(self, step: int, model: Trainable) -> Ready:
        with self._drawing:
            draw = self.plan.batch(step).part(self._rank, self._num_ranks)
        rows = read(self._datasets, self.plan.names, draw)
        options = [self._datasets[self.plan.names[dataset]].image_options for dataset in draw.dataset.tolist()]
        batch = collate(rows, draw.epoch, self._choice, step=step, image_options=options)
        return Ready(
            queries=[model.prepare(told, query=True) for told in batch.queries],
            positives=_documents(batch.positives, model),
            negatives=[_documents(own, model) for own in batch.negatives],
            notes=batch.notes,
            row_keys=rows["row_key"].to_pylist(),
            rejects=batch.rejects,
        )


def _documents(told: Sequence[Told], model: Trainable) -> list[Any]:
    return [model.prepare(each, query=False) for each in told]
