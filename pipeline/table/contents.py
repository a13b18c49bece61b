"""Reading a table into what planning needs: which items it holds, in which versions, and which containers are complete."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.known import WHOLE, Contents, Known, added_up, hash64, member
from pipeline.plan import Note
from pipeline.table.at import TableAt
from schemas.rejects import PASSING

READ_AHEAD_BYTES = 64 * 2**20


def read_contents(at: TableAt, dataset: lance.LanceDataset | None, *, source: str) -> Contents:
    """What the table and its rejects hold, with the rows of `source` told apart.

    Cost: a scan of ids and versions; 40 bytes a row at its peak, of which 16 stay.
    """
    own, others, rejected, duplicates = Known(), Known(), Known(), Known()
    bereft: set[str] = set()
    doubles, sums = dict[int, str](), Counter[str]()
    if dataset is not None:
        hashes = [(*_hashes(batch), _equals(batch["source"], source)) for batch in read_batches(dataset, ["id", "_version", "source"])]
        _add(own, [(ids[mine], versions[mine]) for ids, versions, mine in hashes])
        _add(others, [(ids[~mine], versions[~mine]) for ids, versions, mine in hashes])
        del hashes
    rejects = at.open(".rejects")
    if rejects is not None:
        # A duplicate has the id, and may have the version, of the item that came first: that one must not pass for rejected.
        predicate = f"source = {quoted(source)} AND reason != 'duplicate_id'"
        found = [(*_hashes(batch), _is_passing(batch["reason"])) for batch in read_batches(rejects, ["id", "_version", "reason"], predicate)]
        _add(rejected, [(ids[~passing], versions[~passing]) for ids, versions, passing in found])
        # Under no version: tried again, and forgotten once it is embedded.
        _add(rejected, [(ids[passing], np.zeros_like(versions[passing])) for ids, versions, passing in found])
        predicate = f"source = {quoted(source)} AND reason = 'duplicate_id'"
        for batch in read_batches(rejects, ["id", "_version", "_unit"], predicate):
            ids, versions = _hashes(batch)
            duplicates.add(ids, versions)
            gone = ~own.find(ids)[0] & ~others.find(ids)[0]
            bereft |= set(batch["_unit"].filter(pa.array(gone)).drop_null().to_pylist())
            units_of, placed = batch["_unit"].drop_null(), ids[np.asarray(batch["_unit"].is_valid())]
            doubles |= dict(zip(placed.tolist(), units_of.to_pylist(), strict=True))
            _add_up(sums, units_of, placed)
    holders = _holders(dataset, doubles, source=source) if dataset is not None and doubles else {}
    units = unit_states(dataset, source=source) if dataset is not None else {}
    version = dataset.version if dataset is not None else 0
    return Contents(own, others, rejected, version, units=units, duplicates=duplicates, bereft=frozenset(bereft), doubles=sums, holders=holders)


def double_sums(at: TableAt, *, source: str) -> Counter[str]:
    """Of each container of `source` with duplicates on record: their id hashes, added up."""
    rejects = at.open(".rejects")
    return _sums(rejects, f"source = {quoted(source)} AND _unit IS NOT NULL AND reason = 'duplicate_id'") if rejects is not None else Counter()


def _holders(dataset: lance.LanceDataset, doubles: dict[int, str], *, source: str) -> dict[str, set[str]]:
    """Of each container in `doubles` (by id hash): the containers that have the rows with these ids."""
    wanted, found = np.sort(np.array(list(doubles), np.uint64)), defaultdict[str, set[str]](set)
    for batch in read_batches(dataset, ["id", "_unit"], f"source = {quoted(source)} AND _unit IS NOT NULL"):
        ids = hash64(batch["id"])
        for row in np.flatnonzero(member(ids, wanted)).tolist():
            found[doubles[int(ids[row])]].add(batch["_unit"][row].as_py())
    return found


def ids_in(dataset: lance.LanceDataset, units: frozenset[str], *, source: str) -> np.ndarray:
    """Id hashes, sorted, of the rows of some containers of `source`."""
    wanted = pa.array(sorted(units), pa.string())
    batches = read_batches(dataset, ["id", "_unit"], f"source = {quoted(source)} AND _unit IS NOT NULL")
    hashes = [hash64(batch["id"].filter(pc.is_in(batch["_unit"], wanted))) for batch in batches]
    return np.sort(np.concatenate([np.empty(0, np.uint64), *hashes]))


def id_sums(dataset: lance.LanceDataset, units: Iterable[str], *, source: str) -> dict[str, int]:
    """Of each of some containers of `source`: the id hashes of its rows, added up."""
    return _sums(dataset, f"source = {quoted(source)} AND _unit IS NOT NULL", pa.array(sorted(units), pa.string()))


def _sums(dataset: lance.LanceDataset, predicate: str, units: pa.Array | None = None) -> Counter[str]:
    sums = Counter[str]()
    for batch in read_batches(dataset, ["id", "_unit"], predicate):
        rows = batch if units is None else batch.filter(pc.is_in(batch["_unit"], units))
        _add_up(sums, rows["_unit"], hash64(rows["id"]))
    return sums


def _add_up(sums: Counter[str], units: pa.Array, hashes: np.ndarray) -> None:
    """Add id hashes (N,) to the sums of their containers (N,), none of which is null."""
    encoded = units.dictionary_encode()
    found = np.zeros(len(encoded.dictionary), np.uint64)
    np.add.at(found, encoded.indices.to_numpy(), hashes)
    for unit, more in zip(encoded.dictionary.to_pylist(), found.tolist(), strict=True):
        sums[unit] = added_up([sums[unit], more])


def read_batches(dataset: lance.LanceDataset, columns: list[str], predicate: str | None = None) -> Iterator[pa.RecordBatch]:
    """Rows batch by batch: the strings of all of them are ten times what is made of them, and Lance would read 2 GB ahead."""
    return iter(dataset.scanner(columns=columns, filter=predicate, io_buffer_size=READ_AHEAD_BYTES).to_batches())


def _hashes(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    return hash64(batch["id"]), hash64(batch["_version"])


def _equals(values: pa.Array, text: str) -> np.ndarray:
    return np.asarray(pc.fill_null(pc.equal(values, text), False).to_numpy(zero_copy_only=False))


def _is_passing(reasons: pa.Array) -> np.ndarray:
    return np.asarray(pc.is_in(reasons, pa.array(sorted(PASSING), pa.string())).to_numpy(zero_copy_only=False))


def _add(known: Known, hashes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    if hashes:
        known.add(np.concatenate([ids for ids, _ in hashes]), np.concatenate([versions for _, versions in hashes]))


def unit_states(dataset: lance.LanceDataset, *, source: str) -> dict[str, tuple[int, str]]:
    """Of each container of `source`: its rows in the table, and a digest of their chunks and counts. Under WHOLE: of all of them."""
    chunks: dict[str, Counter[str]] = defaultdict(Counter)
    # Batch by batch: the rows' names of containers and chunks, all at once, are larger than what is made of them.
    for batch in dataset.scanner(columns=["_unit", "_chunk"], filter=f"source = {quoted(source)} AND _unit IS NOT NULL").to_batches():
        counts = pa.table(batch).group_by(["_unit", "_chunk"]).aggregate([([], "count_all")])
        for row in counts.to_pylist():
            chunks[row["_unit"]][row["_chunk"]] += row["count_all"]
    states = {unit: (counter.total(), _digest(list(counter.items()))) for unit, counter in chunks.items()}
    total = sum(rows for rows, _ in states.values())
    return states | {WHOLE: (total, _digest([(f"{unit} {digest}", rows) for unit, (rows, digest) in states.items()]))}


def units_by(dataset: lance.LanceDataset, column: str, *, source: str) -> dict[str, set[str]]:
    """The containers of `source` that have rows with each value of a column."""
    found: dict[str, set[str]] = defaultdict(set)
    for batch in dataset.scanner(columns=["_unit", column], filter=f"source = {quoted(source)} AND _unit IS NOT NULL").to_batches():
        for row in pa.table(batch).group_by(["_unit", column]).aggregate([]).to_pylist():
            found[row[column]].add(row["_unit"])
    return found


def _digest(chunks: list[tuple[str, int]]) -> str:
    return hashlib.blake2b(repr(sorted(chunks)).encode(), digest_size=16).hexdigest()


def read_notes(at: TableAt, *, source: str) -> dict[str, Note]:
    """The newest note on each container of `source`."""
    rows = newest_notes(at, predicate=f"source = {quoted(source)}").values()
    return {row["unit"]: Note(row["version"], row["rows"], row["rejected"], row["digest"]) for row in rows}


def newest_notes(at: TableAt, *, predicate: str | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """The newest note (UNIT row) on each container, by source and unit; all of them, or those of an SQL predicate."""
    dataset = at.open(".units")
    rows = dataset.to_table(filter=predicate).to_pylist() if dataset is not None else []
    return {(row["source"], row["unit"]): row for row in rows}  # a later note stands further down, and wins


def quoted(text: str) -> str:
    """A string literal of Lance's SQL."""
    return "'" + text.replace("'", "''") + "'"


def rows_with(dataset: lance.LanceDataset, ids: list[str], *, batch: int = 10_000) -> dict[int, list[str]]:
    """Of the rows whose id is among `ids`: the ids, by fragment."""
    found: dict[int, list[str]] = defaultdict(list)
    for start in range(0, len(ids), batch):
        predicate = id_predicate(ids[start : start + batch])
        rows = dataset.to_table(columns=["id"], filter=predicate, with_row_address=True)
        fragments = (rows["_rowaddr"].to_numpy() >> np.uint64(32)).astype(int)
        for fragment, item in zip(fragments, rows["id"].to_pylist(), strict=True):
            found[int(fragment)].append(item)
    return found


def id_predicate(ids: list[str]) -> str:
    """SQL: the id is one of these."""
    return f"id IN ({', '.join(quoted(i) for i in ids)})"
