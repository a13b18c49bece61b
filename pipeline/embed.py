"""Chunks through encoder actors on Ray Data: receipts come back as they are staged, in any order.

One operator, an actor pool: the actors read, decode, encode and stage a chunk each, so nothing but the work order and the
receipt crosses a process border. A worker that dies is restarted by Ray and its chunk is tried again (see `journal`).
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline.compute import Compute, Sizes, holds, sizes
from pipeline.config import ConfigError, JobFailed
from pipeline.plan import Chunk
from pipeline.table.stage import Receipt
from pipeline.work import CHUNKS_AT_ONCE, ChunkWorker, Task

log = logging.getLogger(__name__)

MACHINE_S = 1800
"""Longest wait for the first machine that can hold an actor, on a cluster that starts machines by itself."""
SAY_S = 60
NODE_GROUP = "ray.io/node-group"
"""Label of a node that an autoscaler, or KubeRay, started. Ray itself does not tell what an autoscaler may start."""


@contextlib.contextmanager
def running_ray(compute: Compute) -> Iterator[None]:
    """Connect to the cluster, or start a Ray of our own, and leave it afterwards; a Ray that the caller started is used and left alone."""
    if ray.is_initialized():
        yield
        return
    _start(compute)
    try:
        yield
    finally:
        ray.shutdown()


def _start(compute: Compute) -> None:
    address = compute.address or os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR, **local)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ConfigError(
            f"compute.address={address!r}: no Ray cluster answers there, or it asks for a token: set RAY_AUTH_MODE=token, with its token in "
            f"~/.ray/auth_token ({str(error).splitlines()[0]})"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # ray.init puts its own in place, which ends the process without a last commit


def cluster_nodes() -> list[dict[str, float]]:
    """Resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fitted(compute: Compute) -> Sizes:
    """How wide a run is on this cluster. Where the cluster starts machines by itself it is asked for the first one, and waited for.

    Raises ConfigError if no node can hold one actor. Ray must be running.
    """
    grows = growing()
    if grows and not any(holds(compute, node) for node in cluster_nodes()):
        await_machines([{"CPU": compute.cpus or 1, "GPU": compute.gpus}])
    nodes = cluster_nodes()
    if not compute.gpus and any(node.get("GPU") for node in nodes):
        log.info("the cluster has GPUs, and compute.gpus is 0: the encoder runs on CPUs")
    return sizes(compute, nodes, growing=grows)


def growing() -> bool:
    """Whether the cluster starts machines by itself when more is asked of it than it has."""
    return any(NODE_GROUP in node.get("Labels", {}) for node in ray.nodes() if node["Alive"])


def await_machines(needs: list[dict[str, float]]) -> None:
    """Ask a growing cluster for room (`CPU`, `GPU`) for all of `needs` at once, and wait for it. Raises ConfigError after `MACHINE_S`."""
    bundles = [{name: amount for name, amount in need.items() if amount} for need in needs]
    told = " and ".join(f"{amount:g} {name}" for name, amount in bundles[0].items())
    told = f"a machine with {told}" if len(needs) == 1 else f"machines with room for all workers, {told} each"
    log.info("the cluster has no room yet: waiting for it to start %s", told)
    group = ray.util.placement_group(bundles)
    started = time.monotonic()
    try:
        while not group.wait(SAY_S):
            if time.monotonic() - started > MACHINE_S:
                raise ConfigError(
                    f"the cluster did not start {told} within {MACHINE_S // 60} minutes; `ray status` says why: "
                    "is there a node type with as much, does its max_workers allow it, and has the cloud one left?"
                )
            log.info("still waiting for %s (%.0f s)", told, time.monotonic() - started)
    finally:
        ray.util.remove_placement_group(group)


def hide_gpus_of_others() -> None:
    """Without a GPU in a task, torch must see none: Ray leaves the variable alone then, and the encoder would take GPUs that Ray gives to others."""
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class EmbedChunks:
    """Ray Data actor: a `ChunkWorker` that takes its chunks from Arrow rows."""

    def __init__(self, task: "ray.ObjectRef[Task]") -> None:
        hide_gpus_of_others()
        told: Task = ray.get(task)
        if told.threads > 1:
            # The threads are the parallelism: each of them multiplying matrices with threads of its own is slower.
            os.environ["OMP_NUM_THREADS"] = "1"
        self._refused: str | None = None
        try:
            self._worker = ChunkWorker(told)
        except ConfigError as error:
            self._refused = str(error)  # raised here, or by a call, it would come with a hundred lines of Ray's

    def __call__(self, batch: pa.Table) -> pa.Table:
        [row] = batch.to_pylist()
        receipt = None
        if self._refused is None:
            receipt = self._worker(row["chunk"], pa.ipc.open_stream(row["work"]).read_all()).to_bytes()
        return pa.table({"receipt": pa.array([receipt], pa.large_binary()), "refused": pa.array([self._refused], pa.string())})


def embed(chunks: list[Chunk], task: Task, fit: Sizes) -> Iterator[Receipt]:
    """Receipts of `chunks` as they are staged. Ray must be running. Raises JobFailed if the encoder cannot work as it is configured."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray's own threshold is barely reached with two chunks at once in an actor: the pool stayed on one node of a cluster.
    context.actor_pool_util_upscaling_threshold = 1.0
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the report and the meter say what it would
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)  # it would print each error that it raises; whether to is ours to say
    # Put one by one: the driver then holds one of them, and Ray moves what does not fit into its memory to disk.
    orders = [ray.put(pa.table({"chunk": [chunk.id], "work": [_to_bytes(chunk.work)]})) for chunk in chunks]
    dataset = ray.data.from_arrow_refs(orders).map_batches(
        EmbedChunks,
        fn_constructor_args=(ray.put(task),),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=min(fit.at_once, len(chunks)),
            max_size=fit.at_most,
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=CHUNKS_AT_ONCE,
        ),
        num_cpus=fit.cpus,
        num_gpus=fit.gpus or None,
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for answer in batch.to_pylist():
            if answer["refused"] is not None:
                raise JobFailed(answer["refused"])
            yield Receipt.from_bytes(answer["receipt"])


def _to_bytes(table: pa.Table) -> bytes:
    """As an Arrow IPC stream. Compressed: paths and URIs are alike, a listing comes down to a fifth."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
