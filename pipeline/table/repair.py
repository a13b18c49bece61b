"""Mending what `verify` found, as far as no data has to be invented. Safe beside jobs that write to the table.

Rows are judged again in the version that a commit builds on, and the commit is refused if another job touched them: a row
that was replaced by a good one meanwhile stays. A deleted row comes back with the next embed run, from the source.
Files are deleted only if they are older than every run that has begun and not ended, receipts only if no run can still need them.
"""

import datetime
import functools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import lance
import numpy as np
import pyarrow as pa
from lance.fragment import write_fragments

from pipeline.config import Model
from pipeline.table import swap
from pipeline.table.at import TableAt
from pipeline.table.contents import id_predicate, newest_notes, quoted
from pipeline.table.evidence import Evidence, Run, doubted_notes, read_receipts, read_rejects
from pipeline.table.files import delete_orphans, present_files, sort_files
from pipeline.table.rejects import forget_rejects
from pipeline.table.scan import FAULTS, batches, missing_columns, vector_faults
from pipeline.table.stage import Staging, metadata_of, stage_rows
from pipeline.table.sweep import sweep_strays
from pipeline.table.verify import orphan_age_of

log = logging.getLogger(__name__)

BATCH_IDS = 1000
"""Ids in one commit; their whole rows are in memory."""
RECEIPT_AGE_S = 3600
"""A younger receipt may be one that a running job is about to delete itself; that takes it seconds."""


class Repaired(Model):
    """One repair that was made."""

    code: str
    """The finding that it mends."""
    count: int
    did: str


def refusal(at: TableAt, seen: Evidence, max_deleted: float) -> str | None:
    """Why a table must not be repaired; None if it may be. `max_deleted`: the share of the rows that may be deleted for their vectors."""
    if seen.broken or seen.files.missing:
        broken = [*seen.files.missing, *seen.broken]
        return f"files of {at.path()} are gone or cannot be read, e.g. {broken[0]}; nothing was repaired. Restore them first"
    if missing := missing_columns(seen.dataset):
        return f"{at.path()} lacks the columns {', '.join(missing)}; nothing was repaired. Fill another table with the embed job"
    faulty = sum(seen.scan.faults.values())
    if faulty <= max_deleted * seen.scan.rows:
        return None
    return (
        f"{faulty} of {seen.scan.rows} rows have faulty vectors, more than max_deleted={max_deleted:g} allows to delete; nothing was repaired. "
        "More likely the encoder is at fault: fill another table with the embed job, or raise max_deleted"
    )


def repair(at: TableAt, seen: Evidence, *, orphan_age: datetime.timedelta) -> list[Repaired]:
    """Mend what the evidence shows, unless there is a `refusal`; what was done."""
    steps: list[tuple[str, int, str]] = []
    if seen.scan.duplicates:
        steps.append(("duplicate_ids", _keep_one_row(at, seen), "rows deleted, one of each id kept"))
    if any(seen.scan.faults.values()):
        steps += [(fault, count, "rows deleted") for fault, count in _delete_faulty(at, seen.dataset).items()]
    steps.append(("contradicted_notes", _delete_notes(at), "notes deleted"))
    steps.append(("dead_receipts", _delete_receipts(at, seen), "receipts deleted"))
    steps.append(("stale_rejects", _forget_stale(at, seen), "rejects deleted"))
    steps.append(("duplicate_rejects", _keep_one_reject(at), "rejects deleted, the newest of each id kept"))
    if seen.strays:
        gone = sweep_strays(Staging(at), read_receipts(at), keep_s=orphan_age_of(seen, orphan_age).total_seconds())
        steps.append(("leftovers", gone, "files and scratch tables deleted"))
    steps.append(("orphaned_files", *_delete_files(at, orphan_age_of(seen, orphan_age))))
    if any(seen.unindexed.values()):
        from pipeline.index import extend  # lancedb: only a repair that needs it pays for it

        done = extend(at)
        steps.append(("unindexed_rows", len(done), f"indices changed: {'; '.join(done)}"))
    repaired = [Repaired(code=code, count=count, did=did) for code, count, did in steps if count]
    for step in repaired:
        log.info("repaired %s: %d %s", step.code, step.count, step.did)
    return repaired


def _in_batches(ids: list[str], change: Callable[[list[str]], int], what: str) -> int:
    """Make a change for a number of ids at a time, each until no other writer gets in between; the counts added up."""
    parts = [ids[start : start + BATCH_IDS] for start in range(0, len(ids), BATCH_IDS)]
    return sum(swap.until_accepted(functools.partial(change, part), what) for part in parts)


def _keep_one_row(at: TableAt, seen: Evidence) -> int:
    """Of each id that stands more than once, keep one row; how many rows went."""
    return _in_batches(list(seen.scan.duplicates), lambda ids: _thin_out(at, ids, seen.runs), at.path())


def _thin_out(at: TableAt, ids: list[str], runs: dict[str, Run]) -> int:
    dataset = at.require()
    rows = dataset.to_table(filter=id_predicate(ids), with_row_address=True)
    places: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(rows["id"].to_pylist()):
        places[item].append(place)
    ranks = _ranks(rows, runs)
    keep = [max(found, key=ranks.__getitem__) for found in places.values() if len(found) > 1]
    kept = rows.take(pa.array(keep, pa.int64())).drop_columns(["_rowaddr"]).cast(dataset.schema).combine_chunks()
    if kept.num_rows == 0:
        return 0
    fragments = [metadata_of(fragment) for fragment in stage_rows(kept, at, dataset)]
    _, removed = swap.replace(dataset, fragments, kept["id"].to_pylist(), at.options)
    return removed - int(kept.num_rows)


def _ranks(rows: pa.Table, runs: dict[str, Run]) -> list[tuple[bool, float, int]]:
    """What makes a row (N) better than another of its id: a sound vector, a newer run, a later place in the table."""
    faults = vector_faults(rows["vector"].combine_chunks())
    sound = ~np.logical_or.reduce(list(faults.values()))
    started = [runs[run].started.timestamp() if run in runs else 0.0 for run in rows["_run"].to_pylist()]
    return list(zip(sound.tolist(), started, rows["_rowaddr"].to_pylist(), strict=True))


def _delete_faulty(at: TableAt, dataset: lance.LanceDataset) -> dict[str, int]:
    """Delete the rows with faulty vectors; how many, by fault."""
    counts = dict.fromkeys(FAULTS, 0)
    for batch in batches(dataset, ["id", "vector"], dataset.get_fragments()):
        for fault, mask in vector_faults(batch["vector"]).items():
            ids = batch["id"].filter(pa.array(mask)).drop_null().to_pylist()
            counts[fault] += _in_batches(ids, lambda part: _delete_still_faulty(at, part), at.path())
    return counts


def _delete_still_faulty(at: TableAt, ids: list[str]) -> int:
    """Delete those of `ids` whose vector is faulty in the newest version too: another job may have replaced them."""
    dataset = at.require()
    rows = dataset.to_table(columns=["id", "vector"], filter=id_predicate(ids))
    if rows.num_rows == 0:
        return 0
    faulty = np.logical_or.reduce(list(vector_faults(rows["vector"].combine_chunks()).values()))
    _, removed = swap.delete(dataset, rows["id"].filter(pa.array(faulty)).to_pylist(), at.options)
    return removed


def _delete_notes(at: TableAt) -> int:
    """Delete the notes that the table's rows do not bear out; the next embed run reads those containers again."""
    notes = newest_notes(at)
    doubted = doubted_notes(at.require(), notes)
    if doubted:
        by_source: dict[str, list[str]] = defaultdict(list)
        for source, unit in doubted:
            by_source[source].append(unit)
        dataset = at.open(".units")
        assert dataset is not None
        for source, units in by_source.items():
            # A plain delete: a note that a running job appends meanwhile stays.
            dataset.delete(f"source = {quoted(source)} AND unit IN ({', '.join(map(quoted, units))})")
    return len(doubted)


def _delete_receipts(at: TableAt, seen: Evidence) -> int:
    """Delete receipts that no run will take over, but no young ones."""
    old = [r.chunk for r in seen.receipts if r.chunk in seen.dead and time.time() - r.staged_at > RECEIPT_AGE_S]
    staging = Staging(at) if old else None
    for chunk in old:
        if staging is not None:
            staging.delete_receipt(chunk)
    return len(old)


def _forget_stale(at: TableAt, seen: Evidence) -> int:
    forget_rejects(at, seen.stale)
    return len(seen.stale)


def _keep_one_reject(at: TableAt) -> int:
    """Of each id with more than one reject, keep the newest; how many went."""
    counts = Counter(read_rejects(at)["id"].to_pylist())
    repeated = [item for item, count in counts.items() if count > 1]
    return _in_batches(repeated, lambda part: _thin_out_rejects(at, part), at.path(".rejects"))


def _thin_out_rejects(at: TableAt, ids: list[str]) -> int:
    dataset = at.open(".rejects")
    assert dataset is not None
    rows = dataset.to_table(filter=id_predicate(ids))
    newest = {item: place for place, item in enumerate(rows["id"].to_pylist())}
    kept = rows.take(pa.array(list(newest.values()), pa.int64())).combine_chunks()
    if kept.num_rows == rows.num_rows:
        return 0
    fragments = write_fragments(kept, dataset, mode="append", data_storage_version="2.2", storage_options=at.options)
    _, removed = swap.replace(dataset, fragments, ids, at.options)
    return removed - int(kept.num_rows)


def _delete_files(at: TableAt, orphan_age: datetime.timedelta) -> tuple[int, str]:
    """Delete the files that nothing refers to now and that are old enough; how many, and the bytes in words."""
    dataset = at.require()
    present = present_files(dataset)
    files = sort_files(dataset, present, read_receipts(at))
    orphans = [file for file in files.loose if file.age > orphan_age]
    freed = delete_orphans(at, orphans)
    return len(orphans), f"files deleted, {freed} bytes"
