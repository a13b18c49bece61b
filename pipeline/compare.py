"""A table against its source: what is missing, changed or gone, and whether a sample embedded again gives the same vectors."""

import json
import tempfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ConfigError, Model, Ref
from pipeline.journal import Journal, Watchdog
from pipeline.media import Limits
from pipeline.prepare import Prepared, Sync, VectorTable, prepare
from pipeline.readers import Reader
from pipeline.table.at import TableAt, fingerprint_of, model_of
from pipeline.table.contents import id_predicate
from pipeline.table.findings import Finding, found
from pipeline.table.scan import FLOAT16_ROUNDING
from pipeline.table.stage import Staging
from pipeline.vectorise import Vectoriser
from schemas.items import ITEM

SAMPLED_CONTAINERS = 4
TOLERANCE = 1e-4
"""Of an encoder that states none, as in its protocol."""


class Comparison(Model):
    """What the source lists, and what the table holds of it. Counts of items."""

    listed: int
    unchanged: int
    missing: int
    """Not in the table; of containers, what they are said to hold."""
    changed: int
    rejected: int
    """Rejected by an earlier run in the same version."""
    vanished: int | None
    """Rows whose item is no longer listed; null for containers, where only reading tells."""
    unread_containers: int
    """Containers that have rows in the table, and that only reading can compare with them."""
    sampled: int = 0
    """Items that were embedded again."""
    worst_cosine: float | None = None
    """Of the table's vector and the new one, over the sample."""


def encoder_of(at: TableAt) -> Ref:
    """The encoder that the table `models` names for a table. Raises ConfigError if it does not know it."""
    model = model_of(at, fingerprint_of(at.require()))
    if model is None:
        raise ConfigError(f"{at.models_path} does not know the encoder of this table; give `encoder` as in the embed job")
    return Ref(target=model["target"], args=json.loads(model["args"]))


def compare(at: TableAt, source: Ref, encoder: Ref, *, sample: int) -> tuple[Comparison, list[Finding]]:
    """List the source, subtract what the table holds, and embed `sample` items again.

    Raises ConfigError for whatever the job file can fix. Memory and time: those of `embed --plan`, and the encoder.
    """
    half = at.require().schema.field("vector").type.value_type == pa.float16()
    table = VectorTable(**at.model_dump(), dtype="float16" if half else "float32")
    prepared = prepare(source, encoder, table, sync=Sync(), chunk_rows=None)
    counts, findings = _against_listing(prepared)
    if not sample:
        return counts, findings
    cosines, lost = _embed_again(prepared, sample)
    least = 1 - getattr(prepared.encoder, "tolerance", TOLERANCE) - (FLOAT16_ROUNDING if half else 0.0)
    other = {item: cosine for item, cosine in cosines.items() if not cosine >= least}
    worst = min(cosines.values(), default=None)
    counts = counts.model_copy(update={"sampled": len(cosines), "worst_cosine": worst})
    shown = [f"{item}: {cosine:.6f}" for item, cosine in other.items()]
    return counts, [*findings, *found("other_vectors", len(other), shown), *found("not_made_again", len(lost), lost)]


def _against_listing(prepared: Prepared) -> tuple[Comparison, list[Finding]]:
    planned, units = prepared.plan, prepared.contents.units
    unread = [unit for unit in planned.units if unit in units]
    work = [chunk.work for chunk in planned.chunks]
    if planned.units:
        missing = [f"{w['unit'][0]} rows {w['start'][0]} to {w['stop'][0]}" for w in work if w["unit"][0].as_py() not in units]
        num_missing = sum(chunk.items for chunk in planned.chunks if chunk.work["unit"][0].as_py() not in units)
        changed: list[str] = []
    else:
        listed = pa.concat_tables(work) if work else None
        missing = listed.filter(pc.invert(listed["changed"]))["id"].to_pylist() if listed else []
        changed = listed.filter(listed["changed"])["id"].to_pylist() if listed else []
        num_missing = len(missing)
    vanished = None if planned.vanished_ids is None else len(planned.vanished_ids)
    counts = Comparison(
        listed=planned.listed,
        unchanged=planned.unchanged,
        missing=num_missing,
        changed=len(changed),
        rejected=planned.rejected,
        vanished=vanished,
        unread_containers=len(unread),
    )
    findings = [
        *found("missing_items", num_missing, missing),
        *found("changed_items", len(changed), changed),
        *found("vanished_items", vanished or 0),
        *found("unread_containers", len(unread), unread),
    ]
    return counts, findings


def _embed_again(prepared: Prepared, sample: int) -> tuple[dict[str, float], list[str]]:
    """Cosines of the table's vectors and new ones, by id, and ids that gave no vector. Items whose version is another are passed over."""
    items = pa.concat_tables([ITEM.empty_table(), *_sampled(prepared.reader, prepared.plan.listing, sample)]).slice(0, sample).combine_chunks()
    if items.num_rows == 0:
        return {}, []
    rows = prepared.table.require().to_table(columns=["id", "_version", "vector"], filter=id_predicate(items["id"].to_pylist()))
    held = {(row["id"], row["_version"]): row["vector"] for row in rows.to_pylist()}
    keys = list(zip(items["id"].to_pylist(), items["version"].to_pylist(), strict=True))
    items = items.filter(pa.array([key in held for key in keys]))
    if hasattr(prepared.encoder, "load"):
        prepared.encoder.load()
    vectorise = Vectoriser(prepared.encoder, Limits(), None, getattr(prepared.reader, "storage_options", None) or {})
    with tempfile.TemporaryDirectory() as folder:  # the journal's place: nothing is written beside the table
        outcome = vectorise(items, Journal(Staging(TableAt(uri=folder, name="sample")), "sample", Watchdog()))
    cosines, lost = {}, []
    for key, vector, problem in zip([key for key in keys if key in held], outcome.vectors, outcome.problems, strict=True):
        if problem is None:
            cosines[key[0]] = _cosine(vector, np.array(held[key], np.float64))
        else:
            lost.append(f"{key[0]}: {problem.reason}")
    return cosines, lost


def _sampled(reader: Reader, listing: pa.Table, sample: int) -> Iterator[pa.Table]:
    """Items from all over the source, ITEM's columns."""
    if listing["id"].null_count == 0:
        works, each = [_evenly(listing, sample)], sample
    else:
        slices = reader.split(_evenly(listing, min(sample, SAMPLED_CONTAINERS)))
        chosen = _evenly(slices, min(sample, SAMPLED_CONTAINERS))
        works, each = [chosen.slice(index, 1) for index in range(chosen.num_rows)], -(-sample // chosen.num_rows)
    for work in works:
        read = [table.select(ITEM.names).cast(ITEM) for table in reader.read(work)]
        yield _evenly(pa.concat_tables([ITEM.empty_table(), *read]), each)


def _evenly(rows: pa.Table, count: int) -> pa.Table:
    """`count` rows of a table at equal distances, or all if there are fewer."""
    if rows.num_rows == 0:
        return rows
    return rows.take(pa.array(np.unique(np.linspace(0, rows.num_rows - 1, min(count, rows.num_rows)).astype(np.int64))))


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    first = first.astype(np.float64)
    return float(first @ second / max(1e-300, np.linalg.norm(first) * np.linalg.norm(second)))
