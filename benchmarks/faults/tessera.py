"""The same work as a Tessera job: in this process on the Ray that runs here, or as the command in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.faults.outcome import TESSERA, Outcome, observe
from jobs.embed import EmbedJob
from jobs.embed import run as run_embed
from pipeline.config import ConfigError, JobFailed

NAME = "t"


def job_of(
    source: Path, db: Path, *, log: Path, encoder: str = "Watched", images: bool = False, seconds: float = 0.0, dim: int = 16
) -> dict[str, Any]:
    """A job file's content: Parquet rows, or a folder of images."""
    parquet = {"target": "pipeline.readers.parquet:Parquet", "args": {"uri": str(source), "id": "id", "text": "text"}}
    folder = {"target": "pipeline.readers.images:Images", "args": {"uri": str(source)}}
    args = {"log": str(log), "dim": dim} | ({"seconds": seconds} if seconds else {})
    return {
        "source": folder if images else parquet,
        "encoder": {"target": f"benchmarks.faults.sources:{encoder}", "args": args},
        "table": {"uri": str(db), "name": NAME},
        "compute": {"cpus": 1, "chunk_rows": 50},
        "sync": {"commit_every_s": 1},
    }


def run(job: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """From beginning to end in this process: the report, and what it said if it failed."""
    try:
        return vars(run_embed(EmbedJob.model_validate(job))), None
    except JobFailed as error:
        return vars(error.report), f"exit 1: {error}"
    except ConfigError as error:
        return {}, f"exit 2: {error}"


def start(job: dict[str, Any], db: Path) -> subprocess.Popen[str]:
    """The command."""
    db.mkdir(exist_ok=True)
    path = db / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    return subprocess.Popen([sys.executable, "-m", "jobs.embed", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str | None:
    """Wait; what it said if it failed."""
    _, said = process.communicate()
    return said if process.returncode else None


def table(db: Path) -> Path:
    """Where the job's table lies."""
    return db / f"{NAME}.lance"


def outcome(db: Path, expected: pa.Table, *, error: str | None = None, note: str = "") -> Outcome:
    """What the table holds."""
    return observe(TESSERA, table(db), expected, error=error, note=note)
