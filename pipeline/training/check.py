"""A loss' gradient on one process and on several ranks, compared; what `pipeline.testing.check_loss` does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.training import Notes
from pipeline.training.gather import mean_over_ranks, world
from pipeline.training.ranks import run_on_ranks

ROWS, NEGATIVES, DIM = 12, 2, 8
SIZES = {1: [ROWS], 2: [7, 5], 4: [3, 0, 6, 3]}
"""Rows of each rank, by the number of ranks: some are left out, on a rank perhaps all."""


@dataclass(frozen=True)
class Sample:
    """A batch of vectors, float64: (ROWS, DIM), and (ROWS, NEGATIVES, DIM); a tuple of these for a loss that takes layers."""

    queries: Tensor | tuple[Tensor, ...]
    positives: Tensor | tuple[Tensor, ...]
    negatives: Tensor | tuple[Tensor, ...]
    notes: Notes


@dataclass(frozen=True)
class Found:
    """A loss' value, and its gradients: at the vectors, row by row, and at the loss' own parameters."""

    value: Tensor
    vectors: list[Tensor]
    parameters: list[Tensor]


def sample(num_layers: int | None = None) -> Sample:
    """Rows with 0 to 2 negatives, two that share a document, two with another answer in the batch, a teacher's scores and vectors.

    `num_layers`: of the tuples; None: no tuple.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)

    queries = [draw(ROWS) for _ in range(num_layers or 1)]
    positives = [query + draw(ROWS) for query in queries]
    negatives = [query[:, None] + 2 * draw(ROWS, NEGATIVES) for query in queries]
    keys = torch.arange(ROWS)
    keys[-1] = 0
    negative_keys = torch.arange(100, 100 + ROWS * NEGATIVES).view(ROWS, NEGATIVES)
    # A row whose query is answered by another one's positive too, and one by another one's negative.
    answers = keys[:, None].repeat(1, 2)
    answers[2, 1], answers[8, 1] = keys[9], negative_keys[1, 0]
    notes = Notes(
        has_negative=torch.rand(ROWS, NEGATIVES, generator=generator) < 0.7,
        positive_keys=keys,
        negative_keys=negative_keys,
        answer_keys=answers,
        teacher_scores=torch.randn(ROWS, 1 + NEGATIVES, generator=generator, dtype=torch.float64),
        teacher_queries=draw(ROWS),
        teacher_positives=draw(ROWS),
        step=3,
    )
    if num_layers is None:
        return Sample(queries[0], positives[0], negatives[0], notes)
    return Sample(tuple(queries), tuple(positives), tuple(negatives), notes)


def on_ranks(loss: Callable[..., Tensor], batch: Sample, num_ranks: int) -> Found:
    """The loss of a batch on several ranks, and the gradients that DDP would make of them."""
    if num_ranks == 1:
        return on_this_rank(loss, batch, SIZES[1])
    parts: list[Found] = run_on_ranks(on_this_rank, num_ranks, loss, batch, SIZES[num_ranks])
    vectors = [torch.cat(grads) / num_ranks for grads in zip(*(part.vectors for part in parts), strict=True)]
    return Found(parts[0].value, vectors, parts[0].parameters)


def on_this_rank(loss: Callable[..., Tensor], batch: Sample, sizes: list[int]) -> Found:
    """The loss, averaged over ranks, and the gradients at this rank's rows."""
    rank, _ = world()
    start = sum(sizes[:rank])
    stop = start + sizes[rank]
    sides = [_leaves(side, start, stop) for side in (batch.queries, batch.positives, batch.negatives)]
    value = loss(
        *(side if isinstance(whole, tuple) else side[0] for side, whole in zip(sides, _sides(batch), strict=True)), batch.notes.part(start, stop)
    )
    assert isinstance(value, Tensor) and value.dim() == 0, f"a loss must give a scalar tensor, not {getattr(value, 'shape', type(value).__name__)}"
    assert torch.isfinite(value), f"the loss is {value.item()}"
    own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    leaves = [leaf for side in sides for leaf in side]
    grads = torch.autograd.grad(value, [*leaves, *own], allow_unused=True, materialize_grads=True)
    return Found(mean_over_ranks(value), list(grads[: len(leaves)]), [mean_over_ranks(grad) for grad in grads[len(leaves) :]])


def check_same(one: Found, several: Found, num_ranks: int) -> None:
    """AssertionError, with the ratio of the gradients, unless both are the same to 1e-10 of the largest."""
    for what, wanted, found in (("vectors", one.vectors, several.vectors), ("parameters", one.parameters, several.parameters)):
        if not wanted:
            continue
        wanted_flat, found_flat = (torch.cat([grad.reshape(-1).double() for grad in grads]) for grads in (wanted, found))
        worst = float((found_flat - wanted_flat).abs().max())
        ratio = float(found_flat.norm() / wanted_flat.norm().clamp(min=1e-300))
        assert worst <= 1e-10 * max(1.0, float(wanted_flat.abs().max())), (
            f"the gradient at the loss' {what} on {num_ranks} ranks is not that of one process: off by {worst:.2g}, its norm {ratio:.4g} of "
            "the right one; gather with gradient (pipeline.training.gather.gather_rows), compute own rows only, and reduce by global_mean"
        )
    assert torch.allclose(one.value, several.value, rtol=1e-10), (
        f"the average over {num_ranks} ranks of the loss is {float(several.value):.6g}; in one process it is {float(one.value):.6g}"
    )


def _sides(batch: Sample) -> list[Tensor | tuple[Tensor, ...]]:
    return [batch.queries, batch.positives, batch.negatives]


def _leaves(side: Tensor | tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
    return tuple(layer[start:stop].clone().requires_grad_() for layer in (side if isinstance(side, tuple) else (side,)))
