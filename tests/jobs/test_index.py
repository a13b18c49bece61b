"""The index job: its file is valid, its plan changes nothing, its report is one JSON line, a wrong column exits 2."""

import json
import subprocess
import sys
from pathlib import Path

from jobs.index import IndexJob, plan, run
from pipeline import config
from pipeline.index import IndexSettings
from tests.tables import clustered, rows_of, write


def tessera(*arguments):
    return subprocess.run([sys.executable, "-m", "jobs", "index", *arguments], check=False, capture_output=True, text=True)


def test_the_job_file_is_valid():
    assert config.load(IndexJob, Path("jobs/index.yaml")).index.kind == "auto"


def test_run_builds_and_a_rerun_has_nothing_to_do(tmp_path):
    job = IndexJob(table=write(tmp_path, rows_of(clustered(600))), index=IndexSettings(kind="ivf_hnsw_sq", scalar=["id"]))
    assert plan(job)["steps"] == ["build vector_idx (HnswSq): the job asks for it", "build id_idx (BTree): filters name it"]
    first = run(job)
    assert plan(job)["steps"] == []
    assert (first.kind, first.indexed_rows, run(job).version) == ("ivf_hnsw_sq", 600, first.version)


def test_the_command_prints_one_line_of_json(tmp_path):
    write(tmp_path, rows_of(clustered(600)))
    result = tessera("jobs/index.yaml", f"table.uri={tmp_path}", "table.name=photos", "index.kind=ivf_rq")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["job"], report["kind"], report["rows"], report["unindexed_rows"]) == ("index", "ivf_rq", 600, 0)
    assert [state["kind"] for state in report["indices"]] == ["BTree", "IvfRq"]


def test_a_wrong_column_or_table_exits_2(tmp_path):
    write(tmp_path, rows_of(clustered(30)))
    column = tessera("jobs/index.yaml", f"table.uri={tmp_path}", "table.name=photos", "index.scalar=[lable]")
    assert (column.returncode, column.stdout) == (2, "")
    assert "did you mean 'label'?" in column.stderr
    table = tessera("jobs/index.yaml", f"table.uri={tmp_path}", "table.name=none")
    assert table.returncode == 2
    assert "there is no table 'none'" in table.stderr
