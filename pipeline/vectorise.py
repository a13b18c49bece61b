"""Items to vectors: fetch, decode, prepare, encode. Every item ends as a vector or as a BadItem that says why not."""

import time
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline import media, storage
from pipeline.encoders import Encoder
from pipeline.journal import Journal
from pipeline.media import BadItem, Limits
from schemas.items import encoder_schema

NORM_TOLERANCE = 1e-2
"""How far from 1 the norm of a vector may be."""


class ContractBroken(RuntimeError):
    """The encoder or the reader does not do what its protocol says."""


@dataclass
class Outcome:
    """What became of N items."""

    vectors: np.ndarray
    """(N, dim) float32; a row whose item has a problem means nothing."""
    problems: list[BadItem | None]
    stages: list[str]
    """The stage that each item reached: decode or encode."""
    thumbnails: list[bytes | None]
    seconds: dict[str, float] = field(default_factory=dict)
    """Thread seconds by stage."""


@dataclass
class Vectoriser:
    """One encoder with the limits that items are held to. Called from several threads at once."""

    encoder: Encoder
    limits: Limits
    thumbnail_px: int | None
    storage_options: dict[str, str]

    def __post_init__(self) -> None:
        self.inputs: frozenset[str] = getattr(self.encoder, "inputs", frozenset({"image", "text"}))

    def __call__(self, items: pa.Table, journal: Journal) -> Outcome:
        """Vectors of `items` (ITEM rows), in their order. `journal` ends the process if an item hangs."""
        seconds: dict[str, float] = {}
        problems, images, thumbnails = self._decode(items, journal, seconds)
        good = [index for index, problem in enumerate(problems) if problem is None]
        vectors = np.zeros((items.num_rows, self.encoder.dim), np.float32)
        stages = ["decode"] * items.num_rows
        started = time.perf_counter()
        with journal.watch(items["id"].to_pylist(), self.limits.item_timeout_s * max(1, len(good))):
            encoded, failed = self._encode(items.take(pa.array(good, pa.int64())), [images[index] for index in good])
        seconds["encode"] = time.perf_counter() - started
        for index, vector, problem in zip(good, encoded, failed, strict=True):
            vectors[index], problems[index], stages[index] = vector, problem, "encode"
        return Outcome(vectors, problems, stages, thumbnails, seconds)

    def _decode(
        self, items: pa.Table, journal: Journal, seconds: dict[str, float]
    ) -> tuple[list[BadItem | None], list[np.ndarray | None], list[bytes | None]]:
        """For each item: what is wrong with it if anything, its prepared image, its thumbnail."""
        started = time.perf_counter()
        sources = self._fetch(items, journal)
        seconds["fetch"] = time.perf_counter() - started
        prepare = getattr(self.encoder, "prepare", None)
        problems: list[BadItem | None] = []
        images: list[np.ndarray | None] = []
        thumbnails: list[bytes | None] = []
        started = time.perf_counter()
        for item, text, data in zip(items["id"].to_pylist(), items["text"].to_pylist(), sources, strict=True):
            image = thumbnail = problem = None
            try:
                if isinstance(data, BadItem):
                    raise data
                if data is not None:
                    with journal.watch([item], self.limits.item_timeout_s):
                        image = media.decode(data, self.limits)
                        thumbnail = media.thumbnail(image, self.thumbnail_px) if self.thumbnail_px else None
                        image = prepare(image) if prepare else image
                else:
                    self._check_text(text)
            except BadItem as bad:
                problem = bad
            problems.append(problem)
            images.append(image)
            thumbnails.append(thumbnail)
        seconds["decode"] = time.perf_counter() - started
        return problems, images, thumbnails

    def _fetch(self, items: pa.Table, journal: Journal) -> list[bytes | BadItem | None]:
        """Each item's encoded image: its own bytes, or fetched from where it lies; None where the encoder gets no image."""
        if "image" not in self.inputs:
            return [None] * items.num_rows
        own: list[bytes | BadItem | None] = items["image"].to_pylist()
        uris = [None if data is not None else uri for data, uri in zip(own, items["image_uri"].to_pylist(), strict=True)]
        if not any(uris):
            return own
        limits = self.limits
        with journal.watch(items["id"].to_pylist(), limits.item_timeout_s * items.num_rows):
            fetched = storage.fetch(uris, max_bytes=limits.max_item_bytes, storage_options=self.storage_options)
        return [data if data is not None else found for data, found in zip(own, fetched, strict=True)]

    def _check_text(self, text: str | None) -> None:
        if "text" not in self.inputs:
            raise BadItem("empty", "the encoder needs an image, and the item has none")
        if text is None or not text.strip():
            raise BadItem("empty", "no image, and no text but white space" if "image" in self.inputs else "no text but white space")
        if len(text.encode()) > self.limits.max_item_bytes:
            raise BadItem("too_many_bytes", f"a text of {len(text.encode())} bytes")

    def _encode(self, items: pa.Table, images: list[np.ndarray | None]) -> tuple[np.ndarray, list[BadItem | None]]:
        """Vectors (N, dim) float32 and what is wrong with each. If the batch fails, its items are tried one by one."""
        if items.num_rows == 0:
            return np.empty((0, self.encoder.dim), np.float32), []
        batch = pa.table([items["id"], items["text"], media.to_pixels(images)], schema=encoder_schema())
        try:
            return self._checked(batch)
        except ContractBroken:
            raise
        except Exception as error:
            if batch.num_rows == 1:
                return np.zeros((1, self.encoder.dim), np.float32), [BadItem("encode_failed", f"{type(error).__name__}: {error}")]
            singles = [self._encode(items.slice(i, 1), images[i : i + 1]) for i in range(batch.num_rows)]
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
