"""A run's driver when stores fail in its midst: what its report says is so, and the next run makes it good. Without Ray."""

import datetime

import lance
import pytest

from pipeline.config import JobFailed
from pipeline.table.commit import Committer
from pipeline.table.stage import Staging
from pipeline.work import ChunkWorker
from tests.jobs.filling import ITEMS, adds_up, due_at_the_last, fails_at, filling_of, ids_in, job_of, names, run, some_texts, work


@pytest.fixture
def texts(tmp_path):
    return some_texts(tmp_path)


def test_a_commit_that_fails_when_its_rows_are_in_is_not_made_again(tmp_path, texts, monkeypatch):
    """It was committed a second time on the way out: every row became a reject `duplicate_id`, for good, and counted twice."""
    filling = filling_of(job_of(tmp_path, texts))
    receipts = work(filling)
    with monkeypatch.context() as store:
        store.setattr(Staging, "delete_receipt", fails_at(1))
        with pytest.raises(JobFailed, match="broke off"):
            filling.take(due_at_the_last(receipts, filling), workers=1)
    report = filling.close()
    assert (report.written, report.rejected, report.failed, report.rejects) == (ITEMS, 0, 0, {})
    assert ids_in(tmp_path) == names()
    again = run(job_of(tmp_path, texts))
    assert (again.unchanged, again.written, again.rejected) == (ITEMS, 0, 0)


@pytest.mark.parametrize("at", [1, 2])
def test_a_failure_between_two_receipts_of_one_commit_repeats_no_row(tmp_path, texts, monkeypatch, at):
    """Those after it were in the table and not accounted for, and the same fragments went in again."""
    filling = filling_of(job_of(tmp_path, texts))
    receipts = work(filling)
    with monkeypatch.context() as store:
        store.setattr(Committer, "_forget_cured", fails_at(at))
        with pytest.raises(JobFailed, match="broke off"):
            filling.take(due_at_the_last(receipts, filling), workers=1)
    report = filling.close()
    assert ids_in(tmp_path) == names()
    assert (report.written, report.failed, adds_up(report)) == (ITEMS, 0, True)
    assert run(job_of(tmp_path, texts)).unchanged == ITEMS


def test_ctrl_c_in_a_commit_leaves_each_row_once(tmp_path, texts, monkeypatch):
    filling = filling_of(job_of(tmp_path, texts))
    receipts = work(filling)
    with monkeypatch.context() as store:
        store.setattr(Committer, "_account", fails_at(1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            filling.take(due_at_the_last(receipts, filling), workers=1)
    assert ids_in(tmp_path) == names()
    report = run(job_of(tmp_path, texts))
    assert (report.unchanged, report.rejected, ids_in(tmp_path)) == (ITEMS, 0, names())


def test_rows_that_another_run_deletes_after_the_last_commit_are_not_called_lost(tmp_path, texts):
    """A run that took rows away between our last commit and our proof made the job fail with a false alarm."""
    filling = filling_of(job_of(tmp_path, texts))
    filling.take(iter(work(filling)), workers=1)
    other = Committer(filling.prepared.table, filling.staging, filling.prepared.contents)
    assert other.delete(["i03"]) == 1
    filling.finish()
    assert filling.close().written == ITEMS


@pytest.mark.parametrize("name", ["get", "put", "delete"])
def test_a_store_that_fails_once_at_a_journal_costs_one_chunk_at_most(tmp_path, texts, monkeypatch, name):
    """It ended the whole run: the worker raised instead of saying that its chunk had failed."""
    filling = filling_of(job_of(tmp_path, texts))
    with monkeypatch.context() as store:
        real = getattr(Staging, name)
        away = fails_at(1)

        def once(*arguments):
            away()
            return real(*arguments)

        store.setattr(Staging, name, once)
        receipts = work(filling)
    errors = [receipt.error for receipt in receipts]
    assert errors == [None if name == "delete" else "OSError: the store is away", None, None]
    filling.take(iter(receipts), workers=1)
    report = filling.close()
    assert (report.failed, report.written) == ((0, ITEMS) if name == "delete" else (8, ITEMS - 8))
    assert run(job_of(tmp_path, texts)).rows_in_table == ITEMS


def test_a_worker_that_starts_when_its_version_was_cleaned_up_goes_on_with_the_newest(tmp_path, texts):
    """Every actor that was started, or started again, after a cleanup of old versions failed."""
    filling = filling_of(job_of(tmp_path, texts))
    task = filling.task(batch_size=4, threads=1)
    first, *others = filling.prepared.plan.chunks
    filling.take(iter([ChunkWorker(task)(first.id, first.work)]), workers=1)
    task.at.require().cleanup_old_versions(older_than=datetime.timedelta(0), delete_unverified=False)
    filling.take(iter([ChunkWorker(task)(chunk.id, chunk.work) for chunk in others]), workers=1)
    filling.finish()
    assert (filling.close().written, ids_in(tmp_path)) == (ITEMS, names())


@pytest.mark.parametrize("staged", ["before", "after"])
def test_a_table_that_is_dropped_and_made_again_meanwhile_is_noticed(tmp_path, texts, staged):
    """Its fragments have the numbers of the old ones, so what it holds was not looked at, and ids came to stand twice."""
    job = job_of(tmp_path, texts)
    kept = {path: path.read_text() for path in sorted(texts.iterdir())[8:]}
    for path in kept:
        path.unlink()
    run(job)
    for path, text in kept.items():
        path.write_text(text)
    filling = filling_of(job)
    receipts = work(filling) if staged == "before" else []
    lance.LanceDataset.drop(job.table.path())
    assert run(job, chunk_rows=ITEMS).written == ITEMS
    with pytest.raises(JobFailed, match=r"^\S+ was dropped and made again"):
        filling.take(iter(receipts or work(filling)), workers=1)
    assert (filling.close().written, ids_in(tmp_path)) == (0, names())
    assert run(job).unchanged == ITEMS
