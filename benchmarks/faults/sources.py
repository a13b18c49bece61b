"""What both routes are given: the same Parquet rows or JPEG files, and an encoder that writes down what it was asked for."""

import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.encoders.hashing import Hashing
from pipeline.encoders.lineage import fingerprint_of
from pipeline.media import to_pixels

KILL = "kill"


def texts(num_rows: int, *, start: int = 0, changed: dict[str, str] | None = None) -> pa.Table:
    """Rows of `id` and `text`. `changed`: texts of their own for some ids."""
    ids = [f"i{n}" for n in range(start, start + num_rows)]
    return pa.table({"id": ids, "text": [(changed or {}).get(i, f"text number {i} of a small collection") for i in ids]})


def write_texts(folder: Path, rows: pa.Table, *, num_files: int = 8) -> Path:
    """The rows as Parquet files, in place of those that were there; returns the folder."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.parquet"):
        old.unlink()
    size = -(-rows.num_rows // num_files)
    for number, start in enumerate(range(0, rows.num_rows, size)):
        pq.write_table(rows.slice(start, size), folder / f"{number:03}.parquet")
    return folder


def write_photos(folder: Path, num_photos: int) -> pa.Table:
    """Small JPEG files of one colour each; returns their paths, in the column `uri`."""
    folder.mkdir(exist_ok=True)
    colours = np.random.default_rng(0).integers(0, 256, size=(num_photos, 3), dtype=np.uint8)
    paths = [folder / f"p{n:05}.jpg" for n in range(num_photos)]
    for path, colour in zip(paths, colours, strict=True):
        data = io.BytesIO()
        Image.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy()).save(data, "JPEG")
        path.write_bytes(data.getvalue())
    return pa.table({"uri": [str(path) for path in paths]})


class Watched(Hashing):
    """Hashing that writes what it encodes into a log, takes `seconds` a call, and is killed by the text `kill`."""

    def __init__(self, log: str, seconds: float = 0.0, dim: int = 16) -> None:
        super().__init__(dim=dim)
        self.log, self.seconds = log, seconds

    def encode(self, items: pa.Table) -> np.ndarray:
        """As Hashing does."""
        time.sleep(self.seconds)
        with Path(self.log).open("a") as file:
            file.write("".join(f"{os.getpid()} {item}\n" for item in items["id"].to_pylist()))
        if KILL in items["text"].to_pylist():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(items)


class OfOtherWeights(Watched):
    """Another encoder of the same `dim`: its vectors fit the table and mean something else."""

    def __init__(self, log: str, dim: int = 16) -> None:
        super().__init__(log, dim=dim)
        self.lineage = self.lineage | {"weights": "other"}
        self.fingerprint = fingerprint_of(self.lineage)

    def encode(self, items: pa.Table) -> np.ndarray:
        """Hashing's vectors with their numbers in another order."""
        return super().encode(items)[:, ::-1]


def encoded(log: Path) -> list[tuple[int, str]]:
    """What Watched encoders were asked for so far: process and item."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines if len(line.split()) == 2]


def encode(encoder: Hashing, rows: pa.Table) -> pa.Table:
    """Rows of `id` and `text` with their vectors, in the column type that Lance takes for vectors."""
    items = pa.table({"id": rows["id"], "text": rows["text"], "image": to_pixels([None] * rows.num_rows)})
    vectors = encoder.encode(items)
    return rows.append_column("vector", pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), encoder.dim))
