"""Build the indices that a table's size calls for, or take new rows into those it has.

    tessera index jobs/index.yaml table.uri=vectors

Run it again at any time, also beside a running embed job: with nothing to do it changes nothing.
"""

from typing import Any

from pipeline import command
from pipeline.config import Model
from pipeline.index import IndexReport, IndexSettings, build
from pipeline.index import plan as plan_indices
from pipeline.table.at import TableAt


class IndexJob(Model):
    """Which table, and which indices."""

    table: TableAt
    index: IndexSettings = IndexSettings()


def plan(job: IndexJob) -> dict[str, Any]:
    """What a run would do, without doing it."""
    found = plan_indices(job.table, job.index)
    return {"job": "index", "kind": found.kind, "reason": found.reason, "steps": [str(step) for step in found.steps]}


def run(job: IndexJob) -> IndexReport:
    """Bring the table's indices to the job's settings."""
    return build(job.table, job.index)


def main() -> None:
    """The command."""
    command.main(IndexJob, run, plan=plan)


if __name__ == "__main__":
    main()
