"""What Lance's own commits promise to two writers, what they do not, and Tessera's. No Ray; writers that take turns make each race certain."""

import contextlib
import datetime
import fcntl
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
from lance.fragment import write_fragments

from benchmarks.faults import commits
from benchmarks.faults.outcome import TESSERA, Outcome, observe

KEY = {"lance-schema:unenforced-primary-key": "true"}


def rows(start: int, stop: int, *, key: bool = False) -> pa.Table:
    """Rows of an `id` each. `key`: declared as unenforced primary key, which must not be null."""
    field = pa.field("id", pa.string(), nullable=not key, metadata=KEY if key else None)
    return pa.table([[f"i{n}" for n in range(start, stop)]], schema=pa.schema([field]))


def upserts(folder: Path) -> Iterator[Outcome]:
    """Two writers upsert the same 1,000 new keys, neither seeing the other

    Tessera: a commit is refused if anything was committed since it was planned; what is there by then is dropped, the rest tried again.
    """
    for title, key, index, use_index in (
        ("merge_insert", False, False, True),
        ("merge_insert, unenforced primary key", True, False, True),
        ("merge_insert, primary key, BTREE on it", True, True, True),
        ("the same, use_index(False)", True, True, False),
    ):
        table = str(folder / f"{key}{index}{use_index}.lance")
        lance.write_dataset(rows(1_000, 1_001, key=key), table)
        if index:
            lance.dataset(table).create_scalar_index("id", "BTREE")
        writers = [lance.dataset(table), lance.dataset(table)]
        for writer in writers:
            merge = writer.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.use_index(use_index).execute(rows(0, 1_000, key=key))
        yield observe(title, Path(table), rows(0, 1_001))
    yield _two_writers(folder, there=rows(1_000, 1_001), missing=rows(0, 1_000))


def read_check_append(folder: Path) -> Iterator[Outcome]:
    """Two writers read the table, and append what is missing

    Tessera: reads and commits by compare-and-swap, so that the check still holds when the rows come in.
    """
    table = folder / "t.lance"
    lance.write_dataset(rows(0, 0), str(table))
    writers = [lance.dataset(str(table)), lance.dataset(str(table))]
    for writer in writers:
        there = set(writer.to_table()["id"].to_pylist())
        missing = [i for i in rows(0, 100)["id"].to_pylist() if i not in there]
        lance.write_dataset(pa.table({"id": missing}), writer, mode="append")
    yield observe("lance.write_dataset, append", table, rows(0, 100))
    yield _two_writers(folder, there=rows(0, 0), missing=rows(0, 100))


def _two_writers(folder: Path, *, there: pa.Table, missing: pa.Table) -> Outcome:
    """Tessera: two runs that have read the table bring in the same rows, one after the other."""
    at = commits.make_table(folder)
    commits.writer(at).commit([commits.staged(at, there["id"].to_pylist(), chunk="there")] if there.num_rows else [])
    writers = [commits.writer(at), commits.writer(at)]
    receipts = [commits.staged(at, missing["id"].to_pylist(), chunk=chunk) for chunk in ("first", "second")]
    for writer, receipt in zip(writers, receipts, strict=True):
        writer.commit([receipt])
    return observe(TESSERA, Path(at.path()), pa.concat_tables([there, missing]))


def committed_twice(folder: Path) -> Iterator[Outcome]:
    """The reply to a commit is lost, and the same Transaction is committed again

    Tessera: the second commit is refused as stale, and finds its rows in the table.
    """
    table = folder / "t.lance"
    dataset = lance.write_dataset(rows(0, 100), str(table))
    fragments = write_fragments(rows(100, 200), dataset, mode="append")
    transaction = lance.Transaction(dataset.version, lance.LanceOperation.Append(fragments))
    for _ in range(2):
        lance.LanceDataset.commit(str(table), transaction, max_retries=0)
    yield observe("LanceDataset.commit, max_retries=0", table, rows(0, 200))
    at = commits.make_table(folder)
    commits.writer(at).commit([commits.staged(at, rows(0, 100)["id"].to_pylist(), chunk="there")])
    writers = [commits.writer(at), commits.writer(at)]
    receipt = commits.staged(at, rows(100, 200)["id"].to_pylist(), chunk="c")
    for writer in writers:
        writer.commit([receipt])
    yield observe(TESSERA, Path(at.path()), rows(0, 200))


def cleaned_up(folder: Path) -> Iterator[Outcome]:
    """Proof of a commit kept in `transaction_properties`, old versions cleaned up, then the job runs again

    Tessera: the proof is a column of the rows themselves.
    """
    table = str(folder / "t.lance")
    lance.write_dataset(rows(0, 0), table)
    _append_unless_done(table)
    lance.write_dataset(rows(100, 110), table, mode="append")
    lance.dataset(table).optimize.compact_files()
    lance.dataset(table).cleanup_old_versions(older_than=datetime.timedelta(0))
    _append_unless_done(table)
    yield observe("transaction_properties", Path(table), rows(0, 110))
    yield _cleaned_up_tessera(folder)


def _append_unless_done(table: str) -> None:
    dataset = lance.dataset(table)
    transactions = [dataset.read_transaction(version["version"]) for version in dataset.versions()]
    if not any(t and (t.transaction_properties or {}).get("job") == "monday" for t in transactions):
        lance.write_dataset(rows(0, 100), table, mode="append", transaction_properties={"job": "monday"})


def _cleaned_up_tessera(folder: Path) -> Outcome:
    at = commits.make_table(folder)
    for start, stop in ((0, 100), (100, 110)):
        commits.writer(at).commit([commits.staged(at, rows(start, stop)["id"].to_pylist(), chunk=str(start))])
    at.require().optimize.compact_files()
    at.require().cleanup_old_versions(older_than=datetime.timedelta(0))
    commits.writer(at).commit([commits.staged(at, rows(0, 100)["id"].to_pylist(), chunk="0")])
    return observe(TESSERA, Path(at.path()), rows(0, 110))


def commit_lock(folder: Path) -> Iterator[Outcome]:
    """Four processes make 25 commits of 10 rows each; all are acknowledged

    Tessera: takes no lock; the store's own conditional write decides, and a self-test refuses a store without one.
    """
    for title, lock in (("no lock", None), ("commit_lock= a lock of the process", _own_lock), ("commit_lock= a lock of the machine", _file_lock)):
        table = folder / f"{title}.lance"
        lance.write_dataset(rows(0, 0), str(table))
        error = _at_once(_append_often, [(table, start, lock) for start in range(0, 1_000, 250)])
        yield observe(title, table, rows(0, 1_000), error=error)
    at = commits.make_table(folder)
    error = _at_once(_commit_often, [(folder, start) for start in range(0, 1_000, 250)])
    yield observe(TESSERA, Path(at.path()), rows(0, 1_000), error=error)


def _at_once(work: Callable[..., None], arguments: list[tuple[Any, ...]]) -> str | None:
    """Call `work` in a process for each of the arguments; how many failed, in words."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=work, args=each) for each in arguments]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    failed = sum(writer.exitcode != 0 for writer in writers)
    return f"{failed} writers failed" if failed else None


_OWN = threading.Lock()


@contextlib.contextmanager
def _own_lock(version: int) -> Iterator[None]:
    with _OWN:
        yield


@contextlib.contextmanager
def _file_lock(version: int) -> Iterator[None]:
    with Path(tempfile.gettempdir(), "tessera-faults.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _append_often(table: Path, start: int, lock: Callable[[int], AbstractContextManager[None]] | None) -> None:
    for first in range(start, start + 250, 10):
        lance.write_dataset(rows(first, first + 10), str(table), mode="append", commit_lock=lock)


def _commit_often(folder: Path, start: int) -> None:
    at = commits.make_table(folder)
    writer = commits.writer(at)
    for first in range(start, start + 250, 10):
        writer.commit([commits.staged(at, rows(first, first + 10)["id"].to_pylist(), chunk=str(first))])
