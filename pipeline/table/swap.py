"""The four commits that are safe whoever else writes, in the operations of pylance 14. All raise CommitConflictError.

* `insert` is a compare-and-swap: `LanceOperation.Merge` at a read version is the one operation that is refused if anything was
  committed in between (Append is rebased onto any version, so two writers duplicate rows).
* `replace` puts new fragments in the place of old rows, in one commit. Lance refuses it if a fragment that held an old row was touched, and
  each of its rows has such a fragment: so it must bring in no id that it does not remove.
* `exchange` adds and removes rows of a set of containers, in one commit. Lance refuses it if a fragment that held any row of them was touched,
  because all of those are named in it, also those that lose nothing: so whoever else changes the same containers makes it stale.
* `delete` removes rows; refused if their fragments were touched.

A Merge must keep every fragment, so it cannot do what `replace` does: a fragment whose rows are all replaced goes.
`self_test` proves the first three of the engine, and that the store lets one of several commits at the same moment win.
"""

import random
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import lance
import pyarrow as pa
from lance.commit import CommitConflictError
from lance.fragment import FragmentMetadata, write_fragments

from pipeline.config import ConfigError
from pipeline.table.at import TableAt, create_dataset
from pipeline.table.contents import id_predicate, rows_with

MAX_TRIES = 200

RACERS = 4
"""Commits at once in the self-test: a store without conditional writes let more than one win in 20 of 20 trials, once not on a busy machine."""

RACES = 3

Options = dict[str, str] | None
T = TypeVar("T")


class EngineRefused(RuntimeError):
    """The installed Lance engine or the store does not do what exactly-once needs."""


def insert(dataset: lance.LanceDataset, fragments: list[FragmentMetadata], options: Options) -> lance.LanceDataset:
    """Add fragments, if `dataset` is still the newest version."""
    kept = [fragment.metadata for fragment in dataset.get_fragments()]
    return _commit(dataset, lance.LanceOperation.Merge([*kept, *fragments], dataset.lance_schema), options)


def replace(dataset: lance.LanceDataset, fragments: list[FragmentMetadata], ids: list[str], options: Options) -> tuple[lance.LanceDataset, int]:
    """Add fragments and remove the rows of `ids`, which are the fragments' ids; returns how many rows went."""
    shrunk, emptied, removed = _without(dataset, ids)
    operation = lance.LanceOperation.Update(removed_fragment_ids=emptied, updated_fragments=shrunk, new_fragments=fragments, fields_modified=[])
    return _commit(dataset, operation, options), removed


def exchange(
    dataset: lance.LanceDataset, fragments: list[FragmentMetadata], *, without: list[str], touching: set[int], options: Options
) -> lance.LanceDataset:
    """Add fragments and remove the rows of the ids `without`, if nobody has touched the fragments `touching`, which must not be empty."""
    assert touching
    shrunk, emptied, _ = _without(dataset, without)
    named = {metadata.id for metadata in shrunk} | set(emptied)
    touched = [fragment.metadata for fragment in dataset.get_fragments() if fragment.fragment_id in touching - named]
    operation = lance.LanceOperation.Update(
        removed_fragment_ids=emptied, updated_fragments=[*shrunk, *touched], new_fragments=fragments, fields_modified=[]
    )
    return _commit(dataset, operation, options)


def delete(dataset: lance.LanceDataset, ids: list[str], options: Options) -> tuple[lance.LanceDataset, int]:
    """Remove the rows of `ids`; returns how many went."""
    shrunk, emptied, removed = _without(dataset, ids)
    if removed == 0:
        return dataset, 0
    return _commit(dataset, lance.LanceOperation.Delete(shrunk, emptied, "id IN (...)"), options), removed


def _without(dataset: lance.LanceDataset, ids: list[str]) -> tuple[list[FragmentMetadata], list[int], int]:
    """Fragments that lose some rows, ids of those that lose all, and the number of rows lost."""
    doomed = rows_with(dataset, ids)
    left = {f.fragment_id: f.delete(id_predicate(doomed[f.fragment_id])) for f in dataset.get_fragments() if f.fragment_id in doomed}
    shrunk = [metadata for metadata in left.values() if metadata is not None]
    emptied = [fragment_id for fragment_id, metadata in left.items() if metadata is None]
    return shrunk, emptied, sum(len(found) for found in doomed.values())


def _commit(dataset: lance.LanceDataset, operation: lance.LanceOperation.BaseOperation, options: Options) -> lance.LanceDataset:
    # max_retries=0: Lance itself must not rebase and try again; what to write has to be decided anew.
    return lance.LanceDataset.commit(dataset.uri, operation, read_version=dataset.version, storage_options=options, max_retries=0)


def until_accepted(attempt: Callable[[], T], what: str) -> T:
    """Call `attempt`, which rereads and commits, until no other writer gets in between."""
    for count in range(MAX_TRIES):
        try:
            return attempt()
        except CommitConflictError:
            time.sleep(random.uniform(0, min(2.0, 0.02 * 2**count)))
    raise EngineRefused(f"{what}: {MAX_TRIES} commits in a row were overtaken by other writers; run again when they have ended")


def self_test(at: TableAt) -> None:
    """Prove on a scratch table in the same store that stale commits are refused. Raises EngineRefused if one is accepted."""
    scratch = TableAt(uri=at.uri, name=f"selftest-{uuid.uuid4().hex[:12]}", storage_options=at.storage_options)
    schema = pa.schema([pa.field("id", pa.string(), nullable=False)])
    try:
        empty = create_dataset(scratch.path(), schema, at.storage_options)
    except ConfigError as error:
        raise ConfigError(f"table.uri={at.uri!r} cannot be written: {error}") from error
    try:
        fragments = write_fragments(pa.table({"id": ["a", "b"]}, schema=schema), empty, mode="append", storage_options=at.options)
        filled = insert(empty, fragments, at.options)
        _must_conflict(lambda: insert(empty, fragments, at.options), at)
        again = write_fragments(pa.table({"id": ["a"]}, schema=schema), filled, mode="append", storage_options=at.options)
        replaced, _ = replace(filled, again, ["a"], at.options)
        _must_conflict(lambda: replace(filled, again, ["a"], at.options), at)
        _must_conflict(lambda: insert(filled, again, at.options), at)
        if sorted(replaced.to_table()["id"].to_pylist()) != ["a", "b"]:
            raise EngineRefused(
                f"pylance {lance.__version__} on {at.uri} lost or repeated a row when it was replaced; install the version of constraints.txt"
            )
        more = write_fragments(pa.table({"id": ["d"]}, schema=schema), replaced, mode="append", storage_options=at.options)
        held = {fragment.fragment_id for fragment in replaced.get_fragments()}
        exchange(replaced, more, without=[], touching=held, options=at.options)
        _must_conflict(lambda: exchange(replaced, more, without=[], touching=held, options=at.options), at)
        for _ in range(RACES):
            _one_must_win(lance.dataset(scratch.path(), storage_options=at.options), at)
    finally:
        lance.LanceDataset.drop(scratch.path(), storage_options=at.options)


def _must_conflict(commit: Callable[[], object], at: TableAt) -> None:
    try:
        commit()
    except CommitConflictError:
        return
    raise EngineRefused(
        f"pylance {lance.__version__} on {at.uri} accepted a stale commit: rows would be duplicated by concurrent jobs. "
        "Install the pylance version of constraints.txt"
    )


def _one_must_win(dataset: lance.LanceDataset, at: TableAt) -> None:
    """Commits at the same moment, which only the store can tell apart: it has to refuse to write a file that is there."""
    rows = pa.table({"id": ["c"]}, schema=dataset.schema)
    fragments = [write_fragments(rows, dataset, mode="append", storage_options=at.options) for _ in range(RACERS)]
    start = threading.Barrier(RACERS)

    def wins(own: list[FragmentMetadata]) -> bool:
        start.wait()
        try:
            insert(dataset, own, at.options)
        except CommitConflictError:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        winners = sum(pool.map(wins, fragments))
    if winners != 1:
        raise EngineRefused(
            f"the store of {at.uri} let {winners} of {RACERS} commits of one version succeed: it does not honour conditional writes (If-None-Match), "
            "and jobs that run at once would lose rows. Use a store that does"
        )
