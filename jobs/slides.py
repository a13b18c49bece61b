"""Embed the tiles of whole slides into a LanceDB table, and keep it current.

    tessera slides jobs/slides.yaml slides.uri=/data/slides table.uri=vectors

A slide is looked at once (scale, tissue, thumbnail: the table NAME.slides), then its tiles are embedded and committed together.
Run it again at any time, also after a crash or beside another run: new slides come in, replaced ones are embedded anew, moved ones
keep their vectors, and what is unchanged is not opened.
"""

import time
from pathlib import Path
from typing import Any

from pipeline import command
from pipeline.config import JobFailed
from pipeline.report import cause_of
from pipeline.slides.job import SlidesJob, Work, list_slides
from pipeline.slides.outlook import summary
from pipeline.slides.report import SlidesReport, problem_of
from pipeline.slides.run import run_slides
from pipeline.table.ledger import record_run


def plan(job: SlidesJob) -> dict[str, Any]:
    """What a run would do: counts, without opening a slide, starting Ray or writing anything."""
    return summary(list_slides(job))


def run(job: SlidesJob) -> SlidesReport:
    """Bring the tables up to date with the slides. Raises ConfigError before work starts, JobFailed with the report after."""
    started = time.perf_counter()
    work = list_slides(job)
    report, problem = run_slides(job, work, started, begin=lambda: _record(job, work, "started", None))
    problem = problem or problem_of(report, job.limits)
    try:
        if job.page is not None:
            report.page = _write_page(job, Path(job.page), work)
    except Exception as error:  # the report must come out all the same
        problem = problem or f"the page could not be written: {cause_of(error)}"
    report.status = report.tiles.status = "failed" if problem else "done"
    try:
        _record(job, work, report.status, command.to_plain(report))
    except Exception as error:
        problem = problem or f"the run could not be written into the ledger: {cause_of(error)}"
        report.status = report.tiles.status = "failed"
    if problem:
        raise JobFailed(problem, report)
    return report


def _write_page(job: SlidesJob, folder: Path, work: Work) -> str:
    from pipeline.slides.page import write_page_of  # OpenCV and fonts: only a run that draws pays for them

    return str(write_page_of(job.table, source=job.slides.source, folder=folder, grids=job.grids, run=work.look.run))


def _record(job: SlidesJob, work: Work, status: str, report: dict[str, Any] | None) -> None:
    fingerprint = work.encoder.fingerprint
    record_run(job.table, run=work.look.run, job="slides", status=status, fingerprint=fingerprint, config=job.model_dump(mode="json"), report=report)


def main() -> None:
    """The command."""
    command.main(SlidesJob, run, plan=plan)


if __name__ == "__main__":
    main()
