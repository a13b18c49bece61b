"""Items that were not embedded, and why. One row an item: a reject is not an error of the run, and never silent."""

import pyarrow as pa

from schemas import field

REASONS = {
    "missing": "the file or object is not there, may not be read, or its host gave no answer",
    "empty": "zero bytes, or a text of only white space",
    "too_many_bytes": "larger than limits.max_item_bytes",
    "too_many_pixels": "larger than limits.max_pixels when decoded (a decompression bomb)",
    "not_an_image": "the bytes are in no image format that can be read",
    "corrupt_image": "an image, but truncated or damaged",
    "bad_row": "a row of a container that could not be parsed, or lacks a required column",
    "unreadable": "a container, or the rest of it, that cannot be read: its old rows stay, and every run tries it again",
    "duplicate_id": "another item of this table has the same id",
    "encode_failed": "the encoder raised an error on this item alone",
    "not_finite": "the encoder returned NaN, infinity or a zero vector",
    "corrupt_tile": "a tile of a slide whose stored pixels are damaged",
    "worker_died": "the worker process died, or hung past limits.item_timeout_s, on this item",
}
"""Every reason a reject row can have."""

PASSING = frozenset({"missing", "unreadable"})
"""Reasons that may pass while the item's version stays: such an item is tried again on every run."""

REJECT = pa.schema(
    [
        field("id", pa.string(), "the item's id", nullable=False),
        field("uri", pa.string(), "where the item was read", nullable=False),
        field("source", pa.string(), "name of the source the item came from", nullable=False),
        field("_unit", pa.string(), "URI of the container; null where the item is a file of its own"),
        field("_version", pa.string(), "the item's version when it was rejected: a new version is tried again", nullable=False),
        field("stage", pa.string(), "read, decode, encode or commit", nullable=False),
        field("reason", pa.string(), "one of schemas.rejects.REASONS", nullable=False),
        field("detail", pa.string(), "what exactly was wrong, for a person"),
        field("_chunk", pa.string(), "the chunk in which it was rejected", nullable=False),
        field("_run", pa.string(), "the run that rejected it", nullable=False),
    ],
    metadata={"tessera.schema": "reject"},
)
