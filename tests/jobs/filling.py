"""Runs of the embed job's driver in this process, without Ray: planned, embedded by one worker, committed, and broken off where a test says so."""

from jobs.embed import EmbedJob
from pipeline.fill import Filling
from pipeline.prepare import prepare
from pipeline.report import EmbedReport
from pipeline.table.at import TableAt
from pipeline.work import ChunkWorker

ITEMS = 24


def some_texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(ITEMS):
        (folder / f"i{i:02}.txt").write_text(f"text number {i}")
    return folder


def job_of(tmp_path, folder, *, target="Lines", encoder="pipeline.encoders.hashing:Hashing", **args):
    return EmbedJob.model_validate(
        {
            "source": {"target": f"tests.sources:{target}", "args": {"uri": str(folder), **args}},
            "encoder": {"target": encoder, "args": {"dim": 16}},
            "table": {"uri": str(tmp_path / "db"), "name": "t"},
            "limits": {"max_rejects": 1.0},
            "sync": {"commit_every_s": 1000},
        }
    )


def filling_of(job, *, chunk_rows=8):
    prepared = prepare(job.source, job.encoder, job.table, sync=job.sync, chunk_rows=chunk_rows)
    filling = Filling(prepared, job.encoder, job.limits, job.sync, EmbedReport())
    filling.open()
    return filling


def work(filling):
    """Receipts of the plan's chunks, embedded in this process."""
    worker = ChunkWorker(filling.task(batch_size=4, threads=1))
    return [worker(chunk.id, chunk.work) for chunk in filling.prepared.plan.chunks]


def run(job, *, chunk_rows=8):
    """A whole run; its report."""
    filling = filling_of(job, chunk_rows=chunk_rows)
    filling.adopt(filling.take_over(chunk_rows))
    filling.take(iter(work(filling)), workers=1)
    filling.finish()
    return filling.close()


def due_at_the_last(receipts, filling):
    """The receipts; with the last of them a commit of all is due, and the loop goes on after it."""
    yield from receipts[:-1]
    filling._committed_at = float("-inf")
    yield receipts[-1]


def ids_in(tmp_path):
    return sorted(TableAt(uri=str(tmp_path / "db"), name="t").require().to_table(columns=["id"])["id"].to_pylist())


def names():
    return [f"i{i:02}" for i in range(ITEMS)]


def adds_up(report):
    return report.listed == report.unchanged + report.written + report.replaced + report.rejected + report.failed


def fails_at(call, error=None):
    """Something to put in a method's place that fails at its `call`-th call, and does nothing at the others."""
    calls = []

    def method(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == call:
            raise error or OSError("the store is away")

    return method
