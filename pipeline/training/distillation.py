"""Learning from a teacher: from its vectors, from its scores of each row's positive and negatives.

Scores come in `Notes.teacher_scores` (B, 1 + K), vectors in `Notes.teacher_queries` and `teacher_positives`.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.training import NO_NOTES, Notes, normalise, to_float
from pipeline.training.blocks import Tensors, sum_over_rows
from pipeline.training.columns import Columns, check_shapes, gather_columns, own_negatives
from pipeline.training.gather import global_mean
from pipeline.training.temperature import check_temperature

Similarity = Literal["cosine", "dot"]


class VectorMSE(nn.Module):
    """Mean squared difference from the teacher's vectors, of queries, positives, or both, whichever the notes hold."""

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        pairs = [(queries, notes.teacher_queries), (positives, notes.teacher_positives)]
        given = [(to_float(student), teacher) for student, teacher in pairs if teacher is not None]
        if not given:
            raise ValueError("VectorMSE needs Notes.teacher_queries or Notes.teacher_positives")
        wrong = [(tuple(student.shape), tuple(teacher.shape)) for student, teacher in given if student.shape != teacher.shape]
        if wrong:
            raise ValueError(f"vectors {wrong[0][0]} and the teacher's {wrong[0][1]} must have one shape; add a projection to the encoder")
        terms = [(student - teacher.to(student)).square().mean(dim=1) for student, teacher in given]
        return global_mean(torch.stack(terms).mean(dim=0).sum(), len(queries))


class MarginMSE(nn.Module):
    """Squared difference of the margins s(q, p) - s(q, n) of student and teacher, averaged over negatives (arXiv 2010.02666, eq. 6)."""

    def __init__(self, *, similarity: Similarity = "dot") -> None:
        super().__init__()
        self.similarity: Similarity = similarity

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        negatives, has = own_negatives(queries, positives, negatives, notes)
        teacher = _teacher(has, notes)
        student = _scores(queries, positives, negatives, self.similarity)
        margins = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:]).to(student)
        return global_mean(margins.where(has, 0.0).square().sum(), int(has.sum()))


class KL(nn.Module):
    """KL(softmax(teacher / teacher_temperature) || softmax(student / temperature)) over each row's positive and own negatives.

    It is not multiplied by temperature squared; weigh it in `Sum`.
    """

    def __init__(self, temperature: float = 0.05, *, teacher_temperature: float = 1.0, similarity: Similarity = "cosine") -> None:
        super().__init__()
        check_temperature(temperature)
        check_temperature(teacher_temperature)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.similarity: Similarity = similarity

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        negatives, has = own_negatives(queries, positives, negatives, notes)
        there = _with_positive(has)
        student = _scores(queries, positives, negatives, self.similarity) / self.temperature
        teacher = (_teacher(has, notes).to(student) / self.teacher_temperature).masked_fill(~there, -math.inf)
        log_student = student.masked_fill(~there, -math.inf).log_softmax(dim=1)
        log_teacher = teacher.log_softmax(dim=1)
        terms = log_teacher.exp() * (log_teacher - log_student).where(there, 0.0)
        return global_mean(terms.sum(), len(queries))


class StableKL(nn.Module):
    """LLM-Embedder's stabilised distillation (arXiv 2310.07554, section 3.2): each candidate in turn is the answer.

    The row's candidates in the order of the teacher's scores, best first: softmax(teacher)_i * cross-entropy of candidate i among the documents
    of all ranks, without the row's better candidates. Averaged over rows as InfoNCE is, so their balance is the same on any number of ranks.
    """

    def __init__(self, temperature: float = 0.05, *, teacher_temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature)
        check_temperature(teacher_temperature)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        there = _with_positive(check_shapes(queries, positives, negatives, notes))
        with torch.autocast(queries.device.type, enabled=False):
            queries = normalise(queries)
            columns = gather_columns(queries, normalise(positives), None if negatives is None else normalise(negatives), notes)
            scores = (_teacher(there[:, 1:], notes).to(queries) / self.teacher_temperature).masked_fill(~there, -math.inf)
            weights, order = scores.softmax(dim=1).sort(dim=1, descending=True, stable=True)

            def block(start: int, rows: Tensors, shared: Tensors) -> Tensor:
                (query,), (documents,) = rows, shared
                here = slice(start, start + len(query))
                own = columns.own(start, len(query))
                candidates = _candidates(columns, own, there[here]).gather(1, order[here])
                logits = _logits(columns, start, own, query @ documents.T / self.temperature)
                return _in_turn(logits, candidates, weights[here], there[here].sum(dim=1))

            return global_mean(sum_over_rows(block, len(columns.documents), (queries,), (columns.documents,)), len(queries))


def _in_turn(logits: Tensor, candidates: Tensor, weights: Tensor, numbers: Tensor) -> Tensor:
    """Sum over rows and candidates; candidates are columns (b, 1 + K), best first, of which the first `numbers` of a row are there."""
    total = logits.new_zeros(())
    for place in range(candidates.shape[1]):
        column = candidates[:, place, None]
        terms = weights[:, place] * (logits.logsumexp(dim=1) - logits.gather(1, column)[:, 0])
        total = total + terms.where(place < numbers, 0.0).sum()
        # The last one stays: a row of -inf alone has no gradient.
        better = torch.zeros_like(logits, dtype=torch.bool).scatter(1, column, (place + 1 < numbers)[:, None])
        logits = logits.masked_fill(better, -math.inf)
    return total


def _logits(columns: Columns, start: int, own: Tensor, logits: Tensor) -> Tensor:
    """Without documents of other rows that fit this one, and without any of them where a row wants none."""
    others = own[:, None] != columns.owners
    for mask in (columns.fits(own, logits.shape[1]), columns.out_of_reach(start, own, logits.shape[1])):
        if mask is not None:
            logits = logits.masked_fill(mask & others, -math.inf)
    return logits


def _candidates(columns: Columns, own: Tensor, there: Tensor) -> Tensor:
    """The columns of the rows' own positive and negatives, (b, 1 + K); where none is there, the positive's."""
    owned = own[:, None] == columns.owners
    candidates = own[:, None].repeat(1, there.shape[1])
    candidates[there] = owned.nonzero()[:, 1]
    return candidates


def _with_positive(has: Tensor) -> Tensor:
    return torch.cat([has.new_ones((len(has), 1)), has], dim=1)


def _teacher(has: Tensor, notes: Notes) -> Tensor:
    wanted = (len(has), 1 + has.shape[1])
    if notes.teacher_scores is None or notes.teacher_scores.shape != wanted:
        given = "none" if notes.teacher_scores is None else str(tuple(notes.teacher_scores.shape))
        raise ValueError(f"Notes.teacher_scores must be {wanted}, the positive's and then the negatives'; given: {given}")
    return notes.teacher_scores


def _scores(queries: Tensor, positives: Tensor, negatives: Tensor, similarity: Similarity) -> Tensor:
    """The student's scores of each row's positive and negatives: (B, 1 + K)."""
    candidates = torch.cat([positives[:, None], negatives], dim=1)
    prepare = normalise if similarity == "cosine" else to_float
    return (prepare(queries)[:, None] * prepare(candidates)).sum(dim=-1)
