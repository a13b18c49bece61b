"""What the tests of verify and repair share: a small table with all that lies beside it, and ways to spoil it."""

import datetime
import os
import time

import lance
import numpy as np
import pyarrow as pa

from jobs.embed import EmbedJob, run
from pipeline.known import hash64
from pipeline.table.ledger import record_run
from pipeline.table.repair import refusal, repair
from pipeline.table.stage import Receipt, Staged, Staging, stage_rows
from pipeline.table.verify import verify
from schemas.rejects import REJECT

WEEK = datetime.timedelta(days=7)
DIM = 16


def embed(folder, at, reader, *, sync=None):
    job = {
        "source": {"target": f"tests.sources:{reader}", "args": {"uri": str(folder)}},
        "encoder": {"target": "pipeline.encoders.hashing:Hashing", "args": {"dim": DIM}},
        "table": {"uri": at.uri, "name": at.name},
        "compute": {"cpus": 1, "chunk_rows": 8},
        "limits": {"max_rejects": 1.0},
        "sync": sync or {},
    }
    return run(EmbedJob.model_validate(job))


def found(at):
    """Count by code."""
    return {finding.code: finding.count for finding in verify(at, orphan_age=WEEK)[2]}


def wrong(at):
    return {finding.code for finding in verify(at, orphan_age=WEEK)[2] if finding.severity == "wrong"}


def mend(at):
    """What was repaired, by code; written into the ledger as the job does."""
    seen, _, _ = verify(at, orphan_age=WEEK)
    assert refusal(at, seen, 0.5) is None
    return repair_and_record(at, seen)


def repair_and_record(at, seen):
    repaired = repair(at, seen, orphan_age=WEEK)
    if repaired:
        report = {"repaired": [done.model_dump() for done in repaired]}
        record_run(at, run="mended", job="verify", status="done", fingerprint=None, config={}, report=report)
    return {done.code: done.count for done in repaired}


def row_of(at, item):
    return at.require().to_table(filter=f"id = '{item}'").slice(0, 1)


def changed(row, **values):
    """A row with other values in some columns."""
    for name, value in values.items():
        place = row.schema.get_field_index(name)
        row = row.set_column(place, row.schema.field(name), pa.array([value], row.schema.field(name).type))
    return row


def append(at, row, suffix=""):
    """A row past the jobs. As Lance asks, again if another commit came before it: a job may be writing at the same time."""
    while True:
        try:
            lance.write_dataset(row, at.path(suffix), mode="append")
        except OSError as error:
            if "Retryable commit conflict" not in str(error):
                raise
        else:
            return


def rewrite(at, item, **values):
    row = changed(row_of(at, item), **values)
    at.require().delete(f"id = '{item}'")
    append(at, row)


def unit_vector(seed):
    vector = np.random.default_rng(seed).normal(size=DIM)
    return (vector / np.linalg.norm(vector)).tolist()


def age(path, days):
    then = os.stat(path).st_mtime - days * 24 * 3600
    os.utime(path, (then, then))


def lost(at):
    [finding] = [finding for finding in verify(at, orphan_age=WEEK)[2] if finding.code == "lost_rows"]
    return finding.count, finding.examples


def chunk_of(at, item):
    return row_of(at, item)["_chunk"][0].as_py()


def staged(at, ids, *, chunk="late", fingerprint=None):
    """A receipt of rows that were staged: copies of a row under other ids."""
    rows = pa.concat_tables([changed(row_of(at, "i03"), id=item, _version="9") for item in ids]).combine_chunks()
    fragments = stage_rows(rows, at, at.require())
    new = Staged(fragments, hash64(rows["id"]), hash64(rows["_version"]))
    fingerprint = fingerprint or verify(at, orphan_age=WEEK)[1].encoder.fingerprint
    return Receipt(chunk=chunk, fingerprint=fingerprint, listed=len(ids), new=new)


def staged_before(at):
    """A receipt whose rows are not looked at."""
    ids = pa.array(["x1", "x2"])
    return Receipt(chunk="late", listed=2, new=Staged([], hash64(ids), hash64(ids)))


def put(at, receipt, *, hours_old=0):
    receipt.staged_at = time.time() - hours_old * 3600
    Staging(at).put(f"receipts/{receipt.chunk}", receipt.to_bytes())


def reject(item, version, reason="empty"):
    fixed = {"uri": "u", "source": "s", "_unit": None, "stage": "decode", "detail": "", "_chunk": "c", "_run": "r"}
    return pa.Table.from_pylist([{"id": item, "_version": version, "reason": reason, **fixed}], schema=REJECT)
