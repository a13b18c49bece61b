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
    documents, `groups`: of the rows, `row_keys`: of the rows' positives; None where not known. `alone`: of this rank's rows,
    those that are compared with their own negatives only.
    """

    queries: Tensor
    documents: Tensor
    owners: Tensor
    offset: int
    keys: Tensor | None
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
        """(b, num_columns), True where a column is as good an answer as the row's own: same key or same group. None: nowhere but at its own.

        `num_columns`: num_rows for queries (which stand for their positives) or positives, all for documents.
        """
        masks = []
        if self.keys is not None:
            masks.append(self.keys[own, None] == self.keys[:num_columns])
        if self.groups is not None:
            same = self.groups[own, None] == self.groups
            masks.append(torch.nn.functional.pad(same, (0, num_columns - self.num_rows)))
        return masks[0] | masks[-1] if masks else None

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
    if notes.positive_keys is not None:
        keys = torch.cat([gather_rows(notes.positive_keys), gather_rows(_negative_keys(notes, has))])
    return Columns(
        queries=gather_rows(queries),
        documents=documents,
        owners=torch.cat([first, gather_rows(owners + offset)]),
        offset=offset,
        keys=keys,
        groups=None if notes.groups is None else gather_rows(notes.groups),
        alone=_alone(notes, has),
    )


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
