"""Work that an earlier run staged and did not live to commit: taken over instead of computed again."""

import time

import numpy as np
import pyarrow as pa

from pipeline.known import UNCHANGED, Known, hash64
from pipeline.plan import Chunk, Plan, cut
from pipeline.table.stage import Receipt, Staging

KEEP_S = 7 * 24 * 3600
"""Receipts that fit nothing are forgotten after a week; Lance's cleanup takes their data files at the same age."""


def adopt(plan: Plan, staging: Staging, *, fingerprint: str, chunk_rows: int | None) -> list[Receipt]:
    """Receipts that do part of what `plan` asks for. Their chunks are taken out of the plan.

    A receipt is adopted whole or not at all: every item of it must be pending, in the version that it was embedded in.
    """
    receipts = [r for r in staging.receipts() if r.fingerprint == fingerprint and r.error is None and staging.has_files(r)]
    if any("start" in chunk.work.column_names for chunk in plan.chunks):
        adopted = _adopt_slices(plan, receipts)
    else:
        adopted = _adopt_files(plan, receipts, fingerprint, chunk_rows)
    _forget_old(staging, {r.chunk for r in adopted})
    return adopted


def _adopt_slices(plan: Plan, receipts: list[Receipt]) -> list[Receipt]:
    by_chunk = {receipt.chunk: receipt for receipt in receipts}
    adopted = [by_chunk[chunk.id] for chunk in plan.chunks if chunk.id in by_chunk]
    plan.chunks = [chunk for chunk in plan.chunks if chunk.id not in by_chunk]
    return adopted


def _adopt_files(plan: Plan, receipts: list[Receipt], fingerprint: str, chunk_rows: int | None) -> list[Receipt]:
    if not receipts or not plan.chunks:
        return []
    work = pa.concat_tables([chunk.work for chunk in plan.chunks])
    ids = hash64(work["id"])
    pending = Known()
    pending.add(ids, hash64(work["version"]))
    taken = np.empty(0, np.uint64)
    adopted = []
    for receipt in receipts:
        covered = np.concatenate([receipt.new.ids, receipt.changed.ids, hash64(receipt.rejects["id"])])
        versions = np.concatenate([receipt.new.versions, receipt.changed.versions, hash64(receipt.rejects["_version"])])
        if (pending.classify(covered, versions) == UNCHANGED).all() and not np.isin(covered, taken).any():
            adopted.append(receipt)
            taken = np.concatenate([taken, covered])
    left = work.filter(pa.array(~np.isin(ids, taken)))
    plan.chunks = _recut(plan.chunks, left, fingerprint, chunk_rows) if adopted else plan.chunks
    return adopted


def _recut(chunks: list[Chunk], left: pa.Table, fingerprint: str, chunk_rows: int | None) -> list[Chunk]:
    """The work that is left, in chunks of the size that the whole had."""
    return cut(left, fingerprint, chunk_rows or max(chunk.items for chunk in chunks)) if left.num_rows else []


def _forget_old(staging: Staging, adopted: set[str]) -> None:
    for receipt in staging.receipts():
        if receipt.chunk not in adopted and time.time() - receipt.staged_at > KEEP_S:
            staging.delete_receipt(receipt.chunk)
