"""What a run takes over of what another one staged, and what it must not. Without Ray."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.table.at import TableAt, create_dataset
from pipeline.table.rejects import record_rejects
from pipeline.table.stage import Staging
from pipeline.table.sweep import KEEP_S
from tests.jobs.filling import ITEMS, adds_up, filling_of, ids_in, job_of, names, run, some_texts, work


@pytest.fixture
def texts(tmp_path):
    return some_texts(tmp_path)


@pytest.fixture
def at(tmp_path):
    return TableAt(uri=str(tmp_path / "db"), name="t")


def data_file(at, receipt):
    return Path(at.path()) / "data" / receipt.files()[0]


def test_what_was_staged_for_another_source_is_not_taken_over(tmp_path, texts):
    """It came in under the name of the other source, and the run then failed because it missed the rows under its own."""
    work(filling_of(job_of(tmp_path, texts, name="photos/2023")))
    report = run(job_of(tmp_path, texts, name="photos"))
    assert (report.adopted, report.written, adds_up(report)) == (0, ITEMS, True)
    assert ids_in(tmp_path) == names()


def test_an_unchanged_container_of_another_source_adds_nothing_to_the_counts(tmp_path, texts):
    """A receipt without rows fitted any plan."""
    folder = tmp_path / "ledgers"
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps([[f"r{i}", f"row {i}"] for i in range(5)]))
    job = job_of(tmp_path, folder, target="Ledgers")
    run(job)
    os.utime(folder / "one.json", (1, 1))
    [receipt] = work(filling_of(job))
    assert receipt.unchanged == 5
    report = run(job_of(tmp_path, texts))
    assert (report.listed, report.written, report.unchanged, report.adopted) == (ITEMS, ITEMS, 0, 0)


def test_a_run_that_died_between_its_rejects_and_its_rows_is_taken_over(tmp_path, texts):
    """Its chunks with rejects were computed again: the rejects were known by then."""
    (texts / "i00.txt").write_text(" ")
    (texts / "i09.txt").write_text(" ")
    job = job_of(tmp_path, texts)
    record_rejects(job.table, [receipt.rejects for receipt in work(filling_of(job))[:2]])
    report = run(job)
    assert (report.adopted, report.written, report.rejected, report.listed) == (ITEMS - 2, ITEMS - 2, 2, ITEMS)
    assert Staging(job.table).receipts() == []
    assert len(ids_in(tmp_path)) == ITEMS - 2


def test_a_row_that_came_in_another_version_meanwhile_is_not_brought_in_as_new(tmp_path, texts, at):
    """Its id then stood twice in the table."""
    job = job_of(tmp_path, texts)
    receipts = work(filling_of(job, chunk_rows=1))
    stat = (texts / "i00.txt").stat()
    kept = {receipt.chunk: Staging(at).get(f"receipts/{receipt.chunk}") for receipt in receipts}
    (texts / "i00.txt").write_text("for a while it says this")
    run(job)
    (texts / "i00.txt").write_text("text number 0")
    os.utime(texts / "i00.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for chunk, data in kept.items():
        Staging(at).put(f"receipts/{chunk}", data)
    report = run(job)
    assert ids_in(tmp_path) == names()
    assert (report.replaced, report.unchanged, report.adopted) == (1, ITEMS - 1, 0)


@pytest.mark.parametrize("damage", ["cut off", "zeroed", "of another chunk", "gone"])
def test_staged_rows_that_do_not_read_back_are_made_again(tmp_path, texts, at, damage):
    """A power cut leaves files that are there and not whole; they used to be committed."""
    job = job_of(tmp_path, texts)
    receipts = work(filling_of(job))
    path = data_file(at, receipts[0])
    data = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "zeroed":
        path.write_bytes(bytes(len(data) // 2) + data[len(data) // 2 :])
    elif damage == "of another chunk":
        path.write_bytes(data_file(at, receipts[1]).read_bytes())
    else:
        path.unlink()
    report = run(job)
    assert (report.adopted, report.written, report.failed) == (ITEMS - receipts[0].rows, ITEMS, 0)
    assert at.require().to_table().num_rows == ITEMS
    assert ids_in(tmp_path) == names()


def with_an_unknown_field(data):
    table = pa.ipc.open_stream(data).read_all()
    metadata = table.schema.metadata
    metadata[b"receipt"] = json.dumps({**json.loads(metadata[b"receipt"]), "of_next_year": 1}).encode()
    table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\0" * 64, with_an_unknown_field])
def test_a_receipt_that_cannot_be_read_is_passed_over(tmp_path, texts, at, damage, caplog):
    """One of them blocked every run with a traceback."""
    job = job_of(tmp_path, texts)
    receipts = work(filling_of(job))
    name = f"receipts/{receipts[0].chunk}"
    Staging(at).put(name, damage(Staging(at).get(name)))
    report = run(job)
    assert (report.adopted, report.written) == (ITEMS - receipts[0].rows, ITEMS)
    assert f"{name} cannot be read" in caplog.text
    assert Staging(at).receipts() == []


def test_a_receipt_that_another_run_deletes_while_it_is_read_is_gone(tmp_path, texts, at, monkeypatch):
    job = job_of(tmp_path, texts)
    receipts = work(filling_of(job))
    staging = Staging(at)
    session = staging._session

    class Late:
        """The store's session, with another run that deletes each file after it was seen and before it is read."""

        def __getattr__(self, name):
            return getattr(session, name)

        def download_file(self, name, local):
            session.delete_file(name)
            session.download_file(name, local)

    staging._session = Late()
    assert staging.get(f"receipts/{receipts[0].chunk}") is None
    assert staging.receipts() == []


def test_what_killed_runs_leave_is_swept_after_a_week(tmp_path, texts, at):
    """Journals, damaged receipts and the scratch tables of the self-test stayed for ever."""
    job = job_of(tmp_path, texts)
    staging = filling_of(job).staging
    staging.put("attempts/run-chunk", b"{}")
    staging.put("receipts/damaged", b"")
    scratch = tmp_path / "db" / "selftest-0123456789ab.lance"
    create_dataset(str(scratch), pa.schema([("id", pa.string())]), {})
    mine = tmp_path / "db" / "selftest-mine.lance"
    mine.mkdir()
    filling_of(job).take_over(8)
    strays = json.loads(staging.get("strays"))
    assert set(strays) == {"attempts/run-chunk", "receipts/damaged", "selftest-0123456789ab.lance"}
    assert scratch.exists() and staging.get("attempts/run-chunk") is not None
    staging.put("strays", json.dumps({name: first - KEEP_S - 1 for name, first in strays.items()}).encode())
    filling_of(job).take_over(8)
    assert json.loads(staging.get("strays")) == {}
    assert not scratch.exists() and mine.exists()
    assert staging.names("attempts") == staging.names("receipts") == []
