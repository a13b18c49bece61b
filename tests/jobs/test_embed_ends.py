"""The embed job when something else than an item goes wrong: it ends in a report, and says why in a line."""

import pytest

from jobs import embed
from jobs.embed import run
from pipeline.compute import Compute
from pipeline.config import ConfigError, JobFailed
from pipeline.fill import Filling
from pipeline.table.commit import Committer
from pipeline.table.stage import Unproved
from pipeline.table.swap import EngineRefused
from tests.jobs.filling import ITEMS, adds_up, fails_at, job_of, some_texts

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def texts(tmp_path):
    return some_texts(tmp_path)


def test_a_disk_that_fills_up_ends_in_a_report(tmp_path, texts, monkeypatch):
    """It used to end in a traceback, without the counts of what was committed."""

    def full(*arguments, **settings):
        raise OSError("LanceError(IO): No space left on device (os error 28)")

    with monkeypatch.context() as disk:
        disk.setattr(Committer, "commit", full)
        disk.setattr(embed, "record_run", lambda *arguments, **settings: full() if settings["status"] != "started" else None)
        with pytest.raises(JobFailed, match="No space left") as failure:
            run(job_of(tmp_path, texts))
    report = failure.value.report
    assert (report.status, report.written, report.failed, adds_up(report)) == ("failed", 0, ITEMS, True)
    assert run(job_of(tmp_path, texts)).adopted == ITEMS


@pytest.mark.parametrize("compute", [{"gpus": 1}, {"cpus": 999}])
def test_a_machine_that_cannot_hold_a_worker_is_found_before_anything_is_written(tmp_path, texts, compute):
    """The table was made and the run put down as started, and then the command said that nothing had run."""
    with pytest.raises(ConfigError, match=r"compute\.gpus"):
        run(job_of(tmp_path, texts).model_copy(update={"compute": Compute(**compute)}))
    assert not (tmp_path / "db").exists()


def failed(job, *, match):
    """The report of a run that fails, and its rows in the ledger."""
    with pytest.raises(JobFailed, match=match) as failure:
        run(job)
    report = failure.value.report
    assert (report.status, adds_up(report), report.vanished) == ("failed", True, None)
    return report, [(r["run"], r["status"]) for r in job.table.open(".runs").to_table().to_pylist()]


def test_a_worker_that_cannot_start_ends_the_run_with_a_report_that_says_why(tmp_path, texts):
    """It was a traceback of Ray's, without a report."""
    report, ledger = failed(job_of(tmp_path, texts, encoder="tests.sources:TooLarge"), match="do not fit")
    assert (report.failed, report.rows_in_table) == (ITEMS, 0)
    assert ledger == [(report.run, "started"), (report.run, "failed")]


@pytest.mark.parametrize("step", ["adopt", "finish"])
@pytest.mark.parametrize("error", [ConfigError("cannot open the table: the store is away"), Unproved("rows are lost"), KeyError("a bug")])
def test_whatever_goes_wrong_once_work_has_begun_ends_in_a_report(tmp_path, texts, monkeypatch, step, error):
    """A store that failed after hours was called a configuration error, and nothing was said of what had been done."""
    monkeypatch.setattr(Filling, step, fails_at(1, error))
    report, ledger = failed(job_of(tmp_path, texts), match=str(error).strip("'"))
    assert report.written == (0 if step == "adopt" else ITEMS)
    assert ledger == [(report.run, "started"), (report.run, "failed")]


def test_an_engine_that_is_refused_ends_in_a_report(tmp_path, texts, monkeypatch):
    monkeypatch.setattr("pipeline.fill.self_test", fails_at(1, EngineRefused("accepted a stale commit")))
    report, ledger = failed(job_of(tmp_path, texts), match="stale commit")
    assert (report.failed, report.table_version, [status for _, status in ledger]) == (ITEMS, 0, ["failed"])


def test_a_table_that_cannot_be_read_at_the_end_does_not_cost_the_report(tmp_path, texts, monkeypatch):
    monkeypatch.setattr("pipeline.fill.describe", fails_at(1, ConfigError("cannot open the table")))
    report = run(job_of(tmp_path, texts))
    assert (report.written, report.rows_in_table, report.table_version) == (ITEMS, None, None)


def test_an_encoder_for_a_gpu_says_in_one_line_that_it_was_given_none(tmp_path, texts, caplog):
    """The line stood at the end of forty lines of traceback."""
    with pytest.raises(JobFailed, match=r"^device='cuda', and no GPU is seen here; give the workers one with compute.gpus=1"):
        run(job_of(tmp_path, texts, encoder="tests.sources:WithoutItsGpu"))
    assert "Traceback" not in caplog.text
