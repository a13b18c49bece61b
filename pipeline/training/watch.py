"""Signs of collapse: how alike a batch's vectors are, and how many dimensions they use. They cost no pass of the model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.training import NO_NOTES, Notes, normalise
from pipeline.training.gather import gather_rows, world
from pipeline.training.tape import Vectors, layers_of

MOST = 256
"""Rows that are looked at, of all ranks together: enough to see a collapse, and cheap."""


class Watched(nn.Module):
    """A loss that keeps the vectors it was last given, a part of them, without gradient. Gives what the loss gives."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, queries: Vectors, positives: Vectors, negatives: Vectors | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """As the loss that is watched."""
        most = MOST // world()[1]
        self._seen = layers_of(queries)[-1][:most].detach().clone(), layers_of(positives)[-1][:most].detach().clone()
        return self.loss(queries, positives, negatives, notes)

    def signs(self) -> dict[str, float]:
        """Of the last batch; every rank must call it. `cosine_positive`, `cosine_negative`: means of a query with its own and with others' positives.

        `effective_rank`: of the positives, exp of the entropy of their normalised singular values (Roy and Vetterli, EUSIPCO 2007); 1 is collapse.
        """
        assert self._seen is not None, "no batch yet"
        queries, positives = (gather_rows(normalise(side)) for side in self._seen)
        cosines = queries @ positives.T
        num = len(cosines)
        own = cosines.diagonal().sum()
        singular = torch.linalg.svdvals(positives)
        shares = singular / singular.sum()
        entropy = -torch.special.xlogy(shares, shares).sum()
        return {
            "cosine_positive": float(own / num),
            "cosine_negative": float((cosines.sum() - own) / max(1, num * num - num)),
            "effective_rank": float(entropy.exp()),
        }
