"""The triplet family: a negative shall be farther away than the positive, by a margin (FaceNet, arXiv 1503.03832, eq. 1)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from pipeline.training import NO_NOTES, Notes, normalise, to_float
from pipeline.training.blocks import Tensors, sum_over_rows
from pipeline.training.columns import gather_columns, own_negatives
from pipeline.training.gather import global_mean

Distance = Literal["cosine", "euclidean"]
Margin = float | Literal["soft"]


class Triplet(nn.Module):
    """max(0, d(query, positive) - d(query, negative) + margin), averaged over the negatives of all rows; BatchHard needs none of their own.

    `distance`: 1 - cosine, or the Euclidean distance of the vectors as they come. `margin` "soft": log(1 + exp(difference))
    in place of the hinge (arXiv 1703.07737, section 2). Every row of every rank counts by its number of negatives.
    """

    def __init__(self, margin: Margin = 0.3, *, distance: Distance = "cosine") -> None:
        super().__init__()
        self.margin: Margin = margin
        self.distance: Distance = distance

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        negatives, has = own_negatives(queries, positives, negatives, notes)
        queries, positives, negatives = (_prepare(side, self.distance) for side in (queries, positives, negatives))
        near = _distance(queries, positives, self.distance)
        far = _distance(queries[:, None], negatives, self.distance)
        # A flag times, and not an index: a gradient reaches all vectors also where a rank has no negative.
        return global_mean((_hinge(near[:, None] - far, self.margin) * has).sum(), int(has.sum()))


class BatchHard(nn.Module):
    """Triplet of each query with its farthest positive and its nearest negative among the documents of all ranks (arXiv 1703.07737, eq. 5).

    Positives are the documents that answer the row's query, or are of its group (`Notes`), at least its own.
    """

    def __init__(self, margin: Margin = 0.3, *, distance: Distance = "cosine") -> None:
        super().__init__()
        self.margin: Margin = margin
        self.distance: Distance = distance

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        queries, positives = _prepare(queries, self.distance), _prepare(positives, self.distance)
        columns = gather_columns(queries, positives, None if negatives is None else _prepare(negatives, self.distance), notes)

        def block(start: int, rows: Tensors, shared: Tensors) -> Tensor:
            (query,), (documents,) = rows, shared
            own = columns.own(start, len(query))
            far = _pairwise(query, documents, self.distance)
            others = columns.fits(own, len(documents))
            fits = columns.is_own(own, len(documents))
            fits = fits if others is None else fits | others
            unwanted = columns.out_of_reach(start, own, len(documents))
            left_out = torch.zeros_like(fits) if unwanted is None else unwanted
            positive = far.masked_fill(~fits | left_out, -math.inf).amax(dim=1)
            negative = far.masked_fill(fits | left_out, math.inf).amin(dim=1)
            return _hinge(positive - negative, self.margin).sum()

        return global_mean(sum_over_rows(block, len(columns.documents), (queries,), (columns.documents,)), len(queries))


def _hinge(difference: Tensor, margin: Margin) -> Tensor:
    return softplus(difference) if margin == "soft" else relu(difference + float(margin))


def _prepare(vectors: Tensor, distance: Distance) -> Tensor:
    return normalise(vectors) if distance == "cosine" else to_float(vectors)


def _distance(left: Tensor, right: Tensor, distance: Distance) -> Tensor:
    """Along the last dimension. The square root is kept from 0, where it has no gradient."""
    if distance == "cosine":
        return 1 - (left * right).sum(dim=-1)
    return (left - right).square().sum(dim=-1).clamp(min=1e-12).sqrt()


def _pairwise(left: Tensor, right: Tensor, distance: Distance) -> Tensor:
    """(b, columns)."""
    products = left @ right.T
    if distance == "cosine":
        return 1 - products
    return (left.square().sum(dim=1)[:, None] + right.square().sum(dim=1) - 2 * products).clamp(min=1e-12).sqrt()
