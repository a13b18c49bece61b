"""Items to vectors: fetch, decode, prepare, encode. Every item ends as a vector or as a BadItem that says why not."""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import media
from pipeline.encoders import Encoder
from pipeline.fetch import fetch
from pipeline.journal import Journal
from pipeline.media import BadItem, Limits
from schemas.items import encoder_schema

log = logging.getLogger(__name__)

FETCHED_AT_ONCE = 16
"""Encoded images that a thread holds at a time. Object stores are slow to answer, so more than one."""

MAX_BATCH_BYTES = 128 * 2**20
"""Prepared images that go to the encoder in one call, unless a single one is larger: 256 of 384 x 384 px fit."""

TIMED_TOGETHER = 16
"""Of items that are worked on together, so many have `limits.item_timeout_s` each; the others are hoped to take less than that."""

MACHINES_FAULT = ("out of memory", "not enough memory", "allocate memory", "cuda error", "cublas_status", "cudnn_status", "hip error")
"""What the messages of torch and its devices hold where no item is to blame: memory, and a device that an earlier call has left broken."""

NORM_TOLERANCE = 1e-2
"""How far from 1 the norm of a vector may be."""


Pixels = Callable[[dict[str, Any]], tuple[np.ndarray, dict[str, Any]]]
"""What a reader may offer: the image of one of its rows, and metadata that is measured on it."""


class ContractBroken(RuntimeError):
    """The encoder or the reader does not do what its protocol says."""


class MachineFault(RuntimeError):
    """Memory or a device failed, and it may be no item's fault."""


@dataclass
class Outcome:
    """What became of N items."""

    vectors: np.ndarray
    """(N, dim) float32; a row whose item has a problem means nothing."""
    problems: list[BadItem | None]
    stages: list[str]
    """The stage that each item reached: decode or encode."""
    thumbnails: list[bytes | None]
    measured: list[dict[str, Any]]
    """Metadata that came with the pixels, by column; empty where none did."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Thread seconds by stage."""

    def spent(self, stage: str, started: float) -> None:
        """Add the time since `started` to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


@dataclass
class Vectoriser:
    """One encoder with the limits that items are held to. Called from several threads at once."""

    encoder: Encoder
    limits: Limits
    thumbnail_px: int | None
    storage_options: dict[str, str]
    pixels: Pixels | None = None
    """Where the images come from, if not from encoded files."""

    def __post_init__(self) -> None:
        self.inputs: frozenset[str] = getattr(self.encoder, "inputs", frozenset({"image", "text"}))
        self._warned = False

    def __call__(self, items: pa.Table, journal: Journal) -> Outcome:
        """Vectors of `items` (ITEM rows), in their order. `journal` ends the process if an item hangs."""
        n = items.num_rows
        outcome = Outcome(np.zeros((n, self.encoder.dim), np.float32), [None] * n, ["decode"] * n, [None] * n, [{} for _ in range(n)])
        ready: dict[int, np.ndarray | None] = {}
        size = 0
        for index, image in self._decode(items, journal, outcome):
            bytes_more = 0 if image is None else image.nbytes
            if ready and size + bytes_more > MAX_BATCH_BYTES:
                self._encode_ready(items, ready, journal, outcome)
                ready, size = {}, 0
            ready[index] = image
            size += bytes_more
        self._encode_ready(items, ready, journal, outcome)
        failures = [problem.detail for problem in outcome.problems if problem is not None and problem.reason == "encode_failed"]
        if n > 1 and len(failures) == n:  # not the items' fault
            raise ContractBroken(f"the encoder fails on each of {n} items: {failures[0]}")
        return outcome

    def _encode_ready(self, items: pa.Table, ready: dict[int, np.ndarray | None], journal: Journal, outcome: Outcome) -> None:
        """Encode the items whose prepared images (None: a text) are in `ready`, by index."""
        started = time.perf_counter()
        batch = items.take(pa.array(list(ready), pa.int64()))
        vectors, problems = self._encode(batch, list(ready.values()), journal)
        for index, vector, problem in zip(ready, vectors, problems, strict=True):
            outcome.vectors[index], outcome.problems[index], outcome.stages[index] = vector, problem, "encode"
        outcome.spent("encode", started)

    def _decode(self, items: pa.Table, journal: Journal, outcome: Outcome) -> Iterator[tuple[int, np.ndarray | None]]:
        """Index and prepared image (None: a text) of each good item; notes the others' problems, and the thumbnails."""
        if self.pixels is not None:
            yield from self._read_pixels(items, self.pixels, journal, outcome)
            return
        pictured = items["image"].null_count + items["image_uri"].null_count < 2 * items.num_rows
        size = FETCHED_AT_ONCE if pictured and "image" in self.inputs else items.num_rows
        for start in range(0, items.num_rows, max(1, size)):
            window = items.slice(start, size)
            started = time.perf_counter()
            sources = self._fetch(window, journal)
            outcome.spent("fetch", started)
            for index, (item, text) in enumerate(zip(window["id"].to_pylist(), window["text"].to_pylist(), strict=True)):
                started = time.perf_counter()
                data, sources[index] = sources[index], None
                try:
                    image, thumbnail = self._decode_one(item, text, data, journal)
                except BadItem as bad:
                    outcome.problems[start + index] = _bare(bad)
                    continue
                finally:
                    outcome.spent("decode", started)
                outcome.thumbnails[start + index] = thumbnail
                yield start + index, image

    def _read_pixels(self, items: pa.Table, pixels: Pixels, journal: Journal, outcome: Outcome) -> Iterator[tuple[int, np.ndarray]]:
        """As `_decode`, of images that the reader itself reads."""
        for index, row in enumerate(items.to_pylist()):
            started = time.perf_counter()
            try:
                with journal.watch([row["id"]], self.limits.item_timeout_s):
                    image, outcome.measured[index] = pixels(row)
                    prepared, outcome.thumbnails[index] = self._prepared(image)
            except BadItem as bad:
                outcome.problems[index] = _bare(bad)
                continue
            finally:
                outcome.spent("decode", started)
            yield index, prepared

    def _prepared(self, image: np.ndarray) -> tuple[np.ndarray, bytes | None]:
        """The prepared image and the thumbnail. Raises BadItem: an odd image is no reason to lose its neighbours."""
        try:
            thumbnail = media.thumbnail(image, self.thumbnail_px) if self.thumbnail_px else None
            prepare = getattr(self.encoder, "prepare", None)
            return prepare(image) if prepare else image, thumbnail
        except BadItem:
            raise
        except Exception as error:
            raise _failed(error, f"an image of {image.shape[1]} x {image.shape[0]} px") from error

    def _decode_one(self, item: str, text: str | None, data: bytes | BadItem | None, journal: Journal) -> tuple[np.ndarray | None, bytes | None]:
        """The prepared image and the thumbnail. Raises BadItem."""
        if isinstance(data, BadItem):
            raise data
        if data is None:
            self._check_text(text)
            return None, None
        with journal.watch([item], self.limits.item_timeout_s):
            return self._prepared(media.decode(data, self.limits))

    def _fetch(self, items: pa.Table, journal: Journal) -> list[bytes | BadItem | None]:
        """Each item's encoded image: its own bytes, or fetched from where it lies; None where the encoder gets no image."""
        if "image" not in self.inputs:
            return [None] * items.num_rows
        own = self._own(items["image"])
        uris = [None if data is not None else uri for data, uri in zip(own, items["image_uri"].to_pylist(), strict=True)]
        if not any(uris):
            return own
        limits = self.limits
        with journal.watch(items["id"].to_pylist(), self._time_for(items)):
            fetched = fetch(uris, max_bytes=limits.max_item_bytes, storage_options=self.storage_options)
        return [data if data is not None else found for data, found in zip(own, fetched, strict=True)]

    def _own(self, column: pa.ChunkedArray) -> list[bytes | BadItem | None]:
        """The images that came with their items. Those that are too large are not copied."""
        limit = self.limits.max_item_bytes
        lengths = pc.binary_length(column).to_pylist()
        return [
            BadItem("too_many_bytes", f"{length} bytes; limits.max_item_bytes is {limit}") if length is not None and length > limit else data.as_py()
            for data, length in zip(column, lengths, strict=True)
        ]

    def _check_text(self, text: str | None) -> None:
        if "text" not in self.inputs:
            raise BadItem("empty", "the encoder needs an image, and the item has none")
        if text is None or not text.strip():
            raise BadItem("empty", "no image, and no text but white space" if "image" in self.inputs else "no text but white space")
        if len(text.encode()) > self.limits.max_item_bytes:
            raise BadItem("too_many_bytes", f"a text of {len(text.encode())} bytes")

    def _time_for(self, items: pa.Table) -> float:
        """Seconds that one call may take that works on these items together."""
        return float(self.limits.item_timeout_s * min(TIMED_TOGETHER, max(1, items.num_rows)))

    def _encode(self, items: pa.Table, images: list[np.ndarray | None], journal: Journal) -> tuple[np.ndarray, list[BadItem | None]]:
        """Vectors (N, dim) float32 and what is wrong with each. If the batch fails, its items are tried one by one."""
        if items.num_rows == 0:
            return np.empty((0, self.encoder.dim), np.float32), []
        batch = pa.table([items["id"], items["text"], media.to_pixels(images)], schema=encoder_schema())
        try:
            with journal.watch(batch["id"].to_pylist(), self._time_for(batch), shared=True):
                return self._checked(batch)
        except ContractBroken:
            raise
        except Exception as error:
            if batch.num_rows == 1:
                return np.zeros((1, self.encoder.dim), np.float32), [_failed(error, f"item {batch['id'][0]}")]
            self._warn(batch.num_rows, error)
            singles = [self._encode(items.slice(i, 1), images[i : i + 1], journal) for i in range(batch.num_rows)]
            problems = [problem for _, [problem] in singles]
            if all(problem is not None for problem in problems):  # not the items' fault
                raise
            return np.concatenate([vectors for vectors, _ in singles]), problems

    def _checked(self, batch: pa.Table) -> tuple[np.ndarray, list[BadItem | None]]:
        vectors = self.encoder.encode(batch)
        if vectors.shape != (batch.num_rows, self.encoder.dim):
            raise ContractBroken(f"encode gave shape {vectors.shape} for {batch.num_rows} items of dim {self.encoder.dim}")
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        usable = np.isfinite(norms) & (norms > 0)
        if (np.abs(norms[usable] - 1) > NORM_TOLERANCE).any():
            raise ContractBroken(f"encode gave vectors of norm {norms[usable].min():.3f} to {norms[usable].max():.3f}; the norm must be 1")
        problem = BadItem("not_finite", "the encoder returned NaN, infinity or a zero vector")
        return vectors, [None if ok else problem for ok in usable]

    def _warn(self, count: int, error: Exception) -> None:
        """Once a worker: what goes through the encoder one by one takes many times as long."""
        if not self._warned:
            self._warned = True
            log.warning(
                "the encoder failed on %d items together (%s: %s) and gets them one by one, which is slow; if it wants for memory, "
                "lower compute.batch_size or compute.threads (further failures are not told)",
                *(count, type(error).__name__, error),
            )


def _failed(error: Exception, what: str) -> BadItem:
    """What is wrong with an item that raised alone. Raises MachineFault if that may be the machine's fault."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(sign in said.lower() for sign in MACHINES_FAULT):
        raise MachineFault(
            f"{said}; met at {what}, taken alone: free memory, or lower compute.batch_size or compute.threads, and run again"
        ) from error
    place = traceback.extract_tb(error.__traceback__)[-1]
    return BadItem("encode_failed", f"{said} ({Path(place.filename).name}, line {place.lineno})")


def _bare(bad: BadItem) -> BadItem:
    """The problem without its traceback: frames hold the item's data, and the outcome, which would hold them, until the garbage is collected."""
    return BadItem(bad.reason, bad.detail)
