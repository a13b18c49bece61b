"""Staging: one uncommitted Lance fragment per chunk, and a receipt. Done by workers, as often as they like: harmless.

Nothing staged is visible to a reader of the table. A receipt that was never committed is adopted by the next run.
"""

import json
import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
from lance.file import LanceFileReader, LanceFileSession
from lance.fragment import FragmentMetadata, write_fragments

from pipeline.table.at import TableAt
from pipeline.table.equality import same_rows
from schemas.rejects import REJECT

log = logging.getLogger(__name__)


def _no_hashes() -> np.ndarray:
    return np.empty(0, np.uint64)


@dataclass
class Staged:
    """Rows that were written and not committed."""

    fragments: list[str] = field(default_factory=list)
    """Metadata of the uncommitted fragments, as JSON. Empty if there are no rows."""
    ids: np.ndarray = field(default_factory=_no_hashes)
    """Id hashes (rows,), in the rows' order."""
    versions: np.ndarray = field(default_factory=_no_hashes)
    """Version hashes (rows,)."""


@dataclass
class Receipt:
    """What a worker did with one chunk."""

    chunk: str
    fingerprint: str = ""
    source: str = ""
    """The source whose rows these are; receipts of older releases do not say."""
    listed: int = 0
    """Items of the chunk, all of them: unchanged + rejected_before + rows + rejects, or failed."""
    unchanged: int = 0
    rejected_before: int = 0
    """Items that an earlier run rejected in the same version."""
    new: Staged = field(default_factory=Staged)
    """Rows of items that the table did not hold."""
    changed: Staged = field(default_factory=Staged)
    """Rows of items that the table held in another version: to take the place of their old rows."""
    rejects: pa.Table = field(default_factory=REJECT.empty_table)
    seen: np.ndarray = field(default_factory=_no_hashes)
    """Id hashes of the chunk's unchanged items."""
    before: np.ndarray = field(default_factory=_no_hashes)
    """Id hashes of the items that an earlier run rejected."""
    unread: bool = False
    """Whether the chunk's container, or the rest of it, could not be read: what it holds is not known."""
    unit: str | None = None
    """The container, if the chunk is a slice of one."""
    error: str | None = None
    """Why the whole chunk failed; then there are no rows and no rejects."""
    changed_unit: bool = False
    """Whether it failed because its container was replaced or taken away: no fault of this run's."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Thread seconds by stage."""
    staged_at: float = 0.0
    """Unix time when it was staged."""

    @property
    def rows(self) -> int:
        """Rows staged."""
        return len(self.new.ids) + len(self.changed.ids)

    def to_bytes(self) -> bytes:
        """As an Arrow IPC stream: the rejects, with everything else in the schema's metadata."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("rejects", "new", "changed", "seen", "before")}
        metadata = {"receipt": json.dumps(plain), "seen": self.seen.tobytes(), "before": self.before.tobytes()}
        for name, staged in (("new", self.new), ("changed", self.changed)):
            metadata |= {
                f"{name}.fragments": json.dumps(staged.fragments),
                f"{name}.ids": staged.ids.tobytes(),
                f"{name}.versions": staged.versions.tobytes(),
            }
        table = self.rejects.replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return bytes(sink.getvalue().to_pybytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Receipt":
        """The receipt that `to_bytes` wrote."""
        table = pa.ipc.open_stream(data).read_all()
        metadata = {key.decode(): value for key, value in table.schema.metadata.items()}
        staged = {
            name: Staged(json.loads(metadata[f"{name}.fragments"]), _hashes(metadata[f"{name}.ids"]), _hashes(metadata[f"{name}.versions"]))
            for name in ("new", "changed")
        }
        receipt = cls(**json.loads(metadata["receipt"]), new=staged["new"], changed=staged["changed"])
        receipt.rejects = table.replace_schema_metadata(REJECT.metadata)
        receipt.seen = _hashes(metadata["seen"])
        receipt.before = _hashes(metadata.get("before", b""))  # a receipt of an earlier release has none
        return receipt

    def files(self) -> list[str]:
        """Paths of the staged data files, relative to the table's data folder."""
        return [entry["path"] for fragment in [*self.new.fragments, *self.changed.fragments] for entry in json.loads(fragment)["files"]]


def _hashes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint64)


def _parsed(name: str, data: bytes) -> Receipt | None:
    """A receipt, or None if it was cut off, or another release wrote it: then its chunk is made again."""
    try:
        return Receipt.from_bytes(data)
    except (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be read and is passed over: %s: %s", name, type(error).__name__, error)
        return None


class Unproved(RuntimeError):
    """What was read back is not what was written."""


def stage_rows(rows: pa.Table, at: TableAt, dataset: lance.LanceDataset) -> list[str]:
    """Write `rows` as uncommitted fragments of `dataset`, read them back and compare.

    Returns the fragments' metadata as JSON. Raises Unproved if the store gave back something else.
    """
    fragments = write_fragments(rows, dataset, mode="append", data_storage_version="2.2", storage_options=at.options)
    read = read_staged([json.dumps(f.to_json()) for f in fragments], at.path(), at.options)
    if not same_rows(read, rows.cast(read.schema)):
        raise Unproved(f"the {rows.num_rows} rows read back from {at.path()} differ from those written; check the store")
    return [json.dumps(f.to_json()) for f in fragments]


def read_staged(fragments: list[str], dataset_uri: str, options: dict[str, str] | None) -> pa.Table:
    """The rows of staged fragments of a dataset, all columns."""
    parts = []
    for fragment in fragments:
        for entry in json.loads(fragment)["files"]:
            path = f"{dataset_uri}/data/{entry['path']}"
            parts.append(LanceFileReader(path, storage_options=options).read_all().to_table())
    return pa.concat_tables(parts).combine_chunks()


def metadata_of(fragment: str) -> FragmentMetadata:
    """A staged fragment as Lance's commit wants it."""
    return FragmentMetadata.from_json(fragment)


def remove(session: LanceFileSession, name: str) -> bool:
    """Delete a file of a store; whether it was there, and not deleted by another process this moment."""
    try:
        session.delete_file(name)
    except OSError:
        if session.contains(name):
            raise
        return False
    return True


class Staging:
    """The folder of receipts and journals beside a table. Small files, each written in one atomic put."""

    def __init__(self, at: TableAt) -> None:
        if "://" not in at.staging:
            Path(at.staging).mkdir(parents=True, exist_ok=True)
        self.at = at
        self._session = LanceFileSession(at.staging, storage_options=at.options)
        self._data = LanceFileSession(f"{at.path()}/data", storage_options=at.options)

    def put(self, name: str, data: bytes) -> None:
        """Write a file, replacing it whole."""
        with tempfile.NamedTemporaryFile() as local:
            local.write(data)
            local.flush()
            self._session.upload_file(local.name, name)

    def get(self, name: str) -> bytes | None:
        """A file's bytes, or None if it is not there."""
        if not self._session.contains(name):
            return None
        with tempfile.TemporaryDirectory() as folder:
            local = f"{folder}/file"
            try:
                self._session.download_file(name, local)
            except OSError:
                if self._session.contains(name):
                    raise
                return None  # another job has deleted it this moment
            return Path(local).read_bytes()

    def delete(self, name: str) -> None:
        """Remove a file; no error if it is gone."""
        remove(self._session, name)

    def names(self, folder: str) -> list[str]:
        """Files in a folder of the staging area, `folder/name`."""
        return sorted(f"{folder}/{str(entry).rsplit('/', 1)[-1]}" for entry in self._session.list(folder))

    def put_receipt(self, receipt: Receipt) -> None:
        """Keep a receipt until its rows are committed."""
        receipt.staged_at = time.time()
        self.put(f"receipts/{receipt.chunk}", receipt.to_bytes())

    def receipts(self) -> list[Receipt]:
        """Every receipt that was not committed, or whose commit was not followed by its removal."""
        found = ((name, self.get(name)) for name in self.names("receipts"))
        receipts = [_parsed(name, data) for name, data in found if data is not None]
        return [receipt for receipt in receipts if receipt is not None]

    def delete_receipt(self, chunk: str) -> None:
        """Forget a receipt: its rows are in the table, or will never be."""
        self.delete(f"receipts/{chunk}")

    def has_files(self, receipt: Receipt) -> bool:
        """Whether the staged data files are still there (a cleanup may have taken them)."""
        return all(self._data.contains(path) for path in receipt.files())
