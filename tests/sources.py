"""Readers and encoders that tests run jobs with: small, real, and with faults that can be ordered."""

import contextlib
import errno
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.encoders.hashing import Hashing
from pipeline.media import BadItem, from_pixels
from pipeline.readers import UnitChanged
from schemas.items import ITEM, LISTING, SLICE


class Lines:
    """A folder of .txt files, each one item; the id is the file's stem."""

    def __init__(self, uri: str, name: str | None = None):
        self.uri = str(Path(uri).absolute())
        self.source = name or self.uri
        self.metadata = pa.schema([])

    def list(self) -> pa.Table:
        files = sorted(Path(self.uri).glob("*.txt"))
        versions = [f"{f.stat().st_size}-{f.stat().st_mtime_ns}" for f in files]
        columns = {"unit": [str(f) for f in files], "version": versions, "bytes": [f.stat().st_size for f in files], "id": [f.stem for f in files]}
        return pa.table(columns, schema=LISTING)

    def read(self, work):
        texts = [Path(unit).read_text() for unit in work["unit"].to_pylist()]
        yield items(work["id"].to_pylist(), work["version"].to_pylist(), work["unit"].to_pylist(), texts)


class Pointers(Lines):
    """Lines that name the image each of them stands for."""

    def read(self, work):
        for found in super().read(work):
            yield found.set_column(5, "image_uri", found["text"]).set_column(3, "text", pa.nulls(found.num_rows, pa.string()))


class Ledgers:
    """A folder of .json files, each a container: a list of [id, text]; the version of an item is its text."""

    def __init__(self, uri: str, slice_rows: int = 10):
        self.uri, self.slice_rows = str(Path(uri).absolute()), slice_rows
        self.source = self.uri
        self.metadata = pa.schema([])

    def list(self) -> pa.Table:
        files = sorted(Path(self.uri).glob("*.json"))
        columns = {"unit": [str(f) for f in files], "version": [str(f.stat().st_mtime_ns) for f in files]}
        return pa.table({**columns, "bytes": [0] * len(files), "id": [None] * len(files)}, schema=LISTING)

    def split(self, units) -> pa.Table:
        rows = []
        for unit, version in zip(units["unit"].to_pylist(), units["version"].to_pylist(), strict=True):
            size = len(json.loads(Path(unit).read_text()))
            for start in range(0, size, self.slice_rows):
                rows.append({"unit": unit, "version": version, "start": start, "stop": min(size, start + self.slice_rows), "bytes": 0})
        return pa.Table.from_pylist(rows, schema=SLICE)

    def read(self, work):
        for cut in work.to_pylist():
            pairs = json.loads(Path(cut["unit"]).read_text())[cut["start"] : cut["stop"]]
            ids, texts = [p[0] for p in pairs], [p[1] for p in pairs]
            yield items(ids, texts, [cut["unit"]] * len(ids), texts)


class Painted(Ledgers):
    """Ledgers whose reader makes the pictures itself, of the grey that the text names, and measures them. `corrupt` and `hang` do that."""

    def __init__(self, uri: str, slice_rows: int = 10):
        super().__init__(uri, slice_rows)
        self.metadata = pa.schema([("grey", pa.float32())])

    def read(self, work):
        for found in super().read(work):
            yield found.set_column(3, "text", pa.nulls(found.num_rows, pa.string())).append_column("grey", pa.nulls(found.num_rows, pa.float32()))

    def pixels(self, row):
        if row["version"] == "corrupt":
            raise BadItem("corrupt_tile", "told to be")
        if row["version"] == "hang":
            time.sleep(3600)
        return np.full((8, 8, 3), int(row["version"]), np.uint8), {"grey": float(row["version"])}

    def confirm(self, work):
        if Path(work["unit"][0].as_py()).with_suffix(".replaced").exists():
            raise UnitChanged("replaced")


def items(ids, versions, uris, texts) -> pa.Table:
    n = len(ids)
    columns = [ids, versions, uris, texts, pa.nulls(n, pa.binary()), pa.nulls(n, pa.string())]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, ITEM, strict=True)], schema=ITEM)


class Faulty(Hashing):
    """Hashing, with faults ordered by the words in a text. Same vectors, same fingerprint as `Hashing`.

    `kill`: kills its worker, always. `kill-once`: kills it the first time (`memory` is a folder that remembers).
    `hang`: never returns. `raise`: raises. `nan`: gives NaN.
    """

    def __init__(self, dim: int = 16, memory: str | None = None, seconds: float = 0.0):
        super().__init__(dim=dim)
        self.memory, self.seconds = memory, seconds

    def encode(self, items: pa.Table) -> np.ndarray:
        time.sleep(self.seconds)
        words = [(text or "").split() for text in items["text"].to_pylist()]
        for ws in words:
            self._obey(ws)
        vectors = super().encode(items)
        for row, ws in enumerate(words):
            if "nan" in ws:
                vectors[row] = np.nan
        return vectors

    def _obey(self, words: list[str]) -> None:
        if "raise" in words:
            raise ValueError("told to raise")
        if "hang" in words:
            time.sleep(3600)
        if "kill" in words or ("kill-once" in words and self._first()):
            os.kill(os.getpid(), signal.SIGKILL)

    def _first(self) -> bool:
        try:
            (Path(self.memory) / "killed").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class TooLarge(Hashing):
    """Hashing that no worker can load."""

    def load(self) -> None:
        raise MemoryError("the weights do not fit")


class DiesAfterStaging(Hashing):
    """Hashing whose worker is killed once, after it has written a fragment and before it has written the receipt."""

    def __init__(self, dim: int = 16, memory: str = "."):
        super().__init__(dim=dim)
        self.memory = memory

    def load(self) -> None:
        import pipeline.work

        stage = pipeline.work.stage_rows

        def stage_and_die(*arguments):
            fragments = stage(*arguments)
            with contextlib.suppress(FileExistsError):
                (Path(self.memory) / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
            return fragments

        pipeline.work.stage_rows = stage_and_die


class Slow(Hashing):
    """Hashing that takes its time, and leaves a file named after the session of processes it ran in, on which raylet: the GPUs it saw."""

    def __init__(self, dim: int = 16, seconds: float = 0.0, memory: str = "."):
        super().__init__(dim=dim)
        self.seconds, self.memory = seconds, memory

    def encode(self, items: pa.Table) -> np.ndarray:
        (Path(self.memory) / f"session-{os.getsid(0)}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        time.sleep(self.seconds)
        return super().encode(items)


class Quadrants:
    """An encoder whose vectors show what it was given: the mean colours of an image's quadrants, in units of their last number."""

    dim = 13
    inputs = frozenset({"image"})
    lineage = {"encoder": "quadrants"}
    fingerprint = "9" * 32

    def encode(self, items: pa.Table) -> np.ndarray:
        vectors = np.array([self._vector(image) for image in from_pixels(items["image"])], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _vector(self, image: np.ndarray) -> np.ndarray:
        image = image[:: max(1, len(image) // 64)]  # every row of a small one
        halves = [part for half in np.array_split(image, 2, axis=0) for part in np.array_split(half, 2, axis=1)]
        return np.array([*np.concatenate([half.mean(axis=(0, 1)) for half in halves]) / 255, 1.0])


class Forbidden:
    """An encoder whose weights may not be read."""

    def __init__(self) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/weights")


class WithoutItsGpu(Hashing):
    """An encoder that was told to run on a GPU."""

    def load(self) -> None:
        from pipeline.encoders.precision import device_of

        device_of("cuda")
