"""Chaos: drivers and workers killed again and again at random moments. `make chaos`; one kill of each kind is in `make test`.

The two long tests took 5 minutes on two busy cores.
"""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.embed import EmbedJob
from pipeline.config import Ref
from pipeline.encoders.hashing import Hashing
from pipeline.fill import Filling
from pipeline.prepare import prepare
from pipeline.report import EmbedReport
from pipeline.table.at import TableAt
from pipeline.work import ChunkWorker
from tests.jobs.test_embed_killed import ITEMS, finish, rows, start, texts  # noqa: F401


class Interrupted(Hashing):
    """Hashing in a process that ends in its midst: nothing after `encode` is done, nothing is cleaned up."""

    def encode(self, items):
        raise KeyboardInterrupt


def test_runs_that_were_killed_are_not_held_against_the_items_they_had_in_hand(tmp_path, texts):  # noqa: F811
    """The tries of a chunk were counted across runs: whoever stopped a job four times found sound items rejected."""
    job = EmbedJob.model_validate(
        {
            "source": {"target": "tests.sources:Lines", "args": {"uri": str(texts)}},
            "encoder": {"target": "pipeline.encoders.hashing:Hashing", "args": {"dim": 16}},
            "table": {"uri": str(tmp_path / "db"), "name": "t"},
        }
    )
    prepared = prepare(job.source, job.encoder, job.table, sync=job.sync, chunk_rows=5)
    filling = Filling(prepared, job.encoder, job.limits, job.sync, EmbedReport())
    filling.open()
    task = filling.task(batch_size=1, threads=1)
    chunk = prepared.plan.chunks[0]
    interrupted = Ref(target="tests.jobs.test_chaos:Interrupted", args={"dim": 16})
    for number in range(8):
        with pytest.raises(KeyboardInterrupt):
            ChunkWorker(replace(task, encoder=interrupted, run=f"run-{number}"))(chunk.id, chunk.work)
    receipt = ChunkWorker(task)(chunk.id, chunk.work)
    assert (receipt.error, receipt.rows, receipt.rejects.num_rows) == (None, 5, 0)


def test_more_than_one_ctrl_c_ends_the_job_at_once_and_in_order(tmp_path, texts):  # noqa: F811
    """The second one met Ray's shut-down, and the process crashed with a segmentation fault."""
    driver = start(tmp_path, texts, encoder="tests.sources:Faulty", seconds=0.3)
    at = TableAt(uri=str(tmp_path / "db"), name="t")
    deadline = time.monotonic() + 120
    while (dataset := at.open()) is None or dataset.count_rows() == 0:
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    for _ in range(3):
        driver.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 1, err[-2000:]
    assert "run the same command again to go on" in err
    report = finish(start(tmp_path, texts, encoder="tests.sources:Faulty"))
    assert report["written"] + report["unchanged"] == ITEMS == len(rows(tmp_path))


def descendants(pid):
    """Process ids below `pid`, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return found


def kill_a_worker(driver):
    """kill -9 of one encoder actor of `driver`, if it has one; whether it had."""
    for pid in sorted(descendants(driver.pid)):
        try:
            is_worker = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::MapWorker")
        except FileNotFoundError:
            continue
        if is_worker:
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def timed(tmp_path, texts, *overrides, **how):  # noqa: F811
    """A run from start to end: seconds until its first rows were committed, and from there to its end."""
    began = time.monotonic()
    driver = start(tmp_path, texts, *overrides, db="whole", **how)
    at = TableAt(uri=str(tmp_path / "whole"), name="t")
    while (dataset := at.open()) is None or dataset.count_rows() == 0:
        assert driver.poll() is None
        time.sleep(0.1)
    first = time.monotonic()
    finish(driver)
    return first - began, time.monotonic() - first


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_drivers_and_workers_killed_ten_times_leave_what_one_run_would(tmp_path, texts):  # noqa: F811
    dice = random.Random(0)
    how = {"encoder": "tests.sources:Faulty", "seconds": 0.8}
    overrides = ["compute.chunk_rows=10"]
    # Kills are placed by what a run takes on this machine: some before its first commit, the others so soon after it that work is left for all.
    to_first, rest = timed(tmp_path, texts, *overrides, **how)
    workers = drivers = 0
    for number in range(10):
        driver = start(tmp_path, texts, *overrides, **how)
        deadline = time.monotonic() + to_first + dice.uniform(-0.5 * to_first, 0.2 * rest)
        while driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if number % 2:
            while driver.poll() is None and not kill_a_worker(driver):
                time.sleep(0.1)
            workers += driver.poll() is None
            time.sleep(dice.uniform(0, 0.5 * to_first))
        drivers += driver.poll() is None
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        time.sleep(1)
    assert workers >= 3, "too few workers were met"
    assert drivers >= 7, "too few drivers were met"
    report = finish(start(tmp_path, texts, encoder="tests.sources:Faulty"))
    assert report["rejected"] == report["failed"] == 0
    assert rows(tmp_path) == rows(tmp_path, "whole")
    assert len(rows(tmp_path)) == ITEMS


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_worker_killed_every_few_seconds_only_slows_the_job(tmp_path, texts):  # noqa: F811
    dice = random.Random(1)
    finish(start(tmp_path, texts, encoder="tests.sources:Faulty", db="whole"))
    driver = start(tmp_path, texts, encoder="tests.sources:Faulty", seconds=0.5)
    killed = 0
    while driver.poll() is None and killed < 5:
        time.sleep(dice.uniform(4, 8))
        killed += kill_a_worker(driver)
    report = finish(driver)
    assert killed > 0, "no worker was met"
    assert report["written"] == ITEMS == report["rows_in_table"]
    assert rows(tmp_path) == rows(tmp_path, "whole")
