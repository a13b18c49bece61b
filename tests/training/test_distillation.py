"""Distillation against loops over rows and candidates."""

import pytest
import torch

from pipeline.training import Notes
from pipeline.training.distillation import KL, MarginMSE, StableKL, VectorMSE
from pipeline.training.infonce import InfoNCE
from pipeline.training.sum import Sum
from tests.training.test_infonce import DIM, ROWS, assert_same, batch, cosine

HAS = torch.tensor([[True, True], [False, False], [True, False], [False, True], [True, True], [False, False]])
TEACHER = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
NOTES = Notes(has_negative=HAS, teacher_scores=TEACHER.masked_fill(torch.cat([torch.zeros(ROWS, 1, dtype=torch.bool), ~HAS], dim=1), torch.nan))


def candidates(positives, negatives, row):
    """(vector, the teacher's score) of each candidate that is there."""
    return [(positives[row], TEACHER[row, 0])] + [(negatives[row, k], TEACHER[row, 1 + k]) for k in range(2) if HAS[row, k]]


def test_vectors_are_drawn_to_the_teachers():
    queries, positives, _ = batch()
    teacher = torch.randn(2, ROWS, DIM, dtype=torch.float64)
    wanted = sum(((side[i] - of[i]) ** 2).mean() / 2 for side, of in ((queries, teacher[0]), (positives, teacher[1])) for i in range(ROWS)) / ROWS
    notes = Notes(teacher_queries=teacher[0], teacher_positives=teacher[1])
    assert_same(VectorMSE()(queries, positives, None, notes), wanted, (queries, positives))
    with pytest.raises(ValueError, match="projection"):
        VectorMSE()(queries, positives, None, Notes(teacher_queries=teacher[0, :, :3]))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_margins_are_drawn_to_the_teachers(similarity):
    queries, positives, negatives = sides = batch()
    score = cosine if similarity == "cosine" else torch.dot
    terms = []
    for i in range(ROWS):
        (positive, of_positive), *others = candidates(positives, negatives, i)
        terms += [(score(queries[i], positive) - score(queries[i], other) - (of_positive - of)) ** 2 for other, of in others]
    assert_same(MarginMSE(similarity=similarity)(*sides, NOTES), sum(terms) / len(terms), sides)


def test_kl_runs_over_the_candidates_that_are_there():
    queries, positives, negatives = sides = batch()
    total = 0
    for i in range(ROWS):
        found = candidates(positives, negatives, i)
        wanted = (torch.stack([score for _, score in found]) / 0.7).softmax(0)
        student = torch.stack([cosine(queries[i], vector) / 0.1 for vector, _ in found]).softmax(0)
        total = total + (wanted * (wanted / student).log()).sum()
    assert_same(KL(0.1, teacher_temperature=0.7)(*sides, NOTES), total / ROWS, sides)


def test_stable_kl_makes_each_candidate_the_answer_without_its_betters():
    queries, positives, negatives = sides = batch()
    total = 0
    for i in range(ROWS):
        found = sorted(candidates(positives, negatives, i), key=lambda candidate: -candidate[1])
        weights = torch.stack([score for _, score in found]).softmax(0)
        others = [vector for j in range(ROWS) if j != i for vector, _ in candidates(positives, negatives, j)]
        for place, (answer, _) in enumerate(found):
            left = [vector for vector, _ in found[place:]] + others
            logits = torch.stack([cosine(queries[i], vector) / 0.1 for vector in left])
            total = total + weights[place] * (logits.logsumexp(0) - cosine(queries[i], answer) / 0.1)
    assert_same(StableKL(0.1)(*sides, NOTES), total / ROWS, sides)


def test_stable_kl_of_one_row_is_finite():
    queries, positives, negatives = batch()
    notes = NOTES.part(2, 3)
    (grad,) = torch.autograd.grad(StableKL()(queries[2:3], positives[2:3], negatives[2:3], notes), queries)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("loss", [MarginMSE(), KL(), StableKL()])
def test_missing_scores_of_the_teacher_are_refused(loss):
    with pytest.raises(ValueError, match=r"teacher_scores must be \(6, 3\)"):
        loss(*batch())


def test_a_sum_weighs_its_losses():
    sides = batch()
    wanted = 0.2 * InfoNCE()(*sides, NOTES) + 1.5 * KL()(*sides, NOTES)
    found = Sum((0.2, InfoNCE()), (1.5, KL()))(*sides, NOTES)
    assert_same(found, wanted, sides)
