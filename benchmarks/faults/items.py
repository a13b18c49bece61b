"""One item among many that cannot be decoded, or that takes its worker with it."""

import contextlib
import io
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance_ray
import numpy as np
import pyarrow as pa
import ray
import ray.data
from PIL import Image

from benchmarks.faults import obvious, tessera
from benchmarks.faults.outcome import Outcome, observe
from benchmarks.faults.sources import KILL, encoded, texts, write_photos, write_texts
from pipeline.encoders.hashing import Hashing
from pipeline.media import to_pixels

PATIENCE_S = 40


def corrupt_photo(folder: Path) -> Iterator[Outcome]:
    """One corrupt JPEG among 2,000"""
    photos = write_photos(folder / "photos", 2_000)
    corrupt = photos["uri"][1_000].as_py()
    Path(corrupt).write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    good = photos.filter(pa.array(np.arange(2_000) != 1_000))
    routes = ("read_images", None), ("read_images", -1), ("read_binary_files", -1)
    for reader, max_errored_blocks in routes:
        table = folder / f"{reader}{max_errored_blocks}.lance"
        title = f"{reader}, max_errored_blocks={max_errored_blocks}" if max_errored_blocks else f"{reader}, default"
        yield observe(title, table, good, error=_embed_photos(folder / "photos", table, reader, max_errored_blocks))
    report, error = tessera.run(tessera.job_of(folder / "photos", folder / "db", log=folder / "log", images=True))
    yield tessera.outcome(folder / "db", good, error=error, note=_rejects(report))


def _embed_photos(photos: Path, table: Path, reader: str, max_errored_blocks: int | None) -> str | None:
    obvious.start_ray()
    ray.data.DataContext.get_current().max_errored_blocks = max_errored_blocks or 0
    if reader == "read_images":
        rows = ray.data.read_images(str(photos), include_paths=True, mode="RGB").map_batches(EmbedPixels, **ACTORS)
    else:
        rows = ray.data.read_binary_files(str(photos), include_paths=True).map_batches(embed_bytes, batch_size=32, batch_format="pyarrow")
    try:
        lance_ray.write_lance(rows, str(table))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


class EmbedPixels:
    """Decoded images through the model."""

    def __init__(self) -> None:
        self.encoder = Hashing(dim=16)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        return _rows(self.encoder, list(batch["path"]), list(batch["image"]))


def embed_bytes(batch: pa.Table) -> pa.Table:
    """Encoded images, decoded here, through the model."""
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in batch["bytes"].to_pylist()]
    return _rows(Hashing(dim=16), batch["path"].to_pylist(), images)


def _rows(encoder: Hashing, paths: list[str], images: list[np.ndarray]) -> pa.Table:
    items = pa.table({"id": paths, "text": pa.nulls(len(paths), pa.string()), "image": to_pixels(images)})
    vectors = encoder.encode(items)
    return pa.table({"uri": paths, "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), encoder.dim)})


ACTORS: dict[str, Any] = {"batch_size": 32, "compute": ray.data.ActorPoolStrategy(size=2)}


def killing_item(folder: Path) -> Iterator[Outcome]:
    """One item of 400 kills its worker, as a decompression bomb does; ended after 40 s if need be"""
    rows = texts(400, changed={"i200": KILL})
    others = rows.filter(pa.array(np.arange(400) != 200))
    source, table, log = write_texts(folder / "source", rows), folder / "t.lance", folder / "obvious"
    job = obvious.start("embed", source, table, log=log)
    began = _wait_for(job, log)
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(began + PATIENCE_S - time.monotonic())
    ended = job.poll() is not None
    if not ended:
        job.send_signal(signal.SIGKILL)
    tries = len({process for process, item in encoded(log) if item == "i200"})
    error = obvious.finish(job) if ended else f"no answer: ended from outside after {PATIENCE_S} s"
    yield observe("lance_ray.write_lance", table, others, error=error, note=f"{tries} workers dead")
    report, error = tessera.run(tessera.job_of(source, folder / "db", log=folder / "log"))
    tries = len({process for process, item in encoded(folder / "log") if item == "i200"})
    yield tessera.outcome(folder / "db", others, error=error, note=f"{tries} workers dead, {_rejects(report)}")


def _rejects(report: dict[str, Any]) -> str:
    return ", ".join(f"{count} reject: {reason}" for reason, count in report["rejects"].items())


def _wait_for(job: subprocess.Popen[str], log: Path) -> float:
    """When the first item was encoded: Ray's start is not counted."""
    while not encoded(log) and job.poll() is None:
        time.sleep(0.1)
    return time.monotonic()
