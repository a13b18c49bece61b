"""kill -9 of a driver between its chunks, and two runs at once: real processes over real slides."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.table.stage import Staging
from tests.slides.runs import Lab, write

pytestmark = pytest.mark.usefixtures("cluster")
SLIDES = 4


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "slides", tmp_path / "db")
    for seed in range(SLIDES):
        write(lab.folder / f"{seed}.svs", seed)
    return lab


def settings(lab, seconds=0.0):
    encoder = {"target": "tests.sources:Slow", "args": {"dim": 16, "seconds": seconds, "memory": str(lab.db.parent)}}
    return {"encoder": encoder, "compute": {"chunk_rows": 20, "batch_size": 8, "threads": 1}, "sync": {"commit_every_s": 0}}


def start(lab, *, seconds):
    path = lab.db.parent / f"{time.monotonic_ns()}.yaml"
    path.write_text(yaml.safe_dump(lab.job(**settings(lab, seconds)).model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.slides", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out)


def content(lab):
    return {item: (row["vector"], row["tissue_fraction"], row["lapvar"]) for item, row in lab.tiles().items()}


def test_a_run_killed_half_way_shows_whole_slides_only_and_is_finished_by_the_next(lab):
    driver = start(lab, seconds=0.4)
    receipts = Path(lab.at.staging) / "receipts"
    deadline = time.monotonic() + 300
    # At least one slide is committed, and something of the next is staged.
    while not (lab.tiles() and receipts.is_dir() and os.listdir(receipts)):
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.communicate()[1][-3000:]
        time.sleep(0.05)
    orphans = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    # Its workers end a moment after it, and one may stage a chunk until then, which the next run has embedded by that time.
    psutil.wait_procs(orphans, timeout=60)
    counts = {slide_id: row["tiles"] for slide_id, row in lab.slides().items()}
    seen = {slide_id: len(lab.tiles(slide_id)) for slide_id in counts}
    assert all(seen[slide_id] in (0, counts[slide_id]) for slide_id in counts), "a reader sees half a slide"
    assert 0 < sum(seen.values()) < sum(counts.values())
    report = lab.run(**settings(lab))
    assert report.opened == 0, "what was surveyed stays surveyed"
    assert report.tiles.written == sum(counts.values()) - sum(seen.values())
    assert {row["status"] for row in lab.slides().values()} == {"ok"}
    assert Staging(lab.at).receipts() == []
    whole = Lab(lab.folder, lab.db, name="whole")
    whole.run(**settings(lab))
    assert content(lab) == content(whole)
    third = lab.run(**settings(lab))
    assert (third.unchanged, third.tiles.commits) == (SLIDES, 0)


def test_two_runs_at_once_on_an_empty_table_lose_and_repeat_nothing(lab):
    reports = [finish(run) for run in [start(lab, seconds=0.2), start(lab, seconds=0.2)]]
    slides = lab.slides()
    assert {row["status"] for row in slides.values()} == {"ok"}
    assert len(lab.tiles()) == sum(row["tiles"] for row in slides.values()) == sum(report["tiles"]["written"] for report in reports)
    for report in reports:
        tiles = report["tiles"]
        assert tiles["listed"] == tiles["unchanged"] + tiles["written"]
