"""One run of the embed job: plan, adopt, embed, commit, and prove. `jobs/embed.py` is its command.

Whatever interrupts it, the table holds whole commits only, and the next run goes on from what is committed and staged.
"""

import contextlib
import functools
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from pipeline.adopt import adopt
from pipeline.closing import Closing
from pipeline.compute import Compute, Sizes
from pipeline.config import ConfigError, JobFailed, Ref
from pipeline.media import Limits
from pipeline.prepare import Prepared, Sync, refuse_foreign, to_do
from pipeline.progress import Meter
from pipeline.report import EmbedReport, cause_of, explains_itself, too_many_rejects
from pipeline.table.at import create_dataset
from pipeline.table.commit import Committed, Committer
from pipeline.table.ledger import record_model
from pipeline.table.stage import Receipt, Staging
from pipeline.table.swap import self_test
from pipeline.work import Task
from schemas.vectors import TABLE

log = logging.getLogger(__name__)

MAX_FAILED_CHUNKS = 5
"""Then the run stops: the fault is not in the items."""


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
        self._closing = Closing(p, self.committer)
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
        self.end(vanished=None if self.report.failed else self._closing.vanished())

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
            self.report.deleted = self._closing.delete(vanished, self.sync)
        self._closing.forget_outdated_rejects(duplicates=self.gate is None)
        self._closing.note_units(exact=vanished is not None and len(vanished) == self.report.deleted)
        self._closing.prove()

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


def unchanged_report(prepared: Prepared) -> EmbedReport:
    """The report of a run that had nothing to do."""
    planned = prepared.plan
    report = EmbedReport(listed=planned.listed, unchanged=planned.unchanged, rejected=planned.rejected)
    report.vanished = len(planned.vanished_ids) if planned.vanished_ids is not None else None
    return report
