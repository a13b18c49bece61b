"""The slides job when the machine, a store or the page fails: what is said of it, and what the next run makes of it."""

import pytest

from jobs.slides import run
from pipeline.config import ConfigError, JobFailed
from pipeline.slides import run as steps
from tests.jobs.filling import fails_at
from tests.slides.runs import Lab, write

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "slides", tmp_path / "db")
    write(lab.folder / "a.svs")
    return lab


def ledger(lab):
    return [(row["run"], row["status"]) for row in lab.at.open(".runs").to_table().to_pylist()]


def failed(lab, *, match, **changes):
    with pytest.raises(JobFailed, match=match) as failure:
        run(lab.job(**changes))
    report = failure.value.report
    assert (report.status, report.tiles.status) == ("failed", "failed")
    return report


def test_a_machine_that_cannot_hold_a_worker_is_found_before_a_slide_is_opened(lab):
    """It was found after the survey, when the run was in the ledger, and the command said that nothing had run."""
    with pytest.raises(ConfigError, match=r"compute\.gpus"):
        run(lab.job(compute={"cpus": 1, "gpus": 1}))
    assert not lab.db.exists()


@pytest.mark.parametrize("step", ["survey_slides", "plan_tiles", "fill_tiles"])
@pytest.mark.parametrize("error", [OSError("the store is away"), ConfigError("cannot open the table: the store is away")])
def test_whatever_goes_wrong_once_work_has_begun_ends_in_a_report(lab, monkeypatch, step, error):
    with monkeypatch.context() as store:
        store.setattr(steps, step, fails_at(1, error))
        report = failed(lab, match="the store is away")
    assert report.listed == report.surveyed == (0 if step == "survey_slides" else 1)
    assert ledger(lab) == [(report.run, "started"), (report.run, "failed")]


def test_a_run_that_has_only_surveyed_slides_to_fill_is_in_the_ledger_from_its_start(lab, monkeypatch):
    """It was written down at its end only: killed before that, it left rows of a run that nothing was known of."""
    with monkeypatch.context() as store:
        store.setattr(steps, "fill_tiles", fails_at(1))
        first = failed(lab, match="the store is away")
    with monkeypatch.context() as store:
        store.setattr(steps, "finish", fails_at(1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(lab.job())
    [_, _, (second, status)] = ledger(lab)
    assert (second != first.run, status) == (True, "started")
    assert {row["_run"] for row in lab.tiles().values()} == {second}
    assert lab.run().unchanged == 1


@pytest.mark.parametrize("ledger_too", [False, True])
def test_a_page_or_a_ledger_that_cannot_be_written_does_not_cost_the_report(lab, tmp_path, monkeypatch, ledger_too):
    """The run ended in a traceback, after all its work."""
    (tmp_path / "file").write_text("")
    if ledger_too:
        monkeypatch.setattr("jobs.slides.record_run", fails_at(2))
    report = failed(lab, match="the page could not be written", page=str(tmp_path / "file" / "page"))
    assert (report.ok, report.page) == (1, None)
    assert len(lab.tiles()) == report.tiles.written
