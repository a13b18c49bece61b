"""How good a ranking is: recall, reciprocal rank, nDCG, and the ranking of exact search. numpy only.

`found`: document numbers, best first, (Q, K). `relevant`: for each query its relevant documents and how much each is worth,
{number: gain above 0}. Every figure is a mean over queries, between 0 and 1.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Relevant = Sequence[Mapping[int, float]]
_One = Callable[[list[int], Mapping[int, float]], float]

BLOCK = 16_777_216
"""Scores that are computed at once: 64 MiB in float32."""


def ranking(queries_QD: np.ndarray, documents_ND: np.ndarray, k: int) -> np.ndarray:
    """The k documents with the largest dot products, best first: int64 (Q, min(k, N)). Of equal ones the first document comes first.

    So give documents in an order that has nothing to do with the queries': an encoder that gives one vector for everything would else look perfect.
    """
    num = min(k, len(documents_ND))
    size = max(1, BLOCK // max(1, len(documents_ND)))
    parts = [
        np.argsort(-(queries_QD[start : start + size] @ documents_ND.T), axis=1, kind="stable")[:, :num] for start in range(0, len(queries_QD), size)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, num), np.int64)


def recall_at(found: np.ndarray, relevant: Relevant, k: int) -> float:
    """Share of a query's relevant documents among the first k."""
    return _mean(found, relevant, lambda row, gains: sum(number in gains for number in row[:k]) / len(gains))


def mrr_at(found: np.ndarray, relevant: Relevant, k: int) -> float:
    """1 / place of the first relevant document, 0 if it is not among the first k."""
    return _mean(found, relevant, lambda row, gains: next((1 / (place + 1) for place, number in enumerate(row[:k]) if number in gains), 0.0))


def ndcg_at(found: np.ndarray, relevant: Relevant, k: int) -> float:
    """Discounted gain of the first k over that of the best order: gain / log2(1 + place), as trec_eval computes it."""

    def one(row: list[int], gains: Mapping[int, float]) -> float:
        return _discounted([gains.get(number, 0.0) for number in row[:k]]) / _discounted(sorted(gains.values(), reverse=True)[:k])

    return _mean(found, relevant, one)


def _discounted(gains: Sequence[float]) -> float:
    return float(sum(gain / np.log2(place + 2) for place, gain in enumerate(gains)))


def _mean(found: np.ndarray, relevant: Relevant, one: _One) -> float:
    if len(found) != len(relevant) or not len(relevant):
        raise ValueError(
            f"rankings of {len(found)} queries and relevant documents of {len(relevant)}: both must be of the same queries, at least one"
        )
    bare = next((number for number, gains in enumerate(relevant) if not gains or min(gains.values()) <= 0), None)
    if bare is not None:
        raise ValueError(f"query {bare} must have a relevant document, and gains above 0; leave out queries that nothing answers")
    return float(np.mean([one(row, gains) for row, gains in zip(found.tolist(), relevant, strict=True)]))
