"""A run's driver when stores fail in its midst: what its report says is so, and the next run makes it good. Without Ray."""

import pytest

from pipeline.config import JobFailed
from pipeline.table.commit import Committer
from pipeline.table.stage import Staging
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
