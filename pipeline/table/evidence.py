"""Everything that is read to judge a table, in an order that lets other jobs write meanwhile.

Notes are read before the rows that they speak of, the ledger after the rows that name its runs, and the manifests last:
so a run beside this one is seen at work, and not taken for a fault.
"""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from pipeline.known import hash64
from pipeline.table.at import TableAt, fingerprint_of
from pipeline.table.contents import id_predicate, newest_notes, unit_states
from pipeline.table.files import Files, present_files, sort_files
from pipeline.table.ledger import COMMITTED, PLANNED
from pipeline.table.scan import FAULTS, Scan, Unreadable, missing_columns, null_counts, pair64, readable, scan
from pipeline.table.stage import Receipt, Staging
from pipeline.table.sweep import strays
from schemas.rejects import REJECT


@dataclass
class Run:
    """A run of the embed or the slides job, from its rows in the ledger."""

    run: str
    status: str
    """done, failed, or started: then it is running, or was killed."""
    fingerprint: str
    source: Any
    started: datetime.datetime
    ended: datetime.datetime
    """When its last row was written."""
    rewrote: bool
    """Whether it may have replaced or deleted rows."""
    deletes: bool
    """Whether it may delete rows while it is at work."""
    planned: list[str] | None
    """Chunks that it planned; None if the ledger does not say."""
    committed: dict[str, int] | None
    """Rows of each chunk that it committed; None while it has not ended, or if the ledger does not say."""
    rows_left: int | None
    """Rows of the table when it ended; None while it has not."""
    version_left: int
    """The table's version then."""


@dataclass
class Evidence:
    """What was read."""

    dataset: lance.LanceDataset
    fingerprint: str
    scan: Scan
    broken: list[str]
    """Data files that cannot be read; the counts are without them."""
    nulls: dict[str, int]
    runs: dict[str, Run]
    repairs: list[tuple[datetime.datetime, int]]
    """When repairs ended, and how many rows each deleted."""
    notes: dict[tuple[str, str], dict[str, Any]]
    """The newest note (UNIT row) on each container, by source and unit."""
    doubted: list[tuple[str, str]]
    """The containers of `notes` whose rows are not those of the note."""
    receipts: list[Receipt]
    dead: set[str]
    """Chunks of the receipts that no run will take over."""
    strays: list[str]
    """Journals, receipts that cannot be read, scratch tables: a running run's, or a killed one's."""
    rejects: pa.Table
    stale: list[str]
    """Ids of rejects that stand in the table in the same version."""
    files: Files
    unindexed: dict[str, int]
    """Rows that each index lacks."""


def look(at: TableAt) -> Evidence:
    """Read a table and all that lies beside it. Raises ConfigError if it is not there, or is not Tessera's."""
    notes = newest_notes(at)
    dataset = at.require()
    fingerprint = fingerprint_of(dataset)
    present = present_files(dataset)
    receipts = read_receipts(at)
    rejects = read_rejects(at)
    candidates = rejects.filter(pa.array([reason != "duplicate_id" for reason in rejects["reason"].to_pylist()], pa.bool_()))
    wanted = np.concatenate([*(_pairs(receipt) for receipt in receipts), _reject_pairs(candidates)])
    found, broken = _scan(dataset, wanted)
    whole = not broken and not missing_columns(dataset)
    return Evidence(
        dataset=dataset,
        fingerprint=fingerprint,
        scan=found,
        broken=broken,
        nulls={} if broken else null_counts(dataset),
        runs=read_runs(at),
        repairs=read_repairs(at),
        notes=notes,
        doubted=doubted_notes(dataset, notes) if whole else [],
        receipts=receipts,
        dead=_dead(at, receipts, found.met, fingerprint),
        strays=read_strays(at, receipts),
        rejects=rejects,
        stale=_stale(dataset, candidates.filter(pa.array(np.isin(_reject_pairs(candidates), found.met)))),
        files=sort_files(dataset, present, receipts),
        unindexed={} if broken else unindexed_rows(dataset),
    )


def _scan(dataset: lance.LanceDataset, wanted: np.ndarray) -> tuple[Scan, list[str]]:
    try:
        return scan(dataset, dataset.get_fragments(), wanted), []
    except Unreadable:
        whole, broken = readable(dataset)
        if not broken:
            raise
        return scan(dataset, whole, wanted), broken


def read_runs(at: TableAt) -> dict[str, Run]:
    """The runs of the embed and the slides job, in the order they started."""
    dataset = at.open(".runs")
    rows = dataset.to_table(filter="job IN ('embed', 'slides')").sort_by("at").to_pylist() if dataset is not None else []
    runs: dict[str, Run] = {}
    for row in rows:
        runs[row["run"]] = _run(row, runs.get(row["run"]))
    return runs


def _run(row: dict[str, Any], before: Run | None) -> Run:
    """A run by its newest row in the ledger. `before`: by the rows before that."""
    report, config = json.loads(row["report"] or "{}"), json.loads(row["config"])
    # A slides run has the embed job's report in its own; it may rewrite rows without embedding any.
    tiles = report.get("tiles", report)
    return Run(
        run=row["run"],
        status=row["status"],
        fingerprint=row["fingerprint"],
        source=config.get("source", config.get("slides")),
        started=before.started if before else row["at"],
        ended=row["at"],
        rewrote=row["status"] != "done" or any((tiles.get("replaced"), tiles.get("deleted"), report.get("removed"), report.get("revised"))),
        deletes=row["job"] == "slides" or config.get("sync", {}).get("vanished") == "delete",
        planned=report.get(PLANNED, before.planned if before else None),
        committed=report.get(COMMITTED),
        rows_left=tiles.get("rows_in_table"),
        version_left=tiles.get("table_version") or 0,
    )


def read_repairs(at: TableAt) -> list[tuple[datetime.datetime, int]]:
    """When repairs ended, and how many rows each deleted."""
    dataset = at.open(".runs")
    rows = dataset.to_table(filter="job = 'verify'").to_pylist() if dataset is not None else []
    return [(row["at"], _rows_deleted(json.loads(row["report"] or "{}").get("repaired", []))) for row in rows]


def _rows_deleted(steps: list[dict[str, Any]]) -> int:
    return sum(step["count"] for step in steps if step["code"] in (*FAULTS, "duplicate_ids"))


def read_receipts(at: TableAt) -> list[Receipt]:
    """Receipts of rows that were staged and whose commit is not known. Makes no folder where there is none."""
    return Staging(at).receipts() if _has_staging(at) else []


def read_strays(at: TableAt, receipts: list[Receipt]) -> list[str]:
    """What `sweep` knows as strays. Makes no folder where there is none."""
    return strays(Staging(at), receipts) if _has_staging(at) else []


def _has_staging(at: TableAt) -> bool:
    return "://" in at.staging or Path(at.staging).is_dir()


def read_rejects(at: TableAt) -> pa.Table:
    """Id, version, reason, chunk and run of all rejects, oldest first."""
    dataset = at.open(".rejects")
    names = ["id", "_version", "reason", "_chunk", "_run"]
    return dataset.to_table(columns=names) if dataset is not None else REJECT.empty_table().select(names)


def doubted_notes(dataset: lance.LanceDataset, notes: dict[tuple[str, str], dict[str, Any]]) -> list[tuple[str, str]]:
    """The containers whose rows in the table are not those of their note."""
    states = {source: unit_states(dataset, source=source) for source in {source for source, _ in notes}}
    return [key for key, note in notes.items() if states[key[0]].get(key[1], (0, "")) != (note["rows"], note["digest"])]


def unindexed_rows(dataset: lance.LanceDataset) -> dict[str, int]:
    """Rows that each index lacks."""
    rows = dataset.count_rows()
    return {index.name: rows - index.num_rows_indexed for index in dataset.describe_indices()}


def _pairs(receipt: Receipt) -> np.ndarray:
    return np.concatenate([pair64(staged.ids, staged.versions) for staged in (receipt.new, receipt.changed)])


def _reject_pairs(rejects: pa.Table) -> np.ndarray:
    return pair64(hash64(rejects["id"]), hash64(rejects["_version"])) if rejects.num_rows else np.empty(0, np.uint64)


def _dead(at: TableAt, receipts: list[Receipt], met: np.ndarray, fingerprint: str) -> set[str]:
    """Chunks of receipts whose rows are all in the table, whose files are gone, or which belong to another encoder."""
    staging = Staging(at) if receipts else None
    return {
        receipt.chunk
        for receipt in receipts
        if receipt.fingerprint != fingerprint
        or (receipt.rows and np.isin(_pairs(receipt), met).all())
        or (staging is not None and not staging.has_files(receipt))
    }


def _stale(dataset: lance.LanceDataset, candidates: pa.Table) -> list[str]:
    """Of rejects that seem to stand in the table in the same version: those that do, by the ids and versions themselves."""
    stale = []
    for start in range(0, candidates.num_rows, 10_000):
        part = candidates.slice(start, 10_000)
        rows = dataset.to_table(columns=["id", "_version"], filter=id_predicate(part["id"].to_pylist()))
        held = set(zip(rows["id"].to_pylist(), rows["_version"].to_pylist(), strict=True))
        stale += [item for item, version in zip(part["id"].to_pylist(), part["_version"].to_pylist(), strict=True) if (item, version) in held]
    return stale
