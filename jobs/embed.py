"""Embed a source into a LanceDB table, exactly once.

    tessera embed jobs/embed.yaml table.uri=vectors

Run it again at any time, also after a crash or beside another run: what is there stays, what is missing is made.
"""

import time
from typing import Any

from pipeline import command
from pipeline.compute import Compute
from pipeline.config import JobFailed, Model, Ref
from pipeline.fill import Filling, describe, embed_chunks, unchanged_report, workers
from pipeline.media import Limits
from pipeline.prepare import Prepared, Sync, VectorTable, nothing_to_do, prepare, summary
from pipeline.report import EmbedReport, cause_of, problem_of
from pipeline.table.ledger import COMMITTED, PLANNED, record_run


class EmbedJob(Model):
    """Everything that one embedding run needs."""

    source: Ref
    """The reader, e.g. `pipeline.readers.images:Images`, or a class of your own."""
    encoder: Ref
    """The encoder, e.g. `pipeline.encoders.openclip:OpenClip`, or a class of your own."""
    table: VectorTable
    compute: Compute = Compute()
    limits: Limits = Limits()
    sync: Sync = Sync()


def plan(job: EmbedJob) -> dict[str, Any]:
    """What a run would do: counts, without starting Ray or writing anything."""
    return summary(_prepare(job))


def run(job: EmbedJob) -> EmbedReport:
    """Bring the table up to date with the source. Raises ConfigError before work starts, JobFailed with the report after."""
    started = time.perf_counter()
    prepared = _prepare(job)
    problem: str | None = None
    committed: dict[str, int] = {}
    if nothing_to_do(prepared, job.sync):
        report = describe(unchanged_report(prepared), prepared)
    else:
        report, problem, committed = _fill(job, prepared)
    problem = problem or problem_of(report, job.limits)
    report.status = "failed" if problem else "done"
    report.seconds = round(time.perf_counter() - started, 2)
    try:
        _record(job, prepared, report.status, command.to_plain(report) | {COMMITTED: committed})
    except Exception as error:  # a full disk, most likely: the report must come out all the same
        problem = problem or f"the run could not be written into the ledger: {cause_of(error)}"
        report.status = "failed"
    if problem:
        raise JobFailed(problem, report)
    return report


def _prepare(job: EmbedJob) -> Prepared:
    return prepare(job.source, job.encoder, job.table, sync=job.sync, chunk_rows=job.compute.chunk_rows)


def _fill(job: EmbedJob, prepared: Prepared) -> tuple[EmbedReport, str | None, dict[str, int]]:
    """The report, why the run is not complete, and the rows of each chunk that was committed."""
    filling = Filling(prepared, job.encoder, job.limits, job.sync, EmbedReport())
    with workers(job.compute, wanted=bool(prepared.plan.chunks)) as fit, filling.reporting():
        filling.open()
        taken = filling.take_over(job.compute.chunk_rows)
        chunks = [*(receipt.chunk for receipt in taken), *(chunk.id for chunk in prepared.plan.chunks)]
        _record(job, prepared, "started", {PLANNED: chunks})
        filling.adopt(taken)
        embed_chunks(filling, fit)
        filling.finish()
    return filling.close(), filling.problem, dict(filling.committer.chunks) if filling.opened else {}


def _record(job: EmbedJob, prepared: Prepared, status: str, report: dict[str, Any] | None) -> None:
    fingerprint = prepared.encoder.fingerprint
    record_run(job.table, run=prepared.run, job="embed", status=status, fingerprint=fingerprint, config=job.model_dump(mode="json"), report=report)


def main() -> None:
    """The command."""
    command.main(EmbedJob, run, plan=plan)


if __name__ == "__main__":
    main()
