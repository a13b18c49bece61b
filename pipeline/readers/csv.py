"""CSV and TSV files with a header line, plain or gzip; quoted fields may hold line ends.

A stray quote costs its own line, not the rest of the file: where a record does not end properly, reading goes on at
the next line.
"""

import csv
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.readers import lines, rows
from pipeline.readers.lines import BEGIN, MAX_LINE_BYTES, Line, Record, Start, Starts

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
MAX_RECORD_LINES = 1000


class Csv:
    """Items in the rows of CSV files. open_clip's lists are `text: title, image_uri: filepath`."""

    def __init__(
        self,
        uri: str | Sequence[str],
        *,
        delimiter: str | None = None,
        id: str | None = None,
        text: str | None = None,
        image: str | None = None,
        image_uri: str | None = None,
        metadata: Sequence[str] | Mapping[str, str] | None = None,
        version: str | None = None,
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Name the columns that hold what: as for Parquet. An empty field is null; metadata without a type is a string.

        `delimiter`: one character; without it a comma, or a tab in a .tsv file.
        """
        if delimiter is not None and len(delimiter) != 1:
            raise ConfigError(f'delimiter={delimiter!r} must be one character; a tab is written "\\t" in YAML')
        self.uri = uri
        self.delimiter = delimiter
        self.columns = rows.columns(id=id, text=text, image=image, image_uri=image_uri, version=version, metadata=metadata)
        self.metadata = self.columns.schema(dict.fromkeys(self.columns.metadata, pa.string()))
        self.source = name or storage.source_name(uri)
        self.storage_options = storage_options
        self._starts: Starts = {}

    def list(self) -> pa.Table:
        """The files, and a look at the first header. Raises ConfigError if it lacks a column."""
        found = storage.find(self.uri, suffixes=SUFFIXES, storage_options=self.storage_options)
        for unit in found["unit"].to_pylist():
            try:
                with lines.opened(unit, self.storage_options) as file:
                    header, _, _ = self._header(unit, lines.lines(file, BEGIN))
            except (FileNotFoundError, PermissionError):
                continue
            if header:
                rows.require(self.columns, header, unit)
                break
        return rows.containers(found, self.columns.digest(self.delimiter))

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows and about 64 MiB. Reads the files once to count their rows."""
        slices, starts = lines.split(units, self._records)
        self._starts |= starts
        return slices

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """Items by batches. A row with too few or too many fields, or a stray quote, is a reject that names its line."""
        return lines.read(work, self._records, _parse, columns=self.columns, metadata=self.metadata, starts=self._starts)

    def _records(self, unit: str, start: Start) -> Iterator[Record]:
        with lines.opened(unit, self.storage_options) as file:
            found = lines.lines(file, BEGIN)
            header, padded, rest = self._header(unit, found)
            if start != BEGIN:
                rest = lines.lines(file, start)
            for record in _split(rest, self._delimiter(unit), padded):
                yield record._replace(value=(header, record.value))

    def _delimiter(self, unit: str) -> str:
        return self.delimiter or ("\t" if unit.removesuffix(".gz").lower().endswith(".tsv") else ",")

    def _header(self, unit: str, found: Iterator[Line]) -> tuple[Sequence[str], bool, Iterator[Line]]:
        """The columns' names, whether spaces follow the delimiters, and the lines after the header."""
        for record in _split(found, self._delimiter(unit), False):
            names = record.value or []
            return [field.strip() for field in names], any(field != field.lstrip() for field in names[1:]), found
        return [], False, iter(())


def _split(found: Iterator[Line], delimiter: str, padded: bool) -> Iterator[Record]:
    """Lines to records. Blank lines are none."""
    csv.field_size_limit(MAX_LINE_BYTES)  # Python's own limit is 131,072 characters, less than a long document
    ahead: deque[Line] = deque()
    while (line := ahead.popleft() if ahead else next(found, None)) is not None:
        taken = [line]
        if line.fault:
            yield Record(line.number, line.number + 1, line.end, None, line.fault)
            continue
        if line.raw.isspace() or not line.raw:
            continue
        try:
            fields = next(csv.reader(_texts(taken, ahead, found), delimiter=delimiter, strict=True, skipinitialspace=padded))
        except (csv.Error, UnicodeDecodeError, StopIteration) as error:
            ahead.extendleft(reversed(taken[1:]))
            yield Record(line.number, line.number + 1, line.end, None, f"line {line.number}: {error}")
        else:
            yield Record(line.number, taken[-1].number + 1, taken[-1].end, fields, None)


def _texts(taken: list[Line], ahead: deque[Line], found: Iterator[Line]) -> Iterator[str]:
    """The text of a record's lines, as the parser asks for more; each is noted in `taken`."""
    yield taken[0].raw.decode()
    while len(taken) < MAX_RECORD_LINES and (line := ahead.popleft() if ahead else next(found, None)) is not None:
        taken.append(line)
        if line.fault:
            return
        yield line.raw.decode()


def _parse(unit: str, value: tuple[Sequence[str], Sequence[str]]) -> Mapping[str, Any]:
    header, fields = value
    if len(fields) != len(header):
        raise ValueError(f"{len(fields)} fields, and the header has {len(header)}")
    return {name: field or None for name, field in zip(header, fields, strict=True)}
