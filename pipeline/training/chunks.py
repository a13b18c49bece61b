"""How the rows of a batch are cut into what the encoder computes at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rows:
    """So many rows at once, in the order they come."""

    num: int

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"Rows({self.num}): a chunk must hold at least 1 row")

    def cut(self, rows: Sequence[Any]) -> list[list[int]]:
        """Row numbers of each chunk."""
        return [list(range(start, min(start + self.num, len(rows)))) for start in range(0, len(rows), self.num)]


@dataclass(frozen=True)
class Budget:
    """As many rows at once as keep (rows x the costliest of them) within `most`: what padded batches cost. A row beyond it goes alone.

    `cost`: of a row, such as its number of tokens (text and image). Rows are put together by cost, costliest first: if
    memory does not suffice, that shows at once.
    """

    most: int
    cost: Callable[[Any], int]

    def cut(self, rows: Sequence[Any]) -> list[list[int]]:
        """Row numbers of each chunk."""
        costs = [self.cost(row) for row in rows]
        chunks: list[list[int]] = []
        for place in sorted(range(len(rows)), key=lambda row: -costs[row]):
            if chunks and (len(chunks[-1]) + 1) * costs[chunks[-1][0]] <= self.most:
                chunks[-1].append(place)
            else:
                chunks.append([place])
        return chunks


Chunk = Rows | Budget
