"""Containers of records: JSON Lines (plain or gzip), a JSON array, Parquet, and the Arrow files of Hugging Face's `save_to_disk`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.fetch import open_file
from pipeline.readers import lines, rows, slices
from pipeline.readers.lines import BEGIN, Record, Start, Starts
from pipeline.readers.slices import UNREADABLE

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json", ".json.gz")
SUFFIXES = (*LINES, ".parquet", ".arrow")
NO_DATA = ("state.json", "dataset_info.json", "dataset_dict.json")
"""What `save_to_disk` writes beside the rows."""

BATCH_ROWS = 512
BATCH_BYTES = 32 * 2**20
"""Records are held together until they are so many, or their images so large."""
LOOK_ROWS = 100

Unit = tuple[str, str]
"""URI and version of a container."""


class Raw(NamedTuple):
    """One record: its number in its container, its columns, or what is wrong with it."""

    row: int
    value: Mapping[str, Any]
    fault: str | None


class Batch(NamedTuple):
    """Consecutive records of one container."""

    unit: str
    records: Sequence[Raw]


class Files:
    """The files of a folder, a glob, a file or a list of these, each a container of records."""

    def __init__(self, uri: str | Sequence[str], storage_options: dict[str, Any] | None = None) -> None:
        self.uri = uri
        self.source = storage.source_name(uri)
        self.storage_options = storage_options
        self._starts: Starts = {}
        self._columns: list[str] = []

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the first file that can be read, in its order; of JSON the keys of its first 100 rows. Known after `list`."""
        return self._columns

    def list(self) -> pa.Table:
        """The containers (LISTING). Raises ConfigError if there is none, or none of them can be read."""
        found = storage.find(self.uri, suffixes=SUFFIXES, storage_options=self.storage_options)
        found = found.filter(pa.array([unit.rpartition("/")[2] not in NO_DATA for unit in found["unit"].to_pylist()], pa.bool_()))
        for unit, version in zip(found["unit"].to_pylist(), found["version"].to_pylist(), strict=True):
            first = [raw.value for raw in islice(self._read(unit, BEGIN, version, None), LOOK_ROWS)]
            self._columns = list(dict.fromkeys(name for value in first for name in value))
            if self._columns:
                return rows.listing(found)
        raise ConfigError(f"no row of {self.source} can be read; its files are {', '.join(found['unit'].to_pylist()[:3])}")

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 records and about 64 MiB. JSON is read once to count its rows."""
        parts = []
        for unit, version in zip(units["unit"].to_pylist(), units["version"].to_pylist(), strict=True):
            try:
                found = self._cut(unit, version)
            except (FileNotFoundError, PermissionError, pa.ArrowInvalid):
                found = [UNREADABLE]
            parts += [(unit, version, part) for part in found]
        return slices.table(parts)

    def batches(self, work: pa.Table) -> Iterator[Batch]:
        """The records of slices, in order. What a container does not yield is a record with a fault."""
        for part in work.select(["unit", "version", "start", "stop"]).to_pylist():
            unit, at, stop = part["unit"], part["start"], part["stop"]
            fault = f"{unit} has fewer rows than when it was listed"
            held: list[Raw] = []
            size = 0
            try:
                start = lines.nearest_start(self._starts, unit, part["version"], at)
                for raw in self._read(unit, start, part["version"], range(at, stop)):
                    held.append(raw)
                    size += bytes_in(raw.value)
                    at = raw.row + 1
                    if len(held) == BATCH_ROWS or size >= BATCH_BYTES:
                        yield Batch(unit, held)
                        held, size = [], 0
            except (FileNotFoundError, PermissionError, pa.ArrowInvalid) as error:
                fault = f"{unit}: {error}"
            yield Batch(unit, [*held, *(Raw(row, {}, fault) for row in range(at, stop))])

    def name(self, unit: str) -> str:
        """What a container is called within its source: a row keeps its id when the whole source is moved."""
        if isinstance(self.uri, str) and unit == self.source:
            return unit.rpartition("/")[2]
        return unit.removeprefix(f"{self.source}/")

    def _cut(self, unit: str, version: str) -> Sequence[slices.Part]:
        if unit.endswith(".parquet"):
            with open_file(unit, self.storage_options) as file:
                header = pq.ParquetFile(file).metadata
            return slices.cut([(header.row_group(i).num_rows, header.row_group(i).total_byte_size) for i in range(header.num_row_groups)])
        if unit.endswith(".arrow"):
            with self._stream(unit) as stream:
                return slices.cut([(batch.num_rows, batch.nbytes) for batch in stream])
        if self._is_array(unit):
            return slices.cut([(len(self._array(unit)), 0)])
        parts = lines.cut((record.next_line, record.end) for record in self._records(unit, BEGIN))
        self._starts[unit, version] = [start for start, _, _ in parts]
        return [(start.row, stop, size) for start, stop, size in parts]

    def _read(self, unit: str, start: Start, version: str, wanted: range | None) -> Iterator[Raw]:
        """Records of a container: those wanted, or from the beginning on."""
        if unit.endswith(".parquet"):
            return self._parquet(unit, wanted)
        if unit.endswith(".arrow"):
            return self._arrow(unit, wanted)
        if self._is_array(unit):
            return _counted(self._array(unit), wanted, _element)
        found = (_parsed(record) for record in self._records(unit, start))
        within = range(wanted.start - start.row, wanted.stop - start.row) if wanted is not None else None
        return (raw._replace(row=raw.row + start.row) for raw in _counted(found, within, lambda record: record))

    def _parquet(self, unit: str, wanted: range | None) -> Iterator[Raw]:
        with open_file(unit, self.storage_options) as file:
            parquet = pq.ParquetFile(file)
            counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
            groups, at, first, size = [], 0, None, 1
            for group, count in enumerate(counts):
                if wanted is None or (at < wanted.stop and at + count > wanted.start):
                    first = at if first is None else first
                    groups.append(group)
                    size += parquet.metadata.row_group(group).total_byte_size
                at += count
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * sum(counts[group] for group in groups) // size))
            if groups:
                yield from _of_batches(parquet.iter_batches(batch_rows, row_groups=groups, use_threads=False), first or 0, wanted)

    def _arrow(self, unit: str, wanted: range | None) -> Iterator[Raw]:
        with self._stream(unit) as stream:
            yield from _of_batches(stream, 0, wanted)

    @contextmanager
    def _stream(self, unit: str) -> Iterator[pa.RecordBatchStreamReader]:
        with open_file(unit, self.storage_options) as file, pa.ipc.open_stream(file) as stream:
            yield stream

    def _records(self, unit: str, start: Start) -> Iterator[Record]:
        with lines.opened(unit, self.storage_options) as file:
            for number, end, raw, fault in lines.lines(file, start):
                if fault or not raw.isspace():
                    yield Record(number, number + 1, end, raw, fault)

    def _is_array(self, unit: str) -> bool:
        if not unit.endswith((".json", ".json.gz")):
            return False
        with lines.opened(unit, self.storage_options) as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["

    def _array(self, unit: str) -> Sequence[Any]:
        """The elements of a JSON array, read as a whole; what cannot be parsed is one faulty record."""
        with lines.opened(unit, self.storage_options) as file:
            try:
                elements: list[Any] = json.loads(file.read().removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError) as error:
                return (Raw(0, {}, f"{unit} is no JSON array: {error}"),)
        return elements


def bytes_in(value: Any) -> int:
    """Size of the binary values in a record, at any depth; text is small beside them."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(bytes_in, value.values()))
    return sum(map(bytes_in, value)) if isinstance(value, list) else 0


def _of_batches(batches: Any, at: int, wanted: range | None) -> Iterator[Raw]:
    for batch in batches:
        kept = batch if wanted is None else batch.slice(max(0, wanted.start - at), max(0, min(wanted.stop, at + len(batch)) - max(wanted.start, at)))
        first = at if wanted is None else max(at, wanted.start)
        yield from (Raw(first + i, value, None) for i, value in enumerate(kept.to_pylist()))
        at += len(batch)
        if wanted is not None and at >= wanted.stop:
            return


def _counted(found: Any, wanted: range | None, raw: Callable[[Any], Raw]) -> Iterator[Raw]:
    numbered = enumerate(found)
    kept = numbered if wanted is None else islice(numbered, wanted.start, wanted.stop)
    return (raw(value)._replace(row=row) for row, value in kept)


def _parsed(record: Record) -> Raw:
    if record.fault:
        return Raw(0, {}, record.fault if isinstance(record.fault, str) else record.fault.detail)
    try:
        return _element(json.loads(record.value), f"line {record.line}: ")
    except json.JSONDecodeError as error:
        return Raw(0, {}, f"line {record.line}, column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return Raw(0, {}, f"line {record.line}: {error}")


def _element(value: Any, where: str = "") -> Raw:
    if isinstance(value, Raw):
        return value
    if not isinstance(value, dict):
        return Raw(0, {}, f"{where}a JSON object is wanted, not {type(value).__name__}")
    return Raw(0, value, None)
