"""Say what is true of a table, and what is wrong with it; mend that with --repair.

    tessera verify jobs/verify.yaml table.uri=vectors
    tessera verify jobs/verify.yaml table.uri=vectors --repair

Exit status 1 if anything is wrong. Safe beside a running job. With `source` the table is compared with what the source lists.
"""

import datetime
import logging
import time
import uuid
from typing import Any

import pydantic

from pipeline import command
from pipeline.compare import Comparison, compare, encoder_of
from pipeline.config import ConfigError, JobFailed, Model, Ref
from pipeline.table.at import TableAt
from pipeline.table.findings import Finding, wrong_first
from pipeline.table.ledger import record_run
from pipeline.table.repair import Repaired, refusal, repair
from pipeline.table.scan import FAULTS
from pipeline.table.verify import TableFacts, comparable, verify

log = logging.getLogger(__name__)

COME_BACK = (*FAULTS, "contradicted_notes")
"""After these repairs the source holds more than the table."""


class VerifyJob(Model):
    """Which table, and what to do about what is found."""

    table: TableAt
    repair: bool = False
    """Mend what can be mended without inventing data, then verify again; also --repair. Rows that it deletes come back with the next embed run."""
    orphans_older_than_days: float = pydantic.Field(default=7, gt=0)
    """A file that nothing refers to counts as orphaned from this age on, and if it is older than every run that has not ended."""
    max_deleted: float = pydantic.Field(default=0.1, ge=0, le=1)
    """Deleting more than this share of the rows for their vectors is refused: more likely the encoder is at fault."""
    source: Ref | None = None
    """The embed job's source: compare the table with what it lists now."""
    encoder: Ref | None = None
    """The embed job's encoder; without it the one that the table `models` names."""
    sample: pydantic.NonNegativeInt = 0
    """Embed this many items of the source again, and compare their vectors with the table's."""


class VerifyReport(Model):
    """What the table holds, and what is wrong with it. The findings are those after the repair, if there was one."""

    job: str = "verify"
    status: str
    """done, or failed if anything is wrong."""
    table: str
    wrong: int
    """Findings that are wrong; the others are worth knowing."""
    findings: list[Finding]
    facts: TableFacts
    source: Comparison | None
    """The table against its source; null if the job names none."""
    repaired: list[Repaired]
    refused: str | None
    """Why nothing was repaired though it was asked for."""
    before: list[Finding]
    """What was found before the repair; empty if there was none."""
    seconds: float


def plan(job: VerifyJob) -> dict[str, Any]:
    """What --repair would do, without doing it."""
    report = _report(job.model_copy(update={"repair": False}))
    mendable = {finding.code: {"count": finding.count, "does": finding.repair} for finding in report.findings if finding.repair}
    others = {finding.code: {"count": finding.count, "to_do": finding.do} for finding in report.findings if not finding.repair}
    return {"job": "verify", "table": report.table, "repair": mendable, "beyond_repair": others}


def run(job: VerifyJob) -> VerifyReport:
    """Verify, repair if told to, and verify again. Raises JobFailed with the report if anything is wrong at the end."""
    report = _report(job)
    for finding in report.findings:
        log.warning("%s", finding)
    if any(step.code in COME_BACK for step in report.repaired):
        log.warning("run the embed job: it brings back the rows that were deleted, and reads again the containers whose rows were lost")
    if report.refused:
        raise JobFailed(report.refused, report)
    if report.wrong:
        raise JobFailed(f"wrong with {report.table}: {_named(report.findings[: report.wrong])}{_beyond_repair(job, report)}", report)
    return report


def _named(findings: list[Finding]) -> str:
    return ", ".join(f"{finding.code} ({finding.count})" for finding in findings)


def _beyond_repair(job: VerifyJob, report: VerifyReport) -> str:
    """What a repair has left, and what is to be done about it."""
    left = [finding for finding in report.findings[: report.wrong] if finding.repair is None]
    return f"; no repair mends {'; '.join(f'{finding.code}: {finding.do}' for finding in left)}" if job.repair and left else ""


def _report(job: VerifyJob) -> VerifyReport:
    started = time.perf_counter()
    encoder = _checked(job)
    age = datetime.timedelta(days=job.orphans_older_than_days)
    seen, facts, findings = verify(job.table, orphan_age=age)
    before: list[Finding] = []
    repaired: list[Repaired] = []
    refused = refusal(job.table, seen, job.max_deleted) if job.repair else None
    if job.repair and refused is None and any(finding.repair for finding in findings):
        before, repaired = findings, repair(job.table, seen, orphan_age=age)
        if repaired:
            _record(job, seen.fingerprint, before, repaired)
        seen, facts, findings = verify(job.table, orphan_age=age)
    compared = None
    if job.source and encoder and comparable(seen):
        compared, differences = compare(job.table, job.source, encoder, sample=job.sample)
        findings = wrong_first([*findings, *differences])
    wrong = sum(finding.severity == "wrong" for finding in findings)
    return VerifyReport(
        status="failed" if wrong or refused else "done",
        table=job.table.path(),
        wrong=wrong,
        findings=findings,
        facts=facts,
        source=compared,
        repaired=repaired,
        refused=refused,
        before=before,
        seconds=round(time.perf_counter() - started, 2),
    )


def _record(job: VerifyJob, fingerprint: str, before: list[Finding], repaired: list[Repaired]) -> None:
    """Write a repair into the ledger at once: the rows that it deleted must not be missed by whoever verifies next."""
    told = {"before": [each.model_dump() for each in before], "repaired": [each.model_dump() for each in repaired]}
    config = job.model_dump(mode="json")
    record_run(job.table, run=uuid.uuid4().hex[:16], job="verify", status="done", fingerprint=fingerprint, config=config, report=told)


def _checked(job: VerifyJob) -> Ref | None:
    """The encoder to compare with, if the source is to be compared; raises ConfigError before the table is read."""
    if job.source is None:
        if job.sample or job.encoder:
            raise ConfigError("sample and encoder are for comparing with a source; give `source` as in the embed job")
        return None
    job.source.build("source", "metadata", "list", "read")
    encoder = job.encoder or encoder_of(job.table)
    encoder.build("dim", "fingerprint", "encode")
    return encoder


def main() -> None:
    """The command."""
    command.main(VerifyJob, run, plan=plan)


if __name__ == "__main__":
    main()
