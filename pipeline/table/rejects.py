"""The table of rejects: one row an item that was not embedded, kept beside the vectors."""

from collections.abc import Callable

import lance
import pyarrow as pa
from lance.fragment import write_fragments

from pipeline.table.at import TableAt, create_dataset
from pipeline.table.contents import id_predicate, quoted
from pipeline.table.swap import delete, insert, until_accepted
from schemas.rejects import PASSING, REJECT


def record_rejects(at: TableAt, tables: list[pa.Table]) -> None:
    """Record reject rows, one an id: an older reject of the same id goes; one of the same version stays, unless it has passed."""
    rows = pa.concat_tables([REJECT.empty_table(), *tables]).combine_chunks()
    if rows.num_rows == 0:
        return
    create_dataset(at.path(".rejects"), REJECT, at.storage_options)
    until_accepted(lambda: _record(at, rows), at.path(".rejects"))


def _record(at: TableAt, rows: pa.Table) -> None:
    dataset = at.open(".rejects")
    assert dataset is not None
    known = {(r["id"], r["_version"]): r["reason"] for r in _rejects_of(dataset, rows["id"].to_pylist())}
    fresh = _first_of_each_id(rows, known)
    if fresh.num_rows == 0:
        return
    dataset, _ = delete(dataset, fresh["id"].to_pylist(), at.options)
    fragments = write_fragments(fresh, dataset, mode="append", data_storage_version="2.2", storage_options=at.options)
    insert(dataset, fragments, at.options)


def rejects_of(at: TableAt, *, source: str) -> pa.Table:
    """`id`, `_unit` and `reason` of the rejects of a source's containers."""
    dataset, names = at.open(".rejects"), ["id", "_unit", "reason"]
    if dataset is None:
        return REJECT.empty_table().select(names)
    return dataset.to_table(columns=names, filter=f"source = {quoted(source)} AND _unit IS NOT NULL")


def forget_rejects(at: TableAt, ids: list[str]) -> None:
    """Forget the rejects of items that have been embedded since. Duplicates stay: the item that came first is another one."""
    _forget(at, ids, lambda reason: reason != "duplicate_id")


def forget_duplicates(at: TableAt, ids: list[str]) -> None:
    """Forget the duplicates with these ids: the items are gone, or have taken the place of those that came first."""
    _forget(at, ids, lambda reason: reason == "duplicate_id")


def _forget(at: TableAt, ids: list[str], outdated: Callable[[str], bool]) -> None:
    def attempt() -> None:
        dataset = at.open(".rejects")
        if dataset is not None:
            delete(dataset, [r["id"] for r in _rejects_of(dataset, ids) if outdated(r["reason"])], at.options)

    if ids:
        until_accepted(attempt, at.path(".rejects"))


def _rejects_of(dataset: lance.LanceDataset, ids: list[str]) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for start in range(0, len(ids), 10_000):
        rows += dataset.to_table(columns=["id", "_version", "reason"], filter=id_predicate(ids[start : start + 10_000])).to_pylist()
    return rows


def _first_of_each_id(rows: pa.Table, known: dict[tuple[str, str], str]) -> pa.Table:
    """`known`: the reason of each reject that is recorded, by id and version."""
    seen: set[str] = set()
    keep = []
    for item, version, reason in zip(*(rows[name].to_pylist() for name in ("id", "_version", "reason")), strict=True):
        before = known.get((item, version))
        keep.append(item not in seen and (before is None or (before in PASSING and before != reason)))
        seen.add(item)
    return rows.filter(pa.array(keep, pa.bool_()))
