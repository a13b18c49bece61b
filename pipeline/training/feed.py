"""Feed: what a worker computes at a step: the rows that the plan draws, read, decoded, and prepared by the model; some steps ahead of it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.pairs.prepared import Prepared
from pipeline.training import Notes
from pipeline.training.batches import Batch, Choice, Told, collate, read, source_of, without
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
    stand_in: tuple[Any, Any] | None = None
    """Query and positive of another worker's row, where all of this one's were left out."""


@dataclass(frozen=True)
class Read:
    """A worker's rows of a step, read and decoded. It pickles."""

    batch: Batch
    row_keys: list[int]


def plan_of(parts: Sequence[Part], mixture: Mixture) -> Plan:
    """Raises ConfigError if the mixture does not fit the data sets."""
    return Plan([source_of(part.prepared, part.weight) for part in parts], mixture)


@dataclass(frozen=True)
class Reader:
    """Reads and decodes the rows of one worker of several: what needs no model. It pickles, and gives the same wherever it runs."""

    parts: tuple[Part, ...]
    mixture: Mixture
    choice: Choice
    rank: int
    num_ranks: int

    def read(self, step: int, place: int = 0) -> Read:
        """The rows of a step, of this worker or of the one `place` after it. Safe in several threads once `plan` is there."""
        draw = self.plan.batch(step).part((self.rank + place) % self.num_ranks, self.num_ranks)
        rows = read(self._datasets, self.plan.names, draw)
        options = [self._datasets[self.plan.names[dataset]].image_options for dataset in draw.dataset.tolist()]
        return Read(collate(rows, draw.epoch, self.choice, step=step, image_options=options), rows["row_key"].to_pylist())

    @cached_property
    def plan(self) -> Plan:
        """Sorts the rows of all data sets."""
        return plan_of(self.parts, self.mixture)

    @cached_property
    def _datasets(self) -> dict[str, Prepared]:
        return {part.prepared.name: part.prepared for part in self.parts}

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: self.__dict__[each.name] for each in fields(self)}


class Feed:
    """Batches for one worker, of steps before `steps`: as `read` gives them, prepared by the model. Holds threads: use it with `with`."""

    def __init__(self, read: Callable[[int, int], Read], *, num_ranks: int, steps: int, feeding: Feeding, choice: Choice) -> None:
        self._read, self._num_ranks, self._steps, self._feeding, self._choice = read, num_ranks, steps, feeding, choice
        self._ahead: dict[int, Future[Ready]] = {}

    def __enter__(self) -> "Feed":
        # Each reader elsewhere has a thread here that waits for it.
        self._threads = ThreadPoolExecutor(max(self._feeding.threads, self._feeding.workers))
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def at(self, step: int, model: Trainable) -> Ready:
        """The rows of a step. Those of the next ones are begun with."""
        wanted = range(step, min(self._steps, step + 1 + max(self._feeding.ahead, self._feeding.workers)))
        self._ahead = {each: self._ahead.get(each) or self._threads.submit(self._made, each, model) for each in wanted}
        return self._ahead.pop(step).result()

    def _made(self, step: int, model: Trainable) -> Ready:
        own = self._prepared(self._read(step, 0), model)
        return own if own.queries else replace(own, stand_in=self._stand_in(step, model, own.rejects))

    def _stand_in(self, step: int, model: Trainable, rejects: pa.Table) -> tuple[Any, Any]:
        """Of the next worker that has a row. Raises ConfigError if none has: on all of them alike, so that none waits for the others."""
        for place in range(1, self._num_ranks):
            other = self._prepared(self._read(step, place), model)
            if other.queries:
                return other.queries[0], other.positives[0]
        first = rejects.slice(0, 1).to_pylist()[0]
        raise ConfigError(f"none of the rows of step {step} can be used; one of them: {first['uri']}: {first['detail']}")

    def _prepared(self, found: Read, model: Trainable) -> Ready:
        batch, bad, good = found.batch, dict[int, str](), list[tuple[Any, Any, list[Any]]]()
        negatives = batch.negatives or [[]] * len(batch.queries)
        for place, (query, positive, own) in enumerate(zip(batch.queries, batch.positives, negatives, strict=True)):
            try:
                good.append((model.prepare(query, query=True), model.prepare(positive, query=False), _documents(own, model)))
            except ValueError as error:
                if self._choice.bad_image == "error":
                    raise ConfigError(f"{query.uri}: {error}; or leave such rows out by choice.bad_image: drop") from error
                bad[place] = str(error)
        batch = without(batch, bad) if bad else batch
        return Ready(
            queries=[query for query, _, _ in good],
            positives=[positive for _, positive, _ in good],
            negatives=[own for _, _, own in good] if batch.negatives else [],
            notes=batch.notes,
            row_keys=found.row_keys,
            rejects=batch.rejects,
        )


def _documents(told: Sequence[Told], model: Trainable) -> list[Any]:
    return [model.prepare(each, query=False) for each in told]
