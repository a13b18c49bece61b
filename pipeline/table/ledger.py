"""What was done and by what, kept beside the table: runs, models, and notes on complete containers."""

import datetime
import importlib.metadata
import json
import platform
import socket
from typing import Any

import lance
import pyarrow as pa
from lance.fragment import write_fragments

from pipeline.config import Ref
from pipeline.redact import dropping_secrets, without_secrets
from pipeline.table.at import TableAt, create_dataset, model_of, open_dataset
from pipeline.table.swap import insert, until_accepted
from schemas.runs import MODEL, RUN, UNIT

PACKAGES = ("tessera", "ray", "pylance", "lancedb", "pyarrow", "torch", "transformers", "open_clip_torch", "timm", "pillow", "numpy")
PLANNED = "planned"
"""Key of the chunks that a run planned, in the report that its started row has."""
COMMITTED = "committed"
"""Key of the rows of each chunk that it committed, in the report that its last row has: not for stdout, there are many."""
TRAINING = "training"
"""Key of the run that made an encoder, in the lineage that a MODEL row keeps."""


def now() -> datetime.datetime:
    """The present time, UTC."""
    return datetime.datetime.now(datetime.UTC)


def record_run(
    at: TableAt, *, run: str, job: str, status: str, fingerprint: str | None, config: dict[str, Any], report: dict[str, Any] | None
) -> None:
    """Append a row to the ledger of runs."""
    row = {
        "run": run,
        "job": job,
        "status": status,
        "at": now(),
        "fingerprint": fingerprint,
        "config": json.dumps(without_secrets(config), default=str),
        "report": json.dumps(report, default=str) if report is not None else None,
        "versions": json.dumps(_versions()),
        "host": socket.gethostname(),
    }
    _append(at.path(".runs"), pa.Table.from_pylist([row], schema=RUN), at)


def _append(path: str, rows: pa.Table, at: TableAt) -> None:
    # A plain append may be rebased onto any version: right for a log, where every row is its own.
    create_dataset(path, rows.schema, at.storage_options)
    lance.write_dataset(rows, path, mode="append", storage_options=at.options)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record_model(at: TableAt, encoder: Any, ref: Ref, *, run: str) -> None:
    """Make sure that the database's table of models says what the encoder's fingerprint stands for."""
    create_dataset(at.models_path, MODEL, at.storage_options)
    row = {
        "fingerprint": encoder.fingerprint,
        "dim": encoder.dim,
        "target": ref.target,
        "args": json.dumps(dropping_secrets(ref.args)),
        "lineage": json.dumps(_lineage(encoder), default=str),
        "created_at": now(),
        "run": run,
    }

    def attempt() -> None:
        dataset = open_dataset(at.models_path, at.storage_options)
        if dataset is not None and model_of(at, encoder.fingerprint) is None:
            insert(
                dataset, write_fragments(pa.Table.from_pylist([row], schema=MODEL), dataset, mode="append", storage_options=at.options), at.options
            )

    until_accepted(attempt, at.models_path)


def _lineage(encoder: Any) -> dict[str, Any] | None:
    """What the fingerprint is a hash of, and, under TRAINING, the run that made the encoder if it says so."""
    found, training = getattr(encoder, "lineage", None), getattr(encoder, "training", None)
    return {**(found or {}), TRAINING: without_secrets(training)} if training else found


def record_notes(at: TableAt, rows: list[dict[str, Any]]) -> None:
    """Append notes (UNIT rows) on containers that are complete."""
    if rows:
        _append(at.path(".units"), pa.Table.from_pylist(rows, schema=UNIT), at)
