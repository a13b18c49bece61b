"""What the rows of a rank are compared with: the queries and documents of all ranks, and which of them are the same."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.training import Notes
from pipeline.training.gather import gather_rows, gather_sizes, world


@dataclass(frozen=True)
class Columns:
    """N queries and N + M documents of all ranks: all positives in the order of their queries, then all negatives.

    `owners`: the row of all ranks that a document belongs to, (N + M,). `offset`: the first row of this rank. `keys`: of the
    documents, `answers` (N, P): of those that answer a row's query, `groups`: of the rows; None where not known. `alone`: of this rank's
    rows, those that are compared with their own negatives only.
    """

    queries: Tensor
    documents: Tensor
    owners: Tensor
    offset: int
    keys: Tensor | None
    answers: Tensor | None
    groups: Tensor | None
    alone: Tensor | None

    @property
    def num_rows(self) -> int:
        """N, of all ranks."""
        return len(self.queries)

    def own(self, start: int, num: int) -> Tensor:
        """The rows of all ranks that this rank's rows start, start + 1, ... are: (num,). A row's positive is the document of the same number."""
        return torch.arange(self.offset + start, self.offset + start + num, device=self.owners.device)

    def is_own(self, own: Tensor, num_columns: int) -> Tensor:
        """(b, num_columns), True at each row's own number: its query among queries, its positive among documents."""
        return own[:, None] == torch.arange(num_columns, device=own.device)

    def fits(self, own: Tensor, num_columns: int) -> Tensor | None:
        """(b, num_columns), True where a column answers the row's query too: one of its answers, or of its group. None: nowhere but at its own.

        `num_columns`: num_rows for queries (which stand for their positives) or positives, all for documents.
        """
        masks = self._same_group(own, num_columns)
        if self.keys is not None and self.answers is not None:
            masks += [column[:, None] == self.keys[:num_columns] for column in self.answers[own].unbind(dim=1)]
        return _either(masks)

    def fits_back(self, own: Tensor, num_columns: int) -> Tensor | None:
        """(b, num_columns), True where the row's positive answers the column's query: columns are queries, or stand for theirs. None: as `fits`."""
        masks = self._same_group(own, num_columns)
        if self.keys is not None and self.answers is not None:
            same = [self.keys[own, None] == column for column in self.answers.unbind(dim=1)]
            masks += [torch.nn.functional.pad(each, (0, num_columns - self.num_rows)) for each in same]
        return _either(masks)

    def _same_group(self, own: Tensor, num_columns: int) -> list[Tensor]:
        if self.groups is None:
            return []
        return [torch.nn.functional.pad(self.groups[own, None] == self.groups, (0, num_columns - self.num_rows))]

    def out_of_reach(self, start: int, own: Tensor, num_columns: int) -> Tensor | None:
        """(b, num_columns), True where a column belongs to another row and the row wants no such negatives. None: nowhere."""
        if self.alone is None:
            return None
        others = own[:, None] != self.owners[:num_columns]
        return others & self.alone[start : start + len(own), None]


def gather_columns(queries: Tensor, positives: Tensor, negatives: Tensor | None, notes: Notes) -> Columns:
    """Gather what this rank's rows are compared with. ValueError where shapes do not fit, or a row has nothing to be compared with."""
    has = check_shapes(queries, positives, negatives, notes)
    flat, owners = _flatten(positives, negatives, has)
    rank, _ = world()
    sizes = gather_sizes(len(queries), queries.device)
    offset = sum(sizes[:rank])
    all_positives, all_negatives = gather_rows(positives), gather_rows(flat)
    documents = torch.cat([all_positives, all_negatives]) if len(all_negatives) else all_positives
    if len(documents) < 2:
        raise ValueError("one row and no negatives: the loss would always be 0; give more rows or negatives")
    first = torch.arange(sum(sizes), device=queries.device)
    keys = None
    if notes.answer_keys is not None and notes.positive_keys is None:
        raise ValueError("answer_keys are given but positive_keys are not: give both, or none")
    if notes.positive_keys is not None:
        keys = torch.cat([gather_rows(notes.positive_keys), gather_rows(_negative_keys(notes, has))])
    answers = None if keys is None else _answers(notes, keys)
    return Columns(
        queries=gather_rows(queries),
        documents=documents,
        owners=torch.cat([first, gather_rows(owners + offset)]),
        offset=offset,
        keys=keys,
        answers=answers,
        groups=None if notes.groups is None else gather_rows(notes.groups),
        alone=_alone(notes, has),
    )


def _answers(notes: Notes, keys: Tensor) -> Tensor:
    """(N, P), of those only that are among `keys`: of hundreds of answers few are in one batch, and each costs a comparison with all columns."""
    assert notes.positive_keys is not None
    own = notes.positive_keys[:, None]
    answers = own if notes.answer_keys is None else notes.answer_keys
    most = max(gather_sizes(answers.shape[1], answers.device))
    answers = gather_rows(torch.cat([answers, own.expand(-1, most - answers.shape[1])], dim=1))
    there = torch.isin(answers, keys)
    first = there.int().argsort(dim=1, descending=True, stable=True)
    return answers.gather(1, first)[:, : int(there.sum(dim=1).max())]


def _either(masks: list[Tensor]) -> Tensor | None:
    found = None
    for mask in masks:
        found = mask if found is None else found | mask
    return found


def check_shapes(queries: Tensor, positives: Tensor, negatives: Tensor | None, notes: Notes) -> Tensor:
    """Which negatives are there, bool (B, K). ValueError, naming the shapes, where vectors and notes do not fit together."""
    if queries.shape != positives.shape or queries.dim() != 2:
        raise ValueError(f"queries {tuple(queries.shape)} and positives {tuple(positives.shape)} must both be (rows, dim)")
    rows, dim = queries.shape
    if negatives is None:
        return torch.zeros((rows, 0), dtype=torch.bool, device=queries.device)
    if negatives.dim() != 3 or (negatives.shape[0], negatives.shape[2]) != (rows, dim):
        raise ValueError(f"negatives {tuple(negatives.shape)} must be ({rows}, negatives of a row, {dim})")
    if notes.has_negative is None:
        return torch.ones(negatives.shape[:2], dtype=torch.bool, device=queries.device)
    if notes.has_negative.shape != negatives.shape[:2]:
        raise ValueError(f"has_negative {tuple(notes.has_negative.shape)} must be {tuple(negatives.shape[:2])}, one flag a negative")
    return notes.has_negative


def own_negatives(queries: Tensor, positives: Tensor, negatives: Tensor | None, notes: Notes) -> tuple[Tensor, Tensor]:
    """This rank's negatives (B, K, D) and which of them are there (B, K), for a loss that compares a row with its own; K is 0 where it has none.

    ValueError on every rank alike if no rank has any, which is not for a single rank to say: the others would wait for it.
    """
    has = check_shapes(queries, positives, negatives, notes)
    if not any(gather_sizes(int(has.sum()), queries.device)):
        raise ValueError(
            "no row of the batch has a negative, and this loss compares a row with its own: give some (`negatives: required` sees to it), or take "
            "a loss that finds them in the batch, such as InfoNCE or BatchHard"
        )
    # A part of the positives and not new zeros: it has a gradient, as on ranks that have negatives.
    return positives[:, None][:, :0] if negatives is None else negatives, has


def _flatten(positives: Tensor, negatives: Tensor | None, has: Tensor) -> tuple[Tensor, Tensor]:
    """The negatives that are there (M, D), row by row, and their rows (M,)."""
    if negatives is None:
        # An empty part of the positives and not new zeros: it has a gradient where negatives have one, which the same model makes.
        return positives[:0], has.nonzero()[:, 0]
    return negatives[has], has.nonzero()[:, 0]


def _negative_keys(notes: Notes, has: Tensor) -> Tensor:
    if notes.negative_keys is None:
        if has.any():
            raise ValueError("positive_keys are given but negative_keys are not, and there are negatives: give both, or none")
        return has.new_zeros(0, dtype=torch.int64)
    return notes.negative_keys[has]


def _alone(notes: Notes, has: Tensor) -> Tensor | None:
    if notes.in_batch_negatives is None:
        return None
    alone = ~notes.in_batch_negatives
    lost = (alone & ~has.any(dim=1)).nonzero()[:, 0].tolist()
    if lost:
        raise ValueError(f"rows {lost[:10]} have in_batch_negatives off and no negative of their own: nothing to learn from; give some or turn it on")
    return alone
