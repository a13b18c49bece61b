"""One run of the embed job: plan, adopt, embed, commit, and prove. `jobs/embed.py` is its command.

Whatever interrupts it, the table holds whole commits only, and the next run goes on from what is committed and staged.
"""

import contextlib
import functools
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic

from pipeline.adopt import adopt
from pipeline.compute import Compute, Sizes
from pipeline.config import ConfigError, JobFailed, Model, Ref, nearest
from pipeline.encoders import Encoder
from pipeline.known import WHOLE, Contents, added_up, hash64, member
from pipeline.media import Limits
from pipeline.plan import Note, Plan, listing_version, noted_version, plan
from pipeline.progress import Meter
from pipeline.readers import Reader
from pipeline.report import EmbedReport, cause_of, explains_itself, too_many_rejects
from pipeline.table.at import TableAt, create_dataset, dim_of, fingerprint_of
from pipeline.table.commit import Committed, Committer
from pipeline.table.contents import double_sums, id_sums, ids_in, quoted, read_batches, read_contents, read_notes, unit_states
from pipeline.table.ledger import record_model, record_notes
from pipeline.table.rejects import forget_duplicates, forget_rejects, rejects_of
from pipeline.table.stage import Receipt, Staging, Unproved
from pipeline.table.swap import self_test
from pipeline.work import Task
from schemas.vectors import TABLE, vector_schema

log = logging.getLogger(__name__)

MAX_FAILED_CHUNKS = 5
"""Then the run stops: the fault is not in the items."""


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


class Gate(Protocol):
    """Decides when receipts of containers are committed, and how."""

    def admit(self, receipt: Receipt) -> list[Receipt]:
        """The receipts that may be committed now that this one has come."""

    def commit(self, committer: Committer, receipts: list[Receipt]) -> None:
        """Commit what was admitted."""


@dataclass
class Filling:
    """A planned run being carried out."""

    prepared: Prepared
    encoder_ref: Ref
    limits: Limits
    sync: Sync
    report: EmbedReport
    gate: Gate | None = None
    """None: every receipt is committed as it comes."""
    excused: frozenset[str] = frozenset()
    """Reasons of rejects that do not end a run early: they are the data's fault, and everything is to be tried."""
    problem: str | None = field(default=None, init=False)
    """Why the run is not complete."""
    opened: bool = field(default=False, init=False)
    """Whether the table is there and may have been written to."""

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Whatever goes wrong becomes `problem`, so that the report comes out. Only a ConfigError before the table is open passes."""
        try:
            yield
        except Exception as error:
            if isinstance(error, ConfigError) and not self.opened:
                raise
            if not explains_itself(error):
                log.exception("the run ends early")
            self.problem = cause_of(error)

    def open(self) -> None:
        """Make the table if need be, prove the engine, write down the model."""
        p = self.prepared
        self_test(p.table)
        named = p.schema.with_metadata({**p.schema.metadata, TABLE: uuid.uuid4().hex.encode()})
        dataset = create_dataset(p.table.path(), named, p.table.storage_options)
        refuse_foreign(dataset, p.encoder, p.table)  # another job may have made the table since the plan
        record_model(p.table, p.encoder, self.encoder_ref, run=p.run)
        self.staging = Staging(p.table)
        self.committer = Committer(p.table, self.staging, p.contents)
        self._waiting: list[Receipt] = []
        self.changed_units: dict[str, str] = {}
        """Containers that were replaced or taken away meanwhile, and what was found."""
        self._committed_at = time.monotonic()
        self.opened = True

    def task(self, *, batch_size: int, threads: int) -> Task:
        """What the workers are told."""
        p = self.prepared
        return Task(
            reader=p.reader,
            encoder=self.encoder_ref,
            fingerprint=p.encoder.fingerprint,
            at=p.table,
            version=p.table.require().version,
            run=p.run,
            limits=self.limits,
            batch_size=batch_size,
            threads=threads,
            thumbnail_px=p.table.thumbnail_px,
            contents=p.contents if p.plan.units else None,
        )

    def take_over(self, chunk_rows: int | None) -> list[Receipt]:
        """What an earlier run staged, taken out of the plan; `adopt` commits it."""
        p = self.prepared
        return adopt(p.plan, self.staging, p.contents, fingerprint=p.encoder.fingerprint, source=p.reader.source, chunk_rows=chunk_rows)

    def adopt(self, taken: list[Receipt]) -> None:
        """Commit what an earlier run staged."""
        if taken:
            self.settle(taken)
            self.report.adopted = sum(receipt.rows for receipt in taken)
            log.info("adopted %d items that an earlier run had staged", self.report.adopted)

    def take(self, receipts: Iterator[Receipt], *, workers: int) -> None:
        """Commit receipts as they come. Raises JobFailed if too much is rejected or fails."""
        started = time.monotonic()
        first: float | None = None
        items = 0
        with Meter(to_do(self.prepared.plan), what="embedding") as meter, self._committing():
            for receipt in receipts:
                items += receipt.listed if first else 0
                first = first or time.monotonic()
                meter.add(receipt.listed, rejected=receipt.rejects.num_rows)
                self._add(receipt)
                if time.monotonic() - self._committed_at >= self.sync.commit_every_s:
                    self._commit()
                self._stop_early()
        ended = time.monotonic()
        if first is not None:
            self.report.seconds_to_first_chunk = round(first - started, 2)
            self.report.items_per_s = round(items / max(1e-3, ended - first), 2) if items else None
        self.report.ceiling = self._ceiling((ended - started) * workers)

    def _add(self, receipt: Receipt) -> None:
        for stage, seconds in receipt.seconds.items():
            self.report.stage_seconds[stage] = round(self.report.stage_seconds.get(stage, 0.0) + seconds, 3)
        if receipt.error is None:
            self._admit(receipt)
            return
        self.report.failed += receipt.listed
        if receipt.changed_unit:
            self.changed_units[str(receipt.unit)] = receipt.error
        else:
            self.report.errors.append(receipt.error)

    def settle(self, receipts: list[Receipt]) -> None:
        """Take receipts that cost no work."""
        for receipt in receipts:
            self._admit(receipt)
        self._commit()

    def _admit(self, receipt: Receipt) -> None:
        self._waiting += [receipt] if self.gate is None else self.gate.admit(receipt)

    @contextlib.contextmanager
    def _committing(self) -> Iterator[None]:
        """Whatever ends the loop, what is staged is committed."""
        try:
            yield
        finally:
            self._commit_rest()

    def _commit(self) -> None:
        """What has come, but for changes of a container's rows.

        These wait until all containers were read: a row that another container has under the same id stays as long as it is met unchanged,
        whichever of the two is read first. Meanwhile they are staged, and not lost if the run is killed.
        """
        now, late = list[Receipt](), list[Receipt]()
        for receipt in self._waiting:
            (late if self.gate is None and receipt.unit is not None and len(receipt.changed.ids) else now).append(receipt)
        self._waiting = now
        self._commit_rest()
        self._waiting = late

    def _commit_rest(self) -> None:
        # Taken out first: what was committed in part, or by a commit whose answer was lost, must not be committed again. It stays staged,
        # and the next run, which reads the table anew, adopts what is not in it.
        waiting, self._waiting = self._waiting, []
        if waiting:
            try:
                commit = self.committer.commit if self.gate is None else functools.partial(self.gate.commit, self.committer)
                commit(waiting)
            except JobFailed:
                raise
            except Exception as error:
                raise JobFailed(_broken_off(waiting, error)) from error
        self._committed_at = time.monotonic()

    def _stop_early(self) -> None:
        if len(self.report.errors) >= MAX_FAILED_CHUNKS:
            raise JobFailed(f"{MAX_FAILED_CHUNKS} chunks failed, the first with: {self.report.errors[0]}")
        rejected = self.prepared.plan.rejected + self.committer.counts.rejected + sum(r.rejects.num_rows for r in self._waiting)
        if self.excused:
            rejected = sum(count for reason, count in self.committer.reasons.items() if reason not in self.excused)
        if rejected > self.limits.max_rejects * self.prepared.plan.listed:
            raise JobFailed(too_many_rejects(rejected, self.prepared.plan.listed, self.limits))

    def _ceiling(self, thread_seconds: float) -> str | None:
        stages = self.report.stage_seconds
        if not any(stages.values()):
            return None
        busy = sum(stages.values()) / max(1e-9, thread_seconds)
        top = max(stages, key=lambda name: stages[name])
        return f"{top} ({stages[top] / sum(stages.values()):.0%} of the work; worker threads busy {busy:.0%} of the time, start-up included)"

    def finish(self) -> None:
        """What waits to be committed, vanished items, notes on complete containers, and the proof that the rows are there."""
        self._commit_rest()
        self.end(vanished=None if self.report.failed else self._vanished())

    def end(self, *, vanished: pa.ChunkedArray | None) -> None:
        """As `finish`, with the ids of vanished items given: None if they cannot be known."""
        self.report.vanished = None if vanished is None else len(vanished)
        self.report.unread = len(self.committer.unread)
        if self.committer.unread:
            log.warning(
                "%d containers could not be read whole; their old rows stay, and the next run tries them again: %s",
                len(self.committer.unread),
                ", ".join(sorted(self.committer.unread)[:5]),
            )
        if vanished is not None and len(vanished) and self.sync.vanished == "delete":
            self.report.deleted = delete_vanished(self.committer, vanished, self.prepared, self.sync)
        self._forget_outdated_rejects()
        self._note_units(exact=vanished is not None and len(vanished) == self.report.deleted)
        self._prove()

    def _forget_outdated_rejects(self) -> None:
        """Those of containers that were read whole and have them no more: of rows that are gone, or of when a container could not be read.

        So are duplicates that have taken the place of the item that came first.
        """
        p = self.prepared
        if not p.plan.units or not (len(p.contents.rejected) or len(p.contents.duplicates)):
            return
        rejects = rejects_of(p.table, source=p.reader.source)
        whole = np.asarray(pc.is_in(rejects["_unit"], pa.array(sorted(self._whole_units()), pa.string())))
        ids, double = hash64(rejects["id"]), np.asarray(pc.equal(rejects["reason"], "duplicate_id"))
        forget_rejects(p.table, rejects["id"].filter(pa.array(whole & ~double & ~self.committer.refused.find(ids)[0])).to_pylist())
        if self.gate is None:
            forget_duplicates(p.table, rejects["id"].filter(pa.array(whole & double & ~self.committer.doubles.find(ids)[0])).to_pylist())

    def _vanished(self) -> pa.ChunkedArray:
        """Ids of this source's rows whose item was not met. As Arrow strings: they may be half of the source, and most runs only count them."""
        p = self.prepared
        gone: list[pa.Array] = []
        if p.plan.vanished_ids is None or len(p.plan.vanished_ids):
            for batch in read_batches(p.table.require(), ["id", "_unit"], f"source = {quoted(p.reader.source)}"):
                gone.append(batch["id"].filter(pa.array(self._is_gone(batch))))
        return pa.chunked_array(gone, pa.string())

    def _is_gone(self, rows: pa.RecordBatch) -> np.ndarray:
        """Whether the item of each row (N,) was not met."""
        hashes, vanished = hash64(rows["id"]), self.prepared.plan.vanished_ids
        if vanished is not None:
            return member(hashes, vanished)
        known = self.prepared.contents.own.find(hashes)[0]  # what another job has brought since the plan is not ours to miss
        met = self.committer.own.find(hashes)[0] | self.committer.refused.find(hashes)[0]
        return np.asarray(known & ~met & self._is_known(rows["_unit"]))

    def _is_known(self, units: pa.Array) -> np.ndarray:
        """Whether it is known what became of the rows (N,) of some containers that this run has not met.

        Not of those that need no reading; and while some cannot be read only of those that were: the rest may have moved to where nobody can look.
        """
        if self.committer.unread:
            return np.asarray(pc.is_in(units, pa.array(sorted(self._whole_units()), pa.string())))
        return ~np.asarray(pc.is_in(units, pa.array(sorted(self.prepared.plan.complete_units), pa.string())))

    def _whole_units(self) -> set[str]:
        """The containers of which this run has read every item."""
        committer, listed = self.committer, self.prepared.plan.unit_items
        return {unit for unit, (items, _) in committer.units.items() if items == listed[unit]} - committer.unread

    def _note_units(self, *, exact: bool) -> None:
        """Note the containers that need no reading any more. `exact`: the table has no row of this source whose item is not listed.

        A row that has moved to another container keeps the name of the old one, so that neither has the rows of its own items, be there as many
        of them. If all containers together add up, the source is noted as a whole: it needs no reading as long as nothing of it changes.
        """
        p = self.prepared
        if not p.plan.units:
            return
        dataset = p.table.require()
        states = unit_states(dataset, source=p.reader.source)
        notes, done = [], self._whole_units() - self.committer.again
        counts = {unit: tuple(self.committer.units[unit]) for unit in done}
        versions = {unit: p.plan.units[unit] for unit in done}
        if exact and done == set(p.plan.units) and self.committer.alone(dataset.version) and p.plan.listing is not None:
            listed, rejected = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
            counts[WHOLE] = (listed + p.plan.unchanged + p.plan.rejected, rejected + p.plan.rejected)
            versions[WHOLE] = listing_version(p.plan.listing)
        counts = {unit: count for unit, count in counts.items() if states.get(unit, (0, ""))[0] == count[0] - count[1]}
        sums, recorded = id_sums(dataset, counts, source=p.reader.source), double_sums(p.table, source=p.reader.source)
        for unit, (_, rejected) in sorted(counts.items()):
            rows, digest = states.get(unit, (0, ""))
            met = self.committer.doubles_of.get(unit, np.empty(0, np.uint64)).tolist()
            double = added_up(recorded.values() if unit == WHOLE else met)
            # A duplicate that is not on record under its container's name will not be found when it is to take the other one's place.
            if unit == WHOLE or (sums[unit] == self.committer.accepted[unit] and double == recorded.get(unit, 0)):
                row = {
                    "source": p.reader.source,
                    "unit": unit,
                    "version": noted_version(versions[unit], double),
                    "rows": rows,
                    "rejected": rejected,
                    "digest": digest,
                    "run": p.run,
                }
                notes.append(row)
        record_notes(p.table, notes)

    def _prove(self) -> None:
        """Count the committed chunks' rows in the table as it is now. Raises Unproved if some are missing and nobody else has written."""
        dataset = self.prepared.table.require()
        found: Counter[str] = Counter()
        for batch in read_batches(dataset, ["_chunk"], f"source = {quoted(self.prepared.reader.source)}"):
            found.update({entry["values"]: entry["counts"] for entry in pc.value_counts(batch["_chunk"]).to_pylist()})
        lost = sum(max(0, committed - found[chunk]) for chunk, committed in self.committer.chunks.items())
        if lost and self.committer.alone(dataset.version):
            raise Unproved(f"{lost} of the rows that were committed are not in {self.prepared.table.path()}; did something else delete them?")

    def close(self) -> EmbedReport:
        """The report with all counts in it."""
        report, planned = self.report, self.prepared.plan
        counts = self.committer.counts if self.opened else Committed()
        report.unchanged = planned.unchanged + counts.unchanged
        report.written, report.replaced = counts.written, counts.replaced
        report.rejected = planned.rejected + counts.rejected
        report.overtaken, report.commits = counts.overtaken, counts.commits
        report.rejects = dict(self.committer.reasons) if self.opened else {}
        done = report.unchanged + report.written + report.replaced + report.rejected
        report.listed = max(planned.listed, done + report.failed)
        report.failed = report.listed - done  # a run that stopped early has not done the rest either
        try:
            return describe(report, self.prepared)
        except (ConfigError, OSError, ValueError):  # the store is away: the counts must come out all the same
            log.exception("the table cannot be read")
            report.rows_in_table = report.table_version = None
            return report


def _broken_off(receipts: list[Receipt], error: Exception) -> str:
    """Why a run ends at a commit, and what its counts cannot say."""
    return (
        f"a commit of {sum(receipt.rows for receipt in receipts)} rows broke off: {cause_of(error)}; earlier ones stay. Those of its rows that are "
        "in the table and not counted here are unchanged to the next run, which adopts what is staged of the others"
    )


@contextlib.contextmanager
def workers(compute: Compute, *, wanted: bool) -> Iterator[Sizes | None]:
    """Ray, and what it can carry; None if it is not `wanted`. Raises ConfigError, so it is entered before anything is written."""
    if not wanted:
        yield None
        return
    from pipeline.embed import fitted, running_ray  # ray: only a run that has work pays for it

    with running_ray(compute):
        yield fitted(compute)


def embed_chunks(filling: Filling, fit: Sizes | None) -> None:
    """Give the plan's chunks to the workers, and take what they bring."""
    from pipeline.embed import embed

    if fit is not None and filling.prepared.plan.chunks:
        task = filling.task(batch_size=fit.batch_size, threads=fit.threads)
        filling.take(embed(filling.prepared.plan.chunks, task, fit), workers=fit.actors * fit.threads)


def describe(report: EmbedReport, prepared: Prepared) -> EmbedReport:
    """Fill in what the table says."""
    report.run, report.table, report.fingerprint = prepared.run, prepared.table.path(), prepared.encoder.fingerprint
    dataset = prepared.table.open()
    report.rows_in_table = dataset.count_rows() if dataset is not None else 0
    report.table_version = dataset.version if dataset is not None else 0
    return report


def delete_vanished(committer: Committer, ids: pa.ChunkedArray, prepared: Prepared, sync: Sync) -> int:
    """Delete rows in one commit. Raises JobFailed if they are more of the source than `sync.max_vanished` allows."""
    rows = len(prepared.contents.own)
    if len(ids) > math.floor(sync.max_vanished * rows):
        raise JobFailed(
            f"{len(ids)} of the source's {rows} rows would be deleted, more than sync.max_vanished={sync.max_vanished:g}; nothing was deleted. "
            "Is the source complete? If it is, raise sync.max_vanished"
        )
    return committer.delete(ids.to_pylist())


def nothing_to_do(prepared: Prepared, sync: Sync) -> bool:
    """Whether the table is already what it should be: then Ray is not started and no version is added."""
    vanished = prepared.plan.vanished_ids
    deletes = sync.vanished == "delete" and (vanished is None or len(vanished) > 0)
    return not prepared.plan.chunks and not deletes and prepared.contents.version > 0


def unchanged_report(prepared: Prepared) -> EmbedReport:
    """The report of a run that had nothing to do."""
    planned = prepared.plan
    report = EmbedReport(listed=planned.listed, unchanged=planned.unchanged, rejected=planned.rejected)
    report.vanished = len(planned.vanished_ids) if planned.vanished_ids is not None else None
    return report


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
