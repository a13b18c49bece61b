"""Holds a pair reader, yours or a built-in one, to the protocol: raises AssertionError saying what is wrong."""

import pickle

import pyarrow as pa

from pipeline.pairs import PairReader
from pipeline.pairs.rows import REJECTED
from schemas.items import LISTING, SLICE
from schemas.pairs import REASONS


def check_pair_reader(reader: PairReader) -> pa.Table:
    """Every row that it yields, if it keeps the contract. It lists twice and reads twice, so give it a small source."""
    units = reader.list()
    assert units.schema.equals(LISTING), f"list() must give schemas.items.LISTING, not {units.schema}"
    assert units.num_rows, "list() is empty: it must raise ConfigError, saying what it looked for"
    assert units.equals(reader.list()), "a second list() gives another listing, though nothing changed"
    assert reader.uses() and all(isinstance(name, str) for name in reader.uses()), f"uses() must name the source's columns, not {reader.uses()!r}"
    slices = reader.split(units)
    assert slices.schema.equals(SLICE), f"split() must give schemas.items.SLICE, not {slices.schema}"
    assert slices.equals(reader.split(units)), "a second split() of the same containers gives other slices"
    travelled: PairReader = pickle.loads(pickle.dumps(reader))
    tables = [table for row in range(slices.num_rows) for table in travelled.read(slices.slice(row, 1))]
    for table in tables:
        assert table.schema.equals(REJECTED), f"read() must give PAIR with reject_reason and reject_detail, not {table.schema}"
    found = pa.concat_tables(tables) if tables else REJECTED.empty_table()
    _check_rows(found.to_pylist())
    together = [*reader.read(slices)]
    assert (pa.concat_tables(together) if together else REJECTED.empty_table()).equals(found), "all slices at once give other rows than one by one"
    return found


def _check_rows(rows: list[dict[str, object]]) -> None:
    ids = {row["row_id"] for row in rows}
    assert len(ids) == len(rows), f"{len(rows) - len(ids)} of {len(rows)} rows have the row_id of another one"
    for row in rows:
        where = f"{row['uri']}: "
        assert row["row_id"] and row["uri"], f"{where}row_id and uri must be given"
        assert row["reject_reason"] in (None, *REASONS), f"{where}reject_reason {row['reject_reason']!r} is no key of schemas.pairs.REASONS"
        if row["reject_reason"] is None:
            assert row["positives"], f"{where}a row has at least one positive, or is rejected as no_positive"
