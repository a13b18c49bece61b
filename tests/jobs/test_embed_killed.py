"""kill -9 of an encoder actor, of a worker between its file and its receipt, of the driver; two jobs at once. Real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from pipeline.table.at import TableAt
from pipeline.table.stage import Staging

ITEMS = 240


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(ITEMS):
        (folder / f"i{i:03}.txt").write_text(f"text number {i}")
    return folder


def start(tmp_path, texts, *overrides, encoder="pipeline.encoders.hashing:Hashing", db="db", **args):
    job = {
        "source": {"target": "tests.sources:Lines", "args": {"uri": str(texts)}},
        "encoder": {"target": encoder, "args": {"dim": 16, **args}},
        "table": {"uri": str(tmp_path / db), "name": "t"},
        "compute": {"cpus": 1, "chunk_rows": 20},
        "sync": {"commit_every_s": 0},
    }
    path = tmp_path / f"{db}-{len(overrides)}.yaml"
    path.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "jobs.embed", str(path), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out)


def rows(tmp_path, db="db"):
    dataset = TableAt(uri=str(tmp_path / db), name="t").require()
    found = dataset.to_table(columns=["id", "vector"]).to_pylist()
    assert len(found) == len({row["id"] for row in found}), "an id stands twice"
    return {row["id"]: row["vector"] for row in found}


def test_a_killed_encoder_actor_costs_nothing_but_time(tmp_path, texts):
    (texts / "i100.txt").write_text("kill-once")
    report = finish(start(tmp_path, texts, encoder="tests.sources:Faulty", memory=str(tmp_path)))
    assert (tmp_path / "killed").exists()
    assert (report["written"], report["rejected"], report["failed"]) == (ITEMS, 0, 0)
    assert len(rows(tmp_path)) == ITEMS


def test_a_worker_killed_after_its_file_was_written_leaves_no_second_copy(tmp_path, texts):
    report = finish(start(tmp_path, texts, encoder="tests.sources:DiesAfterStaging", memory=str(tmp_path)))
    assert (tmp_path / "killed").exists()
    assert report["written"] == ITEMS
    assert len(rows(tmp_path)) == ITEMS
    dataset = TableAt(uri=str(tmp_path / "db"), name="t").require()
    files = list((tmp_path / "db" / "t.lance" / "data").iterdir())
    assert 1 <= len(files) - len(dataset.get_fragments()) <= 2, "the killed worker's orphans should lie there, unreferenced"


def test_a_driver_killed_half_way_is_finished_by_the_rerun(tmp_path, texts):
    uninterrupted = finish(start(tmp_path, texts, encoder="tests.sources:Faulty", db="whole"))
    driver = start(tmp_path, texts, encoder="tests.sources:Faulty", seconds=0.5)
    at = TableAt(uri=str(tmp_path / "db"), name="t")
    deadline = time.monotonic() + 120
    while (dataset := at.open()) is None or dataset.count_rows() < 60:
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    committed = len(rows(tmp_path))
    assert 0 < committed < ITEMS
    report = finish(start(tmp_path, texts, encoder="tests.sources:Faulty"))
    assert report["unchanged"] == committed
    assert report["written"] == ITEMS - committed
    assert rows(tmp_path) == rows(tmp_path, "whole")
    assert Staging(at).receipts() == []
    third = finish(start(tmp_path, texts, encoder="tests.sources:Faulty"))
    assert (third["written"], third["commits"], third["table_version"]) == (0, 0, report["table_version"])
    assert uninterrupted["written"] == ITEMS


def test_a_job_told_to_stop_commits_what_it_has(tmp_path, texts):
    driver = start(tmp_path, texts, "sync.commit_every_s=1000", encoder="tests.sources:Faulty", seconds=0.3)
    at = TableAt(uri=str(tmp_path / "db"), name="t")
    deadline = time.monotonic() + 120
    while at.open() is None or len(os.listdir(at.staging + "/receipts") if os.path.isdir(at.staging + "/receipts") else []) < 3:
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert "interrupted" in err
    assert len(rows(tmp_path)) >= 40


def test_two_jobs_started_together_on_an_empty_table_lose_and_repeat_nothing(tmp_path, texts):
    jobs = [start(tmp_path, texts, encoder="tests.sources:Faulty", seconds=0.2), start(tmp_path, texts, encoder="tests.sources:Faulty", seconds=0.2)]
    reports = [finish(job) for job in jobs]
    assert len(rows(tmp_path)) == ITEMS
    assert sum(report["written"] for report in reports) == ITEMS
    for report in reports:
        assert report["listed"] == ITEMS == report["unchanged"] + report["written"]
