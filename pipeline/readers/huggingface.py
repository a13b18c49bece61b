"""A dataset that Hugging Face's `save_to_disk` wrote: Arrow files, read without the `datasets` package.

Where a store cannot skip, planning reads each new file once to count its rows.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.config import ConfigError, nearest
from pipeline.fetch import fetch, open_file
from pipeline.media import BadItem
from pipeline.readers import rows, slices
from pipeline.readers.rows import Block
from pipeline.readers.slices import UNREADABLE, Part

MAX_STATE_BYTES = 2**24


class HuggingFace:
    """Items in the rows of a saved dataset."""

    def __init__(
        self,
        path: str,
        *,
        split: str | None = None,
        id: str | None = None,
        text: str | None = None,
        image: str | None = None,
        image_uri: str | None = None,
        metadata: Sequence[str] | Mapping[str, str] | None = None,
        version: str | None = None,
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Name the columns that hold what: as for Parquet. `split`: of a dataset with several, the one to read."""
        self.path = storage.canonical(path)
        self.split_name = split
        self.columns = rows.columns(id=id, text=text, image=image, image_uri=image_uri, version=version, metadata=metadata)
        self.source = name or self.path + (f"/{split}" if split else "")
        self.storage_options = storage_options
        self._metadata: pa.Schema | None = None

    @property
    def metadata(self) -> pa.Schema:
        """Types that the job file does not give are the dataset's."""
        if self._metadata is None:
            self.list()
        return self._metadata

    def list(self) -> pa.Table:
        """The dataset's Arrow files. Raises ConfigError for a folder that is no saved dataset, or lacks the split or a column."""
        folder = self._folder()
        state = self._json(f"{folder}/state.json")
        if state is None:
            raise ConfigError(f"{folder} has no state.json: give a folder that datasets.save_to_disk wrote")
        files = [f"{folder}/{entry['filename']}" for entry in state["_data_files"]]
        found = storage.find(files, storage_options=self.storage_options)
        for unit in found["unit"].to_pylist():
            try:
                with self._stream(unit) as stream:
                    schema = stream.schema
            except (pa.ArrowInvalid, OSError):
                continue  # `read` rejects it
            rows.require(self.columns, schema.names, unit)
            self._metadata = self.columns.schema({entry.name: entry.type for entry in schema})
            return rows.containers(found, self.columns.digest())
        raise ConfigError(f"no file of {folder} can be read; save the dataset again")

    def _folder(self) -> str:
        splits = self._json(f"{self.path}/dataset_dict.json")
        if splits is None:
            if self.split_name:
                raise ConfigError(f"{self.path} is one dataset without splits; leave out split={self.split_name!r}")
            return self.path
        names = splits["splits"]
        if self.split_name not in names:
            hint = nearest(self.split_name or "", names)
            raise ConfigError(f"{self.path} has no split {self.split_name!r}{hint}; set `split` to one of {', '.join(names)}")
        return f"{self.path}/{self.split_name}"

    def _json(self, uri: str) -> Any:
        data = fetch([uri], max_bytes=MAX_STATE_BYTES, storage_options=self.storage_options)[0]
        try:
            return None if data is None or isinstance(data, BadItem) else json.loads(data)
        except ValueError as error:
            raise ConfigError(f"{uri} is damaged: {error}; save the dataset again") from error

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows and about 64 MiB."""
        pairs = zip(units["unit"].to_pylist(), units["version"].to_pylist(), strict=True)
        return slices.table((unit, version, part) for unit, version in pairs for part in self._parts(unit))

    def _parts(self, unit: str) -> Sequence[Part]:
        try:
            with self._stream(unit) as stream:
                return slices.cut([(batch.num_rows, batch.nbytes) for batch in stream])
        except (pa.ArrowInvalid, OSError) as error:
            if slices.of_the_store(error):
                raise
            return [UNREADABLE]

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """Items by batches."""
        return slices.read(work, self._blocks, self.columns, self.metadata)

    def _blocks(self, unit: str, start: int, stop: int) -> Iterator[Block]:
        with self._stream(unit) as stream:
            names = [name for name in self.columns.names() if name in stream.schema.names]
            at = 0
            for batch in stream:
                kept = batch.slice(max(0, start - at), max(0, min(stop, at + batch.num_rows) - max(start, at))).select(names)
                if kept.num_rows:
                    yield Block(unit, max(start, at), dict(zip(names, kept.columns, strict=True)), [None] * kept.num_rows)
                at += batch.num_rows
                if at >= stop:
                    return

    @contextmanager
    def _stream(self, unit: str) -> Iterator[pa.RecordBatchStreamReader]:
        """An Arrow file's batches; a local one is mapped, so that what is skipped is not read."""
        with open_file(unit, self.storage_options) as opened:
            file = pa.memory_map(unit) if unit.startswith("/") else opened
            with pa.ipc.open_stream(file) as stream:
                yield stream
