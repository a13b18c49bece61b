"""The embed job submitted with Ray's Jobs API to a cluster of two raylets, with a token; and one raylet dies half-way.

The raylets are real `ray start` processes with ports and folders of their own; only these are ended. Two minutes in all.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.table.at import TableAt

ITEMS = 240
REPOSITORY = Path(__file__).parents[2]
HEAVY = [".git", ".venv", "demo/assets", "demo/output", ".mypy_cache", ".ruff_cache"]
CPUS = 3
"""Of each raylet. An actor takes two of them by default: that of a dead raylet finds no room beside the other's."""


class Head(NamedTuple):
    """A running head: where it is, and what another process needs to be let in."""

    folder: Path
    port: int
    dashboard: str
    token: str


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    port, dashboard, client = free_ports(3)
    head = Head(folder, port, f"http://127.0.0.1:{dashboard}", secrets.token_hex(32))
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    process = start(head, "--head", f"--temp-dir={folder}", *ports)
    try:
        wait(lambda: answers(dashboard), seconds=60)
        yield head
    finally:
        end(process)


@pytest.fixture
def second(head):
    process = start(head, f"--address=127.0.0.1:{head.port}")
    yield process
    end(process)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(ITEMS):
        (folder / f"i{i:03}.txt").write_text(f"text number {i}")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(texts, tmp_path_factory):
    """The rows of a run on this machine alone."""
    folder = tmp_path_factory.mktemp("local")
    command = [sys.executable, "-m", "jobs.embed", str(job_file(folder, texts, seconds=0.0)), "compute.address=local"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    return rows(folder)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(head, *arguments, settings=None):
    """A raylet, with `settings` in its environment. What it starts belongs to the session that it leads."""
    agent, grpc, environment_agent, metrics = free_ports(4)
    ports = [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}", f"--runtime-env-agent-port={environment_agent}"]
    ports += [f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0"]
    sizes = [f"--num-cpus={CPUS}", f"--object-store-memory={100 * 2**20}"]
    scripts = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token, "PATH": f"{scripts}:{os.environ['PATH']}", **(settings or {})}
    command = [scripts / "ray", "start", "--block", "--disable-usage-stats", *sizes, *ports, *arguments]
    with (head.folder / "start.log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def end(process):
    """kill -9 of everything in the session that `process` leads: the raylet, its agents, its workers."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and session_of(int(entry.name)) == process.pid:
            os.kill(int(entry.name), signal.SIGKILL)
    process.wait(timeout=10)


def session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def answers(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def wait(condition, *, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.2)


def job_file(folder, texts, *, seconds):
    job = {
        "source": {"target": "tests.sources:Lines", "args": {"uri": str(texts)}},
        "encoder": {"target": "tests.sources:Slow", "args": {"dim": 16, "seconds": seconds, "memory": str(folder)}},
        "table": {"uri": str(folder / "db"), "name": "t"},
        "compute": {"chunk_rows": 5, "threads": 1},
        "sync": {"commit_every_s": 0},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def submit(head, path):
    """A client, and the job that it submitted as `ray job submit --working-dir .` does."""
    client = JobSubmissionClient(head.dashboard, headers={"Authorization": f"Bearer {head.token}"})
    environment = {"working_dir": str(REPOSITORY), "excludes": HEAVY}
    return client, client.submit_job(entrypoint=f"python -m jobs.embed {path}", runtime_env=environment)


def finish(client, job):
    wait(lambda: client.get_job_status(job).is_terminal(), seconds=150)
    logs = client.get_job_logs(job)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs[-3000:]
    return json.loads(next(line for line in reversed(logs.splitlines()) if line.startswith('{"job"')))


def rows(folder):
    found = TableAt(uri=str(folder / "db"), name="t").require().to_table(columns=["id", "vector"]).to_pylist()
    assert len(found) == len({row["id"] for row in found}), "an id stands twice"
    return {row["id"]: row["vector"] for row in found}


def count(folder):
    dataset = TableAt(uri=str(folder / "db"), name="t").open()
    return dataset.count_rows() if dataset else 0


def test_a_submitted_job_makes_the_table_that_a_local_run_makes(head, second, tmp_path, texts, uninterrupted):
    report = finish(*submit(head, job_file(tmp_path, texts, seconds=0.1)))
    assert (report["listed"], report["written"], report["failed"], report["rejected"]) == (ITEMS, ITEMS, 0, 0)
    assert rows(tmp_path) == uninterrupted
    # With compute.gpus=0 the encoder took every GPU that it saw, and Ray knew nothing of it.
    assert {seen.read_text() for seen in tmp_path.glob("session-*")} == {""}
    again = finish(*submit(head, tmp_path / "job.yaml"))
    assert (again["unchanged"], again["written"], again["table_version"]) == (ITEMS, 0, report["table_version"])


def test_a_raylet_killed_half_way_changes_nothing_in_the_result(head, second, tmp_path, texts, uninterrupted):
    client, job = submit(head, job_file(tmp_path, texts, seconds=0.8))
    wait(lambda: count(tmp_path) >= 40 and (tmp_path / f"session-{second.pid}").exists(), seconds=90)
    end(second)
    committed = count(tmp_path)
    assert committed < ITEMS
    report = finish(client, job)
    assert report["written"] == ITEMS == report["listed"] == report["rows_in_table"]
    assert (report["unchanged"], report["rejected"], report["failed"], report["errors"]) == (0, 0, 0, [])
    assert rows(tmp_path) == uninterrupted
    assert not list((tmp_path / "db" / "t.staging" / "receipts").iterdir())


def test_a_client_without_the_token_is_turned_away(head):
    with pytest.raises(Exception, match="Invalid authentication token"):
        JobSubmissionClient(head.dashboard, headers={"Authorization": "Bearer " + secrets.token_hex(32)})
