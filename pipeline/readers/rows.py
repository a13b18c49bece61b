"""Rows of containers to items: what the Parquet, JSON Lines, CSV and table readers share."""

import base64
import binascii
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.config import ConfigError, nearest
from pipeline.media import BadItem
from pipeline.readers.identity import content_versions, position_ids, settings_digest
from pipeline.readers.kinds import convert, declared, plain
from schemas.items import LISTING, item_schema


@dataclass(frozen=True)
class Columns:
    """Which columns of a source hold what."""

    id: str | None
    text: str | None
    image: str | None
    image_uri: str | None
    version: str | None
    metadata: Mapping[str, pa.DataType | None]
    """Names and types; a type None is taken from the source."""
    revision: str | None = None
    """A column that says, beside the content, whether a row is still the same."""

    def names(self) -> list[str]:
        """Every column that is read, once."""
        given = [self.id, self.text, self.image, self.image_uri, self.version, self.revision, *self.metadata]
        return list(dict.fromkeys(name for name in given if name is not None))

    def digest(self, *more: object) -> str:
        """Of all that makes items of a container's rows; `more`: a reader's other settings of that kind."""
        return settings_digest(self.id, self.text, self.image, self.image_uri, self.version, self.revision, dict(self.metadata), *more)

    def schema(self, found: Mapping[str, pa.DataType]) -> pa.Schema:
        """The metadata columns, their types taken from `found` where the job file gives none."""
        return pa.schema([pa.field(name, to or plain(found[name])) for name, to in self.metadata.items()])


def columns(
    *,
    id: str | None,
    text: str | None,
    image: str | None,
    image_uri: str | None,
    version: str | None,
    metadata: Sequence[str] | Mapping[str, str] | None,
) -> Columns:
    """The columns that a reader's arguments name. Raises ConfigError if there would be nothing to embed."""
    if not (text or image or image_uri):
        raise ConfigError("there is nothing to embed: name the column of the text, the image or the image_uri")
    return Columns(id, text, image, image_uri, version, declared(metadata))


def require(wanted: Columns, found: Iterable[str], unit: str) -> None:
    """Raise ConfigError naming the nearest existing column unless `found` has all that are wanted."""
    names = list(found)
    for name in wanted.names():
        if name not in names:
            raise ConfigError(f"{unit} has no column {name!r}{nearest(name, names)}; it has {', '.join(map(repr, names))}")


def listing(found: pa.Table, ids: pa.ChunkedArray | None = None) -> pa.Table:
    """A LISTING of what `storage.find` found: of containers, or of items if `ids` are given."""
    column = pa.nulls(found.num_rows, pa.string()) if ids is None else ids
    return pa.table([*found.columns, column], schema=LISTING)


def containers(found: pa.Table, settings: str) -> pa.Table:
    """A LISTING of containers. `settings`: a digest of what decides which items they give; other settings are another version of each."""
    return listing(found.set_column(1, "version", pc.binary_join_element_wise(found["version"], pa.scalar(settings), "|")))


Fault = str | BadItem
"""What is wrong with a row: a text is the detail of a `bad_row`."""


@dataclass
class Block:
    """Consecutive rows of a container as they were read, before they are items."""

    unit: str
    start: int
    values: Mapping[str, pa.Array | list[Any]]
    """Every column that the source has of those wanted, equally long."""
    faults: Sequence[Fault | None] = field(default_factory=list)
    """What was wrong with a row before its values were looked at; empty if nothing was."""
    labels: Sequence[str | None] | None = None
    """What a row is called within its container, if not by its number."""

    def __len__(self) -> int:
        return len(next(iter(self.values.values()))) if self.values else len(self.faults)


def items(block: Block, wanted: Columns, metadata: pa.Schema) -> pa.Table:
    """The items of a block, one a row, those that are wrong with `reject_reason` and `reject_detail`.

    An id is the id column's, else of the row's position; a version is the version column's and which columns are embedded, else a hash of
    the content.
    """
    draft = _Draft(block)
    text = draft.column(wanted.text, pa.string())
    image, path = draft.image(wanted.image)
    image_uri = draft.column(wanted.image_uri, pa.string()) if wanted.image_uri else path
    image_uri = resolve(image_uri, storage.parent(block.unit))
    carried = {entry.name: draft.column(entry.name, entry.type) for entry in metadata}
    content = {"text": text, "image": image, "image_uri": image_uri} | {f"metadata.{name}": v for name, v in carried.items()}
    if wanted.revision:
        content["revision"] = draft.column(wanted.revision, pa.string())
    versions = content_versions(content)
    if wanted.version:
        embedded = settings_digest(wanted.text, wanted.image, wanted.image_uri)
        versions = pc.coalesce(pc.binary_join_element_wise(draft.key(wanted.version), pa.scalar(embedded), "|"), versions)
    ids = draft.key(wanted.id) if wanted.id else pa.nulls(len(block), pa.string())
    if ids.null_count:
        ids = pc.coalesce(ids, position_ids(block.unit, block.start, block.start + len(block)))
    draft.reject_empty(text, image, image_uri)
    numbers = pa.array(np.arange(block.start, block.start + len(block))).cast(pa.string())
    labels = numbers if block.labels is None else pc.coalesce(pa.array(block.labels, pa.string()), numbers)
    uris = pc.binary_join_element_wise(pa.scalar(block.unit), labels, "#")
    table = pa.table([ids, versions, uris, text, image, image_uri, *carried.values()], schema=item_schema(metadata))
    return draft.with_rejects(table)


def resolve(uris: pa.Array, folder: str) -> pa.Array:
    """Image URIs, those that are relative taken from `folder`; white space around them is no part of them."""
    uris = pc.utf8_trim_whitespace(uris)
    uris = pc.if_else(pc.equal(uris, ""), pa.scalar(None, pa.string()), uris)
    absolute = pc.or_(pc.starts_with(uris, "/"), pc.match_substring(uris, "://"))
    joined = pc.if_else(absolute, uris, pc.binary_join_element_wise(pa.scalar(folder), uris, "/"))
    dotted = pc.and_(pc.invert(absolute), pc.match_substring(uris, "./"))
    if pc.any(dotted).as_py():
        return pa.array([_normal(uri) if dots else uri for uri, dots in zip(joined.to_pylist(), dotted.to_pylist(), strict=True)], pa.string())
    return joined


def _normal(uri: str) -> str:
    scheme, separator, path = uri.rpartition("://")
    return scheme + separator + posixpath.normpath(path)


class _Draft:
    """A block while it becomes items: hands out columns of the right type, and keeps the first fault of each row."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.reasons: list[str | None] = [None] * len(block)
        self.details: list[str | None] = [None] * len(block)
        for row, fault in enumerate(block.faults):
            if fault is not None:
                self.fault(row, *((fault,) if isinstance(fault, str) else (fault.detail, fault.reason)))

    def fault(self, row: int, detail: str, reason: str = "bad_row") -> None:
        if self.reasons[row] is None:
            self.reasons[row], self.details[row] = reason, detail

    def values(self, name: str) -> pa.Array | list[Any]:
        if name not in self.block.values:
            for row in range(len(self.block)):
                self.fault(row, f"there is no column {name!r}")
            return pa.nulls(len(self.block), pa.string())
        return self.block.values[name]

    def column(self, name: str | None, to: pa.DataType) -> pa.Array:
        """The column as type `to`; null where it is not, which is a fault."""
        if name is None:
            return pa.nulls(len(self.block), to)
        values = self.values(name)
        if not isinstance(values, list):
            values = values.cast(plain(values.type)) if plain(values.type) != values.type else values
        converted, bad = _to_text(values) if pa.types.is_string(to) and not isinstance(values, list) else convert(values, to)
        for row in np.flatnonzero(bad):
            self.fault(int(row), f"{name!r} is not {to}: {_short(values[int(row)])}")
        return converted

    def key(self, name: str) -> pa.Array:
        """An id or version: text or a whole number; null or empty is a fault."""
        values = self.values(name)
        if isinstance(values, list):
            given = [str(v) if isinstance(v, int) and not isinstance(v, bool) else v if isinstance(v, str) else None for v in values]
            values, _ = convert(given, pa.string())  # JSON can hold halves of characters, which are null then
        elif pa.types.is_integer(plain(values.type)) or pa.types.is_temporal(plain(values.type)):
            values = values.cast(pa.string())
        else:
            values = _to_text(values.cast(plain(values.type)))[0]
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
        for row in np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False)):
            self.fault(int(row), f"{name!r} is null, empty, or neither UTF-8 text nor a whole number")
        return values

    def image(self, name: str | None) -> tuple[pa.Array, pa.Array]:
        """Encoded images, and the paths beside them if the column is Hugging Face's struct of bytes and path."""
        none = pa.nulls(len(self.block), pa.string())
        values = pa.nulls(len(self.block), pa.binary()) if name is None else self.values(name)
        if not isinstance(values, list) and pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
            data, path = (_member(values, part, none) for part in ("bytes", "path"))
            data = data.cast(pa.binary())
            return data, pc.if_else(data.is_null(), path.cast(pa.string()), pa.scalar(None, pa.string()))
        if isinstance(values, list) or pa.types.is_string(plain(values.type)):
            return self._base64(name, values if isinstance(values, list) else values.to_pylist()), none
        return self.column(name, pa.binary()), none

    def _base64(self, name: str | None, values: list[Any]) -> pa.Array:
        images: list[bytes | None] = []
        for row, value in enumerate(values):
            try:
                images.append(base64.b64decode(value.rpartition(",")[2], validate=True) if value else None)
            except (AttributeError, ValueError, binascii.Error):
                self.fault(row, f"{name!r} is neither bytes nor base64: {_short(value)}")
                images.append(None)
        return pa.array(images, pa.binary())

    def reject_empty(self, text: pa.Array, image: pa.Array, image_uri: pa.Array) -> None:
        pictured = pc.or_(image.is_valid(), image_uri.is_valid())
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(text), ""), True)
        for row in np.flatnonzero(pc.and_(blank, pc.invert(pictured)).to_numpy(zero_copy_only=False)):
            if text[int(row)].is_valid:
                self.fault(int(row), "a text of only white space", "empty")
            else:
                self.fault(int(row), "neither text nor image")

    def with_rejects(self, table: pa.Table) -> pa.Table:
        if not any(self.reasons):
            return table
        table = table.append_column("reject_reason", pa.array(self.reasons, pa.string()))
        return table.append_column("reject_detail", pa.array(self.details, pa.string()))


def _to_text(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Arrow would make text of any number; a column of numbers where text is wanted is the wrong column."""
    if pa.types.is_string(values.type) or pa.types.is_null(values.type):
        return values.cast(pa.string()), np.zeros(len(values), bool)
    return pa.nulls(len(values), pa.string()), values.is_valid().to_numpy(zero_copy_only=False)


def _member(values: pa.Array, name: str, none: pa.Array) -> pa.Array:
    return pc.struct_field(values, name) if values.type.get_field_index(name) >= 0 else none


def _short(value: Any) -> str:
    shown = repr(value.as_py() if isinstance(value, pa.Scalar) else value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
