"""Text files of records: what the JSON Lines and CSV readers share. Plain or gzip.

Row numbers say where a slice starts, and only a scan says where a row is: planning reads every new file once. The
byte offsets found then travel with the reader, so that a worker starts at its slice; in a gzip file it must unpack
from the beginning. Prefer Parquet for what is large.
"""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import pyarrow as pa

from pipeline.fetch import open_file
from pipeline.media import BadItem
from pipeline.readers import slices
from pipeline.readers.rows import Block, Columns, Fault
from pipeline.readers.slices import MAX_SLICE_BYTES, MAX_SLICE_ROWS, UNREADABLE, Part

MAX_LINE_BYTES = 64 * 2**20
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)
BATCH_ROWS = 4096
BATCH_BYTES = 16 * 2**20


class Line(NamedTuple):
    """One line: its number, from 1, the offset after it, and its bytes or why they cannot be had."""

    number: int
    end: int
    raw: bytes
    fault: Fault | None


class Record(NamedTuple):
    """One row: the number of its first line and of the line after it, the offset after it, its value or what is wrong."""

    line: int
    next_line: int
    end: int
    value: Any
    fault: Fault | None


class Start(NamedTuple):
    """Where a row starts in its file."""

    row: int
    line: int
    offset: int


BEGIN = Start(0, 1, 0)
Records = Callable[[str, Start], Iterator[Record]]
"""Opens a file at a Start, which is BEGIN or one that an earlier record ended at."""
Parse = Callable[[str, Any], Mapping[str, Any]]
"""A record's value to its columns, given the file. Raises ValueError saying what is malformed."""
Starts = dict[tuple[str, str], Sequence[Start]]
"""By file and version, the starts of its slices."""


@contextmanager
def opened(unit: str, storage_options: dict[str, Any] | None) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked."""
    with open_file(unit, storage_options) as file:
        if unit.endswith((".gz", ".tgz")):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield file


def lines(file: IO[bytes], start: Start) -> Iterator[Line]:
    """Lines from a start on. A line that is too long, or the rest of a damaged gzip file, is one line with a fault."""
    number, at = start.line, start.offset
    try:
        file.seek(at)
        while raw := file.readline(MAX_LINE_BYTES):
            at += len(raw)
            fault: Fault | None = None
            while raw and len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                fault = BadItem("too_many_bytes", f"line {number}: longer than {MAX_LINE_BYTES} bytes, {slices.BOUND}")
                raw = file.readline(MAX_LINE_BYTES)
                at += len(raw)
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            yield Line(number, at, b"" if fault else raw, fault)
            number += 1
    except DAMAGE as error:
        yield Line(number, at, b"", BadItem("unreadable", f"line {number}: the rest of the file cannot be read: {error}"))


def split(units: pa.Table, records: Records) -> tuple[pa.Table, Starts]:
    """Slices of at most 8,192 records and about 64 MiB, and where they start."""
    parts: list[tuple[str, str, Part]] = []
    starts: Starts = {}
    for unit in units.select(["unit", "version"]).to_pylist():
        name, version = unit["unit"], unit["version"]
        try:
            found = cut((record.next_line, record.end) for record in records(name, BEGIN))
        except (FileNotFoundError, PermissionError):
            parts.append((name, version, UNREADABLE))
            continue
        parts += [(name, version, (start.row, stop, size)) for start, stop, size in found]
        starts[name, version] = [start for start, _, _ in found]
    return slices.table(parts), starts


def cut(ends: Iterable[tuple[int, int]]) -> list[tuple[Start, int, int]]:
    """Start, stop and bytes of slices, over the line and offset after each row."""
    parts = []
    start, row, end = BEGIN, 0, 0
    for next_line, end in ends:
        row += 1
        if row - start.row == MAX_SLICE_ROWS or end - start.offset >= MAX_SLICE_BYTES:
            parts.append((start, row, end - start.offset))
            start = Start(row, next_line, end)
    if row > start.row or not parts:
        # A row that breaks off at once has no bytes; a slice of one row and none is UNREADABLE.
        parts.append((start, row, max(end - start.offset, row - start.row)))
    return parts


def read(work: pa.Table, records: Records, parse: Parse, *, columns: Columns, metadata: pa.Schema, starts: Starts) -> Iterator[pa.Table]:
    """The items of slices, by batches. A malformed record is a reject that names its line."""
    versions = dict(zip(work["unit"].to_pylist(), work["version"].to_pylist(), strict=True))

    def blocks(unit: str, start: int, stop: int) -> Iterator[Block]:
        begin = nearest_start(starts, unit, versions[unit], start)
        return _blocks(records(unit, begin), begin.row, unit, range(start, stop), parse)

    return slices.read(work, blocks, columns, metadata)


def nearest_start(starts: Starts, unit: str, version: str, row: int) -> Start:
    """The last known start at or before a row: the file's beginning if nothing is known of this version."""
    return max(start for start in starts.get((unit, version), [BEGIN]) if start.row <= row)


def _blocks(records: Iterator[Record], row: int, unit: str, wanted: range, parse: Parse) -> Iterator[Block]:
    values: list[Mapping[str, Any]] = []
    faults: list[Fault | None] = []
    size, last_end = 0, 0
    for number, record in enumerate(records, row):
        if number >= wanted.stop:
            break
        if number >= wanted.start:
            value, fault = _parsed(record, unit, parse)
            values.append(value)
            faults.append(fault)
            size += record.end - last_end
            if len(values) == BATCH_ROWS or size >= BATCH_BYTES:
                yield _block(unit, number + 1 - len(values), values, faults)
                values, faults, size = [], [], 0
        last_end = record.end
    if values:
        yield _block(unit, number + (number < wanted.stop) - len(values), values, faults)


def _parsed(record: Record, unit: str, parse: Parse) -> tuple[Mapping[str, Any], Fault | None]:
    if record.fault:
        return {}, record.fault
    try:
        return parse(unit, record.value), None
    except (ValueError, RecursionError) as error:
        return {}, f"line {record.line}: {error}"


def _block(unit: str, start: int, values: list[Mapping[str, Any]], faults: list[Fault | None]) -> Block:
    names = dict.fromkeys(name for value in values for name in value)
    return Block(unit, start, {name: [value.get(name) for value in values] for name in names}, faults)
