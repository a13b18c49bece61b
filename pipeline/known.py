"""What a table already holds, small enough for a driver's memory: 16 bytes a row, whatever the ids look like.

Ids and versions are kept as 64-bit hashes (SipHash, by pandas). Two ids of one hash are to be expected with probability 0.03 in a billion rows,
3e-8 in a million. No row of another id is ever replaced or deleted for it, because commits go by the ids themselves. What it can cost: an item that
comes in beside its twin becomes a reject (`duplicate_id`); one that comes later is embedded again on every run, or, if the versions are equal too,
passes for unchanged; and of the two one that has vanished stays.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

NEW, CHANGED, UNCHANGED, DUPLICATE = 0, 1, 2, 3


HASHED_AT_ONCE = 2**15
"""Strings that are Python objects at the same time. In the processor's caches they are hashed twice as fast, too."""


def hash64(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """uint64 hashes (N,) of N strings; the same on every machine and in every run. Beside them it needs no memory to speak of."""
    hashes = np.empty(len(values), np.uint64)
    done = 0
    for chunk in values.chunks if isinstance(values, pa.ChunkedArray) else [values]:
        for start in range(0, len(chunk), HASHED_AT_ONCE):
            strings = chunk.slice(start, HASHED_AT_ONCE).to_numpy(zero_copy_only=False)
            hashes[done : done + len(strings)] = pd.util.hash_array(strings.astype(object), categorize=False)
            done += len(strings)
    return hashes


def added_up(hashes: Iterable[int]) -> int:
    """The sum of 64-bit hashes, in 64 bits: the same for the same items in any order."""
    return sum(hashes) % 2**64


def repeated(values: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    """How often each string stands that stands more than once. Equal hashes only say where to look: the strings are compared."""
    hashes = hash64(values)
    suspects = repeated_hashes(hashes.copy())
    if len(suspects) == 0:
        return {}
    found = pc.value_counts(values.filter(pa.array(np.isin(hashes, suspects)))).to_pylist()
    return {entry["values"]: entry["counts"] for entry in found if entry["counts"] > 1}


def repeated_hashes(hashes: np.ndarray) -> np.ndarray:
    """Those that stand more than once in an array (N,), which is sorted in its place."""
    hashes.sort()
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


@dataclass
class Known:
    """A map from id hash to version hash that only grows: sorted segments, the newest first to answer."""

    segments: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def __len__(self) -> int:
        """Entries, those that a later addition hides included."""
        return sum(len(ids) for ids, _ in self.segments)

    def add(self, ids: np.ndarray, versions: np.ndarray) -> None:
        """Add id and version hashes (N,). A later addition of the same id wins."""
        if len(ids) == 0:
            return
        order = np.argsort(ids, kind="stable")
        self.segments.append((ids[order], versions[order]))
        # Merging whenever the last segment has outgrown the one before keeps the number of segments logarithmic.
        while len(self.segments) > 1 and len(self.segments[-1][0]) * 2 > len(self.segments[-2][0]):
            self._merge_last_two()

    def _merge_last_two(self) -> None:
        (new_ids, new_versions), (old_ids, old_versions) = self.segments.pop(), self.segments.pop()
        keep = ~member(old_ids, new_ids)
        ids = np.concatenate([old_ids[keep], new_ids])
        versions = np.concatenate([old_versions[keep], new_versions])
        order = np.argsort(ids, kind="stable")
        self.segments.append((ids[order], versions[order]))

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For id hashes (N,): whether each is known (N,) bool, and its version hash (N,), 0 where it is not."""
        found, versions = np.zeros(len(ids), bool), np.zeros(len(ids), np.uint64)
        # Asked in order, neighbours are looked for in the same part of memory: several times as fast with millions.
        order = np.argsort(ids)
        asked = ids[order]
        for known_ids, known_versions in reversed(self.segments):
            place = np.searchsorted(known_ids, asked)
            place[place == len(known_ids)] = 0
            hit = (known_ids[place] == asked) & ~found
            versions[hit] = known_versions[place[hit]]
            found |= hit
        return _scattered(found, order), _scattered(versions, order)

    def classify(self, ids: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """NEW, CHANGED or UNCHANGED (N,) for id and version hashes (N,): the one rule of what is already embedded."""
        found, known = self.find(ids)
        return np.where(~found, NEW, np.where(known == versions, UNCHANGED, CHANGED))


def _scattered(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """What stands at each place (N,) if `values` (N,) were taken by `order` (N,)."""
    result = np.empty_like(values)
    result[order] = values
    return result


def without(values: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """The different ones of `values` that are not in `gone`, sorted. As np.setdiff1d, at a tenth of its cost for millions of hashes."""
    ordered = np.sort(values)
    left: np.ndarray = ordered[~member(ordered, np.sort(gone))]
    first = np.ones(len(left), bool)
    first[1:] = left[1:] != left[:-1]
    return np.asarray(left[first])


def member(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Whether each of `values` (N,) is in the sorted array `among`."""
    if len(among) == 0:
        return np.zeros(len(values), bool)
    place = np.searchsorted(among, values)
    place[place == len(among)] = 0
    return np.asarray(among[place] == values)


WHOLE = ""
"""Stands for all containers of a source where one is named."""


@dataclass
class Contents:
    """What a vector table and its rejects hold when a run is planned."""

    own: Known
    """Rows of this run's source."""
    others: Known
    """Rows of other sources in the same table."""
    rejected: Known
    """Items of this source that were rejected, in the version that was rejected; without one where the reason may pass by itself."""
    version: int
    """The table's version that was read; 0 if there is no table."""
    retries: bool = False
    """Whether what was rejected before is tried again."""
    units: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of each container of this source: its rows in the table, and a digest of their chunks. Under WHOLE: of all of them."""
    duplicates: Known = field(default_factory=Known)
    """Items of this source that were rejected because another one has the same id, in the version that was rejected."""
    bereft: frozenset[str] = frozenset()
    """Containers with a duplicate of an item that is gone: theirs is to take its place, so they are read again."""
    doubles: Mapping[str, int] = field(default_factory=dict)
    """Of a container with duplicates: the id hashes of those that stand in the rejects under its name, added up."""
    holders: dict[str, set[str]] = field(default_factory=dict)
    """Of a container with duplicates: those that the rows with these ids came from. Theirs may take the place of what goes there."""
    settled: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Id hashes, sorted, of this source's rows of containers that need no reading: theirs are the items that came first."""

    def classify(self, ids: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """As `Known.classify`; an item that another source brought in the same version is unchanged too, in another one DUPLICATE.

        DUPLICATE is also what a container that is being read has in common with one that needs no reading.
        """
        codes = self.own.classify(ids, versions)
        elsewhere = self.others.classify(ids, versions)
        codes = np.where((codes == NEW) & (elsewhere == UNCHANGED), UNCHANGED, codes)
        codes = np.where((codes == NEW) & (elsewhere == CHANGED), DUPLICATE, codes)
        return np.where(member(ids, self.settled), DUPLICATE, codes)

    def is_rejected(self, ids: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """Whether each item (N,) was rejected before, in this very version, and is not to be tried again."""
        if self.retries:
            return np.zeros(len(ids), bool)
        return np.asarray(self.rejected.classify(ids, versions) == UNCHANGED)

    def is_known_duplicate(self, ids: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """Whether each item (N,) stands in the rejects as a duplicate, in this very version."""
        return np.asarray(self.duplicates.classify(ids, versions) == UNCHANGED)
