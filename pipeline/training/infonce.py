"""InfoNCE: the softmax over documents (arXiv 1807.03748, eq. 4; in-batch negatives), exact over ranks and without an N x N matrix."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pipeline.training import NO_NOTES, Notes, normalise
from pipeline.training.blocks import Tensors, sum_over_rows
from pipeline.training.columns import Columns, gather_columns
from pipeline.training.gather import global_mean
from pipeline.training.temperature import Temperature, check_temperature, scale_of

Direction = Literal["query-document", "document-query", "query-query", "document-document"]
Softmax = Literal["each", "joint"]
Weighted = Literal["in-batch", "own", "all"]


@dataclass(frozen=True)
class Hardness:
    """Makes hard negatives count more: alpha * s_ij, without gradient, is added to a negative's logit.

    `alpha`: a number, or a function of the step such as `Ramp(5.0, 3_000)`; 9 with "in-batch" is LLaVE (arXiv 2503.04812,
    eq. 5), 5 with "own" (a row's explicit negatives) EmbeddingGemma (arXiv 2509.20354). `mean_one`: the weights
    exp(alpha * s_ij) of a row are divided by their mean, so that hard negatives gain what easy ones lose.

    With a ramp and `mean_one` this is OUR RECONSTRUCTION of PEG's progressive weighting (arXiv 2311.11691), whose formula we found in no text.
    """

    alpha: float | Callable[[int], float]
    on: Weighted = "all"
    mean_one: bool = False

    def at(self, step: int | None) -> float:
        """Alpha at a step."""
        if not callable(self.alpha):
            return self.alpha
        if step is None:
            raise ValueError("alpha follows a schedule, so Notes.step must be given")
        return self.alpha(step)


@dataclass(frozen=True)
class Ramp:
    """A schedule: 0 at step 0, linear to `highest` at `steps`, then constant."""

    highest: float
    steps: int

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return self.highest * min(1.0, step / self.steps)


class InfoNCE(nn.Module):
    """-log softmax of the positive's cosine / temperature among all documents of all ranks, averaged over rows.

    `directions` with softmax "each": one softmax for "query-document", and for "document-query" if named, averaged (CLIP: both). "joint": the
    comparisons of all directions in one denominator (GTE, arXiv 2308.03281, eq. 3: all four).

    A false negative is dropped: one of the query's other answers, or of its group (`Notes`), or a cosine above the positive's by more than
    `false_negative_margin` (Qwen3-Embedding, arXiv 2506.05176: 0.1; None: none dropped by cosine). `hardness` acts on "query-document".
    """

    def __init__(
        self,
        temperature: float | Temperature = 0.05,
        *,
        directions: tuple[Direction, ...] = ("query-document",),
        softmax: Softmax = "each",
        false_negative_margin: float | None = None,
        hardness: Hardness | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        _check_directions(directions, softmax)
        self.temperature = temperature
        self.directions = directions
        self.softmax = softmax
        self.false_negative_margin = false_negative_margin
        self.hardness = hardness

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        with torch.autocast(queries.device.type, enabled=False):
            queries, positives = normalise(queries), normalise(positives)
            columns = gather_columns(queries, positives, None if negatives is None else normalise(negatives), notes)
            alpha = self.hardness.at(notes.step) if self.hardness else 0.0

            def block(start: int, rows: Tensors, shared: Tensors) -> Tensor:
                *sides, scale = shared
                return self._terms(_Rows(columns, start, columns.own(start, len(rows[0])), *rows, *sides), scale, alpha).sum()

            num_cells = (len(columns.documents) + columns.num_rows) * len(self.directions)
            total = sum_over_rows(block, num_cells, (queries, positives), (columns.queries, columns.documents, scale_of(self.temperature, queries)))
            return global_mean(total, len(queries))

    def _terms(self, rows: "_Rows", scale: Tensor, alpha: float) -> Tensor:
        """The loss of each row, (b,)."""
        cosine = (rows.query * rows.positive).sum(dim=1)
        logits = [self._logits(direction, rows, cosine.detach(), scale, alpha) for direction in self.directions]
        if self.softmax == "joint":
            logits = [torch.cat(logits, dim=1)]
        return torch.stack([part.logsumexp(dim=1) for part in logits]).mean(dim=0) - cosine * scale

    def _logits(self, direction: Direction, rows: "_Rows", positive: Tensor, scale: Tensor, alpha: float) -> Tensor:
        """(b, columns) of one direction, -inf where a column is dropped. `positive`: cosines of the rows' own pairs, (b,)."""
        cosines = rows.cosines(direction)
        # Scaled before -inf is written: the gradient of the scale would be 0 * inf.
        logits = cosines * scale
        dropped = rows.dropped(direction, cosines.detach(), positive, self.false_negative_margin)
        if self.hardness is not None and alpha and direction == "query-document":
            logits = logits + rows.hardness(self.hardness, alpha, cosines.detach(), dropped)
        return logits if dropped is None else logits.masked_fill(dropped, -math.inf)


@dataclass(frozen=True)
class _Rows:
    """A block of b rows: their numbers among all ranks' rows, their vectors, and what they are compared with."""

    columns: Columns
    start: int
    own: Tensor
    query: Tensor
    positive: Tensor
    queries: Tensor
    documents: Tensor

    def cosines(self, direction: Direction) -> Tensor:
        """(b, N) against queries or (b, N + M) against documents."""
        side, other = direction.split("-")
        return (self.query if side == "query" else self.positive) @ (self.queries if other == "query" else self.documents).T

    def dropped(self, direction: Direction, cosines: Tensor, positive: Tensor, margin: float | None) -> Tensor | None:
        """bool (b, columns): what is no negative for a row, other than its own pair, which stays where the direction has it."""
        num = cosines.shape[1]
        masks = [self.columns.out_of_reach(self.start, self.own, num)]
        if direction != "document-query":
            masks.append(self.columns.fits(self.own, num))
        if direction != "query-document":
            masks.append(self.columns.fits_back(self.own, num))
        if margin is not None:
            masks.append(cosines > positive[:, None] + margin)
        crossing = direction in ("query-document", "document-query")
        if not crossing:
            masks.append(self.own[:, None] == self.columns.owners[:num])
        dropped = None
        for mask in masks:
            if mask is not None:
                dropped = mask if dropped is None else dropped | mask
        return dropped & ~self.columns.is_own(self.own, num) if crossing and dropped is not None else dropped

    def hardness(self, hardness: Hardness, alpha: float, cosines: Tensor, dropped: Tensor | None) -> Tensor:
        """What is added to the logits, (b, documents): 0 at positives and at negatives that are not weighted."""
        owned = self.own[:, None] == self.columns.owners
        weighted = ~self.columns.is_own(self.own, len(self.columns.owners))
        if hardness.on != "all":
            weighted &= owned if hardness.on == "own" else ~owned
        if dropped is not None:
            weighted &= ~dropped
        added = alpha * cosines
        if hardness.mean_one:
            log_mean = added.masked_fill(~weighted, -math.inf).logsumexp(dim=1) - weighted.sum(dim=1).clamp(min=1).to(added).log()
            added = added - log_mean[:, None]
        return added.masked_fill(~weighted, 0.0)


def _check_directions(directions: tuple[Direction, ...], softmax: Softmax) -> None:
    unknown = set(directions) - set(get_args(Direction))
    if unknown or "query-document" not in directions or softmax not in get_args(Softmax):
        raise ValueError(
            f"directions={directions} must hold 'query-document' and others of {get_args(Direction)}; softmax={softmax!r} is 'each' or 'joint'"
        )
    if softmax == "each" and set(directions) & {"query-query", "document-document"}:
        raise ValueError("'query-query' and 'document-document' hold no positive, so they have no softmax of their own; use softmax='joint'")
