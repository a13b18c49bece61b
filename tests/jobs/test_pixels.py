"""A reader that gives pixels itself: decoded in the workers' threads, measured, rejected and watched one by one."""

import json

import pytest

from jobs.embed import run
from pipeline.config import JobFailed
from tests.jobs.test_embed import adds_up, job_of, rejects, table

pytestmark = pytest.mark.usefixtures("cluster")


def test_pixels_are_measured_and_a_bad_or_hanging_one_costs_itself_only(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    greys = {f"i{i}": str(10 * i) for i in range(12)}
    (folder / "a.json").write_text(json.dumps([*greys.items(), ["bad", "corrupt"], ["slow", "hang"]]))
    (folder / "b.json").write_text(json.dumps([["other", "5"]]))
    (folder / "b.replaced").touch()
    with pytest.raises(JobFailed, match="failed") as failure:
        run(job_of(tmp_path, folder, target="Painted", limits={"item_timeout_s": 0.5}))
    report = failure.value.report
    assert adds_up(report)
    assert (report.written, report.rejected, report.failed) == (12, 2, 1), "a container that was replaced is not committed"
    assert rejects(tmp_path) == {"bad": "corrupt_tile", "slow": "worker_died"}
    rows = table(tmp_path).require().to_table(columns=["id", "grey"]).to_pylist()
    assert {row["id"]: row["grey"] for row in rows} == {item: float(grey) for item, grey in greys.items()}
    (folder / "b.replaced").unlink()
    again = run(job_of(tmp_path, folder, target="Painted"))
    assert (again.unchanged, again.written, again.rejected) == (12, 1, 2)
