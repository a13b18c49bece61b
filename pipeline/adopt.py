"""Work that an earlier run staged and did not live to commit: taken over instead of computed again."""

import logging

import numpy as np
import pyarrow as pa

from pipeline.known import CHANGED, UNCHANGED, Contents, Known, hash64
from pipeline.plan import Chunk, Plan, cut
from pipeline.table.scan import Unreadable, vector_faults
from pipeline.table.stage import Receipt, Staged, Staging, read_staged
from pipeline.table.sweep import sweep

log = logging.getLogger(__name__)


def adopt(plan: Plan, staging: Staging, contents: Contents, *, fingerprint: str, source: str, chunk_rows: int | None) -> list[Receipt]:
    """Receipts that do part of what `plan` asks for. Their chunks are taken out of the plan.

    The rows of a receipt are adopted all or none: every one of them must be pending, in the version that it was embedded in, and readable.
    """
    staged = staging.receipts()
    receipts = [r for r in staged if r.fingerprint == fingerprint and r.source == source and r.error is None and _still_so(r, contents)]
    if any("start" in chunk.work.column_names for chunk in plan.chunks):
        adopted = _adopt_slices(plan, receipts, staging)
    else:
        adopted = _adopt_files(plan, receipts, staging, fingerprint=fingerprint, chunk_rows=chunk_rows)
    sweep(staging, staged, adopted={r.chunk for r in adopted})
    return adopted


def _still_so(receipt: Receipt, contents: Contents) -> bool:
    """Whether the table holds what the receipt met as unchanged, and no other version of what it brings as new."""
    there = contents.own.find(receipt.seen)[0] | contents.others.find(receipt.seen)[0]
    return bool(there.all() and (contents.own.classify(receipt.new.ids, receipt.new.versions) != CHANGED).all())


def _adopt_slices(plan: Plan, receipts: list[Receipt], staging: Staging) -> list[Receipt]:
    wanted = {chunk.id for chunk in plan.chunks}
    adopted = {receipt.chunk: receipt for receipt in receipts if receipt.chunk in wanted and _reads_back(receipt, staging)}
    plan.chunks = [chunk for chunk in plan.chunks if chunk.id not in adopted]
    return list(adopted.values())


def _adopt_files(plan: Plan, receipts: list[Receipt], staging: Staging, *, fingerprint: str, chunk_rows: int | None) -> list[Receipt]:
    if not receipts or not plan.chunks:
        return []
    work = pa.concat_tables([chunk.work for chunk in plan.chunks])
    ids = hash64(work["id"])
    pending = Known()
    pending.add(ids, hash64(work["version"]))
    taken = np.empty(0, np.uint64)
    adopted = []
    for receipt in receipts:
        covered = np.concatenate([receipt.new.ids, receipt.changed.ids])
        versions = np.concatenate([receipt.new.versions, receipt.changed.versions])
        rejects = hash64(receipt.rejects["id"])
        # A run may have died when it had recorded its rejects and not yet inserted its rows: those are no longer pending.
        open_rejects = (pending.classify(rejects, hash64(receipt.rejects["_version"])) == UNCHANGED) & ~np.isin(rejects, taken)
        fits = (pending.classify(covered, versions) == UNCHANGED).all() and not np.isin(covered, taken).any()
        if receipt.unit is None and fits and len(covered) + open_rejects.sum() and _reads_back(receipt, staging):
            receipt.rejects = receipt.rejects.filter(pa.array(open_rejects))
            receipt.listed = receipt.rows + receipt.rejects.num_rows
            adopted.append(receipt)
            taken = np.concatenate([taken, covered, rejects[open_rejects]])
    left = work.filter(pa.array(~np.isin(ids, taken)))
    plan.chunks = _recut(plan.chunks, left, fingerprint, chunk_rows) if adopted else plan.chunks
    return adopted


def _reads_back(receipt: Receipt, staging: Staging) -> bool:
    """Whether what was staged is still there and whole: a cleanup may have taken it, a power cut may have left half of it."""
    try:
        whole = all(_as_staged(part, staging) for part in (receipt.new, receipt.changed))
    except (*Unreadable, RuntimeError) as error:  # the last for values that cannot be decoded
        log.warning("staged rows of chunk %s cannot be read, and are made again: %s", receipt.chunk, error)
        return False
    if not whole:
        log.warning("staged rows of chunk %s are not those that were written, and are made again", receipt.chunk)
    return whole


def _as_staged(staged: Staged, staging: Staging) -> bool:
    if not staged.fragments:
        return True
    rows = read_staged(staged.fragments, staging.at.path(), staging.at.options)
    same = np.array_equal(hash64(rows["id"]), staged.ids) and np.array_equal(hash64(rows["_version"]), staged.versions)
    return same and not any(fault.any() for fault in vector_faults(rows["vector"].combine_chunks()).values())


def _recut(chunks: list[Chunk], left: pa.Table, fingerprint: str, chunk_rows: int | None) -> list[Chunk]:
    """The work that is left, in chunks of the size that the whole had."""
    return cut(left, fingerprint, chunk_rows or max(chunk.items for chunk in chunks)) if left.num_rows else []
