"""Checks of the protocols, for the built-in classes and for your own: each raises AssertionError saying what is wrong."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.encoders import Encoder
from pipeline.media import from_pixels
from pipeline.readers import Reader
from schemas.items import ITEM, LISTING, SLICE, encoder_schema, item_schema
from schemas.rejects import REASONS
from schemas.vectors import RESERVED

if TYPE_CHECKING:
    from torch import Tensor


def check_encoder(encoder: Encoder, items: pa.Table, *, again: Encoder | None = None) -> None:
    """Hold an encoder to its contract on `items` (schema `schemas.items.encoder_schema`, at least 3 rows, best all different).

    `again`: a second one made with the same arguments, where that is cheap; its fingerprint must be the same.
    """
    assert items.schema.equals(encoder_schema()), f"items must have the schema of schemas.items.encoder_schema(), not {items.schema}"
    assert items.num_rows >= 3, f"{items.num_rows} items are too few to see whether their order is kept; give at least 3"
    _check_identity(encoder, again)
    _check_prepare(encoder, items)
    tolerance = float(getattr(encoder, "tolerance", 1e-4))
    vectors = encoder.encode(items)
    _check_vectors(vectors, items.num_rows, encoder.dim)

    backwards = encoder.encode(items.take(pa.array(range(items.num_rows - 1, -1, -1))))[::-1]
    _check_same(vectors, backwards, tolerance, "the items in reverse order: the order of the items is not kept, or a vector depends on it")
    alone = np.concatenate([encoder.encode(items.slice(row, 1)) for row in range(items.num_rows)])
    _check_same(vectors, alone, tolerance, "each item alone: a vector depends on the batch")
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(encoder.encode, [items] * 4):
            _check_same(vectors, found, tolerance, "four threads at once: encode must be safe to call from several")
    _check_vectors(encoder.encode(items.slice(0, 0)), 0, encoder.dim)
    if hasattr(encoder, "for_queries"):
        queries = encoder.for_queries()
        assert (queries.dim, queries.fingerprint) == (encoder.dim, encoder.fingerprint), (
            "for_queries must keep dim and fingerprint: both sides are one space"
        )
        _check_vectors(queries.encode(items), items.num_rows, encoder.dim)


def _check_identity(encoder: Encoder, again: Encoder | None) -> None:
    assert isinstance(encoder.dim, int) and encoder.dim > 0, f"dim must be a whole number above 0, not {encoder.dim!r}"
    assert isinstance(encoder.fingerprint, str) and encoder.fingerprint, f"fingerprint must be a text, not {encoder.fingerprint!r}"
    try:
        json.dumps(encoder.lineage)
    except TypeError as error:
        raise AssertionError(f"lineage must hold JSON types only: {error}") from error
    if again is not None:
        assert again.fingerprint == encoder.fingerprint, "two encoders made with the same arguments have different fingerprints"


def _check_prepare(encoder: Encoder, items: pa.Table) -> None:
    prepare = getattr(encoder, "prepare", None)
    if prepare is None:
        return
    for image in from_pixels(items["image"]):
        if image is None:
            continue
        prepared = prepare(image)
        right = isinstance(prepared, np.ndarray) and prepared.dtype == np.uint8 and prepared.ndim == 3 and prepared.shape[2] == 3
        assert right, f"prepare must give uint8 (h, w, 3), not {getattr(prepared, 'dtype', type(prepared))} {getattr(prepared, 'shape', '')}"


def _check_vectors(vectors: np.ndarray, rows: int, dim: int) -> None:
    assert isinstance(vectors, np.ndarray), f"encode must give a numpy array, not {type(vectors).__name__}"
    assert vectors.shape == (rows, dim), f"{rows} items and dim {dim} must give the shape ({rows}, {dim}), not {vectors.shape}"
    assert vectors.dtype == np.float32, f"vectors must be float32, not {vectors.dtype}"
    assert np.isfinite(vectors).all(), "vectors hold NaN or infinity"
    norms = np.linalg.norm(vectors, axis=1)
    assert np.allclose(norms, 1, atol=1e-3), f"vectors must have norm 1; these have {norms.min():.4f} to {norms.max():.4f}"


def _check_same(wanted: np.ndarray, found: np.ndarray, tolerance: float, when: str) -> None:
    assert found.shape == wanted.shape, f"another shape with {when}: {found.shape}, not {wanted.shape}"
    worst = float(np.abs(found - wanted).max())
    assert worst <= tolerance, f"vectors differ by up to {worst:.2g}, allowed are {tolerance:.2g}, with {when}"


def check_reader(reader: Reader) -> None:
    """Hold a reader to its contract on a source of its own: lists it twice and reads all of it, so give it a small one."""
    listing = reader.list()
    assert set(LISTING.names) <= set(listing.column_names), f"list() must have the columns {LISTING.names}, not {listing.column_names}"
    listing = listing.select(LISTING.names)
    assert listing.schema.equals(LISTING), f"list() must give the types of schemas.items.LISTING, not {listing.schema}"
    assert listing.num_rows, "list() is empty: it must raise ConfigError, saying what it looked for"
    assert listing.equals(reader.list().select(LISTING.names)), "a second list() gives another listing, though nothing changed"
    assert reader.source and isinstance(reader.source, str), f"source must be a text, not {reader.source!r}"
    for name in ("unit", "version"):
        assert not {None, ""} & set(listing[name].to_pylist()), f"list() has a row without {name}"
    assert isinstance(reader.metadata, pa.Schema), f"metadata must be an Arrow schema, not {type(reader.metadata).__name__}"
    taken = set(reader.metadata.names) & (RESERVED | set(ITEM.names))
    assert not taken, f"metadata has columns that the vector table uses itself: {', '.join(sorted(taken))}"

    travelled: Reader = pickle.loads(pickle.dumps(reader))
    assert listing["id"].null_count in (0, listing.num_rows), "a listing is of items (all ids given) or of containers (no ids), not of both"
    if listing["id"].null_count == 0:
        assert len(set(listing["id"].to_pylist())) == listing.num_rows, "list() gives the same id twice"
        _check_files(travelled, listing)
    else:
        assert len(set(listing["unit"].to_pylist())) == listing.num_rows, "list() gives the same container twice"
        _check_containers(reader, travelled, listing)


def _check_files(reader: Reader, listing: pa.Table) -> None:
    work = listing.take(pa.array(range(listing.num_rows - 1, -1, -1)))
    items = _read(reader, work)
    assert items["id"].to_pylist() == work["id"].to_pylist(), "read must give one item for each row of its work, in order"
    good = [reason is None for reason in _reasons(items)]
    wrong = [row for row in range(len(good)) if good[row] and items["version"][row] != work["version"][row]]
    assert not wrong, f"item {items['id'][wrong[0]]} has another version than its row of the listing: it would be embedded on every run"


def _check_containers(reader: Reader, travelled: Reader, listing: pa.Table) -> None:
    slices = reader.split(listing)
    assert slices.schema.equals(SLICE), f"split() must give the types of schemas.items.SLICE, not {slices.schema}"
    assert slices.equals(reader.split(listing)), "a second split() of the same containers gives other slices"
    spans: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for part in slices.to_pylist():
        spans.setdefault((part["unit"], part["version"]), []).append((part["start"], part["stop"]))
    listed = set(zip(listing["unit"].to_pylist(), listing["version"].to_pylist(), strict=True))
    assert set(spans) == listed, "split() must give at least one slice for each container, with its listed version, and none for others"
    for (unit, _), parts in spans.items():
        ends = [0, *(stop for _, stop in sorted(parts))]
        assert [start for start, _ in sorted(parts)] == ends[:-1], f"the slices of {unit} overlap or leave a gap: {sorted(parts)}"

    seen: list[str] = []
    for index in range(slices.num_rows):
        part = slices.slice(index, 1)
        items = _read(travelled, part)
        wanted = part["stop"][0].as_py() - part["start"][0].as_py()
        where = f"{part['unit'][0]} rows {part['start'][0]} to {part['stop'][0]}"
        assert items.num_rows == wanted, f"{where}: read gives {items.num_rows} items and rejects for {wanted} rows"
        again = _read(reader, part)
        assert items.equals(again), f"{where}: a second read gives other rows"
        seen += [id for id, reason in zip(items["id"].to_pylist(), _reasons(items), strict=True) if reason is None]
    repeated = len(seen) - len(set(seen))
    assert not repeated, f"{repeated} of {len(seen)} items have the id of another one"


def _read(reader: Reader, work: pa.Table) -> pa.Table:
    """What `read` yields of some work, as one table with reject columns."""
    schema = item_schema(reader.metadata)
    tables = []
    for yielded in reader.read(work):
        assert isinstance(yielded, pa.Table), f"read must yield Arrow tables, not {type(yielded).__name__}"
        assert set(schema.names) <= set(yielded.column_names), f"read must yield ITEM and the metadata columns, not {yielded.column_names}"
        found = yielded.select(schema.names)
        assert found.schema.equals(schema), f"read must yield the types of ITEM and of the metadata columns, not {found.schema}"
        for name in ("id", "version", "uri"):
            assert not {None, ""} & set(found[name].to_pylist()), f"read yields a row without {name}"
        for name in ("reject_reason", "reject_detail"):
            given = name in yielded.column_names
            found = found.append_column(name, yielded[name] if given else pa.nulls(found.num_rows, pa.string()))
        unknown = set(_reasons(found)) - {None, *REASONS}
        assert not unknown, f"reject_reason is {unknown}; it must be a key of schemas.rejects.REASONS"
        tables.append(found)
    whole = pa.schema([*schema, ("reject_reason", pa.string()), ("reject_detail", pa.string())])
    return pa.concat_tables(tables).combine_chunks() if tables else whole.empty_table()


def _reasons(items: pa.Table) -> list[str | None]:
    reasons: list[str | None] = items["reject_reason"].to_pylist()
    return reasons


def check_loss(loss: Callable[..., "Tensor"], *, num_layers: int | None = None) -> None:
    """Hold a loss to its contract: a finite scalar, and the same gradient on 1, 2 and 4 ranks, also with different numbers of rows.

    It starts processes, so `loss` must pickle, and a script that calls this needs `if __name__ == "__main__":`. Compared in float64, so
    parameters of the loss must be float64 too (`loss.double()`). `num_layers`: of the tuples that a loss of layers takes.
    """
    from pipeline.training.check import check_same, on_ranks, sample

    batch = sample(num_layers)
    one = on_ranks(loss, batch, 1)
    assert any(grad.abs().max() > 0 for grad in one.vectors), "the loss has no gradient at any vector"
    for num_ranks in (2, 4):
        check_same(one, on_ranks(loss, batch, num_ranks), num_ranks)
