"""A machine of a training run is to be taken away: a real notice (`ray drain-node`) to a cluster of two raylets, of which one is then killed.

The run has one to two workers, sharded while there are two, and no other checkpoint than the one that the notice makes.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.training.journal import Journal
from tests.jobs.test_cluster_jobs import REPOSITORY, Head, answers, end, free_ports, start, wait
from tests.training.pairs import job_values, losses, rows, write_pairs
from tests.vlm.models import save_model

STEPS = 40
NODE = secrets.token_hex(28)
"""Ray's name of the second raylet."""
QUIET = {"RAY_memory_monitor_refresh_ms": "0"}
"""What else runs on this machine must not make Ray kill workers."""


@pytest.fixture
def head(tmp_path_factory):
    # A short name: the paths of Ray's sockets may have 107 characters.
    folder = tmp_path_factory.mktemp("p")
    port, client = free_ports(2)
    head = Head(folder, port, "", secrets.token_hex(32))
    ports = [f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
    process = start(head, "--head", "--num-cpus=1", f"--temp-dir={folder}", *ports, settings=QUIET)
    try:
        wait(lambda: answers(port), seconds=120)
        yield head
    finally:
        end(process)


def environment(head):
    # Ray counts the dead machine for a while yet, and waits so long for workers on it before it takes what is left.
    patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token, "PYTHONPATH": str(REPOSITORY), **patience}


def lines(folder):
    return Journal(folder / "metrics.jsonl").lines()


def told(folder, event):
    return [line for line in lines(folder) if line.get("event") == event]


def notice(head):
    """As a cloud's notice comes to Ray."""
    command = [Path(sys.executable).parent / "ray", "drain-node", f"--address=127.0.0.1:{head.port}", f"--node-id={NODE}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=300"]
    subprocess.run(command, env=environment(head), check=True, capture_output=True, timeout=60)


def test_a_notice_makes_a_checkpoint_with_which_the_other_machine_goes_on(tmp_path, head):
    second = start(head, f"--address=127.0.0.1:{head.port}", "--num-cpus=1", settings={"RAY_OVERRIDE_NODE_ID_FOR_TESTING": NODE, **QUIET})
    write_pairs(tmp_path)
    save_model(tmp_path / "model", "qwen2_vl")
    values = job_values(tmp_path, tmp_path / "model", name="spot", steps=STEPS)
    values["workers"] = {"num": 1, "most": 2, "address": f"127.0.0.1:{head.port}", "max_failures": 0, "sharding": "fsdp2"}
    values["watching"] |= {"checkpoint_every": 10_000, "evaluate_every": 10_000}
    values["loss"] = {"target": "tests.training.pairs:Slow", "args": {"seconds": 0.4}}
    values["held_out"] = []
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    folder = tmp_path / "runs" / "spot"
    command = [sys.executable, "-m", "jobs.train", str(tmp_path / "job.yaml")]
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(command, env=environment(head), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        wait(lambda: driver.poll() is not None or len(losses_so_far(folder)) > 2, seconds=240)
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()[-3000:]
        notice(head)
        wait(lambda: checkpointed(folder), seconds=60)
        end(second)
        out, _ = driver.communicate(timeout=280)
    finally:
        driver.kill()
        end(second)
    assert driver.returncode == 0, (tmp_path / "driver.log").read_text()[-3000:]
    at = told(folder, "notice")[0]["step"]
    begun, resumed = told(folder, "begun"), told(folder, "resumed")
    assert [line["workers"] for line in begun] == [2] and [(line["workers"], line["step"]) for line in resumed] == [(1, at)]
    assert sorted(losses(folder)) == list(range(STEPS))
    drawn = [key for step in range(5) for key in rows(folder)[step]]
    assert len(set(drawn)) == 40, "5 steps of 8 are the 40 rows, each once, also those done again"
    assert json.loads(out)["rows"] == (STEPS - at) * 8
    page = (folder / "report.html").read_text()
    assert "a machine of the run was to be taken away" in page and "went on from the last checkpoint with 1 worker" in page


def losses_so_far(folder):
    return [line for line in lines(folder) if "loss" in line]


def checkpointed(folder):
    """Whether the checkpoint of the notice is whole, and Ray has had time to know of it."""
    steps = [line["step"] for line in told(folder, "notice")]
    found = [json.loads(path.read_text())["position"]["step"] for path in folder.glob("checkpoint_*/position.json")]
    if not set(steps) & set(found):
        return False
    time.sleep(2)
    return True
