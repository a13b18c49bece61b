"""The obvious job, as the documentation of Ray Data, Lance and lance-ray has it: read, encode in actors, write.

`python -m benchmarks.faults.obvious JSON` runs `embed` with the arguments in JSON.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import lance
import lance_ray
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset
from ray.data.checkpoint import CheckpointConfig

from benchmarks.faults import sources
from pipeline.encoders.hashing import Hashing


class Embed:
    """The model, loaded once an actor; Arrow in, Arrow out."""

    def __init__(self, encoder: Hashing) -> None:
        self.encoder = encoder

    def __call__(self, rows: pa.Table) -> pa.Table:
        return sources.encode(self.encoder, rows)


class EmbedAndAppend(Embed):
    """The same, writing its own batches, so that a long job keeps what it has done."""

    def __init__(self, encoder: Hashing, uri: str) -> None:
        super().__init__(encoder)
        self.uri = uri

    def __call__(self, rows: pa.Table) -> pa.Table:
        lance.write_dataset(super().__call__(rows), self.uri, mode="append")
        return pa.table({"rows": [rows.num_rows]})


def start_ray(**settings: Any) -> None:
    """A Ray of our own with CPUs to spare: a pool that takes every CPU would wait for itself."""
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False, **settings)
    ray.data.DataContext.get_current().enable_progress_bars = False


def rows_of(source: Path) -> Dataset:
    """The Parquet rows, in several blocks as a collection is: so few rows would be one."""
    return ray.data.read_parquet(str(source), override_num_blocks=8)


def vectors(source: Path, encoder: Hashing) -> Dataset:
    """The rows through two encoder actors."""
    actors = ActorPoolStrategy(size=2)
    return rows_of(source).map_batches(Embed, fn_constructor_args=(encoder,), batch_size=32, batch_format="pyarrow", compute=actors)


def embed(source: Path, table: Path, encoder: Hashing, *, mode: Literal["create", "append"] = "create", rows_per_file: int = 2**20) -> None:
    """One commit, at the end."""
    start_ray()
    lance_ray.write_lance(vectors(source, encoder), str(table), mode=mode, min_rows_per_file=rows_per_file)


def embed_in_stream(source: Path, table: Path, encoder: Hashing, *, resume_rows: int = 0) -> None:
    """A commit a batch, by the driver, onto an existing table."""
    start_ray()
    lance_ray.write_lance(vectors(source, encoder), str(table), mode="append", stream=True, batch_size=32, resume_rows=resume_rows)


def embed_with_checkpoint(source: Path, table: Path, encoder: Hashing, *, checkpoint: str) -> None:
    """Ray Data's checkpoint remembers the ids that were written. 50 rows a file and blocks of 4 kB stand for a million and 128 MB."""
    start_ray()
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=checkpoint)
    context.target_max_block_size = 4096
    embed(source, table, encoder, rows_per_file=50)


def embed_and_append(source: Path, table: Path, encoder: Hashing) -> None:
    """A commit a batch, by the actors, onto an existing table."""
    start_ray()
    arguments = {"fn_constructor_args": (encoder, str(table)), "compute": ActorPoolStrategy(size=2)}
    rows_of(source).map_batches(EmbedAndAppend, batch_size=32, batch_format="pyarrow", **arguments).materialize()


def start(how: str, source: Path, table: Path, *, log: Path, seconds: float = 0.0, **settings: Any) -> subprocess.Popen[str]:
    """One of the jobs above in a process of its own. `log`, `seconds`: of the Watched encoder."""
    job = {"how": how, "source": str(source), "table": str(table), "log": str(log), "seconds": seconds, "settings": settings}
    command = [sys.executable, "-m", "benchmarks.faults.obvious", json.dumps(job)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen[str]) -> str | None:
    """Wait; what it said if it failed."""
    _, said = job.communicate()
    return said if job.returncode else None


def main() -> None:
    """What `start` started."""
    job = json.loads(sys.argv[1])
    encoder = sources.Watched(job["log"], seconds=job["seconds"])
    globals()[job["how"]](Path(job["source"]), Path(job["table"]), encoder, **job["settings"])


if __name__ == "__main__":
    main()
