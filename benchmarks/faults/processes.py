"""kill -9 of drivers and actors from outside, and two drivers at once. Every job is a process of its own."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lance

from benchmarks.faults import obvious, tessera
from benchmarks.faults.outcome import Outcome, exists, observe
from benchmarks.faults.sources import Watched, encode, encoded, texts, write_texts

SLOW_S = 0.5
"""A call of the encoder, so that there is a middle to be killed in."""


def driver_killed(folder: Path) -> Iterator[Outcome]:
    """kill -9 of the driver half way through 400 items, then the job runs again"""
    rows = texts(400)
    source = write_texts(folder / "source", rows)
    table, log = folder / "created.lance", folder / "created"
    kill_driver(obvious.start("embed", source, table, log=log, seconds=SLOW_S), lambda: len(encoded(log)) >= 200)
    yield _rerun("lance-ray, create", "embed", source, table, log)
    table, log = folder / "streamed.lance", folder / "streamed"
    empty_table(table)
    kill_driver(obvious.start("embed_in_stream", source, table, log=log, seconds=SLOW_S), lambda: row_count(table) >= 64)
    yield _rerun("lance-ray, stream=True", "embed_in_stream", source, table, log)
    table, log = folder / "resumed.lance", folder / "resumed"
    empty_table(table)
    kill_driver(obvious.start("embed_in_stream", source, table, log=log, seconds=SLOW_S), lambda: row_count(table) >= 64)
    yield _rerun("the same, resume_rows=those committed", "embed_in_stream", source, table, log, resume_rows=row_count(table))
    yield _tessera_driver_killed(folder, source)


def _rerun(title: str, how: str, source: Path, table: Path, log: Path, **settings: int) -> Outcome:
    """The job once more, and what it leaves."""
    before, kept = len(encoded(log)), row_count(table)
    error = obvious.finish(obvious.start(how, source, table, log=log, **settings))
    note = f"{kept} rows were committed, {len(encoded(log)) - before} items encoded by the rerun"
    return observe(title, table, texts(400), error=error, note=note)


def _tessera_driver_killed(folder: Path, source: Path) -> Outcome:
    db, log, rows = folder / "db", folder / "log", texts(400)
    slow = tessera.start(tessera.job_of(source, db, log=log, seconds=SLOW_S), db)
    kill_driver(slow, lambda: row_count(tessera.table(db)) >= 100)
    kept, before = row_count(tessera.table(db)), len(encoded(log))
    error = tessera.finish(tessera.start(tessera.job_of(source, db, log=log), db))
    note = f"{kept} rows were committed, {len(encoded(log)) - before} items encoded by the rerun"
    return tessera.outcome(db, rows, error=error, note=note)


def checkpoint_resumed(folder: Path) -> Iterator[Outcome]:
    """Ray Data's CheckpointConfig, the driver killed half way, then the job runs again"""
    rows = texts(400)
    source, table, log, checkpoint = write_texts(folder / "source", rows), folder / "t.lance", folder / "log", folder / "checkpoint"
    job = obvious.start("embed_with_checkpoint", source, table, log=log, seconds=4 * SLOW_S, checkpoint=str(checkpoint))
    kill_driver(job, lambda: sum(1 for path in checkpoint.rglob("*") if path.is_file()) >= 3)
    error = obvious.finish(obvious.start("embed_with_checkpoint", source, table, log=log, checkpoint=str(checkpoint)))
    yield observe("CheckpointConfig + lance_ray.write_lance", table, rows, error=error)
    yield _tessera_driver_killed(folder, source)


def actors_killed(folder: Path) -> Iterator[Outcome]:
    """kill -9 of two encoder actors"""
    rows = texts(400)
    source = write_texts(folder / "source", rows)
    for how, title in (("embed", "lance-ray, one commit at the end"), ("embed_and_append", "actors that append to the table")):
        table, log = folder / f"{how}.lance", folder / how
        if how == "embed_and_append":
            empty_table(table)
        job = obvious.start(how, source, table, log=log, seconds=SLOW_S)
        killed = kill_encoders(log, job)
        yield observe(title, table, rows, error=obvious.finish(job), note=f"{killed} actors killed")
    db, log = folder / "db", folder / "log"
    job = tessera.start(tessera.job_of(source, db, log=log, seconds=SLOW_S), db)
    killed = kill_encoders(log, job)
    yield tessera.outcome(db, rows, error=tessera.finish(job), note=f"{killed} actors killed")


def two_jobs_at_once(folder: Path) -> Iterator[Outcome]:
    """Two runs of the same job at once, onto an empty table"""
    rows = texts(400)
    source, table, log = write_texts(folder / "source", rows), folder / "t.lance", folder / "log"
    empty_table(table)
    jobs = [obvious.start("embed", source, table, log=log, seconds=SLOW_S, mode="append") for _ in range(2)]
    errors = [obvious.finish(job) for job in jobs]
    yield observe("lance-ray, append", table, rows, error=errors[0] or errors[1])
    dbs = [folder / "db", folder / "other"]
    job = tessera.job_of(source, dbs[0], log=log, seconds=SLOW_S)
    errors = [tessera.finish(process) for process in [tessera.start(job, db) for db in dbs]]
    yield tessera.outcome(dbs[0], rows, error=errors[0] or errors[1])


def empty_table(table: Path) -> None:
    """A table of the obvious job's columns, without rows."""
    lance.write_dataset(encode(Watched(str(table) + ".log"), texts(1)).slice(0, 0), str(table))


def row_count(table: Path) -> int:
    """Rows that are committed."""
    return lance.dataset(str(table)).count_rows() if exists(table) else 0


def kill_driver(job: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """kill -9 as soon as `ready`. Ray's own processes end with their driver."""
    while not ready():
        if job.poll() is not None:
            raise RuntimeError(f"the job ended before it could be killed: {job.communicate()[1][-500:]}")
        time.sleep(0.05)
    job.kill()
    job.wait()
    time.sleep(3)  # its workers die a moment later, and may still write


def kill_encoders(log: Path, job: subprocess.Popen[str], times: int = 2) -> int:
    """kill -9 of `times` processes that encode, each in its third batch or later; returns how many were met."""
    killed: set[int] = set()
    while len(killed) < times and job.poll() is None:
        batches: dict[int, int] = {}
        for process, _ in encoded(log):
            batches[process] = batches.get(process, 0) + 1
        for process in [p for p, count in batches.items() if count > 64 and p not in killed][: times - len(killed)]:
            os.kill(process, signal.SIGKILL)
            killed.add(process)
        time.sleep(0.05)
    return len(killed)
