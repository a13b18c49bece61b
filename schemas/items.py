"""What is embedded: the units that a source lists (LISTING), the slices that are read (SLICE), the items themselves (ITEM)."""

import pyarrow as pa

from schemas import field

LISTING = pa.schema(
    [
        field("unit", pa.string(), "URI of a file: one item (an image) or a container of items (a Parquet file)", nullable=False),
        field("version", pa.string(), "changes when the file changes: etag, or size and modification time", nullable=False),
        field("bytes", pa.int64(), "size of the file in bytes; null where the store does not say"),
        field("id", pa.string(), "the item's id where the file is one item; null where it is a container"),
    ],
    metadata={"tessera.schema": "listing"},
)
"""What `Reader.list` returns, one row a unit. All rows of one listing are items, or all are containers."""

SLICE = pa.schema(
    [
        field("unit", pa.string(), "URI of the container", nullable=False),
        field("version", pa.string(), "the container's version when it was listed", nullable=False),
        field("start", pa.int64(), "first row of the slice, counted from 0", nullable=False),
        field("stop", pa.int64(), "row after the last one of the slice", nullable=False),
        field("bytes", pa.int64(), "estimated bytes to read; null if unknown"),
    ],
    metadata={"tessera.schema": "slice"},
)
"""Part of a container that is read and committed as one chunk: what `Reader.split` returns."""

ITEM = pa.schema(
    [
        field("id", pa.string(), "unique in its table, and the same on the next run", nullable=False),
        field("version", pa.string(), "changes when the item changes: the file's version, or a hash of the row", nullable=False),
        field("uri", pa.string(), "where the item is, for people and for lineage", nullable=False),
        field("text", pa.string(), "caption or document; null where there is none"),
        field("image", pa.binary(), "the encoded image (JPEG, PNG, ...); null where it is at image_uri, or there is none"),
        field("image_uri", pa.string(), "where to fetch the encoded image if `image` is null; null where there is none"),
    ],
    metadata={"tessera.schema": "item"},
)
"""What `Reader.read` yields. Further columns are metadata: they are carried along into the vector table."""

PIXELS = pa.struct([("height", pa.int32()), ("width", pa.int32()), ("rgb", pa.binary())])
"""A decoded image: `rgb` holds height x width x 3 bytes (uint8, row-major, RGB). Null where an item has no image."""


def item_schema(metadata: pa.Schema) -> pa.Schema:
    """ITEM with the metadata columns of one source after it."""
    return pa.schema([*ITEM, *metadata], metadata=ITEM.metadata)


def encoder_schema() -> pa.Schema:
    """What an `Encoder` is given: ITEM's `id` and `text`, and the decoded image as PIXELS in `image`."""
    return pa.schema([ITEM.field("id"), ITEM.field("text"), pa.field("image", PIXELS)])
