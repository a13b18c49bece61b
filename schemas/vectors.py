"""A table of vectors: its columns, and the schema metadata that ties it to exactly one encoder."""

import pyarrow as pa

from schemas import field

FINGERPRINT = b"tessera.fingerprint"
DIM = b"tessera.dim"
TABLE = b"tessera.table"
"""A name that each table is given when it is made: one that is dropped and made again has another. Tables of older releases have none."""

HEAD = [
    field("id", pa.string(), "unique in this table; the item's id", nullable=False),
    field("uri", pa.string(), "where the item was read", nullable=False),
    field("text", pa.string(), "the item's caption or text; null where it has none"),
]
TAIL = [
    field("thumbnail", pa.binary(), "a small JPEG of the image; null unless the job asks for thumbnails"),
    field("source", pa.string(), "name of the source the item came from: what vanished items are looked for in", nullable=False),
    field("_unit", pa.string(), "URI of the container the item was read from; null where the item is a file of its own"),
    field("_version", pa.string(), "the item's version when it was embedded", nullable=False),
    field("_chunk", pa.string(), "the chunk that wrote this row: proof of its commit", nullable=False),
    field("_run", pa.string(), "the run that wrote this row: see the runs ledger", nullable=False),
]
RESERVED = frozenset([f.name for f in [*HEAD, *TAIL]] + ["vector", "version", "image", "image_uri"])
"""Names that a source's metadata columns cannot have."""


def vector_schema(dim: int, *, fingerprint: str, metadata: pa.Schema | None = None, dtype: str = "float32") -> pa.Schema:
    """The schema of a vector table.

    `dim`: length of a vector. `metadata`: columns carried along from the source. `dtype`: float32 or float16.
    """
    kind = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    vector = field("vector", pa.list_(pa.field("item", kind, nullable=True), dim), f"the embedding, {dim} numbers, norm 1", nullable=False)
    fields = [*HEAD, vector, *(metadata or []), *TAIL]
    return pa.schema(fields, metadata={FINGERPRINT: fingerprint.encode(), DIM: str(dim).encode()})
