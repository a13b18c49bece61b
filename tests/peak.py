"""Peak memory of one worker, for tests: `python -m tests.peak JOB.yaml` runs a job's chunks in this process, without Ray.

Prints one line of JSON: listed, rows, rejects (by reason), errors, and the bytes by which the process grew at its peak.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from jobs.embed import EmbedJob
from pipeline.config import load
from pipeline.fill import Filling
from pipeline.prepare import prepare
from pipeline.report import EmbedReport
from pipeline.work import ChunkWorker


def peak_bytes() -> int:
    """Most memory that this process has held. Not getrusage: its figure begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    job = load(EmbedJob, sys.argv[1])
    before = peak_bytes()
    prepared = prepare(job.source, job.encoder, job.table, sync=job.sync, chunk_rows=job.compute.chunk_rows)
    filling = Filling(prepared, job.encoder, job.limits, job.sync, EmbedReport())
    filling.open()
    worker = ChunkWorker(filling.task(batch_size=16, threads=job.compute.threads or 1))
    receipts = [worker(chunk.id, chunk.work) for chunk in prepared.plan.chunks]
    counts = {
        "listed": sum(receipt.listed for receipt in receipts),
        "rows": sum(receipt.rows for receipt in receipts),
        "rejects": Counter(reason for receipt in receipts for reason in receipt.rejects["reason"].to_pylist()),
        "errors": [receipt.error for receipt in receipts if receipt.error],
    }
    print(json.dumps(counts | {"grown": peak_bytes() - before}))


if __name__ == "__main__":
    main()
