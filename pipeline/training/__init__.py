"""The training core: losses, GradCache, and the protocol between them. torch only; `pipeline.testing.check_loss` checks the contract.

A loss sees the rows of its own rank and gathers what it compares them with itself (`pipeline.training.gather`). Its contract: the
average over ranks of what it returns is the loss of the whole batch, and the average over ranks of the gradients is the gradient of the
whole batch, on 1, 2 and 4 ranks, also where ranks hold different numbers of rows. DDP and FSDP average, so they are exact.
A rank may hold no row (all of its rows were left out), or none with negatives. All must give the same kinds of `Notes`.
"""

from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Notes:
    """What is known of a rank's B rows and their K negatives beside the vectors. A loss reads what it needs and leaves the rest.

    `has_negative`: bool (B, K), which negatives are there where rows have different numbers of them; None: all.
    `positive_keys`, `negative_keys`: int64 (B,) and (B, K); equal keys are the same document, so a document's id or a hash of its content.
    `answer_keys`: int64 (B, P); the keys of all documents that answer the row's query, its positive's among them, one of them again where a row
    has fewer than P. None: its positive's alone.
    `groups`: int64 (B,); any query and any positive of one group fit each other (the same query twice, the same class).
    `in_batch_negatives`: bool (B,); where False, a row is compared with its own negatives only. None: True everywhere.
    `teacher_scores`: (B, 1 + K), a teacher's scores of the positive and the negatives; what stands where no negative is is not read.
    `teacher_queries`, `teacher_positives`: (B, D), a teacher's vectors.
    `step`: of the training, for schedules and draws.
    """

    has_negative: Tensor | None = None
    positive_keys: Tensor | None = None
    negative_keys: Tensor | None = None
    answer_keys: Tensor | None = None
    groups: Tensor | None = None
    in_batch_negatives: Tensor | None = None
    teacher_scores: Tensor | None = None
    teacher_queries: Tensor | None = None
    teacher_positives: Tensor | None = None
    step: int | None = None

    def part(self, start: int, stop: int) -> "Notes":
        """Those of the rows from start to stop."""
        return self.rows(torch.arange(start, stop))

    def rows(self, places: Tensor) -> "Notes":
        """Those of the rows at these places."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[places] for name, value in values.items() if isinstance(value, Tensor)})  # type: ignore[arg-type]


NO_NOTES = Notes()


class Loss(Protocol):
    """Turns the vectors of a rank's rows into one number."""

    def __call__(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar. queries and positives: (B, D), row i of one belongs to row i of the other; negatives: (B, K, D), of row i."""


def to_float(vectors: Tensor) -> Tensor:
    """At least float32: similarities and softmax in half precision lose the hard negatives. float64 stays."""
    return vectors if vectors.dtype in (torch.float32, torch.float64) else vectors.float()


def normalise(vectors: Tensor) -> Tensor:
    """Norm 1 along the last dimension, at least float32."""
    return torch.nn.functional.normalize(to_float(vectors), dim=-1)
