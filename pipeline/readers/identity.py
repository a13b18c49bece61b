"""Stable ids and versions: hashes of where a row is, and of what is in it. 32 hex digits of BLAKE2b-128.

The same on every machine, in every release: a change here re-embeds everybody's tables.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def digests(values: pa.Array, salt: bytes = b"") -> pa.Array:
    """The hash of each string or binary value under a salt of at most 16 bytes; a null counts as empty."""
    values = values.cast(pa.binary())
    _, offset_buffer, data = values.buffers()
    if len(values) == 0:
        return pa.array([], pa.string())
    offsets = np.frombuffer(offset_buffer, np.int32)[values.offset : values.offset + len(values) + 1].tolist()
    view = memoryview(data) if data is not None else memoryview(b"")
    blake2b = hashlib.blake2b
    parts = [blake2b(view[start:stop], digest_size=16, person=salt).digest() for start, stop in itertools.pairwise(offsets)]
    # One hex of all of them: 32 characters each, so the offsets are known.
    text = b"".join(parts).hex().encode()
    return pa.Array.from_buffers(
        pa.string(), len(parts), [None, pa.py_buffer(np.arange(0, 32 * len(parts) + 1, 32, dtype=np.int32)), pa.py_buffer(text)]
    )


def _salt(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def position_ids(unit: str, start: int, stop: int) -> pa.Array:
    """Ids of rows that have none of their own: of the container's URI and the row's number. They move when rows move."""
    return digests(pa.array(np.arange(start, stop)).cast(pa.string()), _salt(unit))


def salted(keys: Sequence[str | None], unit: str) -> list[str]:
    """Ids of rows that have a key unique in their container."""
    ids: list[str] = digests(pa.array(keys, pa.string()), _salt(unit)).to_pylist()
    return ids


def settings_digest(*settings: object) -> str:
    """16 hex digits of what decides which items a container gives: part of its version, so that another choice is another version."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def content_versions(columns: Mapping[str, pa.Array]) -> pa.Array:
    """A hash of each row's values: names, types and nulls count, the columns' order does not."""
    names = sorted(columns)
    salt = _salt(json.dumps([[name, str(columns[name].type)] for name in names]))
    return digests(pc.binary_join_element_wise(*(_framed(columns[name]) for name in names), pa.scalar(b"", pa.binary())), salt)


def _framed(column: pa.Array) -> pa.Array:
    """Each value as bytes after their length, so that neighbours cannot run together; `-` for null."""
    if pa.types.is_binary(column.type):
        # The digest of an image, not its bytes: joined, a slice of them would not fit into one array.
        encoded = digests(column)
        encoded = pc.if_else(column.is_valid(), encoded, pa.scalar(None, pa.string()))
    elif pa.types.is_string(column.type):
        encoded = column
    elif pa.types.is_primitive(column.type) and not pa.types.is_temporal(column.type):
        encoded = column.cast(pa.string())
    else:
        encoded = pa.array([None if value is None else json.dumps(value, default=str) for value in column.to_pylist()], pa.string())
    lengths = pc.binary_length(encoded).cast(pa.string())
    framed = pc.binary_join_element_wise(lengths, encoded, ":")
    return pc.fill_null(framed, "-").cast(pa.binary())
