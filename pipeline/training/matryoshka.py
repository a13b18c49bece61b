"""Vectors whose first numbers are vectors too: one loss at several widths (Matryoshka), or at several layers and widths (the ladder).

Both act on the finished vectors, so with GradCache they cost no further pass of the encoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.training import NO_NOTES, Notes, normalise
from pipeline.training.blocks import Tensors, sum_over_rows
from pipeline.training.columns import gather_columns
from pipeline.training.gather import global_mean

Layers = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cuts:
    """Where vectors are trained beside the last layer and the full width."""

    layers: tuple[int, ...] = ()
    """Of the model, counted from 1, rising."""
    widths: tuple[int, ...] = ()


class Matryoshka(nn.Module):
    """sum_m w_m * loss(normalise(e[:m])) over `widths` and the full width (arXiv 2205.13147, eq. 1).

    `widths`: below the full one, which always takes part with weight 1. `weights`: of the widths, 1 each if None. `per_step`: how many of
    the widths are drawn at each step, the same on all ranks: from `seed` and `Notes.step`; None takes all.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        widths: tuple[int, ...],
        *,
        weights: tuple[float, ...] | None = None,
        per_step: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.rungs = list(zip(widths, weights or (1.0,) * len(widths), strict=True))
        self.cuts = Cuts(widths=tuple(widths))
        self.per_step = per_step
        self.seed = seed

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        _check_widths([width for width, _ in self.rungs], queries.shape[1])
        total = self.loss(queries, positives, negatives, notes)
        for place in drawn(len(self.rungs), self.per_step, self.seed, notes.step):
            width, weight = self.rungs[place]
            total = total + weight * self.loss(*_cut((queries, positives, negatives), width), notes)
        return total


class Ladder(nn.Module):
    """2D Matryoshka: the loss at the last layer and full width, and at each rung (layer, width) of a fixed ladder.

    Takes tuples of vectors, one for each layer that the encoder gives, shallow to deep. Give them after the model's final norm, and none of
    the embedding layer: at the last token that is a constant. `rungs`: places in the tuple and widths, such as ((0, 64), (1, 128)), None for
    the full width. `weights`: 1 each if None. A fixed ladder is Starbucks' (arXiv 2410.13230), which found it better than drawing, even at full
    size; `per_step` draws rungs, as 2DMSE does (arXiv 2402.14776), the same on all ranks. `alignment`: weight of KL(softmax(S / temperature) ||
    softmax(S_rung / temperature)), S a query's cosines with all documents at the top, without gradient, S_rung at the rung; over
    similarities and not over coordinates, which are no distribution. A job file names `grid`.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        rungs: tuple[tuple[int, int | None], ...],
        *,
        weights: tuple[float, ...] | None = None,
        alignment: float = 0.0,
        temperature: float = 0.05,
        per_step: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.rungs = list(zip(rungs, weights or (1.0,) * len(rungs), strict=True))
        self.cuts: Cuts | None = None
        self.alignment = alignment
        self.temperature = temperature
        self.per_step = per_step
        self.seed = seed

    def forward(self, queries: Layers, positives: Layers, negatives: Layers | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar. queries and positives: tuples of (B, D), negatives of (B, K, D), one for each layer."""
        self._check(queries)
        top = _layer((queries, positives, negatives), -1)
        total = self.loss(*top, notes)
        for place in drawn(len(self.rungs), self.per_step, self.seed, notes.step):
            (layer, width), weight = self.rungs[place]
            cut = _cut(_layer((queries, positives, negatives), layer), width)
            total = total + weight * self.loss(*cut, notes)
            if self.alignment:
                total = total + weight * self.alignment * self._align(top, cut, notes)
        return total

    def _align(self, top: "Sides", rung: "Sides", notes: Notes) -> Tensor:
        with torch.no_grad():
            top_queries, top_positives, top_negatives = (None if side is None else normalise(side.detach()) for side in top)
            assert top_queries is not None and top_positives is not None
            teacher = gather_columns(top_queries, top_positives, top_negatives, notes).documents
        student = gather_columns(*rung, notes).documents

        def block(start: int, rows: Tensors, shared: Tensors) -> Tensor:
            (top, query), (teacher, student) = rows, shared
            log_wanted = (top @ teacher.T / self.temperature).log_softmax(dim=1)
            log_found = (query @ student.T / self.temperature).log_softmax(dim=1)
            return torch.nn.functional.kl_div(log_found, log_wanted, reduction="sum", log_target=True)

        with torch.autocast(student.device.type, enabled=False):
            return global_mean(sum_over_rows(block, len(student), (top_queries, rung[0]), (teacher, student)), len(rung[0]))

    def _check(self, layers: Layers) -> None:
        if not isinstance(layers, tuple):
            raise ValueError("Ladder takes tuples of vectors, one for each layer; let the encoder give them, or use Matryoshka")
        for (layer, width), _ in self.rungs:
            if not 0 <= layer < len(layers):
                raise ValueError(f"rung ({layer}, {width}) names layer {layer}, but the encoder gives {len(layers)}: 0 to {len(layers) - 1}")
            if width is not None and not 0 < width <= layers[layer].shape[1]:
                raise ValueError(f"rung ({layer}, {width}) is wider than the vectors of its layer, {layers[layer].shape[1]}")


def grid(
    loss: Callable[..., Tensor],
    layers: Sequence[int],
    widths: Sequence[int] = (),
    *,
    alignment: float = 0.0,
    temperature: float = 0.05,
    per_step: int | None = None,
    seed: int = 0,
) -> Ladder:
    """The ladder of every layer at every width, as a job file names it: any of them can then be read alone.

    `layers`: of the model, counted from 1, below the last one, which always takes part; so does the full width. See `Ladder` for the others.
    """
    below = sorted(set(layers))
    if not below or below[0] < 1:
        raise ValueError(f"layers={list(layers)} must name one layer at least, counted from 1")
    rungs = [(place, width) for place in range(len(below) + 1) for width in (*sorted(widths), None)]
    ladder = Ladder(loss, tuple(rungs[:-1]), alignment=alignment, temperature=temperature, per_step=per_step, seed=seed)
    ladder.cuts = Cuts(tuple(below), tuple(sorted(widths)))
    return ladder


def drawn(num: int, per_step: int | None, seed: int, step: int | None) -> list[int]:
    """Which of `num` rungs take part at a step: all, or `per_step` of them, from seed and step alone, so the same on every rank."""
    if per_step is None:
        return list(range(num))
    if step is None:
        raise ValueError("rungs are drawn for each step, so Notes.step must be given")
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFF_FFFF_FFFF_FFFF)
    places: list[int] = torch.randperm(num, generator=generator)[:per_step].tolist()
    return sorted(places)


Sides = tuple[Tensor, Tensor, Tensor | None]


def _cut(sides: Sides, width: int | None) -> Sides:
    queries, positives, negatives = sides
    return normalise(queries[..., :width]), normalise(positives[..., :width]), None if negatives is None else normalise(negatives[..., :width])


def _layer(sides: tuple[Layers, Layers, Layers | None], layer: int) -> Sides:
    queries, positives, negatives = sides
    return queries[layer], positives[layer], None if negatives is None else negatives[layer]


def _check_widths(widths: list[int], dim: int) -> None:
    wrong = [width for width in widths if not 0 < width < dim]
    if wrong:
        raise ValueError(f"widths {wrong} must lie between 1 and {dim - 1}; the full width, {dim}, always takes part")
