"""Signs of collapse: how alike a batch's vectors are, and how many dimensions they use. They cost no pass of the model."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pipeline.training import NO_NOTES, Notes, normalise
from pipeline.training.gather import gather_rows, world
from pipeline.training.tape import Vectors, layers_of

MOST = 256
"""Rows that are looked at, of all ranks together: enough to see a collapse, and cheap."""

BINS = 40
"""Of the histograms of similarities, from -1 to 1."""

ALIKE = 0.9
FEWER = 0.25


class Watched(nn.Module):
    """A loss that keeps the vectors it was last given, a part of them, without gradient. Gives what the loss gives."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, queries: Vectors, positives: Vectors, negatives: Vectors | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """As the loss that is watched."""
        most = max(1, MOST // world()[1])
        self._seen = layers_of(queries)[-1][:most].detach().clone(), layers_of(positives)[-1][:most].detach().clone()
        return self.loss(queries, positives, negatives, notes)

    def signs(self) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Of the last batch, numbers and histograms; every rank must call it.

        `cosine_positive`, `cosine_negative`: means of a query with its own and with others' positives; their histograms, in BINS from -1 to 1, are
        `positive` and `negative`. `cosine_documents`: mean of two positives. `effective_rank`: of the positives, exp of the entropy of their
        normalised singular values (Roy and Vetterli, EUSIPCO 2007); 1 is collapse.
        """
        assert self._seen is not None, "no batch yet"
        queries, positives = (gather_rows(normalise(side)) for side in self._seen)
        cosines = queries @ positives.T
        own, others = cosines.diagonal(), _others(cosines)
        singular = torch.linalg.svdvals(positives)
        shares = singular / singular.sum()
        entropy = -torch.special.xlogy(shares, shares).sum()
        numbers = {
            "cosine_positive": float(own.mean()),
            "cosine_negative": float(others.mean()) if len(others) else 0.0,
            "cosine_documents": float(_others(positives @ positives.T).mean()) if len(others) else 0.0,
            "effective_rank": float(entropy.exp()),
        }
        return numbers, {"positive": _histogram(own), "negative": _histogram(others)}


def collapse(first: Mapping[str, float], last: Mapping[str, float]) -> dict[str, str]:
    """What `signs` of the first and of the last look say that a person should see, by a short name; empty if nothing is wrong."""
    found = {}
    if last["cosine_documents"] > ALIKE:
        found["alike"] = f"documents look alike: the mean cosine of two of them is {last['cosine_documents']:.3f}, above {ALIKE:g}"
    if last["effective_rank"] < FEWER * first["effective_rank"]:
        found["few"] = (
            f"vectors use few dimensions: their effective rank is {last['effective_rank']:.1f}, and was {first['effective_rank']:.1f} at first"
        )
    if last["cosine_positive"] <= last["cosine_negative"]:
        found["lost"] = "queries are no nearer to their own documents than to others'"
    return found


def _others(square: Tensor) -> Tensor:
    """(N * N - N,): what is not on the diagonal."""
    return square[~torch.eye(len(square), dtype=torch.bool, device=square.device)]


def _histogram(cosines: Tensor) -> list[int]:
    counts = torch.histc(cosines.float().cpu().clamp(-1, 1), bins=BINS, min=-1, max=1)
    return [int(count) for count in counts.tolist()]
