"""The files of a table: which of them its versions refer to, which nothing refers to, which are gone.

Memory: the path of every file. Time: a listing of the table's folder, and a reading of each version's manifest.
"""

import datetime
from dataclasses import dataclass
from typing import Any

import lance
import pyarrow as pa
from lance.file import LanceFileSession

from pipeline.table.at import TableAt
from pipeline.table.ledger import now
from pipeline.table.stage import Receipt, remove

FOLDERS = ("data/", "_deletions/", "_indices/")
"""Where the files lie that versions refer to by name."""


@dataclass(frozen=True)
class File:
    """One file, by its path in the table's folder."""

    path: str
    num_bytes: int
    age: datetime.timedelta

    def __str__(self) -> str:
        return f"{self.path}: {self.num_bytes} bytes, {self.age.total_seconds() / 3600:.1f} h old"


@dataclass
class Files:
    """The files of a table, by what refers to them."""

    live: int
    """Bytes that the newest version needs."""
    old: int
    """Bytes that only older versions need: what a cleanup of them frees."""
    staged: int
    """Bytes of rows that were staged and not committed."""
    loose: list[File]
    """Files that nothing refers to, oldest first."""
    strange: bool
    """Whether the newest version has rows and refers to no data file of the table's folder: then the files cannot be told apart."""
    missing: list[str]
    """Files that the newest version refers to, and that are not there."""


def present_files(dataset: lance.LanceDataset) -> dict[str, File]:
    """Every file in the table's folder, by path."""
    at = now()
    files = {}
    for batch in dataset.all_files():
        for row in batch.to_pylist():
            files[row["path"]] = File(row["path"], row["size_bytes"], at - row["last_modified"])
    return files


def sort_files(dataset: lance.LanceDataset, present: dict[str, File], receipts: list[Receipt]) -> Files:
    """Tell the files apart. `present` and then `receipts` must have been read before: what was staged
    in between is in neither, and what was committed in between is in the manifests, which are read last.
    """
    newest, older = set[str](), set[str]()
    for batch in dataset.tracked_files():
        for row in _own(batch, dataset):
            (newest if row["version"] == dataset.version else older).add(row["path"])
    staged = {f"data/{path}" for receipt in receipts for path in receipt.files()} - newest - older
    referred = newest | older | staged
    # If Lance gives the table's folder another name than it was opened by, no file seems to be referred to, and none may be deleted.
    strange = bool(dataset.get_fragments()) and not any(path.startswith("data/") for path in newest)
    # A branch may refer to files of the trunk in manifests of its own, which are not read here.
    judged = [] if strange or dataset.branches.list() else [file for file in present.values() if file.path.startswith(FOLDERS)]
    loose = [file for file in judged if file.path not in referred]
    return Files(
        live=_bytes(newest, present),
        old=_bytes(older - newest, present),
        staged=_bytes(staged, present),
        loose=sorted(loose, key=lambda file: file.age, reverse=True),
        strange=strange,
        missing=sorted(path for path in newest if path.startswith(FOLDERS) and path not in present),
    )


def delete_orphans(at: TableAt, files: list[File]) -> int:
    """Delete files of a table's folder; returns their bytes."""
    session = LanceFileSession(at.path(), storage_options=at.options)
    return sum(file.num_bytes for file in files if remove(session, file.path))


def _own(batch: pa.RecordBatch, dataset: lance.LanceDataset) -> list[dict[str, Any]]:
    """Rows of files in the table's own folder: a shallow clone refers to another table's too."""
    return [row for row in batch.to_pylist() if row["base_uri"].rstrip("/") == dataset.uri.rstrip("/")]


def _bytes(paths: set[str], present: dict[str, File]) -> int:
    return sum(present[path].num_bytes for path in paths if path in present)
