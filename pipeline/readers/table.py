"""A Lance table as a source: one of Tessera's, to embed its items again with another encoder, or any other.

The table is read at the version that was listed. Its fragments are the containers, and a fragment's version is that of
its files, deleted rows included: what another job appends is new, the rest is not read again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import lance
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.readers import rows, slices
from pipeline.readers.rows import Block
from pipeline.readers.slices import MAX_SLICE_BYTES, MAX_SLICE_ROWS
from pipeline.table.at import TableAt

READ_ROWS = 1024


class Table:
    """Items in the rows of a Lance table."""

    def __init__(
        self,
        uri: str,
        name: str,
        *,
        id: str = "id",
        text: str | None = "text",
        image: str | None = None,
        image_uri: str | None = "uri",
        metadata: Sequence[str] | Mapping[str, str] | None = None,
        version: str | None = None,
        storage_options: dict[str, str] | None = None,
        fetch_options: dict[str, str] | None = None,
    ) -> None:
        """Name the table, and its columns that hold what.

        The defaults fit a table of Tessera's: its ids are kept, and its images fetched again from `uri`, unless they came
        out of a container, which a URI does not lead into; `image: thumbnail` takes the small ones in the table instead.
        A row is another one when its content is, or its `_version` where the table has it: a picture may be replaced under its URI.
        `storage_options` are Lance's, for the table; `fetch_options` are fsspec's, for the images.
        """
        self.at = TableAt(uri=uri, name=name, storage_options=storage_options or {})
        self.columns = rows.columns(id=id, text=text, image=image, image_uri=image_uri, version=version, metadata=metadata)
        self.source = self.at.path()
        self.storage_options = fetch_options
        self._metadata: pa.Schema | None = None
        self._version: int | None = None

    @property
    def metadata(self) -> pa.Schema:
        """Types that the job file does not give are the table's."""
        if self._metadata is None:
            self.list()
        return self._metadata

    def list(self) -> pa.Table:
        """The fragments of the newest version. Raises ConfigError if there is no table, or it lacks a column."""
        dataset = self.at.require()
        rows.require(self.columns, dataset.schema.names, self.source)
        if self.columns.version is None and "_version" in dataset.schema.names:
            self.columns = dataclasses.replace(self.columns, revision="_version")
        self._metadata = self.columns.schema({entry.name: entry.type for entry in dataset.schema})
        self._version = dataset.version
        fragments = dataset.get_fragments()
        units = [f"{self.source}#{fragment.fragment_id:08}" for fragment in fragments]
        versions = [version_of(fragment) for fragment in fragments]
        sizes = [sum(file.file_size_bytes or 0 for file in fragment.data_files()) or None for fragment in fragments]
        found = pa.table([units, versions, pa.array(sizes, pa.int64())], names=["unit", "version", "bytes"])
        return rows.containers(found, self.columns.digest())

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows and about 64 MiB."""
        dataset = self._dataset()
        parts = []
        for unit, version, size in zip(*(units[name].to_pylist() for name in ("unit", "version", "bytes")), strict=True):
            count = self._fragment(dataset, unit).count_rows()
            step = max(1, min(MAX_SLICE_ROWS, count * MAX_SLICE_BYTES // max(size or 1, 1)))
            for start in range(0, max(count, 1), step):
                stop = min(count, start + step)
                parts.append((unit, version, (start, stop, (size or 0) * (stop - start) // max(count, 1))))
        return slices.table(parts)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """Items by batches."""
        dataset = self._dataset()

        def blocks(unit: str, start: int, stop: int) -> Iterator[Block]:
            return self._blocks(dataset, unit, start, stop)

        return slices.read(work, blocks, self.columns, self.metadata)

    def _blocks(self, dataset: lance.LanceDataset, unit: str, start: int, stop: int) -> Iterator[Block]:
        wanted = self.columns.names()
        inside = "_unit" in dataset.schema.names and self.columns.image_uri == "uri"
        scanner = self._fragment(dataset, unit).scanner(
            columns=[*wanted, *(["_unit"] if inside else [])], offset=start, limit=stop - start, batch_size=READ_ROWS
        )
        at = start
        for batch in scanner.to_batches():
            values = dict(zip(batch.schema.names, batch.columns, strict=True))
            if inside:
                values["uri"] = pc.if_else(values.pop("_unit").is_null(), values["uri"], pa.scalar(None, pa.string()))
            yield Block(unit, at, values, [None] * batch.num_rows)
            at += batch.num_rows

    def _dataset(self) -> lance.LanceDataset:
        if self._version is None:
            self.list()
        return lance.dataset(self.source, version=self._version, storage_options=self.at.storage_options or None)

    def _fragment(self, dataset: lance.LanceDataset, unit: str) -> lance.LanceFragment:
        number = int(unit.rpartition("#")[2])
        fragment = dataset.get_fragment(number)
        if fragment is None:
            raise FileNotFoundError(f"fragment {number} is not in version {dataset.version} of {self.source}")
        return fragment


def version_of(fragment: lance.LanceFragment) -> str:
    """32 hex digits of the files that a fragment is made of, deleted rows included."""
    state = fragment.metadata.to_json()
    files = {"files": [file["path"] for file in state["files"]], "deleted": state.get("deletion_file")}
    return hashlib.blake2b(json.dumps(files, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
