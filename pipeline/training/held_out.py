"""Retrieval on held-out pairs while a model is trained: each query against the positives of all rows. Shared by the workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.metrics import mrr_at, ndcg_at, ranking, recall_at
from pipeline.pairs.prepared import Prepared
from pipeline.training import normalise
from pipeline.training.batches import Choice, Told, collate
from pipeline.training.gather import gather_rows, of_first, world
from pipeline.training.tape import Embed, layers_of
from pipeline.training.trainable import Trainable

ROWS = 64
"""Rows that are read at once: images of no more than these are in memory."""


def evaluate(model: Trainable, embed: Embed, held_out: Sequence[Prepared], *, choice: Choice, k: int, chunk: int | None) -> dict[str, float]:
    """`NAME/recall@K`, mrr and ndcg of each data set, and their means under `recall@K`, `mrr@K`, `ndcg@K`. The same on all ranks.

    `chunk`: rows that a rank embeds at once, as in training; None: all that are read at once.
    Of a row with several positives each is a relevant document; a document that stands in several rows is one document. Every rank must call it.
    """
    # A held-out row is never left out, and needs no teacher.
    choice = choice.model_copy(update={"bad_image": "error", "teacher_scores": False})
    found = {data.name: _of(_Reader(model, embed, data, choice, chunk), k) for data in held_out}
    device = next((values.device for module in model.modules for values in module.parameters()), torch.device("cpu"))
    # Ranks on different machines may rank near ties differently, and all must agree on which weights are the best.
    found = {name: dict(zip(metrics, of_first(list(metrics.values()), device), strict=True)) for name, metrics in found.items()}
    named = {f"{name}/{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}
    means = {metric: float(np.mean([metrics[metric] for metrics in found.values()])) for metric in next(iter(found.values()), {})}
    return {**named, **means}


def _of(reader: "_Reader", k: int) -> dict[str, float]:
    keys = reader.data.keys()["positive_keys"].to_pylist()
    first: dict[int, tuple[int, int]] = {}
    for row, own in enumerate(keys):
        for place, key in enumerate(own):
            first.setdefault(key, (row, place))
    # In the order of their keys, which are hashes: documents in the order of their queries would win every tie.
    documents = sorted(first)
    number = {key: place for place, key in enumerate(documents)}
    queries = reader.vectors([(row, None) for row in range(len(keys))])
    answers = reader.vectors([first[key] for key in documents])
    order = ranking(queries, answers, k)
    relevant = [{number[key]: 1.0 for key in own} for own in keys]
    return {f"{name}@{k}": measure(order, relevant, k) for name, measure in (("recall", recall_at), ("mrr", mrr_at), ("ndcg", ndcg_at))}


@dataclass(frozen=True)
class _Reader:
    """Makes vectors of a data set's messages. A message is named by its row, and its place among the row's positives (None: the query)."""

    model: Trainable
    embed: Embed
    data: Prepared
    choice: Choice
    chunk: int | None = None

    def vectors(self, wanted: Sequence[tuple[int, int | None]]) -> np.ndarray:
        """(N, D), norm 1, in their order: each rank makes its part, and gets all."""
        rank, num_ranks = world()
        # As many each, and at least one, for the collective; what is made twice is cut off.
        padded = [*wanted, *[wanted[0]] * (-len(wanted) % num_ranks)]
        made = []
        with torch.no_grad():
            for start in range(rank, len(padded), ROWS * num_ranks):
                told = self._told(padded[start : start + ROWS * num_ranks : num_ranks])
                gathered = gather_rows(self._embedded([self._prepared(each, query=query) for each, query in told])).cpu().numpy()
                # Row i of rank r is number i * ranks + r of these.
                made.append(gathered.reshape(num_ranks, -1, gathered.shape[1]).transpose(1, 0, 2).reshape(-1, gathered.shape[1]))
        return np.concatenate(made)[: len(wanted)]

    def _embedded(self, rows: list[Any]) -> Tensor:
        step = self.chunk or len(rows)
        return torch.cat([normalise(layers_of(self.embed(rows[start : start + step]))[-1]) for start in range(0, len(rows), step)])

    def _prepared(self, told: Told, *, query: bool) -> Any:
        try:
            return self.model.prepare(told, query=query)
        except ValueError as error:
            raise ConfigError(f"{told.uri}: {error}; a held-out row is never left out: mend it, or remove it from the data set") from error

    def _told(self, wanted: Sequence[tuple[int, int | None]]) -> list[tuple[Told, bool]]:
        rows = self.data.take(np.array([row for row, _ in wanted]))
        values = [_only(row, place or 0) for row, (_, place) in zip(rows.to_pylist(), wanted, strict=True)]
        batch = collate(
            pa.Table.from_pylist(values, schema=rows.schema),
            np.zeros(len(values), np.int64),
            self.choice,
            step=0,
            image_options=[self.data.image_options] * len(values),
        )
        sides = zip(batch.queries, batch.positives, wanted, strict=True)
        return [(query, True) if place is None else (positive, False) for query, positive, (_, place) in sides]


def _only(row: dict[str, Any], place: int) -> dict[str, Any]:
    """The row with one of its positives, and no negatives."""
    one = {"positives": [row["positives"][place]], "positive_keys": [row["positive_keys"][place]]}
    return row | one | {"negatives": [], "negative_keys": [], "pos_scores": None, "neg_scores": None}
