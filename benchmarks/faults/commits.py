"""Tessera's commits without its job, for the races in which two writers take turns: rows are staged, and a run's Committer brings them in."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.known import hash64
from pipeline.table.at import TableAt, create_dataset
from pipeline.table.commit import Committer
from pipeline.table.contents import read_contents
from pipeline.table.stage import Receipt, Staged, Staging, stage_rows
from schemas.vectors import vector_schema

SOURCE = "s"
DIM = 4
SCHEMA = vector_schema(DIM, fingerprint="races")


def make_table(folder: Path) -> TableAt:
    """An empty table of vectors in a folder of its own."""
    at = TableAt(uri=str(folder), name="tessera")
    create_dataset(at.path(), SCHEMA, {})
    return at


def writer(at: TableAt) -> Committer:
    """A run that has just read the table, and plans by what it holds now."""
    return Committer(at, Staging(at), read_contents(at, at.require(), source=SOURCE))


def staged(at: TableAt, ids: list[str], *, chunk: str) -> Receipt:
    """Rows of these ids as a worker stages them."""
    count = len(ids)
    vectors = np.eye(DIM, dtype=np.float32)[np.arange(count) % DIM]
    made = {"id": ids, "uri": ids, "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)}
    made |= {name: [text] * count for name, text in {"source": SOURCE, "_version": "1", "_chunk": chunk, "_run": chunk}.items()}
    columns = [pa.array(made[entry.name], entry.type) if entry.name in made else pa.nulls(count, entry.type) for entry in SCHEMA]
    rows = pa.table(columns, schema=SCHEMA)
    return Receipt(chunk=chunk, listed=count, new=Staged(stage_rows(rows, at, at.require()), hash64(rows["id"]), hash64(rows["_version"])))
