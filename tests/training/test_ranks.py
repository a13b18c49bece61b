"""The contract of every loss: the gradient on 1, 2 and 4 ranks is one gradient. And that the check of it finds what breaks it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.testing import check_loss
from pipeline.training import NO_NOTES, held_out, normalise
from pipeline.training.batches import Choice
from pipeline.training.check import Found, check_same, on_this_rank, sample
from pipeline.training.distillation import KL, MarginMSE, StableKL, VectorMSE
from pipeline.training.gather import average_gradients, gather_rows, gather_sizes, largest, mean_over_ranks, world
from pipeline.training.held_out import evaluate
from pipeline.training.infonce import Hardness, InfoNCE, Ramp
from pipeline.training.matryoshka import Ladder, Matryoshka
from pipeline.training.ranks import run_on_ranks
from pipeline.training.siglip import SigLIP
from pipeline.training.sum import Sum
from pipeline.training.temperature import Bias, Temperature
from pipeline.training.triplet import BatchHard, Triplet

LOSSES = {
    "InfoNCE": lambda: InfoNCE(Temperature()),
    "InfoNCE, both directions": lambda: InfoNCE(directions=("query-document", "document-query"), false_negative_margin=0.1),
    "InfoNCE, one denominator": lambda: InfoNCE(
        Temperature(),
        directions=("query-document", "document-query", "query-query", "document-document"),
        softmax="joint",
        hardness=Hardness(Ramp(5.0, 10), mean_one=True),
    ),
    "SigLIP": lambda: SigLIP(Temperature(0.1), Bias(-3.0)),
    "Triplet": lambda: Triplet("soft", distance="euclidean"),
    "BatchHard": BatchHard,
    "VectorMSE": VectorMSE,
    "MarginMSE": MarginMSE,
    "KL": KL,
    "StableKL": StableKL,
    "Sum": lambda: Sum((0.2, InfoNCE(Temperature())), (1.0, KL()), (0.5, MarginMSE())),
    "Matryoshka": lambda: Matryoshka(Sum((1.0, InfoNCE()), (1.0, BatchHard())), (2, 4), per_step=1),
    "Ladder": lambda: Ladder(Matryoshka(InfoNCE(Temperature()), (2,)), ((0, 4), (1, 6)), alignment=0.5),
}


def all_losses(sizes):
    """Every loss on one rank's rows, in one start of processes."""
    return {name: on_this_rank(make().double(), sample(3 if name == "Ladder" else None), sizes) for name, make in LOSSES.items()}


def check_ranks(one, parts):
    """What each rank found is what one process did; a vector's gradient is averaged over ranks."""
    vectors = [torch.cat(grads) / len(parts) for grads in zip(*(part.vectors for part in parts), strict=True)]
    for part in parts:
        check_same(one, Found(part.value, vectors, part.parameters), len(parts))


@pytest.mark.parametrize("sizes", [[6, 6], [7, 5], [12, 0], [3, 0, 6, 3]], ids=str)
def test_every_loss_has_one_gradient_on_any_number_of_ranks(sizes):
    ranks = run_on_ranks(all_losses, len(sizes), sizes)
    for name, one in all_losses([12]).items():
        check_ranks(one, [rank[name] for rank in ranks])


def uneven_losses(sizes):
    """Every loss where the first seven rows have no negative, and the others one: a rank's negatives are as its rows have them, or none at all."""
    rank, _ = world()
    start = sum(sizes[:rank])
    found = {}
    for name, make in LOSSES.items():
        whole = sample(3 if name == "Ladder" else None)
        has = torch.zeros_like(whole.notes.has_negative)
        has[7:, 0] = True
        notes = replace(whole.notes, has_negative=has).part(start, start + sizes[rank])
        most = int(notes.has_negative.any())
        notes = replace(notes, has_negative=notes.has_negative[:, :most], teacher_scores=notes.teacher_scores[:, : 1 + most])
        notes = replace(notes, negative_keys=notes.negative_keys[:, :most] if most else None)
        sides = [
            [layer[start : start + sizes[rank]] for layer in (side if name == "Ladder" else [side])] for side in (whole.queries, whole.positives)
        ]
        leaves = [[layer.clone().requires_grad_() for layer in side] for side in sides]
        negatives = [
            layer[start : start + sizes[rank], :most].clone().requires_grad_()
            for layer in (whole.negatives if name == "Ladder" else [whole.negatives])
        ]
        given = [tuple(side) if name == "Ladder" else side[0] for side in [*leaves, negatives]]
        loss = make().double()
        value = loss(given[0], given[1], given[2] if most else None, notes)
        own = list(loss.parameters())
        value.backward()
        # A rank without negatives is not asked for their gradients, but its collectives must be those of the others.
        vectors, parameters = ([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in part] for part in (leaves[0] + leaves[1], own))
        found[name] = Found(mean_over_ranks(value), vectors, [mean_over_ranks(grad) for grad in parameters])
    return found


@pytest.mark.parametrize("sizes", [[6, 6], [3, 4, 0, 5]], ids=str)
def test_a_rank_whose_rows_have_no_negatives_gives_the_gradient_of_one_process(sizes):
    """Triplet, MarginMSE and KL raised an error on that rank alone, for which the others waited."""
    ranks = run_on_ranks(uneven_losses, len(sizes), sizes)
    for name, one in uneven_losses([12]).items():
        check_ranks(one, [rank[name] for rank in ranks])


def balance(sizes):
    """Norms of the gradients of a contrastive and a distillation loss, of this rank's rows."""
    found = {name: on_this_rank(LOSSES[name]().double(), sample(), sizes) for name in ("InfoNCE", "KL")}
    return {name: torch.cat([grad.flatten() for grad in part.vectors]) for name, part in found.items()}


def test_contrastive_and_distillation_keep_their_balance():
    """Another project takes one over all rows and the other over local rows: on 8 ranks it divides the contrastive weight by 8 unasked."""
    one = balance([12])
    ranks = run_on_ranks(balance, 2, [6, 6])
    ratios = [
        norms["InfoNCE"] / norms["KL"]
        for norms in (
            {name: one[name].norm() for name in one},
            {name: torch.cat([rank[name] for rank in ranks]).norm() for name in one},
        )
    ]
    assert abs(ratios[1] / ratios[0] - 1) < 1e-10


def shortcut(queries, positives, negatives=None, notes=NO_NOTES):
    """The common shortcut: gathered without gradient, own rows put back, the loss of all rows on every rank."""
    rank, ranks = world()
    sides = []
    for side in (normalise(queries), normalise(positives)):
        parts = [torch.empty_like(side) for _ in range(ranks)]
        if ranks > 1:
            dist.all_gather(parts, side.detach().contiguous())
        parts[rank] = side
        sides.append(torch.cat(parts))
    return torch.nn.functional.cross_entropy(sides[0] @ sides[1].T / 0.05, torch.arange(len(sides[0])))


def rank_mean(queries, positives, negatives=None, notes=NO_NOTES):
    """Gathered with gradient, but each rank's rows averaged by themselves."""
    rank, _ = world()
    own = torch.arange(len(queries)) + sum(gather_sizes(len(queries), queries.device)[:rank])
    return torch.nn.functional.cross_entropy(normalise(queries) @ gather_rows(normalise(positives)).T / 0.05, own)


def compare_shortcut(sizes):
    return on_this_rank(shortcut, sample(), sizes)


def test_the_shortcut_gives_half_of_the_gradient_on_two_ranks_and_the_check_says_so():
    ranks = run_on_ranks(compare_shortcut, 2, [6, 6])
    one = on_this_rank(shortcut, sample(), [12])
    vectors = [torch.cat(grads) / 2 for grads in zip(*(part.vectors for part in ranks), strict=True)]
    with pytest.raises(AssertionError, match=r"its norm 0\.5 of the right one"):
        check_same(one, type(one)(one.value, vectors, []), 2)


def test_check_loss_passes_what_keeps_the_contract():
    check_loss(InfoNCE(Temperature()).double())


def test_check_loss_finds_an_average_over_ranks_instead_of_rows():
    with pytest.raises(AssertionError, match="global_mean"):
        check_loss(rank_mean)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda q, p, n, notes: q @ p.T, "scalar"),
        (lambda q, p, n, notes: q.sum() * 0, "no gradient"),
        (lambda q, p, n, notes: q.sum() / 0, "the loss is"),
    ],
)
def test_check_loss_finds_what_is_no_loss(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_loss(broken)


def partly_used():
    """Of three parameters one is used by both ranks, one by the second, one by none; averaged twice."""
    rank, _ = world()
    both, second, none = (torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.float32))
    both.grad = torch.full((3,), 1.0 + rank)
    if rank == 1:
        second.grad = torch.full((3,), 4.0, dtype=torch.float64)
    for _ in range(2):
        average_gradients([both, second, none])
    return both.grad, second.grad, none.grad


def test_gradients_are_averaged_once_also_of_what_a_rank_did_not_use():
    for both, second, none in run_on_ranks(partly_used, 2):
        assert both.tolist() == [1.5] * 3
        assert second.tolist() == [2.0] * 3
        assert none is None


def disagreeing():
    """What ranks tell and decide by, where their own numbers differ."""
    rank, _ = world()
    held_out._of = lambda reader, k: {f"recall@{k}": 0.5 + 1e-9 * rank}
    metrics = evaluate(SimpleNamespace(modules=[]), None, [SimpleNamespace(name="held")], choice=Choice(), k=3, chunk=None)
    return largest([0.25 * rank, -float(rank)], torch.device("cpu")), metrics


def test_ranks_tell_of_the_slowest_and_decide_by_the_firsts_metrics():
    """Machines of two kinds may rank near ties differently: ranks would then disagree on which weights are the best, and wait for each other."""
    for worst, metrics in run_on_ranks(disagreeing, 2):
        assert worst == [0.25, 0.0]
        assert metrics == {"held/recall@3": 0.5, "recall@3": 0.5}
