"""The slides table, `NAME.slides`: read, and written by compare-and-swap, so that runs at the same time leave one row a slide."""

from collections.abc import Mapping, Sequence
from typing import Any

import lance
import pyarrow as pa
from lance.fragment import write_fragments

from pipeline.table import swap
from pipeline.table.at import TableAt, create_dataset
from pipeline.table.contents import id_predicate, quoted
from schemas.slides import SLIDE

SUFFIX = ".slides"
LARGE = ["mask", "thumbnail", "contour"]
SMALL = [name for name in SLIDE.names if name not in LARGE]
"""All columns but those that are large."""


def slide_rows(
    at: TableAt, *, source: str, columns: Sequence[str] | None = None, units: Sequence[str] | None = None, where: str | None = None
) -> list[dict[str, Any]]:
    """Rows of the slides table of one source: all, or those of some URIs, or of an SQL condition. None if there is no table."""
    dataset = at.open(SUFFIX)
    if dataset is None:
        return []
    conditions = [f"source = {quoted(source)}", *([id_predicate(list(units))] if units is not None else []), *([where] if where else [])]
    rows: list[dict[str, Any]] = dataset.to_table(columns=list(columns) if columns else None, filter=" AND ".join(conditions)).to_pylist()
    return rows


def kept_elsewhere(at: TableAt, *, source: str) -> dict[str, str]:
    """URIs of the slides of other sources in the same table, and the names of these."""
    dataset = at.open(SUFFIX)
    rows = dataset.to_table(columns=["id", "source"], filter=f"source != {quoted(source)}").to_pylist() if dataset is not None else []
    return {row["id"]: row["source"] for row in rows}


def record_slides(at: TableAt, rows: Sequence[Mapping[str, Any]]) -> int:
    """Write SLIDE rows, each in the place of the one with its id; returns how many were written. Large columns that a row leaves out stay.

    A row that says no more than the one that is there, of another run at the same time, is not written.
    """
    if not rows:
        return 0
    create_dataset(at.path(SUFFIX), SLIDE, at.storage_options)
    return swap.until_accepted(lambda: _record(at, rows), at.path(SUFFIX))


def _record(at: TableAt, rows: Sequence[Mapping[str, Any]]) -> int:
    dataset = at.open(SUFFIX)
    assert dataset is not None
    there = {row["id"]: row for row in dataset.to_table(columns=SMALL, filter=id_predicate([row["id"] for row in rows])).to_pylist()}
    fresh = [row for row in rows if row["id"] not in there]
    other = [row for row in rows if row["id"] in there and _says(row) != _says(there[row["id"]])]
    if fresh:
        dataset = swap.insert(dataset, _fragments(fresh, dataset, at), at.options)
    if other:
        bare = [row["id"] for row in other if not set(LARGE) <= set(row)]
        large = {row["id"]: row for row in dataset.to_table(columns=["id", *LARGE], filter=id_predicate(bare)).to_pylist()} if bare else {}
        other = [large.get(row["id"], {}) | dict(row) for row in other]
        swap.replace(dataset, _fragments(other, dataset, at), [row["id"] for row in other], at.options)
    return len(fresh) + len(other)


WHEN = ("run", "updated_at", "survey_seconds", "embed_seconds", "attempts")


def _says(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of its slide, leaving out who found it and when; large columns follow from `tiling` and `survey`."""
    return {name: row[name] for name in SMALL if name not in WHEN}


def _fragments(rows: Sequence[Mapping[str, Any]], dataset: lance.LanceDataset, at: TableAt) -> list[lance.FragmentMetadata]:
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SLIDE)
    fragments: list[lance.FragmentMetadata] = write_fragments(table, dataset, mode="append", data_storage_version="2.2", storage_options=at.options)
    return fragments


def forget_slides(at: TableAt, uris: Sequence[str]) -> None:
    """Remove rows: slides that have moved, and stand elsewhere."""
    if uris:
        swap.until_accepted(lambda: swap.delete(_required(at), list(uris), at.options), at.path(SUFFIX))


def _required(at: TableAt) -> lance.LanceDataset:
    dataset = at.open(SUFFIX)
    assert dataset is not None
    return dataset
