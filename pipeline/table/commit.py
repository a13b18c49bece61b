"""Commits: staged fragments and the deletion of the rows they replace, in one compare-and-swap.

`LanceOperation.Merge` at a read version is the one operation of pylance 14 that refuses to be rebased onto anything that
was committed in between (Append rebases onto any version, so two writers duplicate rows). A refused commit rereads the
table, drops what another job has written meanwhile, and tries again. `self_test` proves this of the engine at start-up.
"""

import dataclasses
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import lance
import numpy as np
import pyarrow as pa
from lance.commit import CommitConflictError
from lance.fragment import write_fragments

from pipeline.known import Contents, Known, hash64
from pipeline.table.at import TableAt, create_dataset
from pipeline.table.contents import id_predicate, rows_with
from pipeline.table.stage import Receipt, Staging, metadata_of, read_staged, stage_rows
from schemas.rejects import REJECT

log = logging.getLogger(__name__)

MAX_TRIES = 200


class EngineRefused(RuntimeError):
    """The installed Lance engine or the store does not do what exactly-once needs."""


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
class Committer:
    """Brings staged receipts into the table, and keeps account of what it holds."""

    at: TableAt
    staging: Staging
    contents: Contents
    own: Known = field(default_factory=Known)
    """What this run has committed or met unchanged: a second item of the same id is a duplicate."""
    foreign: Known = field(default_factory=Known)
    """What other jobs committed since the plan."""
    counts: Committed = field(default_factory=Committed)
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejects of this run, by reason."""
    chunks: Counter[str] = field(default_factory=Counter)
    """Rows of each chunk committed."""
    units: dict[str, list[int]] = field(default_factory=dict)
    """Of each container: items listed, and rejected, in the chunks committed so far."""

    def __post_init__(self) -> None:
        self._fragments: set[int] = set()
        if self.contents.version:
            planned = lance.dataset(self.at.path(), version=self.contents.version, storage_options=self.at.options)
            self._fragments = _fragment_ids(planned)

    @property
    def alone(self) -> bool:
        """Whether no other job has written rows since the plan, as far as is known."""
        return len(self.foreign) == 0

    def commit(self, receipts: list[Receipt]) -> None:
        """Make the receipts' rows part of the table, once, whoever else writes; then forget the receipts."""
        self._commit_rows([r for r in receipts if r.error is None])
        for receipt in receipts:
            if receipt.error is None:
                self.staging.delete_receipt(receipt.chunk)

    def _commit_rows(self, receipts: list[Receipt]) -> None:
        for attempt in range(MAX_TRIES):
            dataset = self.at.require()
            self._absorb(dataset)
            fitted = self._fit(receipts, dataset)
            replace_rejects(self.at, [f.receipt.rejects for f in fitted] + [f.duplicates for f in fitted])
            changed = [item for f in fitted for item in f.receipt.changed_ids]
            fragments = [fragment for f in fitted for fragment in f.receipt.fragments]
            try:
                replaced = self._swap(dataset, fragments, changed)
            except CommitConflictError:
                time.sleep(random.uniform(0, min(2.0, 0.02 * 2**attempt)))
                continue
            self._account(fitted, replaced)
            return
        raise EngineRefused(f"{self.at.path()}: {MAX_TRIES} commits in a row were overtaken by other writers; run again when they have ended")

    def _absorb(self, dataset: lance.LanceDataset) -> None:
        """Read the ids of fragments that other writers added (or compacted) since we last looked."""
        added = [f for f in dataset.get_fragments() if f.fragment_id not in self._fragments]
        if added:
            rows = dataset.scanner(columns=["id", "_version"], fragments=added).to_table()
            if rows.num_rows:
                self.foreign.add(hash64(rows["id"]), hash64(rows["_version"]))
            self._fragments |= {f.fragment_id for f in added}

    def _fit(self, receipts: list[Receipt], dataset: lance.LanceDataset) -> list["_Fitted"]:
        """Each receipt without the rows that must not be written any more."""
        fitted = []
        earlier = Known()
        for receipt in receipts:
            duplicate, overtaken = self._unwanted(receipt, earlier)
            seen_again = int((self.own.find(receipt.seen)[0] | earlier.find(receipt.seen)[0]).sum())
            fitted.append(_without(receipt, duplicate, overtaken, self.at, dataset, seen_again=seen_again))
            earlier.add(receipt.ids, receipt.versions)
            earlier.add(receipt.seen, np.zeros(len(receipt.seen), np.uint64))
        return fitted

    def _unwanted(self, receipt: Receipt, earlier: Known) -> tuple[np.ndarray, np.ndarray]:
        """Which staged rows (N,) bool repeat an id of this run or of another source, and which another job wrote first."""
        ids, versions = receipt.ids, receipt.versions
        duplicate = self.own.find(ids)[0] | earlier.find(ids)[0]
        in_others, other_versions = self.contents.others.find(ids)
        duplicate |= in_others & (other_versions != versions)
        planned_found, planned = self.contents.own.find(ids)
        foreign_found, foreign = self.foreign.find(ids)
        # A fragment may be foreign because compaction moved our own old rows: those are still ours to replace.
        moved = planned_found & (foreign == planned) & (foreign != versions)
        overtaken = (foreign_found & ~moved) | (planned_found & (planned == versions)) | (in_others & (other_versions == versions))
        return duplicate, overtaken & ~duplicate

    def _swap(self, dataset: lance.LanceDataset, fragments: list[str], changed: list[str]) -> int:
        """One atomic commit; returns how many rows it removed. Raises CommitConflictError if overtaken."""
        if not fragments and not changed:
            return 0
        committed, removed = swap(dataset, [metadata_of(f) for f in fragments], changed, self.at)
        self._fragments |= _fragment_ids(committed)
        self.counts.commits += 1
        return removed

    def _account(self, fitted: list["_Fitted"], replaced: int) -> None:
        for f in fitted:
            receipt = f.receipt
            self.own.add(receipt.ids, receipt.versions)
            self.own.add(receipt.seen, np.zeros(len(receipt.seen), np.uint64))
            self.chunks[receipt.chunk] += receipt.rows
            self.counts.written += receipt.rows
            self.counts.unchanged += receipt.unchanged + f.overtaken - f.seen_again
            self.counts.overtaken += f.overtaken
            rejected = receipt.rejected_before + receipt.rejects.num_rows + f.duplicates.num_rows + f.seen_again
            self.counts.rejected += rejected
            self.reasons.update(receipt.rejects["reason"].to_pylist() + f.duplicates["reason"].to_pylist())
            if receipt.unit is not None:
                unit = self.units.setdefault(receipt.unit, [0, 0])
                unit[0] += receipt.listed
                unit[1] += rejected
            self._forget_rejects(receipt)
        self.counts.written -= replaced
        self.counts.replaced += replaced

    def _forget_rejects(self, receipt: Receipt) -> None:
        """An item that was rejected in an earlier version and is embedded now is a reject no more."""
        cured = self.contents.rejected.find(receipt.ids)[0]
        if cured.any():
            ids = read_staged(receipt.fragments, self.at)["id"].filter(pa.array(cured)).to_pylist()
            remove_rejects(self.at, ids)

    def delete(self, ids: list[str]) -> int:
        """Remove rows by id in one commit; returns how many there were."""
        for attempt in range(MAX_TRIES):
            dataset = self.at.require()
            try:
                return self._swap(dataset, [], ids)
            except CommitConflictError:
                time.sleep(random.uniform(0, min(2.0, 0.02 * 2**attempt)))
        raise EngineRefused(f"{self.at.path()}: deleting {len(ids)} rows was overtaken {MAX_TRIES} times")


@dataclass
class _Fitted:
    """A receipt as it can be committed now."""

    receipt: Receipt
    overtaken: int
    duplicates: pa.Table
    seen_again: int
    """Unchanged items whose id this run has met before: duplicates that an earlier run recorded."""


def _without(receipt: Receipt, duplicate: np.ndarray, overtaken: np.ndarray, at: TableAt, dataset: lance.LanceDataset, *, seen_again: int) -> _Fitted:
    """The receipt without some of its rows; those that stay are staged again under the same chunk."""
    if not duplicate.any() and not overtaken.any():
        return _Fitted(receipt, 0, REJECT.empty_table(), seen_again)
    rows = read_staged(receipt.fragments, at)
    keep = ~duplicate & ~overtaken
    kept = rows.filter(pa.array(keep))
    kept_ids = set(kept["id"].to_pylist())
    reduced = dataclasses.replace(
        receipt,
        rows=kept.num_rows,
        fragments=stage_rows(kept, at, dataset) if kept.num_rows else [],
        changed_ids=[i for i in receipt.changed_ids if i in kept_ids],
        ids=receipt.ids[keep],
        versions=receipt.versions[keep],
    )
    return _Fitted(reduced, int(overtaken.sum()), _duplicate_rejects(rows.filter(pa.array(duplicate))), seen_again)


def _duplicate_rejects(rows: pa.Table) -> pa.Table:
    fixed = {"stage": "commit", "reason": "duplicate_id", "detail": "another item of this table has the same id and came first"}
    columns = [pa.array([fixed[name]] * rows.num_rows, pa.string()) if name in fixed else rows[name] for name in REJECT.names]
    return pa.table(columns, schema=REJECT)


def swap(dataset: lance.LanceDataset, new: list[lance.FragmentMetadata], delete_ids: list[str], at: TableAt) -> tuple[lance.LanceDataset, int]:
    """Add fragments and delete rows by id in one compare-and-swap on `dataset`'s version.

    Returns the committed dataset and the number of rows deleted. Raises CommitConflictError if anything was committed since.
    """
    doomed = rows_with(dataset, delete_ids) if delete_ids else {}
    kept = []
    for fragment in dataset.get_fragments():
        if fragment.fragment_id not in doomed:
            kept.append(fragment.metadata)
        elif (left := fragment.delete(id_predicate(doomed[fragment.fragment_id]))) is not None:  # None: no row is left
            kept.append(left)
    operation = lance.LanceOperation.Merge([*kept, *new], dataset.lance_schema)
    committed = lance.LanceDataset.commit(dataset.uri, operation, read_version=dataset.version, storage_options=at.options)
    return committed, sum(len(ids) for ids in doomed.values())


def _fragment_ids(dataset: lance.LanceDataset) -> set[int]:
    return {fragment.fragment_id for fragment in dataset.get_fragments()}


def replace_rejects(at: TableAt, tables: Iterable[pa.Table]) -> None:
    """Record reject rows, one an id: an older reject of the same id goes, an equal one is not written again."""
    rows = pa.concat_tables([REJECT.empty_table(), *tables]).combine_chunks()
    if rows.num_rows == 0:
        return
    create_dataset(at.path(".rejects"), REJECT, at.storage_options)
    for attempt in range(MAX_TRIES):
        dataset = at.open(".rejects")
        assert dataset is not None
        known = {(r["id"], r["_version"]) for r in _rejects_of(dataset, rows["id"].to_pylist())}
        fresh = _first_of_each_id(rows, known)
        if fresh.num_rows == 0:
            return
        fragments = write_fragments(fresh, dataset, mode="append", data_storage_version="2.2", storage_options=at.options)
        try:
            swap(dataset, fragments, fresh["id"].to_pylist(), at)
            return
        except CommitConflictError:
            time.sleep(random.uniform(0, min(2.0, 0.02 * 2**attempt)))
    raise EngineRefused(f"{at.path('.rejects')}: recording rejects was overtaken {MAX_TRIES} times")


def _rejects_of(dataset: lance.LanceDataset, ids: list[str]) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for start in range(0, len(ids), 10_000):
        rows += dataset.to_table(columns=["id", "_version", "reason"], filter=id_predicate(ids[start : start + 10_000])).to_pylist()
    return rows


def _first_of_each_id(rows: pa.Table, known: set[tuple[str, str]]) -> pa.Table:
    seen: set[str] = set()
    keep = []
    for item, version in zip(rows["id"].to_pylist(), rows["_version"].to_pylist(), strict=True):
        keep.append(item not in seen and (item, version) not in known)
        seen.add(item)
    return rows.filter(pa.array(keep, pa.bool_()))


def remove_rejects(at: TableAt, ids: list[str]) -> None:
    """Forget the rejects of items that have been embedded since, or are gone."""
    for attempt in range(MAX_TRIES):
        dataset = at.open(".rejects")
        rows = _rejects_of(dataset, ids) if dataset is not None else []
        cured = [row["id"] for row in rows if row["reason"] != "duplicate_id"]
        if dataset is None or not cured:
            return
        try:
            swap(dataset, [], cured, at)
            return
        except CommitConflictError:
            time.sleep(random.uniform(0, min(2.0, 0.02 * 2**attempt)))


def self_test(at: TableAt) -> None:
    """Prove on a scratch table in the same store that a stale commit is refused. Raises EngineRefused if one is accepted."""
    scratch = TableAt(uri=at.uri, name=f"selftest-{uuid.uuid4().hex[:12]}", storage_options=at.storage_options)
    schema = pa.schema([pa.field("id", pa.string(), nullable=False)])
    dataset = create_dataset(scratch.path(), schema, at.storage_options)
    try:
        rows = pa.table({"id": ["a"]}, schema=schema)
        fragments = write_fragments(rows, dataset, mode="append", data_storage_version="2.2", storage_options=at.options)
        swap(dataset, fragments, [], scratch)
        try:
            swap(dataset, fragments, [], scratch)
        except CommitConflictError:
            return
        raise EngineRefused(
            f"pylance {lance.__version__} on {at.uri} accepted a stale commit: rows would be duplicated by concurrent jobs. "
            "Install the pylance version of constraints.txt, or use a store with conditional writes"
        )
    finally:
        lance.LanceDataset.drop(scratch.path(), storage_options=at.options)
