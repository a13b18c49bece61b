"""The order of one data set's rows in one epoch: drawn from (seed, name, epoch, row), in blocks of like length without rows that clash.

The stream of a data set is its epochs one after the other, cut into blocks: what a batch takes of it at once. A block may hold the end of
one epoch and the beginning of the next, so that every row comes once an epoch and every block is full.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.pairs.keys import hash64

LOOK_BLOCKS = 64
"""How far head and tail of an epoch look for rows that do not clash, in blocks."""

WINDOWS = 4
"""Windows an epoch is cut into at least."""

TRIES, MORE_TRIES = 64, 2**16
"""Swaps that are tried for each row that clashes, on average, and in addition for all together. Hopeless rows must not cost minutes."""

ROW_TRIES = 2048
"""Swaps that are tried for one row."""


@dataclass(frozen=True)
class Source:
    """N rows of a data set, as far as their order depends on them.

    `row_keys`: int64 (N,), hashes of the rows' ids. `costs`: (N,), tokens or an estimate; None: all alike. `clash_rows`, `clash_keys`: (M,), M pairs
    of a row and a key (its group, a document, a cluster of near-duplicates, whatever the caller hashes): rows that share a key clash.
    `weight`: None: as many as it has rows.
    """

    name: str
    row_keys: np.ndarray
    weight: float | None = None
    costs: np.ndarray | None = None
    clash_rows: np.ndarray | None = None
    clash_keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row_keys)


class Clashes:
    """For each row the keys that other rows have too, as numbers from 0."""

    def __init__(self, source: Source) -> None:
        num = len(source)
        rows = np.zeros(0, np.int64) if source.clash_rows is None else np.asarray(source.clash_rows, np.int64)
        keys = np.zeros(0, np.int64) if source.clash_keys is None else np.asarray(source.clash_keys, np.int64)
        order = np.lexsort((rows, keys))
        rows, keys = rows[order], keys[order]
        again = np.zeros(len(rows), bool)
        again[1:] = (rows[1:] == rows[:-1]) & (keys[1:] == keys[:-1])
        rows, keys = rows[~again], keys[~again]
        alike = np.zeros(len(rows) + 1, bool)
        alike[1:-1] = keys[1:] == keys[:-1]
        shared = alike[1:] | alike[:-1]
        codes = np.cumsum(~alike[:-1])[shared] - 1
        rows = rows[shared]
        order = np.argsort(rows, kind="stable")
        self.codes = codes[order]
        self.starts = np.searchsorted(rows[order], np.arange(num + 1))
        self.num_codes = int(codes.max()) + 1 if len(codes) else 0

    def of(self, row: int) -> list[int]:
        """The keys of a row that others share."""
        found: list[int] = self.codes[self.starts[row] : self.starts[row + 1]].tolist()
        return found

    def within(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in `rows`, and the keys there: one pair for each shared key."""
        counts = self.starts[rows + 1] - self.starts[rows]
        places = np.repeat(np.arange(len(rows)), counts)
        offsets = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        return places, self.codes[self.starts[rows[places]] + offsets]


@dataclass(frozen=True)
class Epochs:
    """The epochs of a source in blocks of `block` rows, at most N. `window`: blocks among which rows are sorted by cost; 1: not sorted."""

    source: Source
    seed: int
    block: int
    window: int
    clashes: Clashes

    def order(self, epoch: int) -> np.ndarray:
        """All rows, once each, in the order of their turn: int64 (N,)."""
        num = len(self.source)
        head_size = -epoch * num % self.block
        drawn = self._drawn(epoch)
        tail = self._tail(epoch, drawn)
        head = np.zeros(0, np.int64)
        if head_size:
            left = drawn[~np.isin(drawn, tail)]
            head = self._choose(left, head_size, self._tail(epoch - 1, self._drawn(epoch - 1)))
        body = drawn[~np.isin(drawn, np.concatenate([head, tail]))]
        return np.concatenate([head, self._blocks(body, epoch).ravel(), tail])

    def _drawn(self, epoch: int) -> np.ndarray:
        return np.argsort(mixed(self.source.row_keys, self._salt(epoch, "rows")), kind="stable")

    def _salt(self, epoch: int, purpose: str) -> int:
        return hash64(str(self.seed), self.source.name, str(epoch), purpose)

    def _tail(self, epoch: int, drawn: np.ndarray) -> np.ndarray:
        """The rows that begin the block which the next epoch fills. They depend on this epoch alone, so that no epoch needs all before it."""
        size = (len(drawn) - (-epoch * len(drawn) % self.block)) % self.block
        return self._choose(drawn[::-1], size, np.zeros(0, np.int64))

    def _choose(self, drawn: np.ndarray, size: int, beside: np.ndarray) -> np.ndarray:
        """The first `size` rows that clash neither with one another nor with those beside, nor are among them; if there are too few, others."""
        used = {code for row in beside.tolist() for code in self.clashes.of(row)}
        taken = set(beside.tolist())
        chosen: list[int] = []
        passed: list[int] = []
        for row in drawn[: size + LOOK_BLOCKS * self.block].tolist():
            if len(chosen) == size:
                break
            codes = self.clashes.of(row)
            if row in taken or not used.isdisjoint(codes):
                passed.append(row)
                continue
            used.update(codes)
            chosen.append(row)
        return np.array(chosen + passed[: size - len(chosen)], np.int64)

    def _blocks(self, body: np.ndarray, epoch: int) -> np.ndarray:
        """(blocks, block), of like cost within a block, blocks in a drawn order."""
        # Sorted as a whole, a small data set would fall into the same blocks every epoch.
        window = min(self.window, len(body) // self.block // WINDOWS)
        if self.source.costs is not None and window > 1:
            places = np.arange(len(body))
            body = body[np.lexsort((places, self.source.costs[body], places // (window * self.block)))]
        blocks = body.reshape(-1, self.block)
        spread(blocks, self.clashes, self._salt(epoch, "swaps"))
        return blocks[np.argsort(mixed(np.arange(len(blocks)), self._salt(epoch, "blocks")), kind="stable")]


def mixed(values: np.ndarray, salt: int) -> np.ndarray:
    """A well-mixed uint64 of each value under a salt: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16), applied twice."""
    found = values.astype(np.int64).view(np.uint64) ^ np.uint64(salt % 2**64)
    for _ in range(2):
        found = found + np.uint64(0x9E3779B97F4A7C15)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found = found ^ (found >> np.uint64(31))
    return found


def spread(blocks: np.ndarray, clashes: Clashes, salt: int) -> None:
    """Swap rows between blocks, in place, until none clash within a block, as far as can be; to near blocks first, which are of like cost."""
    num, size = blocks.shape
    places, codes = clashes.within(blocks.ravel())
    displaced = _displaced(places, codes, size, num)
    if not len(displaced):
        return
    cells, counts = np.unique(places // size * clashes.num_codes + codes, return_counts=True)
    present = dict(zip(cells.tolist(), counts.tolist(), strict=True))
    budget = TRIES * len(displaced) + MORE_TRIES
    starts = mixed(displaced, salt)
    for place, start in zip(displaced.tolist(), starts.tolist(), strict=True):
        if budget <= 0:
            return
        budget -= _swap(blocks, divmod(place, size), start, clashes, present)


def _displaced(places: np.ndarray, codes: np.ndarray, size: int, num: int) -> np.ndarray:
    """Places whose row clashes with an earlier one of its block, for a key that there are not more of than blocks."""
    order = np.lexsort((places, codes))
    places, codes = places[order], codes[order]
    _, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    again = (codes[1:] == codes[:-1]) & (places[1:] // size == places[:-1] // size)
    return np.unique(places[1:][again & (counts[inverse[1:]] <= num)])


def _swap(blocks: np.ndarray, at: tuple[int, int], start: int, clashes: Clashes, present: dict[int, int]) -> int:
    """Swap the row at (block, place) with one of another block where both fit. How many were tried; `present`: rows of each block and key."""
    num, size = blocks.shape
    block, place = at
    row = int(blocks[block, place])
    own = clashes.of(row)
    if all(present[block * clashes.num_codes + code] < 2 for code in own):
        return 0
    for tried in range(min(ROW_TRIES, 8 * num, 2 * num * size)):
        there = block + (1 + tried // 8) * (1 if tried % 2 else -1)
        if not 0 <= there < num:
            continue
        slot = (start + tried // 2) % size
        other = int(blocks[there, slot])
        others = clashes.of(other)
        if _fits(own, others, there, clashes, present) and _fits(others, own, block, clashes, present):
            _move(own, block, there, clashes, present)
            _move(others, there, block, clashes, present)
            blocks[block, place], blocks[there, slot] = other, row
            return tried + 1
    return ROW_TRIES


def _fits(coming: list[int], leaving: list[int], block: int, clashes: Clashes, present: dict[int, int]) -> bool:
    return all(present.get(block * clashes.num_codes + code, 0) - (code in leaving) <= 0 for code in coming)


def _move(codes: Iterable[int], before: int, after: int, clashes: Clashes, present: dict[int, int]) -> None:
    for code in codes:
        present[before * clashes.num_codes + code] -= 1
        present[after * clashes.num_codes + code] = present.get(after * clashes.num_codes + code, 0) + 1
