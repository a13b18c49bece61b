"""Chunks through encoder actors on Ray Data: receipts come back as they are staged, in any order.

One operator, an actor pool: the actors read, decode, encode and stage a chunk each, so nothing but the work order and the
receipt crosses a process border. A worker that dies is restarted by Ray and its chunk is tried again (see `journal`).
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline.compute import Compute, Sizes
from pipeline.config import ConfigError
from pipeline.plan import Chunk
from pipeline.table.stage import Receipt
from pipeline.work import CHUNKS_AT_ONCE, ChunkWorker, Task

log = logging.getLogger(__name__)


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
    except ConnectionError as error:
        raise ConfigError(f"compute.address={address!r}: no Ray cluster answers there ({error})") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # ray.init puts its own in place, which ends the process without a last commit


def cluster_nodes() -> list[dict[str, float]]:
    """Resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class EmbedChunks:
    """Ray Data actor: a `ChunkWorker` that takes its chunks from Arrow rows."""

    def __init__(self, task: "ray.ObjectRef[Task]") -> None:
        told: Task = ray.get(task)
        if told.threads > 1:
            # The threads are the parallelism: each of them multiplying matrices with threads of its own is slower.
            os.environ["OMP_NUM_THREADS"] = "1"
        self._worker = ChunkWorker(told)

    def __call__(self, batch: pa.Table) -> pa.Table:
        receipts = []
        for row in batch.to_pylist():
            work = pa.ipc.open_stream(row["work"]).read_all()
            receipts.append(self._worker(row["chunk"], work).to_bytes())
        return pa.table({"receipt": pa.array(receipts, pa.large_binary())})


def embed(chunks: list[Chunk], task: Task, fit: Sizes) -> Iterator[Receipt]:
    """Receipts of `chunks` as they are staged. Ray must be running."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray's own threshold is barely reached with two chunks at once in an actor: the pool stayed on one node of a cluster.
    context.actor_pool_util_upscaling_threshold = 1.0
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the report and the meter say what it would
    # Put one by one: the driver then holds one of them, and Ray moves what does not fit into its memory to disk.
    orders = [ray.put(pa.table({"chunk": [chunk.id], "work": [_to_bytes(chunk.work)]})) for chunk in chunks]
    dataset = ray.data.from_arrow_refs(orders).map_batches(
        EmbedChunks,
        fn_constructor_args=(ray.put(task),),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=fit.actors, enable_true_multi_threading=True, max_concurrent_calls_per_actor=CHUNKS_AT_ONCE
        ),
        num_cpus=fit.cpus,
        num_gpus=fit.gpus or None,
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for data in batch["receipt"].to_pylist():
            yield Receipt.from_bytes(data)


def _to_bytes(table: pa.Table) -> bytes:
    """As an Arrow IPC stream. Compressed: paths and URIs are alike, a listing comes down to a fifth."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
