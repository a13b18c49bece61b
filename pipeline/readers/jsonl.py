"""JSON Lines: one object a line, plain or gzip."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.readers import lines, rows
from pipeline.readers.lines import BEGIN, Record, Start, Starts

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
LOOK_ROWS = 100


class JsonLines:
    """Items in the lines of JSON Lines files."""

    def __init__(
        self,
        uri: str | Sequence[str],
        *,
        id: str | None = None,
        text: str | None = None,
        image: str | None = None,
        image_uri: str | None = None,
        metadata: Sequence[str] | Mapping[str, str] | None = None,
        version: str | None = None,
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Name the keys that hold what: as for Parquet, an `image` being base64, and metadata without a type being a string."""
        self.uri = uri
        self.columns = rows.columns(id=id, text=text, image=image, image_uri=image_uri, version=version, metadata=metadata)
        self.metadata = self.columns.schema(dict.fromkeys(self.columns.metadata, pa.string()))
        self.source = name or storage.source_name(uri)
        self.storage_options = storage_options
        self._untyped = [key for key, kind in self.columns.metadata.items() if kind is None]
        self._starts: Starts = {}

    def list(self) -> pa.Table:
        """The files, and a look at the first lines. Raises ConfigError if they lack a key."""
        found = storage.find(self.uri, suffixes=SUFFIXES, storage_options=self.storage_options)
        for unit in found["unit"].to_pylist():
            if keys := self._keys(unit):
                rows.require(self.columns, keys, unit)
                break
        return rows.containers(found, self.columns.digest())

    def _keys(self, unit: str) -> Sequence[str]:
        """The keys of the first rows of a file; none if not one of them can be read."""
        keys: dict[str, None] = {}
        try:
            for _, record in zip(range(LOOK_ROWS), self._records(unit, BEGIN), strict=False):
                try:
                    value = json.loads(record.value or b"null")
                except (ValueError, RecursionError):
                    continue
                if isinstance(value, dict):
                    keys |= dict.fromkeys(value)
        except (FileNotFoundError, PermissionError):
            return []
        return [*keys]

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 lines and about 64 MiB. Reads the files once to count their lines."""
        slices, starts = lines.split(units, self._records)
        self._starts |= starts
        return slices

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """Items by batches. A line that is no JSON object is a reject that names it."""
        return lines.read(work, self._records, self._parse, columns=self.columns, metadata=self.metadata, starts=self._starts)

    def _records(self, unit: str, start: Start) -> Iterator[Record]:
        with lines.opened(unit, self.storage_options) as file:
            for number, end, raw, fault in lines.lines(file, start):
                if fault or not raw.isspace():
                    yield Record(number, number + 1, end, raw, fault)

    def _parse(self, unit: str, raw: bytes) -> Mapping[str, Any]:
        try:
            value = json.loads(raw.strip())
        except json.JSONDecodeError as error:
            raise ValueError(f"column {error.colno}: {error.msg}") from error
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object is wanted, not {type(value).__name__}")
        for key in self._untyped:
            if key in value and not isinstance(value[key], str | None):
                value[key] = json.dumps(value[key], ensure_ascii=False)
        return {key: value.get(key) for key in self.columns.names()}
