"""One chunk, from listing to receipt: read, decode, encode, stage. No Ray: an actor calls it, and so can a test.

Threads each take a few items through decode and the model together: on CPUs that is the fastest arrangement measured
(docs/decisions.md). On a GPU it keeps the device busy: while one thread's batch is computed there, the others decode. No lock
keeps them apart, so batches that are ready together are on the device together. Two chunks are worked on at once, so that the
threads have work while one of them is read or staged. A bad item becomes a reject row and never takes its neighbours along.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from pipeline.config import Ref
from pipeline.encoders import Encoder
from pipeline.journal import Journal, Watchdog
from pipeline.known import CHANGED, DUPLICATE, UNCHANGED, Contents, Known, hash64
from pipeline.media import Limits
from pipeline.readers import Reader, UnitChanged
from pipeline.room import Room
from pipeline.table.at import TableAt, fingerprint_of
from pipeline.table.stage import Receipt, Staged, Staging, stage_rows
from pipeline.vectorise import TIMED_TOGETHER, ContractBroken, Vectoriser
from schemas.rejects import REJECT

log = logging.getLogger(__name__)

TEXT_WINDOW = 2048
"""Most texts in one call of `encode`: enough to sort by length, small enough to share among threads."""

CALLS_A_PART = 2
"""Batches of images that a thread encodes one after the other: the second finds the model in the processor's caches."""

CHUNKS_AT_ONCE = 2
"""Chunks that a worker has in hand at the same time."""


@dataclass(frozen=True)
class Task:
    """What every worker of a run is told."""

    reader: Reader
    encoder: Ref
    fingerprint: str
    at: TableAt
    version: int
    """The table's version that fragments are staged against."""
    run: str
    limits: Limits
    batch_size: int
    threads: int
    thumbnail_px: int | None
    contents: Contents | None = None
    """What the table holds, for containers (a file's state is decided on the driver)."""


@dataclass
class _Chunk:
    id: str
    unit: str | None
    """The container that the chunk is a slice of, if it is one."""
    work: pa.Table
    journal: Journal


@dataclass
class _Part:
    """Items that go through the model together."""

    items: pa.Table
    changed: np.ndarray


@dataclass
class _Done:
    rows: pa.Table
    changed: np.ndarray
    """Which rows (N,) bool take the place of an old one."""
    rejects: list[dict[str, Any]]
    seconds: dict[str, float]


@dataclass
class _Tally:
    """What reading found, beside the items that go on to the model."""

    listed: int = 0
    unchanged: int = 0
    rejected_before: int = 0
    rejects: list[dict[str, Any]] = field(default_factory=list)
    seen: list[np.ndarray] = field(default_factory=list)
    before: list[np.ndarray] = field(default_factory=list)
    unread: bool = False
    ids: Known = field(default_factory=Known)
    seconds: float = 0.0


class ChunkWorker:
    """Embeds chunks. Holds one encoder and a pool of threads. Called from `CHUNKS_AT_ONCE` threads at most."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.encoder: Encoder = task.encoder.build()
        if self.encoder.fingerprint != task.fingerprint:
            raise ContractBroken(
                f"on this machine the encoder's fingerprint is {self.encoder.fingerprint}, on the driver it is {task.fingerprint}: "
                "weights or library versions differ between machines"
            )
        if hasattr(self.encoder, "load"):
            self.encoder.load()
        storage_options = getattr(task.reader, "storage_options", None) or {}
        pixels = getattr(task.reader, "pixels", None)
        self._vectorise = Vectoriser(self.encoder, task.limits, task.thumbnail_px, storage_options, pixels)
        self._dataset = _open_version(task)
        self._staging = Staging(task.at)
        self._pool = ThreadPoolExecutor(task.threads, thread_name_prefix="embed")
        self._watchdog = Watchdog()
        self._room = Room(CHUNKS_AT_ONCE)

    def __call__(self, chunk: str, work: pa.Table) -> Receipt:
        """The receipt of a chunk; its `error` is set if the whole chunk failed. `work`: rows of a listing, or one slice."""
        try:
            # Of this run alone: that a run was stopped, or another one has the same chunk in hand, says nothing about the items.
            journal = Journal(self._staging, f"{self.task.run}-{chunk}", self._watchdog)
            # A chunk whose worker has died before goes alone: another death must name its cause.
            with self._room.whole() if journal.tries else self._room.place():
                journal.begin()
                return self._attempt(chunk, work, journal)
        except Exception as error:  # a journal that the store did not give or take: it costs this chunk only
            return _failed(chunk, work, error)

    def _attempt(self, chunk: str, work: pa.Table, journal: Journal) -> Receipt:
        unit = _unit_of(work)
        if journal.hopeless:
            why = "the machine may be short of memory, or the source or the table's store may hang"
            error = f"its worker died {journal.tries - 1} times, and no single item is to blame; {why}"
            return Receipt(chunk=chunk, listed=_items_of(work), unit=unit, error=error)
        try:
            receipt = self._embed(_Chunk(chunk, unit, work, journal))
            self._staging.put_receipt(receipt)
        except UnitChanged as changed:
            receipt = Receipt(chunk=chunk, listed=_items_of(work), unit=unit, error=str(changed), changed_unit=True)
        except Exception as error:  # the chunk is reported as failed; the others go on
            receipt = _failed(chunk, work, error)
        try:
            journal.end()
        except OSError as error:  # what is left of it is swept when it is old
            log.warning("the journal of chunk %s could not be deleted: %s", chunk, error)
        return receipt

    def _embed(self, chunk: _Chunk) -> Receipt:
        tally = _Tally()
        parts = self._read(chunk, tally)
        # With suspects about, one part at a time, for the same reason.
        run: Callable[..., Any] = map if chunk.journal.suspects else self._pool.map
        with self._at_hand(chunk, tally):
            done: list[_Done] = list(run(lambda part: self._embed_part(part, chunk), parts))
        if tally.listed != _items_of(chunk.work):
            raise ContractBroken(f"the reader gave {tally.listed} items where it listed {_items_of(chunk.work)}")
        if hasattr(self.task.reader, "confirm"):
            self.task.reader.confirm(chunk.work)
        rows = pa.concat_tables([self._dataset.schema.empty_table(), *(d.rows for d in done)]).combine_chunks()
        changed = np.concatenate([np.empty(0, bool), *(d.changed for d in done)])
        seconds = {"read": tally.seconds}
        for d in done:
            for stage, spent in d.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
        started = time.perf_counter()
        with self._patiently(chunk.journal):
            new, replacing = self._stage(rows.filter(pa.array(~changed))), self._stage(rows.filter(pa.array(changed)))
        seconds["stage"] = time.perf_counter() - started
        rejects = [*tally.rejects, *(reject for d in done for reject in d.rejects)]
        return Receipt(
            chunk=chunk.id,
            fingerprint=self.task.fingerprint,
            source=self.task.reader.source,
            listed=tally.listed,
            unchanged=tally.unchanged,
            rejected_before=tally.rejected_before,
            new=new,
            changed=replacing,
            rejects=pa.Table.from_pylist(rejects, schema=REJECT),
            seen=np.concatenate([np.empty(0, np.uint64), *tally.seen]),
            before=np.concatenate([np.empty(0, np.uint64), *tally.before]),
            unread=tally.unread,
            unit=chunk.unit,
            seconds=seconds,
        )

    def _read(self, chunk: _Chunk, tally: _Tally) -> Iterator[_Part]:
        """The items that must be embedded, in parts; counts the others."""
        started = time.perf_counter()
        for items in self._batches(chunk):
            tally.listed += items.num_rows
            pending, changed = self._subtract(items, chunk, tally)
            tally.seconds += time.perf_counter() - started
            yield from self._parts(pending, changed, chunk.journal)
            started = time.perf_counter()

    def _batches(self, chunk: _Chunk) -> Iterator[pa.Table]:
        with self._patiently(chunk.journal):
            batches = iter(self.task.reader.read(chunk.work))
        while True:
            with self._patiently(chunk.journal):
                items = next(batches, None)
            if items is None:
                return
            yield items

    @contextlib.contextmanager
    def _at_hand(self, chunk: _Chunk, tally: _Tally) -> Iterator[None]:
        """What the chunk's items lie in, held by the reader if it has something to hold."""
        started = time.perf_counter()
        with contextlib.ExitStack() as held:
            if hasattr(self.task.reader, "hold"):
                with self._patiently(chunk.journal) as alive:
                    held.enter_context(self.task.reader.hold(chunk.work, alive))
            tally.seconds += time.perf_counter() - started
            yield

    def _patiently(self, journal: Journal) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Watch what waits for a disk or a store and is no single item's work."""
        return journal.watch([], TIMED_TOGETHER * self.task.limits.item_timeout_s)

    def _subtract(self, items: pa.Table, chunk: _Chunk, tally: _Tally) -> tuple[pa.Table, np.ndarray]:
        """The items to embed, and which of them replace a row; everything else is counted in `tally`."""
        ids, versions = hash64(items["id"]), hash64(items["version"])
        bad = _is_set(items, "reject_reason")
        dead = np.isin(items["id"].to_numpy(zero_copy_only=False), list(chunk.journal.dead)) if chunk.journal.dead else np.zeros(len(ids), bool)
        contents = self.task.contents
        if contents is None:
            changed = np.isin(items["id"].to_pylist(), chunk.work.filter(chunk.work["changed"])["id"].to_pylist())
            repeated = ~bad & np.isin(items["id"].to_pylist(), chunk.work.filter(chunk.work["duplicate"])["id"].to_pylist())
            unchanged = before = np.zeros(len(ids), bool)
        else:
            codes = contents.classify(ids, versions)
            repeated = ~bad & (tally.ids.find(ids)[0] | _repeats(ids) | (codes == DUPLICATE))
            unchanged = (codes == UNCHANGED) & ~repeated & ~bad
            before = contents.is_rejected(ids, versions) & ~unchanged & ~repeated
            changed = codes == CHANGED
            tally.ids.add(ids[~bad], versions[~bad])
            tally.seen.append(ids[unchanged])
            tally.before.append(ids[before])
            tally.unread |= bool(bad.any()) and "unreadable" in items["reject_reason"].to_pylist()
        tally.unchanged += int(unchanged.sum())
        tally.rejected_before += int(before.sum())
        fresh = ~unchanged & ~before
        for index in np.flatnonzero(fresh & (bad | dead | repeated)):
            row = items.slice(index, 1).to_pylist()[0]
            tally.rejects.append(self._reject(row, chunk, *_why(row, dead=bool(dead[index]))))
        keep = fresh & ~bad & ~dead & ~repeated
        return items.filter(pa.array(keep)), changed[keep]

    def _parts(self, items: pa.Table, changed: np.ndarray, journal: Journal) -> Iterator[_Part]:
        suspects = np.isin(items["id"].to_pylist(), list(journal.suspects)) if journal.suspects else np.zeros(items.num_rows, bool)
        for index in np.flatnonzero(suspects):
            yield _Part(items.slice(index, 1), changed[index : index + 1])
        items, changed = items.filter(pa.array(~suspects)), changed[~suspects]
        size = self._part_size(items)
        for start in range(0, items.num_rows, size):
            yield _Part(items.slice(start, size), changed[start : start + size])

    def _part_size(self, items: pa.Table) -> int:
        has_image = "image" in self._vectorise.inputs and items["image"].null_count + items["image_uri"].null_count < 2 * items.num_rows
        if has_image or self._vectorise.pixels is not None:
            enough_for_all = items.num_rows >= 2 * self.task.threads * CALLS_A_PART * self.task.batch_size
            return self.task.batch_size * (CALLS_A_PART if enough_for_all else 1)
        share: int = math.ceil(items.num_rows / self.task.threads)
        return max(self.task.batch_size, min(TEXT_WINDOW, share))

    def _embed_part(self, part: _Part, chunk: _Chunk) -> _Done:
        items = part.items
        with chunk.journal.flight(items["id"].to_pylist()):
            outcome = self._vectorise(items, chunk.journal)
        kept = np.array([problem is None for problem in outcome.problems], bool)
        rejects = [
            self._reject(row, chunk, stage, problem.reason, problem.detail)
            for row, stage, problem in zip(items.select(["id", "uri", "version"]).to_pylist(), outcome.stages, outcome.problems, strict=True)
            if problem is not None
        ]
        mask = pa.array(kept)
        kept_items = _with_measured(items, outcome.measured, self._dataset.schema).filter(mask)
        rows = self._rows(kept_items, outcome.vectors[kept], pa.array(outcome.thumbnails, pa.binary()).filter(mask), chunk)
        return _Done(rows, part.changed[kept], rejects, outcome.seconds)

    def _stage(self, rows: pa.Table) -> Staged:
        if rows.num_rows == 0:
            return Staged()
        return Staged(stage_rows(rows, self.task.at, self._dataset), hash64(rows["id"]), hash64(rows["_version"]))

    def _rows(self, items: pa.Table, vectors: np.ndarray, thumbnails: pa.Array, chunk: _Chunk) -> pa.Table:
        """Rows of the vector table."""
        schema, n = self._dataset.schema, items.num_rows
        kind = schema.field("vector").type
        flat = pa.array(vectors.astype(kind.value_type.to_pandas_dtype()).ravel(), kind.value_type)
        made = {
            "vector": pa.FixedSizeListArray.from_arrays(flat, type=kind),
            "thumbnail": thumbnails,
            "source": pa.repeat(self.task.reader.source, n),
            "_unit": pa.repeat(pa.scalar(chunk.unit, pa.string()), n),
            "_version": items["version"],
            "_chunk": pa.repeat(chunk.id, n),
            "_run": pa.repeat(self.task.run, n),
        }
        columns = [made[f.name] if f.name in made else items[f.name] if f.name in items.column_names else pa.nulls(n, f.type) for f in schema]
        return pa.table([_as(column, f.type) for column, f in zip(columns, schema, strict=True)], schema=schema)

    def _reject(self, row: dict[str, Any], chunk: _Chunk, stage: str, reason: str, detail: str | None) -> dict[str, Any]:
        return {
            "id": row["id"],
            "uri": row["uri"],
            "source": self.task.reader.source,
            "_unit": chunk.unit,
            "_version": row["version"],
            "stage": stage,
            "reason": reason,
            "detail": (detail or "")[:1000],
            "_chunk": chunk.id,
            "_run": self.task.run,
        }


def _open_version(task: Task) -> lance.LanceDataset:
    """The table as the run found it, or as it is now if a cleanup has taken that version: what is staged fits both."""
    try:
        return lance.dataset(task.at.path(), version=task.version, storage_options=task.at.options)
    except (ValueError, OSError):
        dataset = task.at.require()
        if fingerprint_of(dataset) != task.fingerprint:
            raise ContractBroken(f"table {task.at.name!r} was made again meanwhile, and holds the vectors of another encoder") from None
        return dataset


def _failed(chunk: str, work: pa.Table, error: Exception) -> Receipt:
    log.error("chunk %s failed", chunk, exc_info=error)
    return Receipt(chunk=chunk, listed=_items_of(work), unit=_unit_of(work), error=f"{type(error).__name__}: {error}")


def _unit_of(work: pa.Table) -> str | None:
    """The container that the work is a slice of, if it is one."""
    unit: str | None = work["unit"][0].as_py() if "start" in work.column_names else None
    return unit


def _why(row: dict[str, Any], *, dead: bool) -> tuple[str, str, str]:
    """Stage, reason and detail of an item that does not reach the model."""
    if row.get("reject_reason"):
        return "read", row["reject_reason"], row.get("reject_detail") or ""
    if dead:
        return "decode", "worker_died", "the worker process died, or hung, when it held this item alone"
    return "read", "duplicate_id", "another item of this table has the same id and came first"


def _with_measured(items: pa.Table, measured: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The items with the metadata that came with their pixels in its columns."""
    for name in dict.fromkeys(name for values in measured for name in values):
        column = pa.array([values.get(name) for values in measured], schema.field(name).type)
        items = items.set_column(items.column_names.index(name), name, column)
    return items


def _is_set(items: pa.Table, name: str) -> np.ndarray:
    if name not in items.column_names:
        return np.zeros(items.num_rows, bool)
    return np.asarray(items[name].is_valid().to_numpy())


def _repeats(ids: np.ndarray) -> np.ndarray:
    """Whether each id (N,) has stood before in the same array."""
    _, first = np.unique(ids, return_index=True)
    repeated = np.ones(len(ids), bool)
    repeated[first] = False
    return repeated


def _as(column: Any, kind: pa.DataType) -> pa.Array:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column if column.type == kind else column.cast(kind)


def _items_of(work: pa.Table) -> int:
    if "start" in work.column_names:
        start, stop = work["start"][0].as_py(), work["stop"][0].as_py()
        return int(stop - start)
    return int(work.num_rows)
