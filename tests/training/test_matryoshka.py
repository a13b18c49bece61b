"""Matryoshka and the ladder against the plain loss of cut vectors."""

import pytest
import torch
from torch.nn.functional import normalize

from pipeline.training import Notes
from pipeline.training.check import sample
from pipeline.training.infonce import InfoNCE
from pipeline.training.matryoshka import Ladder, Matryoshka, drawn
from pipeline.training.triplet import Triplet
from tests.training.test_infonce import assert_same, batch


@pytest.mark.parametrize("loss", [InfoNCE(0.1), Triplet(distance="euclidean")])
def test_widths_are_added_each_of_norm_one(loss):
    sides = batch()
    wanted = (
        loss(*sides)
        + 2.0 * loss(*(normalize(side[..., :2], dim=-1) for side in sides))
        + 0.5 * loss(*(normalize(side[..., :4], dim=-1) for side in sides))
    )
    assert_same(Matryoshka(loss, (2, 4), weights=(2.0, 0.5))(*sides), wanted, sides)


def test_the_full_width_and_wider_are_refused_as_widths():
    with pytest.raises(ValueError, match="between 1 and 4"):
        Matryoshka(InfoNCE(), (2, 5))(*batch())


def layers(num=3):
    whole = sample(num)
    sides = [tuple(layer.clone().requires_grad_() for layer in side) for side in (whole.queries, whole.positives, whole.negatives)]
    return sides, whole.notes


def test_the_ladder_adds_its_rungs_to_the_top():
    sides, notes = layers()
    loss = InfoNCE(0.1)
    wanted = loss(*(side[-1] for side in sides), notes)
    wanted = wanted + loss(*(side[0][..., :2] for side in sides), notes) + 3.0 * loss(*(side[2][..., :4] for side in sides), notes)
    assert_same(
        Ladder(loss, ((0, 2), (2, 4)), weights=(1.0, 3.0))(*sides, notes),
        wanted,
        [leaf for side in sides for leaf in (side[0], side[2])],
    )


def test_alignment_draws_rungs_to_the_top_which_it_leaves_alone():
    (queries, positives, negatives), _ = layers(2)
    loss = InfoNCE(0.1)
    plain, aligned = (Ladder(loss, ((0, 3),), alignment=weight, temperature=0.2)(queries, positives, negatives) for weight in (0.0, 0.7))
    total = 0
    for i in range(len(queries[0])):
        top, rung = [], []
        for layer, cells, width in ((1, top, 8), (0, rung, 3)):
            vectors = [*positives[layer], *negatives[layer].flatten(0, 1)]
            cells += [torch.cosine_similarity(queries[layer][i, :width], vector[:width], dim=0) / 0.2 for vector in vectors]
        wanted, found = torch.stack(top).detach().softmax(0), torch.stack(rung).softmax(0)
        total = total + (wanted * (wanted / found).log()).sum()
    assert_same(aligned, plain + 0.7 * total / len(queries[0]), [*queries, *positives, *negatives])


def test_draws_follow_seed_and_step_alone():
    assert drawn(5, None, 0, None) == [0, 1, 2, 3, 4]
    found = [drawn(5, 2, 0, step) for step in range(200)]
    assert found == [drawn(5, 2, 0, step) for step in range(200)]
    assert found != [drawn(5, 2, 1, step) for step in range(200)]
    assert all(len(set(places)) == 2 for places in found)
    counts = torch.bincount(torch.tensor(found).flatten(), minlength=5)
    assert counts.min() > 50, "each of the five is drawn about 80 times"
    with pytest.raises(ValueError, match=r"Notes\.step"):
        drawn(5, 2, 0, None)


def test_drawn_widths_leave_the_others_out():
    sides = batch()
    loss = InfoNCE(0.1)
    (place,) = drawn(3, 1, 0, 7)
    wanted = Matryoshka(loss, ((1, 2, 4)[place],))(*sides)
    assert_same(Matryoshka(loss, (1, 2, 4), per_step=1)(*sides, Notes(step=7)), wanted, sides)


@pytest.mark.parametrize(("rungs", "message"), [(((3, 2),), "names layer 3"), (((0, 9),), "wider"), (((-1, 2),), "names layer -1")])
def test_rungs_that_are_not_there_are_refused(rungs, message):
    sides, _ = layers()
    with pytest.raises(ValueError, match=message):
        Ladder(InfoNCE(), rungs)(*sides)


def test_a_ladder_of_one_tensor_says_what_it_takes():
    with pytest.raises(ValueError, match="tuples"):
        Ladder(InfoNCE(), ((0, 2),))(*batch())
