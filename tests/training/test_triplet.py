"""The triplet family against loops over rows and negatives."""

import pytest
import torch

from pipeline.training import Notes
from pipeline.training.triplet import BatchHard, Triplet
from tests.training.test_infonce import ROWS, assert_same, batch, cosine


def distance(left, right, kind):
    return 1 - cosine(left, right) if kind == "cosine" else (left - right).norm()


def hinge(difference, margin):
    return torch.log1p(difference.exp()) if margin == "soft" else (difference + margin).clamp(min=0)


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
@pytest.mark.parametrize("margin", [0.5, "soft"])
def test_triplets_of_each_row_with_each_of_its_negatives(kind, margin):
    queries, positives, negatives = sides = batch()
    has = torch.tensor([[True, True], [False, False], [True, False], [False, True], [True, True], [False, False]])
    terms = [
        hinge(distance(queries[i], positives[i], kind) - distance(queries[i], negatives[i, k], kind), margin)
        for i in range(ROWS)
        for k in range(2)
        if has[i, k]
    ]
    assert len(terms) == 6
    assert_same(Triplet(margin, distance=kind)(*sides, Notes(has_negative=has)), sum(terms) / len(terms), sides)


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
@pytest.mark.parametrize("margin", [0.5, "soft"])
def test_batch_hard_takes_the_farthest_positive_and_the_nearest_negative(kind, margin):
    queries, positives, negatives = sides = batch()
    groups = torch.tensor([0, 1, 0, 3, 1, 0])
    terms = []
    for i in range(ROWS):
        far = max((distance(queries[i], positives[j], kind) for j in range(ROWS) if groups[i] == groups[j]), key=torch.Tensor.item)
        others = [positives[j] for j in range(ROWS) if groups[i] != groups[j]] + [negatives[j, k] for j in range(ROWS) for k in range(2)]
        near = min((distance(queries[i], other, kind) for other in others), key=torch.Tensor.item)
        terms.append(hinge(far - near, margin))
    assert_same(BatchHard(margin, distance=kind)(*sides, Notes(groups=groups)), sum(terms) / ROWS, sides)


def test_triplet_without_negatives_says_what_to_use():
    queries, positives, _ = batch()
    with pytest.raises(ValueError, match="BatchHard"):
        Triplet()(queries, positives)


def test_equal_vectors_have_a_finite_gradient():
    same = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    for loss in (Triplet(distance="euclidean"), BatchHard(distance="euclidean")):
        (grad,) = torch.autograd.grad(loss(same, same, same[:, None]), same)
        assert torch.isfinite(grad).all()
