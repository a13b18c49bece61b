"""Bringing staged receipts into the table exactly once, whoever else writes, and keeping account of what became of them.

A refused commit rereads what other writers added, drops the rows that are there now, and tries again. Items that are new
come in by compare-and-swap, items that changed by replacement (`swap` says why these are two commits).
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import JobFailed
from pipeline.known import Contents, Known, added_up, hash64
from pipeline.table import swap
from pipeline.table.at import TableAt, identity_of
from pipeline.table.contents import quoted, rows_with
from pipeline.table.rejects import forget_rejects, record_rejects
from pipeline.table.stage import Receipt, Staged, Staging, metadata_of, read_staged, stage_rows
from schemas.rejects import PASSING, REJECT

ROWS_REPLACED_AT_ONCE = 2**16
"""They are read back whole, to learn their ids."""


@dataclass
class Committed:
    """Counts of items, added up over commits."""

    written: int = 0
    replaced: int = 0
    unchanged: int = 0
    rejected: int = 0
    overtaken: int = 0
    """Of `unchanged`: computed here, but another job committed them first."""
    commits: int = 0


@dataclass
class _Fitted:
    """Staged rows of one chunk as they can be committed now."""

    staged: Staged
    overtaken: np.ndarray
    """Id hashes of the rows that another job committed first."""
    duplicates: pa.Table


@dataclass(frozen=True)
class Exchanged:
    """What an exchange did, beside the rows that came in."""

    removed: int
    """Rows that the containers have no more, or have in another version."""
    revised: int
    """Rows that kept their vector and got other metadata."""


@dataclass
class Committer:
    """One run's commits to one table."""

    at: TableAt
    staging: Staging
    contents: Contents
    own: Known = field(default_factory=Known)
    """What this run has committed, or met and found written: a second item of the same id is a duplicate."""
    foreign: Known = field(default_factory=Known)
    """What other jobs committed since the plan."""
    counts: Committed = field(default_factory=Committed)
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejects of this run, by reason."""
    chunks: Counter[str] = field(default_factory=Counter)
    """Rows of each chunk committed."""
    units: dict[str, list[int]] = field(default_factory=dict)
    """Of each container: items listed, and rejected, in the chunks committed so far."""
    accepted: Counter[str] = field(default_factory=Counter)
    """Of each container: the id hashes of its items that have a row in the table, added up."""
    refused: Known = field(default_factory=Known)
    """Items that this run has met and that are rejects."""
    doubles: Known = field(default_factory=Known)
    """Items that this run has met and whose id another item has."""
    doubles_of: dict[str, np.ndarray] = field(default_factory=dict)
    """Their id hashes, each once, by container."""
    unread: set[str] = field(default_factory=set)
    """Containers that could not be read whole."""
    again: set[str] = field(default_factory=set)
    """Containers with rejects that may pass by themselves: the next run reads them again."""

    def __post_init__(self) -> None:
        self._fragments: set[int] = set()
        self._versions: set[int] = set()
        if self.contents.version:
            planned = lance.dataset(self.at.path(), version=self.contents.version, storage_options=self.at.options)
            self._fragments = _fragment_ids(planned)
        self._identity = identity_of(planned if self.contents.version else self.at.require())

    def alone(self, version: int) -> bool:
        """Whether every version of the table from this run's first commit to `version` is of this run."""
        return all(number in self._versions for number in range(min(self._versions, default=version + 1), version + 1))

    def commit(self, receipts: list[Receipt]) -> None:
        """Make the receipts' rows part of the table, then forget the receipts. Those with an error are passed over."""
        receipts = [receipt for receipt in receipts if receipt.error is None]
        # Rejects first: if the run dies in between, they are known, and the rows are computed or adopted again.
        record_rejects(self.at, [receipt.rejects for receipt in receipts])
        for receipt in receipts:
            self._account_read(receipt)
        inserted = swap.until_accepted(lambda: self._insert([receipt.new for receipt in receipts]), self.at.path())
        self._account(receipts, inserted, replaced=False)
        for some in _groups(receipts):
            replaced = swap.until_accepted(functools.partial(self._replace, [receipt.changed for receipt in some]), self.at.path())
            self._account(some, replaced, replaced=True)
        self._forget(receipts)

    def delete(self, ids: list[str]) -> int:
        """Remove rows by id in one commit; returns how many there were."""

        def attempt() -> int:
            committed, removed = swap.delete(self._newest(), ids, self.at.options)
            if removed:
                self._committed(committed)
            return removed

        return swap.until_accepted(attempt, self.at.path())

    def exchange(self, receipts: list[Receipt], *, units: list[str], wanted: pa.Table) -> Exchanged:
        """Make some containers what they should be, in one commit, so that a reader sees all of the change or none of it.

        `wanted`: `id`, `_version` and those metadata columns that do not come from a vectoriser, of every row that the containers should have.
        Of the table's rows of `units` those that are not wanted go, those whose metadata is another get it; the receipts' rows come in.
        """
        record_rejects(self.at, [receipt.rejects for receipt in receipts])
        for receipt in receipts:
            self._account_read(receipt)
        new, changed, done = swap.until_accepted(lambda: self._exchange(receipts, units, wanted), self.at.path())
        self._account(receipts, new, replaced=False)
        self._account(receipts, changed, replaced=True)
        self._forget(receipts)
        return done

    def _exchange(self, receipts: list[Receipt], units: list[str], wanted: pa.Table) -> tuple[list[_Fitted], list[_Fitted], Exchanged]:
        dataset = self._newest()
        new = self._fit([receipt.new for receipt in receipts], dataset)
        changed = self._fit([receipt.changed for receipt in receipts], dataset)
        fragments = [metadata_of(fragment) for f in [*new, *changed] for fragment in f.staged.fragments]
        of_units = f"_unit IN ({', '.join(map(quoted, units))})"
        stored = dataset.to_table(columns=wanted.column_names, filter=of_units, with_row_address=True)
        place = _places(stored, wanted)
        other = _differs(stored, wanted, place)
        ids = stored["id"].filter(pa.array((place < 0) | other)).to_pylist()
        if other.any():
            rows = _revised(dataset.to_table(filter=of_units), stored.filter(pa.array(other)), wanted.take(pa.array(place[other])))
            fragments += _fragments_of(rows, self.at, dataset)
        if stored.num_rows and (ids or fragments):
            touching = set((stored["_rowaddr"].to_numpy() >> np.uint64(32)).astype(int).tolist())
            self._committed(swap.exchange(dataset, fragments, without=ids, touching=touching, options=self.at.options))
        elif fragments:
            self._committed(swap.insert(dataset, fragments, self.at.options))
        staged = sum(len(f.staged.ids) for f in changed)
        return new, changed, Exchanged(removed=int((place < 0).sum()) - staged, revised=int(other.sum()))

    def _newest(self) -> lance.LanceDataset:
        """The table as it is now. Raises JobFailed if it is another one: its fragments have the same numbers, and this run knows none of its rows."""
        dataset = self.at.require()
        if identity_of(dataset) != self._identity:
            raise JobFailed(f"{self.at.path()} was dropped and made again while this run was at work; run again to fill the new table")
        return dataset

    def _insert(self, parts: list[Staged]) -> list[_Fitted]:
        dataset = self._newest()
        fitted = self._fit(parts, dataset)
        fragments = [metadata_of(fragment) for f in fitted for fragment in f.staged.fragments]
        if fragments:
            self._committed(swap.insert(dataset, fragments, self.at.options))
        return fitted

    def _replace(self, parts: list[Staged]) -> list[_Fitted]:
        dataset = self._newest()
        fitted = self._fit(parts, dataset)
        fragments = [fragment for f in fitted for fragment in f.staged.fragments]
        if not fragments:
            return fitted
        rows = read_staged(fragments, self.at.path(), self.at.options)
        ids = rows["id"].to_pylist()
        there = {item for found in rows_with(dataset, ids).values() for item in found}
        gone = np.array([item not in there for item in ids])
        if gone.any():  # their old rows were deleted meanwhile: they are new now, and only an insert may bring them in
            self._committed(swap.insert(dataset, _fragments_of(rows.filter(pa.array(gone)), self.at, dataset), self.at.options))
            dataset = self._newest()
            fragments, ids = [], [item for item in ids if item in there]
            rest = rows.filter(pa.array(~gone))
            fragments = stage_rows(rest, self.at, dataset) if rest.num_rows else []
        if fragments:
            committed, _ = swap.replace(dataset, [metadata_of(fragment) for fragment in fragments], ids, self.at.options)
            self._committed(committed)
        return fitted

    def _committed(self, dataset: lance.LanceDataset) -> None:
        self._fragments |= _fragment_ids(dataset)
        self._versions.add(dataset.version)
        self.counts.commits += 1

    def _fit(self, parts: list[Staged], dataset: lance.LanceDataset) -> list[_Fitted]:
        """Each part without the rows that must not be written any more."""
        self._absorb(dataset)
        fitted = []
        earlier = Known()
        for staged in parts:
            duplicate, overtaken = self._unwanted(staged, earlier)
            fitted.append(self._without(staged, duplicate, overtaken, dataset))
            earlier.add(staged.ids, staged.versions)
        return fitted

    def _absorb(self, dataset: lance.LanceDataset) -> None:
        """Read the ids of fragments that other writers added (or compacted) since we last looked."""
        added = [f for f in dataset.get_fragments() if f.fragment_id not in self._fragments]
        if added:
            rows = dataset.scanner(columns=["id", "_version"], fragments=added).to_table()
            if rows.num_rows:
                self.foreign.add(hash64(rows["id"]), hash64(rows["_version"]))
            self._fragments |= {f.fragment_id for f in added}

    def _unwanted(self, staged: Staged, earlier: Known) -> tuple[np.ndarray, np.ndarray]:
        """Which staged rows (N,) bool repeat an id of this run or of another source, and which another job wrote first."""
        ids, versions = staged.ids, staged.versions
        duplicate = self.own.find(ids)[0] | earlier.find(ids)[0]
        in_others, other_versions = self.contents.others.find(ids)
        duplicate |= in_others & (other_versions != versions)
        planned_found, planned = self.contents.own.find(ids)
        foreign_found, foreign = self.foreign.find(ids)
        # A fragment may be foreign because compaction moved our own old rows: those are still ours to replace.
        moved = planned_found & (foreign == planned) & (foreign != versions)
        overtaken = (foreign_found & ~moved) | (planned_found & (planned == versions)) | (in_others & (other_versions == versions))
        return duplicate, overtaken & ~duplicate

    def _without(self, staged: Staged, duplicate: np.ndarray, overtaken: np.ndarray, dataset: lance.LanceDataset) -> _Fitted:
        """The part without some of its rows; those that stay are staged again under the same chunk."""
        if not duplicate.any() and not overtaken.any():
            return _Fitted(staged, np.empty(0, np.uint64), REJECT.empty_table())
        rows = read_staged(staged.fragments, self.at.path(), self.at.options)
        keep = ~duplicate & ~overtaken
        kept = rows.filter(pa.array(keep))
        fragments = stage_rows(kept, self.at, dataset) if kept.num_rows else []
        fitted = Staged(fragments, staged.ids[keep], staged.versions[keep])
        return _Fitted(fitted, staged.ids[overtaken], _duplicates(rows.filter(pa.array(duplicate))))

    def _account_read(self, receipt: Receipt) -> None:
        """Count what the worker found that needs no commit."""
        # Unchanged items whose id this run has met before are duplicates, recorded by an earlier run or as good as the item itself.
        met = self.own.find(receipt.seen)[0]
        again = int(met.sum())
        self.own.add(receipt.seen, np.zeros(len(receipt.seen), np.uint64))
        rejected = receipt.rejected_before + receipt.rejects.num_rows + again
        self.counts.unchanged += receipt.unchanged - again
        self.counts.rejected += rejected
        self.reasons.update(receipt.rejects["reason"].to_pylist())
        refused = np.concatenate([receipt.before, hash64(receipt.rejects["id"])])
        self.refused.add(refused, np.zeros(len(refused), np.uint64))
        repeated = receipt.rejects["id"].filter(pc.equal(receipt.rejects["reason"], "duplicate_id"))
        self._note_doubles(receipt.unit, np.concatenate([receipt.seen[met], hash64(repeated)]))
        if receipt.unit is not None:
            self.units.setdefault(receipt.unit, [0, 0])[1] += rejected
            self._accept(receipt.unit, receipt.seen[~met])
            self.unread |= {receipt.unit} if receipt.unread else set()
            self.again |= set() if PASSING.isdisjoint(receipt.rejects["reason"].to_pylist()) else {receipt.unit}

    def _account(self, receipts: list[Receipt], fitted: list[_Fitted], *, replaced: bool) -> None:
        """Count what was committed, and record the duplicates that came to light."""
        # Counts of all receipts before anything that can fail: the rows are in the table.
        for receipt, f in zip(receipts, fitted, strict=True):
            rows = len(f.staged.ids)
            self.own.add(f.staged.ids, f.staged.versions)
            self.own.add(f.overtaken, np.zeros(len(f.overtaken), np.uint64))
            self.chunks[receipt.chunk] += rows
            self.counts.replaced += rows if replaced else 0
            self.counts.written += 0 if replaced else rows
            self.counts.unchanged += len(f.overtaken)
            self.counts.overtaken += len(f.overtaken)
            self.counts.rejected += f.duplicates.num_rows
            self.reasons.update(f.duplicates["reason"].to_pylist())
            self._note_doubles(receipt.unit, hash64(f.duplicates["id"]))
            if receipt.unit is not None:
                self.units[receipt.unit][1] += f.duplicates.num_rows
                self._accept(receipt.unit, f.staged.ids, f.overtaken)
        record_rejects(self.at, [f.duplicates for f in fitted])
        for f in fitted:
            self._forget_cured(f.staged)

    def _note_doubles(self, unit: str | None, ids: np.ndarray) -> None:
        self.doubles.add(ids, np.zeros(len(ids), np.uint64))
        if unit is not None and len(ids):
            self.doubles_of[unit] = np.union1d(self.doubles_of.get(unit, np.empty(0, np.uint64)), ids)

    def _accept(self, unit: str, *ids: np.ndarray) -> None:
        self.accepted[unit] = added_up([self.accepted[unit], *(int(part.sum(dtype=np.uint64)) for part in ids)])

    def _forget(self, receipts: list[Receipt]) -> None:
        """The receipts are committed whole: their containers have that much more, and what was staged is forgotten."""
        for receipt in receipts:
            if receipt.unit is not None:
                self.units[receipt.unit][0] += receipt.listed
        for receipt in receipts:
            self.staging.delete_receipt(receipt.chunk)

    def _forget_cured(self, staged: Staged) -> None:
        """An item that was rejected before and is embedded now is a reject no more."""
        cured = self.contents.rejected.find(staged.ids)[0]
        if cured.any():
            rows = read_staged(staged.fragments, self.at.path(), self.at.options)
            forget_rejects(self.at, rows["id"].filter(pa.array(cured)).to_pylist())


def _groups(receipts: list[Receipt]) -> Iterator[list[Receipt]]:
    """Receipts whose changed rows are read at once, whole: `ROWS_REPLACED_AT_ONCE` at most, or those of one receipt."""
    group, rows = list[Receipt](), 0
    for receipt in receipts:
        more = len(receipt.changed.ids)
        if group and rows + more > ROWS_REPLACED_AT_ONCE:
            yield group
            group, rows = [], 0
        group.append(receipt)
        rows += more
    yield group


def _places(stored: pa.Table, wanted: pa.Table) -> np.ndarray:
    """Where each stored row (N,) stands among the wanted ones, in the same version; -1 where it does not."""
    keys = zip(wanted["id"].to_pylist(), wanted["_version"].to_pylist(), strict=True)
    place = {key: index for index, key in enumerate(keys)}
    found = zip(stored["id"].to_pylist(), stored["_version"].to_pylist(), strict=True)
    return np.array([place.get(key, -1) for key in found], np.int64)


def _differs(stored: pa.Table, wanted: pa.Table, place: np.ndarray) -> np.ndarray:
    """Which stored rows (N,) bool are wanted with other metadata."""
    kept = place >= 0
    have, should = stored.filter(pa.array(kept)), wanted.take(pa.array(place[kept]))
    other = np.zeros(have.num_rows, bool)
    for name in wanted.column_names:
        unequal = pc.not_equal(have[name], should[name])
        if pa.types.is_floating(have[name].type):
            unequal = pc.and_(unequal, pc.invert(pc.and_(pc.is_nan(have[name]), pc.is_nan(should[name]))))
        one_null = pc.not_equal(have[name].is_null(), should[name].is_null())
        other |= pc.coalesce(unequal, one_null).to_numpy()
    result = np.zeros(len(place), bool)
    result[kept] = other
    return result


def _revised(rows: pa.Table, doomed: pa.Table, wanted: pa.Table) -> pa.Table:
    """Those of `rows` that are `doomed`, with what is `wanted` of them, whose rows are those of `doomed`."""
    index = {item: number for number, item in enumerate(rows["id"].to_pylist())}
    rows = rows.take(pa.array([index[item] for item in doomed["id"].to_pylist()], pa.int64()))
    for name in wanted.column_names:
        rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), wanted[name].cast(rows.schema.field(name).type))
    return rows.combine_chunks()


def _fragments_of(rows: pa.Table, at: TableAt, dataset: lance.LanceDataset) -> list[lance.FragmentMetadata]:
    return [metadata_of(fragment) for fragment in stage_rows(rows, at, dataset)]


def _duplicates(rows: pa.Table) -> pa.Table:
    fixed = {"stage": "commit", "reason": "duplicate_id", "detail": "another item of this table has the same id and came first"}
    columns = [pa.array([fixed[name]] * rows.num_rows, pa.string()) if name in fixed else rows[name] for name in REJECT.names]
    return pa.table(columns, schema=REJECT)


def _fragment_ids(dataset: lance.LanceDataset) -> set[int]:
    return {fragment.fragment_id for fragment in dataset.get_fragments()}
