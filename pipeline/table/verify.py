"""Whether a table is true: reads it and all that lies beside it, and says what it holds and what is wrong. Writes nothing.

Memory: see `scan` and `files`; a hundred million rows take about 3 GB.
"""

import datetime
import logging
import time
from collections import Counter

from pipeline.config import Model
from pipeline.table.at import TableAt, model_of
from pipeline.table.chunks import ChunkFacts, chunk_facts, facts_of, short_chunks
from pipeline.table.evidence import Evidence, Run, look
from pipeline.table.files import File
from pipeline.table.findings import Finding, found, wrong_first
from pipeline.table.ledger import now
from pipeline.table.scan import FAULTS, is_vector, missing_columns
from schemas.vectors import DIM

log = logging.getLogger(__name__)

LONGEST_RUN = datetime.timedelta(days=7)
SMALL_FRAGMENT_ROWS = 1024
MAX_SMALL_FRAGMENTS = 100
"""More small fragments than this are worth a hint."""


class Bytes(Model):
    """Bytes of the table's files, by what refers to them."""

    live: int
    """Needed by the newest version."""
    old_versions: int
    """Needed by older versions only: what a cleanup of them frees."""
    staged: int
    """Of rows that were staged and not committed."""
    orphaned: int
    """Files that nothing refers to, of any age."""


class EncoderFacts(Model):
    """Whose vectors the table holds."""

    fingerprint: str
    target: str | None
    """The class that makes them; null if the table `models` does not know it."""
    dim: int
    dtype: str


class TableFacts(Model):
    """What a table holds."""

    version: int
    rows: int
    ids: int
    """Different ids."""
    sources: dict[str, int]
    """Rows by source."""
    encoder: EncoderFacts
    runs: dict[str, int]
    """Runs of the embed job by status: done, failed, started (running now, or killed)."""
    rejects: dict[str, int]
    """Rejects by reason."""
    chunks: ChunkFacts
    containers: int
    """Containers with a note of their last complete run."""
    staged_rows: int
    fragments: int
    unindexed: dict[str, int]
    """Rows that each index lacks."""
    bytes: Bytes


def orphan_age_of(seen: Evidence, asked: datetime.timedelta) -> datetime.timedelta:
    """From which age on a file that nothing refers to is nobody's: as asked, but never younger than a run that has begun and not ended.

    Such a run may be at work, or was killed; after a week it counts as killed.
    """
    begun = [now() - run.started for run in seen.runs.values() if run.status == "started"]
    return max([asked, *(age for age in begun if age < LONGEST_RUN)])


def verify(at: TableAt, *, orphan_age: datetime.timedelta) -> tuple[Evidence, TableFacts, list[Finding]]:
    """Read a table and judge it; what is wrong comes first. `orphan_age`: from which on a file that nothing refers to is an orphan.

    Raises ConfigError if there is no such table.
    """
    started = time.perf_counter()
    log.info("verifying %s", at.path())
    seen = look(at)
    findings = judge(at, seen, orphan_age)
    log.info("verified %d rows: %d findings, %.1f s", seen.scan.rows, len(findings), time.perf_counter() - started)
    return seen, _facts(at, seen), findings


def judge(at: TableAt, seen: Evidence, orphan_age: datetime.timedelta) -> list[Finding]:
    """What the evidence says is wrong, first, and what is worth knowing."""
    orphan_age = orphan_age_of(seen, orphan_age)
    findings = [*_rows(seen), *_encoder(at, seen), *_runs(seen), *_staged(seen), *_notes(seen), *_rejects(seen), *_files(seen, orphan_age)]
    return wrong_first(findings)


def comparable(seen: Evidence) -> bool:
    """Whether all rows can be read and hold vectors, so that they can be compared with a source."""
    return not seen.broken and not missing_columns(seen.dataset) and is_vector(seen.dataset.schema.field("vector").type)


def _facts(at: TableAt, seen: Evidence) -> TableFacts:
    model = model_of(at, seen.fingerprint)
    files = seen.files
    return TableFacts(
        version=seen.dataset.version,
        rows=seen.scan.rows,
        ids=seen.scan.ids,
        sources=dict(sorted(seen.scan.sources.items())),
        encoder=EncoderFacts(fingerprint=seen.fingerprint, target=model["target"] if model else None, dim=_dim(seen), dtype=_dtype(seen)),
        runs=dict(Counter(run.status for run in seen.runs.values())),
        rejects=dict(sorted(Counter(seen.rejects["reason"].to_pylist()).items())),
        chunks=chunk_facts(seen),
        containers=len(seen.notes),
        staged_rows=sum(receipt.rows for receipt in seen.receipts if receipt.chunk not in seen.dead),
        fragments=len(seen.dataset.get_fragments()),
        unindexed=seen.unindexed,
        bytes=Bytes(live=files.live, old_versions=files.old, staged=files.staged, orphaned=sum(file.num_bytes for file in files.loose)),
    )


def _dim(seen: Evidence) -> int:
    """Length of a vector as the metadata states it, 0 if it does not."""
    return int((seen.dataset.schema.metadata or {}).get(DIM, b"0"))


def _dtype(seen: Evidence) -> str:
    names = seen.dataset.schema.names
    kind = seen.dataset.schema.field("vector").type if "vector" in names else None
    if kind is None or not is_vector(kind):
        return str(kind)
    return {"float": "float32", "halffloat": "float16"}[str(kind.value_type)]


def _rows(seen: Evidence) -> list[Finding]:
    result = seen.scan
    nulls = [f"{name}: {count}" for name, count in seen.nulls.items()]
    missing = missing_columns(seen.dataset)
    return [
        *found("missing_columns", len(missing), missing),
        *found("duplicate_ids", len(result.duplicates), [f"{item}: {count} rows" for item, count in result.duplicates.items()]),
        *(finding for fault in FAULTS for finding in found(fault, result.faults[fault], result.examples.get(fault, []))),
        *found("null_values", sum(seen.nulls.values()), nulls),
        *_lost(seen),
        *found("empty_table", int(result.rows == 0 and not seen.broken)),
    ]


def _lost(seen: Evidence) -> list[Finding]:
    """Rows that are missing in the chunks of the last runs, or in the count that the last one of them left, whichever is more."""
    if seen.broken:
        return []
    short = short_chunks(seen)
    missing, where = sum(each.committed - each.present for each in short), [str(each) for each in short]
    since = min((seen.runs[each.run].started for each in short), default=None)
    last = _last_to_count(seen)
    if last is not None and last.rows_left is not None:
        missing = max(missing, last.rows_left - seen.scan.rows)
        since = min(since or last.started, last.started)
        where = where or [f"the run {last.run} left {last.rows_left} rows, {_ago(last.ended)}"]
    repaired = sum(count for moment, count in seen.repairs if since is not None and moment > since)
    return found("lost_rows", max(0, missing - repaired), where)


def _last_to_count(seen: Evidence) -> Run | None:
    """The ended run that saw the newest version of the table; None if a run may be deleting rows now.

    Runs that overlapped may have ended in another order than they counted in.
    """
    ended = [run for run in seen.runs.values() if run.rows_left is not None]
    if not ended or any(run.deletes for run in seen.runs.values() if run.status == "started" and not _followed(run, seen)):
        return None
    latest = max(ended, key=lambda run: run.ended)
    return max((run for run in ended if run.ended >= latest.started), key=lambda run: run.version_left)


def _encoder(at: TableAt, seen: Evidence) -> list[Finding]:
    schema, dim = seen.dataset.schema, _dim(seen)
    kind = schema.field("vector").type if "vector" in schema.names else None
    model = model_of(at, seen.fingerprint)
    wrong_type = kind is not None and (not is_vector(kind) or kind.list_size != dim)
    others = {run: rows for run, rows in seen.scan.runs.items() if run in seen.runs and seen.runs[run].fingerprint not in (seen.fingerprint, None)}
    unknown = {run: rows for run, rows in seen.scan.runs.items() if run not in seen.runs}
    return [
        *found("vector_type", int(wrong_type), [f"{kind}, and the metadata says {dim} numbers of float32 or float16"]),
        *found("unknown_model", int(model is None), [seen.fingerprint]),
        *found("model_dim", int(model is not None and model["dim"] != dim), [f"{model['dim'] if model else None}, the table {dim}"]),
        *found("mixed_fingerprints", sum(others.values()), [f"{run}: {rows} rows of {seen.runs[run].fingerprint}" for run, rows in others.items()]),
        *found("unknown_runs", sum(unknown.values()), [f"{run}: {rows} rows" for run, rows in unknown.items()]),
    ]


def _runs(seen: Evidence) -> list[Finding]:
    open_ = [run for run in seen.runs.values() if run.status != "done" and not _followed(run, seen)]
    started = [run for run in open_ if run.status == "started"]
    failed = [run for run in open_ if run.status == "failed"]
    return [
        *found("unfinished_runs", len(started), [f"{run.run}, started {_ago(run.started)}{_progress(run, seen)}" for run in started]),
        *found("failed_runs", len(failed), [f"{run.run}, ended {_ago(run.ended)}{_progress(run, seen)}" for run in failed]),
    ]


def _progress(run: Run, seen: Evidence) -> str:
    """What became of the chunks that a run planned, if the ledger says which they were."""
    if not run.planned:
        return ""
    facts = facts_of(run, seen)
    return f"; of {facts.planned} planned chunks {facts.present} are in the table, {facts.staged} staged, {facts.missing} missing"


def _followed(run: Run, seen: Evidence) -> bool:
    """Whether a later run of the same source was done."""
    return any(other.status == "done" and other.source == run.source and other.started > run.started for other in seen.runs.values())


def _staged(seen: Evidence) -> list[Finding]:
    alive = [receipt for receipt in seen.receipts if receipt.chunk not in seen.dead]
    dead = [receipt for receipt in seen.receipts if receipt.chunk in seen.dead]
    rows = sum(receipt.rows for receipt in alive)
    return [
        *found("staged_receipts", rows, [f"{r.rows} rows of chunk {r.chunk}, {_hours(time.time() - r.staged_at)}" for r in alive]),
        *found("leftovers", len(seen.strays), seen.strays),
        *found("dead_receipts", len(dead), [f"{r.chunk}, {_hours(time.time() - r.staged_at)}" for r in dead]),
    ]


def _notes(seen: Evidence) -> list[Finding]:
    outdated = [key for key in seen.doubted if _rewritten_since(seen.notes[key]["run"], seen)]
    contradicted = [key for key in seen.doubted if key not in set(outdated)]
    return [
        *found("contradicted_notes", len(contradicted), [unit for _, unit in contradicted]),
        *found("outdated_notes", len(outdated), [unit for _, unit in outdated]),
    ]


def _rewritten_since(noting: str, seen: Evidence) -> bool:
    """Whether a run that ended after the one that took the note may have replaced or deleted rows."""
    if noting not in seen.runs:
        return False
    noted = seen.runs[noting].ended
    return any(run.rewrote and run.ended > noted for run in seen.runs.values() if run.run != noting)


def _rejects(seen: Evidence) -> list[Finding]:
    repeated = {item: count for item, count in Counter(seen.rejects["id"].to_pylist()).items() if count > 1}
    return [
        *found("stale_rejects", len(seen.stale), seen.stale),
        *found("duplicate_rejects", len(repeated), list(repeated)),
    ]


def _files(seen: Evidence, orphan_age: datetime.timedelta) -> list[Finding]:
    files = seen.files
    orphans = [file for file in files.loose if file.age > orphan_age]
    young = files.loose[len(orphans) :]
    unreadable = [path for path in seen.broken if path not in files.missing]
    small = sum(fragment.count_rows() < SMALL_FRAGMENT_ROWS for fragment in seen.dataset.get_fragments()) if not seen.broken else 0
    unindexed = [f"{name}: {rows}" for name, rows in seen.unindexed.items() if rows]
    return [
        *found("missing_files", len(files.missing), files.missing),
        *found("unreadable_files", len(unreadable), unreadable),
        *found("unknown_files", int(files.strange)),
        *found("orphaned_files", len(orphans), _shown(orphans)),
        *found("unreferenced_files", len(young), _shown(young)),
        *found("small_fragments", small if small > MAX_SMALL_FRAGMENTS else 0, [f"of {len(seen.dataset.get_fragments())}"]),
        *found("unindexed_rows", sum(seen.unindexed.values()), unindexed),
    ]


def _shown(files: list[File]) -> list[str]:
    return [str(file) for file in files]


def _ago(moment: datetime.datetime) -> str:
    return f"{_hours((now() - moment).total_seconds())} ago"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"
