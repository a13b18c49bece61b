"""Planned against present: what runs say that they planned and committed, and what the table holds of it."""

import json
from dataclasses import dataclass

from pipeline.config import Model
from pipeline.table.evidence import Evidence, Run


class ChunkFacts(Model):
    """Chunks that the last embed run of each source planned, by what became of them."""

    planned: int = 0
    present: int = 0
    """With rows in the table."""
    staged: int = 0
    """Staged and not committed."""
    rowless: int = 0
    """Done, and without rows: their items were rejected, unchanged, another job's, or are replaced by now."""
    missing: int = 0
    """Not done, or their rows are gone."""


@dataclass(frozen=True)
class Short:
    """A chunk that has fewer rows in the table than its run committed, though nothing is known to have replaced or deleted any."""

    chunk: str
    run: str
    committed: int
    present: int

    def __str__(self) -> str:
        return f"chunk {self.chunk} of run {self.run}: {self.present} of {self.committed} rows"


def chunk_facts(seen: Evidence) -> ChunkFacts:
    """Of the last run of each source that planned any."""
    facts = [facts_of(run, seen) for run in _last(seen)]
    return ChunkFacts(**{name: sum(getattr(each, name) for each in facts) for name in ChunkFacts.model_fields})


def facts_of(run: Run, seen: Evidence) -> ChunkFacts:
    """Of one run."""
    planned = set(run.planned or [])
    present = {chunk for chunk in planned if seen.scan.chunks[chunk]}
    staged = {receipt.chunk for receipt in seen.receipts if receipt.chunk not in seen.dead} & planned - present
    # A run that is done has left none out; of another one only rejects tell that a chunk without rows is done.
    done = planned if run.status == "done" else set(seen.rejects["_chunk"].to_pylist()) & planned
    missing = planned - present - staged - done | {short.chunk for short in _short(run, seen) if short.present == 0}
    return ChunkFacts(
        planned=len(planned),
        present=len(present),
        staged=len(staged),
        rowless=len(planned - present - staged - missing),
        missing=len(missing),
    )


def short_chunks(seen: Evidence) -> list[Short]:
    """Chunks of the last run of each source that have lost rows."""
    return [short for run in _last(seen) for short in _short(run, seen)]


def _last(seen: Evidence) -> list[Run]:
    """Of each source the last run that planned any chunk; slides runs do not say what they plan."""
    return list({json.dumps(run.source, sort_keys=True): run for run in seen.runs.values() if run.planned}.values())


def _short(run: Run, seen: Evidence) -> list[Short]:
    if any(other.rewrote and other.ended > run.started for other in seen.runs.values() if other.run != run.run):
        return []
    counts = {chunk: (rows, seen.scan.chunks[chunk]) for chunk, rows in (run.committed or {}).items()}
    return [Short(chunk, run.run, committed, present) for chunk, (committed, present) in counts.items() if present < committed]
