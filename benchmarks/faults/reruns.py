"""Writing at all, writing again, and writing something else: no process dies here."""

from collections.abc import Iterator
from pathlib import Path

import lance_ray
import ray

from benchmarks.faults import obvious, tessera
from benchmarks.faults.outcome import Outcome, observe, one_line
from benchmarks.faults.sources import OfOtherWeights, Watched, encode, encoded, texts, write_texts


def written_at_all(folder: Path) -> Iterator[Outcome]:
    """A first run, no fault"""
    rows = texts(400)
    source, table = write_texts(folder / "source", rows), folder / "ray.lance"
    obvious.start_ray()
    error = None
    try:
        obvious.vectors(source, Watched(str(folder / "log"))).write_lance(str(table))
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    yield observe("Dataset.write_lance", table, rows, error=error)
    obvious.embed(source, folder / "lance_ray.lance", Watched(str(folder / "log")))
    yield observe("lance_ray.write_lance", folder / "lance_ray.lance", rows)
    _, error = tessera.run(tessera.job_of(source, folder / "db", log=folder / "log"))
    yield tessera.outcome(folder / "db", rows, error=error)


def written_onto_a_table(folder: Path) -> Iterator[Outcome]:
    """10 new rows written onto a table of 1,000, default mode"""
    old, new = texts(1_000), texts(10, start=1_000)
    monday, tuesday = write_texts(folder / "monday", old), write_texts(folder / "tuesday", new)
    both, table, encoder = texts(1_010), folder / "t.lance", Watched(str(folder / "log"))
    obvious.embed(monday, table, encoder)
    obvious.embed(tuesday, table, encoder)
    yield observe("lance_ray.write_lance", table, both)
    tessera.run(tessera.job_of(monday, folder / "db", log=folder / "log"))
    _, error = tessera.run(tessera.job_of(tuesday, folder / "db", log=folder / "log"))
    yield tessera.outcome(folder / "db", both, error=error)


def run_again(folder: Path) -> Iterator[Outcome]:
    """A job that succeeded runs again"""
    rows = texts(400)
    source = write_texts(folder / "source", rows)
    for mode in ("append", "create"):
        table, log = folder / f"{mode}.lance", folder / mode
        obvious.embed(source, table, Watched(str(log)))
        obvious.embed(source, table, Watched(str(log)), mode=mode)
        yield observe(f"lance-ray, {mode}", table, rows, note=again(log, 400))
    job = tessera.job_of(source, folder / "db", log=folder / "log")
    tessera.run(job)
    _, error = tessera.run(job)
    yield tessera.outcome(folder / "db", rows, error=error, note=again(folder / "log", 400))


def again(log: Path, before: int) -> str:
    """How many items the second run encoded."""
    return f"{len(encoded(log)) - before:,} items encoded again"


def source_changed(folder: Path) -> Iterator[Outcome]:
    """Of 400 items 10 changed, 10 vanished, 10 are new; the job runs again"""
    before, after = texts(400), texts(400, start=10, changed={f"i{n}": "a new text" for n in range(10, 20)})
    for mode in ("append", "create"):
        table, log = folder / f"{mode}.lance", folder / mode
        obvious.embed(write_texts(folder / "source", before), table, Watched(str(log)))
        obvious.embed(write_texts(folder / "source", after), table, Watched(str(log)), mode=mode)
        yield observe(f"lance-ray, {mode}", table, after, note=again(log, 400))
    job = tessera.job_of(write_texts(folder / "source", before), folder / "db", log=folder / "log")
    tessera.run(job)
    write_texts(folder / "source", after)
    _, error = tessera.run(job | {"sync": {"vanished": "delete"}})
    yield tessera.outcome(folder / "db", after, error=error, note=again(folder / "log", 400))


def another_encoder(folder: Path) -> Iterator[Outcome]:
    """New rows come with another encoder's vectors, equal in length"""
    old, new = texts(400), texts(400, start=400)
    monday, tuesday = write_texts(folder / "monday", old), write_texts(folder / "tuesday", new)
    vectors = encode(Watched(str(folder / "unused")), texts(800))
    table = folder / "t.lance"
    obvious.embed(monday, table, Watched(str(folder / "log")))
    obvious.embed(tuesday, table, OfOtherWeights(str(folder / "log")), mode="append")
    yield observe("lance-ray, append", table, vectors)
    tessera.run(tessera.job_of(monday, folder / "db", log=folder / "log"))
    _, error = tessera.run(tessera.job_of(tuesday, folder / "db", log=folder / "log", encoder="OfOtherWeights"))
    yield tessera.outcome(folder / "db", vectors.slice(0, 400), error=error, note="nothing written")


def write_failed_once(folder: Path) -> Iterator[Outcome]:
    """The store fails one write after some batches (injected: `LanceError(IO)`)"""
    rows = texts(400)
    source = write_texts(folder / "source", rows)
    obvious.start_ray(runtime_env={"worker_process_setup_hook": _failing_once(folder)})
    lance_ray.write_lance(obvious.vectors(source, Watched(str(folder / "log"))), str(folder / "t.lance"))
    yield observe("lance_ray.write_lance", folder / "t.lance", rows)
    ray.shutdown()
    (folder / "failed").unlink()
    obvious.start_ray(runtime_env={"worker_process_setup_hook": _failing_once(folder)})
    job = tessera.job_of(source, folder / "db", log=folder / "log")
    _, error = tessera.run(job)
    tessera.run(job)
    yield tessera.outcome(folder / "db", rows, note=f"after a first run that stopped: `{one_line(error or 'it did not')}`")


def _failing_once(folder: Path):
    """A hook for Ray's workers: the first write of all takes three batches and fails as a broken connection does."""
    marker = str(folder / "failed")

    def hook() -> None:
        import lance.fragment

        real = lance.fragment.write_fragments

        def write(data, *arguments, **settings):
            try:
                Path(marker).touch(exist_ok=False)
            except FileExistsError:
                return real(data, *arguments, **settings)
            for _ in range(3 if hasattr(data, "read_next_batch") else 0):
                data.read_next_batch()
            raise OSError("LanceError(IO): Generic S3 error: connection reset by peer")

        lance.fragment.write_fragments = write

    return hook
