"""Vector tables made directly, without the embed job: what the tests of index and search read."""

import datetime
import json

import lance
import numpy as np
import pyarrow as pa

from pipeline.config import Ref
from pipeline.table.at import TableAt
from schemas.runs import MODEL
from schemas.vectors import vector_schema

LABELS = ("cat", "dog", "owl")


def unit(vectors):
    vectors = np.asarray(vectors, np.float64)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clustered(num_rows, *, dim=64, num_clusters=40, seed=0):
    """Unit vectors around centres that are the same for every seed, with a decaying spectrum, as embeddings have."""
    spectrum = 1 / np.sqrt(np.arange(1, dim + 1))
    centres = np.random.default_rng(99).normal(size=(num_clusters, dim))
    rng = np.random.default_rng(seed)
    spread = 0.6 * rng.normal(size=(num_rows, dim))
    return unit((centres[rng.integers(0, num_clusters, num_rows)] + spread) * spectrum)


def rows_of(vectors, *, fingerprint="f" * 32, start=0, dtype="float32", texts=None, thumbnails=None):
    """Rows of a vector table: ids item-0.., and two metadata columns, `label` (three values) and `year` (the row's number)."""
    metadata = pa.schema([pa.field("label", pa.string()), pa.field("year", pa.int64())])
    schema = vector_schema(vectors.shape[1], fingerprint=fingerprint, metadata=metadata, dtype=dtype)
    numbers = range(start, start + len(vectors))
    flat = pa.array(vectors.astype(dtype).reshape(-1))
    columns = {
        "id": [f"item-{n}" for n in numbers],
        "uri": [f"/photos/{n}.jpg" for n in numbers],
        "text": texts or [f"photo number {n} of a {LABELS[n % 3]}" for n in numbers],
        "vector": pa.FixedSizeListArray.from_arrays(flat, type=schema.field("vector").type),
        "label": [LABELS[n % 3] for n in numbers],
        "year": list(numbers),
        "thumbnail": thumbnails or [None] * len(vectors),
        "source": ["photos"] * len(vectors),
        "_unit": [None] * len(vectors),
        "_version": ["1"] * len(vectors),
        "_chunk": [f"chunk-{start}"] * len(vectors),
        "_run": ["run-1"] * len(vectors),
    }
    return pa.Table.from_arrays([c if isinstance(c, pa.Array) else pa.array(c, schema.field(n).type) for n, c in columns.items()], schema=schema)


def write(folder, rows, *, name="photos"):
    """A table with these rows, or these rows more; where it is."""
    at = TableAt(uri=str(folder), name=name)
    exists = at.open() is not None
    lance.write_dataset(rows, at.path(), mode="append" if exists else "create", data_storage_version="2.2")
    return at


def write_model(at, ref, *, fingerprint=None):
    """The MODEL row of the encoder that `ref` builds."""
    encoder = Ref.build(ref)
    row = {
        "fingerprint": fingerprint or encoder.fingerprint,
        "dim": encoder.dim,
        "target": ref.target,
        "args": json.dumps(ref.args),
        "lineage": json.dumps(encoder.lineage),
        "created_at": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "run": "run-1",
    }
    lance.write_dataset(pa.Table.from_pylist([row], schema=MODEL), at.models_path, mode="create", data_storage_version="2.2")
