"""A disk that fills up: a small tmpfs, mounted in a namespace of this process's own, which ends with it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults import obvious, tessera
from benchmarks.faults.outcome import Outcome, observe
from benchmarks.faults.sources import Watched, texts, write_texts

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Mounting is allowed there, and nobody else sees it."""
DIM = 512


def disk_full(folder: Path) -> Iterator[Outcome]:
    """The disk has room for half of the 10,000 vectors"""
    rows = texts(10_000)
    source, disk = write_texts(folder / "source", rows), folder / "disk"
    disk.mkdir()
    _mount(disk, "12m")
    error = None
    try:
        obvious.embed(source, disk / "t.lance", Watched(str(folder / "log"), dim=DIM))
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    yield observe("lance_ray.write_lance", disk / "t.lance", rows, error=error)
    subprocess.run(["umount", str(disk)], check=True)
    _mount(disk, "12m")
    job = tessera.job_of(source, disk / "db", log=folder / "log", dim=DIM) | {"compute": {"cpus": 1, "chunk_rows": 500}}
    _, error = tessera.run(job)
    yield tessera.outcome(disk / "db", rows, error=error)
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    _, error = tessera.run(job)
    yield tessera.outcome(disk / "db", rows, error=error, note="run again when there is room")


def _mount(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
