"""A run that has been planned and has written nothing yet: reader and encoder are built, the table is looked at, what it holds is subtracted."""

import logging
import math
import uuid
from dataclasses import dataclass
from typing import Any, Literal

import lance
import pyarrow as pa
import pyarrow.compute as pc
import pydantic

from pipeline.config import ConfigError, Model, Ref, nearest
from pipeline.encoders import Encoder
from pipeline.known import Contents
from pipeline.plan import Note, Plan, plan
from pipeline.readers import Reader
from pipeline.table.at import TableAt, dim_of, fingerprint_of
from pipeline.table.contents import ids_in, read_contents, read_notes
from schemas.vectors import vector_schema

log = logging.getLogger(__name__)


class VectorTable(TableAt):
    """The table to fill."""

    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored vectors, fixed when the table is made. float16 halves the bytes."""
    thumbnail_px: pydantic.PositiveInt | None = None
    """Longer side of a JPEG thumbnail kept with each image; none: no thumbnails."""


class Sync(Model):
    """What happens beside new items."""

    vanished: Literal["report", "delete"] = "report"
    """Rows whose item the source lists no more: count them, or delete them in one commit."""
    max_vanished: float = pydantic.Field(default=0.5, ge=0, le=1)
    """Deleting more than this share of the source's rows is refused: more likely the source is incomplete."""
    retry_rejects: bool = False
    """Try items again that an earlier run rejected in the same version."""
    commit_every_s: pydantic.NonNegativeFloat = 30
    """Longest time that staged chunks wait for their commit, in seconds."""

    def allows(self, gone: int, *, rows: int) -> bool:
        """Whether so many of a source's rows may go."""
        return gone <= math.floor(self.max_vanished * rows)


@dataclass
class Prepared:
    """A run that has been planned and has written nothing yet."""

    run: str
    reader: Reader
    encoder: Encoder
    table: VectorTable
    contents: Contents
    plan: Plan
    schema: pa.Schema


def encoder_for(encoder_ref: Ref, table: VectorTable) -> Encoder:
    """Build the encoder. Raises ConfigError if the table holds another one's vectors."""
    encoder: Encoder = encoder_ref.build("dim", "fingerprint", "encode")
    dataset = table.open()
    if dataset is not None:
        refuse_foreign(dataset, encoder, table)
    return encoder


def prepare(source: Ref, encoder_ref: Ref, table: VectorTable, *, sync: Sync, chunk_rows: int | None) -> Prepared:
    """Build reader and encoder, look at the table, list the source and subtract. Raises ConfigError for whatever the job file can fix."""
    encoder = encoder_for(encoder_ref, table)
    return prepare_of(source.build("source", "metadata", "list", "read"), encoder, table, sync=sync, chunk_rows=chunk_rows)


def prepare_of(reader: Reader, encoder: Encoder, table: VectorTable, *, sync: Sync, chunk_rows: int | None) -> Prepared:
    """As `prepare`, with a reader and an encoder that are built."""
    dataset = table.open()
    contents = read_contents(table, dataset, source=reader.source)
    notes: dict[str, Note] = read_notes(table, source=reader.source) if dataset is not None else {}
    planned = plan(reader, contents, fingerprint=encoder.fingerprint, notes=notes, chunk_rows=chunk_rows, retry_rejects=sync.retry_rejects)
    if dataset is not None and planned.chunks and planned.complete_units:
        contents.settled = ids_in(dataset, planned.complete_units, source=reader.source)
    schema = vector_schema(encoder.dim, fingerprint=encoder.fingerprint, metadata=reader.metadata, dtype=table.dtype)
    if dataset is not None:
        _refuse_other_columns(dataset, schema, table)
    log.info("planned: %d listed, %d unchanged, %d rejected before, %d to do", planned.listed, planned.unchanged, planned.rejected, to_do(planned))
    return Prepared(uuid.uuid4().hex[:16], reader, encoder, table, contents, planned, schema)


def to_do(planned: Plan) -> int:
    """Items that a plan gives to the workers."""
    return sum(chunk.items for chunk in planned.chunks)


def refuse_foreign(dataset: lance.LanceDataset, encoder: Encoder, table: TableAt) -> None:
    """Raise ConfigError unless the table holds this encoder's vectors."""
    theirs = fingerprint_of(dataset)
    if theirs != encoder.fingerprint:
        raise ConfigError(
            f"table {table.name!r} holds {dim_of(dataset)}-d vectors of the encoder {theirs}, but this job makes {encoder.dim}-d vectors of "
            f"{encoder.fingerprint}; a table is of one encoder: choose another table.name, or run with the encoder it was made with"
        )


def _refuse_other_columns(dataset: lance.LanceDataset, schema: pa.Schema, table: VectorTable) -> None:
    for entry in schema:
        if entry.name not in dataset.schema.names:
            near = nearest(entry.name, dataset.schema.names)
            raise ConfigError(
                f"table {table.name!r} has no column {entry.name!r}{near}; leave it out of the source's metadata, or fill another table"
            )
        have = dataset.schema.field(entry.name).type
        if have != entry.type:
            setting = "table.dtype" if entry.name == "vector" else "the source's metadata"
            raise ConfigError(f"column {entry.name!r} of table {table.name!r} is {have}, this job would write {entry.type}; correct {setting}")


def nothing_to_do(prepared: Prepared, sync: Sync) -> bool:
    """Whether the table is already what it should be: then Ray is not started and no version is added."""
    vanished = prepared.plan.vanished_ids
    deletes = sync.vanished == "delete" and (vanished is None or len(vanished) > 0)
    return not prepared.plan.chunks and not deletes and prepared.contents.version > 0


def summary(prepared: Prepared) -> dict[str, Any]:
    """What `--plan` prints."""
    planned = prepared.plan
    return {
        "job": "embed",
        "table": prepared.table.path(),
        "table_exists": prepared.contents.version > 0,
        "fingerprint": prepared.encoder.fingerprint,
        "dim": prepared.encoder.dim,
        "listed": planned.listed,
        "unchanged": planned.unchanged,
        "rejected_before": planned.rejected,
        "changed": planned.changed,
        "to_do": to_do(planned),
        "chunks": len(planned.chunks),
        "vanished": None if planned.vanished_ids is None else len(planned.vanished_ids),
        "vector_bytes": to_do(planned) * prepared.encoder.dim * (2 if prepared.table.dtype == "float16" else 4),
        "by_suffix": {entry["values"]: entry["counts"] for entry in pc.value_counts(_suffixes(planned)).to_pylist()},
    }


def _suffixes(planned: Plan) -> pa.ChunkedArray:
    """What each unit's name ends in, after its last dot."""
    units = planned.listing["unit"] if planned.listing else pa.chunked_array([], pa.string())
    return pc.utf8_lower(pc.replace_substring_regex(units, r"(?s)^.*\.", ""))
