"""Parquet files. Read as a stream, a slice of rows at a time.

Row groups are the unit in which a disk or a store is read: files with groups of at most 8,192 rows or 64 MiB are read
once, a group of many slices is read from its start for each of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.fetch import open_file
from pipeline.media import BadItem
from pipeline.readers import rows, slices
from pipeline.readers.rows import Block, Fault
from pipeline.readers.slices import MAX_SLICE_BYTES, MAX_SLICE_ROWS, UNREADABLE, Part

OPENED_AT_ONCE = 16
BATCH_BYTES = 32 * 2**20
MAX_VALUE_BYTES = 64 * 2**20


class Parquet:
    """Items in the rows of Parquet files."""

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
        """Name the columns that hold what.

        `uri`: a folder, a file, a glob, or a list of these. `id`: a column of unique text or whole numbers; without it
        an item's id is its file and row number, so that it moves when rows move. `image`: encoded images, as bytes, as
        base64 or as Hugging Face's struct of bytes and path. `image_uri`: where images are; relative ones are taken from
        the file's folder. `metadata`: columns to carry along, by name, or by name and type. `version`: a column that
        changes when its row does; without it the row's content is hashed. `name` of the source; without it, `uri`.
        """
        self.uri = uri
        self.columns = rows.columns(id=id, text=text, image=image, image_uri=image_uri, version=version, metadata=metadata)
        self.source = name or storage.source_name(uri)
        self.storage_options = storage_options
        self._metadata: pa.Schema | None = None

    @property
    def metadata(self) -> pa.Schema:
        """Types that the job file does not give are the first file's."""
        if self._metadata is None:
            self.list()
        return self._metadata

    def list(self) -> pa.Table:
        """The files, and a look into the first that can be read. Raises ConfigError if it lacks a column."""
        found = storage.find(self.uri, suffixes=[".parquet", ".pq"], storage_options=self.storage_options)
        for unit in found["unit"].to_pylist():
            try:
                with open_file(unit, self.storage_options) as file:
                    schema = pq.read_schema(file)
            except (pa.ArrowInvalid, FileNotFoundError, PermissionError):
                continue  # `read` rejects it
            rows.require(self.columns, schema.names, unit)
            self._metadata = self.columns.schema({entry.name: entry.type for entry in schema})
            break
        else:
            self._metadata = self.columns.schema(dict.fromkeys(self.columns.metadata, pa.string()))
        return rows.containers(found, self.columns.digest())

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of whole row groups, of at most 8,192 rows and about 64 MiB; a larger group is cut. Opens every file's footer."""
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            parts = pool.map(self._parts, units["unit"].to_pylist())
            pairs = zip(units.select(["unit", "version"]).to_pylist(), parts, strict=True)
            return slices.table((unit["unit"], unit["version"], part) for unit, cuts in pairs for part in cuts)

    def _parts(self, unit: str) -> Sequence[Part]:
        try:
            with open_file(unit, self.storage_options) as file:
                groups = _groups(pq.ParquetFile(file).metadata)
        except (pa.ArrowInvalid, FileNotFoundError, PermissionError):
            return [UNREADABLE]
        return slices.cut(groups)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """Items by batches. A file, or the rest of it, that cannot be read is rejected row by row."""
        return slices.read(work, self._blocks, self.columns, self.metadata)

    def _blocks(self, unit: str, start: int, stop: int) -> Iterator[Block]:
        with open_file(unit, self.storage_options) as file:
            header = pq.ParquetFile(file).metadata
            groups = _groups(header)
            first = _row_groups(groups, start, stop)
            if not first:
                return
            size = sum(groups[index][1] for index in first)
            # A row group that fits is fetched in few requests, a huge one is streamed.
            options = {"buffer_size": 2**23} if size > 4 * MAX_SLICE_BYTES else {"pre_buffer": True}
            parquet = pq.ParquetFile(file, metadata=header, **options)
            names = [name for name in self.columns.names() if name in parquet.schema_arrow.names]
            at = sum(count for count, _ in groups[: first[0]])
            batch_rows = max(1, min(MAX_SLICE_ROWS, BATCH_BYTES * sum(groups[i][0] for i in first) // max(size, 1)))
            for batch in parquet.iter_batches(batch_rows, row_groups=first, columns=names, use_threads=False):
                kept = batch.slice(max(0, start - at), max(0, min(stop, at + batch.num_rows) - max(start, at)))
                if kept.num_rows:
                    yield _block(unit, max(start, at), kept)
                at += batch.num_rows
                if at >= stop:
                    return


def _block(unit: str, start: int, batch: pa.RecordBatch) -> Block:
    """Rows as they are, but for values so large that working with them would take a machine's memory: a fault, and null."""
    values, faults = dict(zip(batch.schema.names, batch.columns, strict=True)), list[Fault | None]([None] * batch.num_rows)
    for name, column in values.items():
        if pa.types.is_large_binary(column.type) or pa.types.is_binary(column.type):
            lengths = pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
            for row in np.flatnonzero(lengths > MAX_VALUE_BYTES):
                faults[row] = BadItem("too_many_bytes", f"{name!r} has {lengths[row]} bytes; {MAX_VALUE_BYTES} are {slices.BOUND}")
            if (lengths > MAX_VALUE_BYTES).any():
                values[name] = pc.if_else(pa.array(lengths > MAX_VALUE_BYTES), pa.scalar(None, column.type), column)
    return Block(unit, start, values, faults)


def _groups(metadata: Any) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of each row group."""
    return [(metadata.row_group(i).num_rows, metadata.row_group(i).total_byte_size) for i in range(metadata.num_row_groups)]


def _row_groups(groups: list[tuple[int, int]], start: int, stop: int) -> list[int]:
    """Indices of the row groups that hold rows `start` to `stop`."""
    found, at = [], 0
    for index, (count, _) in enumerate(groups):
        if at < stop and at + count > start:
            found.append(index)
        at += count
    return found
