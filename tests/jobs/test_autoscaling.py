"""A cluster that begins without a machine for the work: Ray's own autoscaler, on a provider that starts raylets on this machine. A minute."""

import json
import os
import secrets
import subprocess
import sys

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.jobs.test_cluster_jobs import REPOSITORY, Head, answers, end, free_ports, job_file, start, wait

ITEMS = 60
HEAD = "ray.head.default"
AUTOSCALER = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    # What `ray up` puts before its own start commands.
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_NODE_TYPE_NAME": HEAD,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "RAY_memory_monitor_refresh_ms": "0",
}
LISTS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands")
LISTS += ("worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")


def config(port):
    """What an autoscaler reads on its head: machines with a GPU, from none to two. The raylets say that they have one; nothing here uses it."""
    gpu = {"CPU": 2, "GPU": 1, "object_store_memory": 100 * 2**20}
    return {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 3}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": gpu, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": HEAD,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in LISTS},
    }


@pytest.fixture
def head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a")  # a short name: the paths of Ray's sockets may have 107 characters
    port, client = free_ports(2)
    head = Head(folder, port, "", secrets.token_hex(32))
    (folder / "cluster.yaml").write_text(json.dumps(config(port)))
    ports = [f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
    process = start(head, "--head", f"--temp-dir={folder}", f"--autoscaling-config={folder / 'cluster.yaml'}", *ports, settings=AUTOSCALER)
    try:
        wait(lambda: answers(port), seconds=60)
        yield head
    finally:
        end(process)


def test_machines_with_gpus_are_started_from_none(head, tmp_path):
    """The job looked only at the machines that were there, and refused: the largest node has 0 GPUs."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(ITEMS):
        (texts / f"i{i:03}.txt").write_text(f"text number {i}")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    told = [str(job_file(tmp_path, texts, seconds=2.0)), f"compute.address=127.0.0.1:{head.port}", "compute.gpus=1", "compute.actors=2"]
    command = [sys.executable, "-m", "jobs.embed", *told]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["written"] == ITEMS
    assert "waiting for it to start a machine with 1 CPU and 1 GPU" in done.stderr
    assert "2 GPUs" in done.stderr, "Ray's autoscaler did not tell of a second machine"
    assert {seen.read_text() for seen in tmp_path.glob("session-*")} == {"0"}


def test_a_training_run_waits_for_machines_that_are_not_there_yet(head):
    """It said that there is room for 0 workers, and ended."""
    code = f"""
from pipeline.training.fit import check_room, running_ray
from pipeline.training.settings import Workers
workers = Workers(num=2, cpus=2, gpus=1, address="127.0.0.1:{head.port}")
with running_ray(workers):
    check_room(workers, readers=1)
"""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
