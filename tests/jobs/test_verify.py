"""The verify job: its report and exit status, beside jobs that run or were killed, against the source, in an object store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import embed
from jobs.verify import VerifyJob, plan, run
from pipeline import config
from pipeline.config import ConfigError, JobFailed, Ref
from pipeline.table.at import TableAt
from tests.jobs.test_embed import job_of, texts  # noqa: F401
from tests.jobs.test_embed_s3 import store  # noqa: F401
from tests.table.verifying import age, append, changed, rewrite, row_of

# ruff: noqa: F811

HASHING = {"target": "pipeline.encoders.hashing:Hashing", "args": {"dim": 16}}


def verify_job(tmp_path, **values):
    return VerifyJob.model_validate({"table": {"uri": str(tmp_path / "db"), "name": "t"}, **values})


def lines(folder):
    return {"target": "tests.sources:Lines", "args": {"uri": str(folder)}}


def tessera(job, *arguments):
    return subprocess.run([sys.executable, "-m", "jobs", job, *map(str, arguments)], check=False, capture_output=True, text=True)


def findings(report):
    return {finding.code: finding.count for finding in report.findings}


def test_the_job_file_is_valid():
    assert config.load(VerifyJob, Path("jobs/verify.yaml")).repair is False


def test_the_command_says_what_is_wrong_and_mends_it(cluster, tmp_path, texts):
    embed.run(job_of(tmp_path, texts))
    here = (f"table.uri={tmp_path / 'db'}", "table.name=t")
    sound = tessera("verify", *here)
    assert (sound.returncode, json.loads(sound.stdout)["findings"]) == (0, []), sound.stderr

    at = TableAt(uri=str(tmp_path / "db"), name="t")
    append(at, row_of(at, "i03"))
    rewrite(at, "i04", vector=[0.0] * 16)
    broken = tessera("verify", *here)
    assert broken.returncode == 1
    assert json.loads(broken.stdout)["wrong"] == 2
    assert "failed: wrong with" in broken.stderr and "duplicate_ids (1), zero_vectors (1)" in broken.stderr
    assert set(json.loads(tessera("verify", *here, "--plan").stdout)["repair"]) == {"duplicate_ids", "zero_vectors"}
    assert at.require().count_rows() == 31, "a plan changes nothing"

    mended = tessera("verify", *here, "--repair")
    report = json.loads(mended.stdout)
    assert (mended.returncode, report["wrong"], len(report["before"]), report["facts"]["rows"]) == (0, 0, 2, 29)
    assert {entry["code"]: entry["count"] for entry in report["repaired"]} == {"duplicate_ids": 1, "zero_vectors": 1}
    [recorded] = at.open(".runs").to_table(filter="job = 'verify'").to_pylist()
    assert json.loads(recorded["report"])["repaired"] == report["repaired"]
    assert embed.run(job_of(tmp_path, texts)).written == 1


def test_a_repair_that_would_delete_too_much_is_refused_with_the_report(cluster, tmp_path, texts):
    embed.run(job_of(tmp_path, texts))
    rewrite(TableAt(uri=str(tmp_path / "db"), name="t"), "i04", vector=[0.0] * 16)
    with pytest.raises(JobFailed, match=r"max_deleted=0\.01") as refused:
        run(verify_job(tmp_path, repair=True, max_deleted=0.01))
    assert findings(refused.value.report) == {"zero_vectors": 1}


def test_what_a_repair_cannot_mend_is_said_with_what_to_do(cluster, tmp_path, texts):
    embed.run(job_of(tmp_path, texts))
    TableAt(uri=str(tmp_path / "db"), name="t").require().delete("id = 'i04'")
    with pytest.raises(JobFailed, match=r"no repair mends lost_rows: run the embed job") as failed:
        run(verify_job(tmp_path, repair=True))
    assert findings(failed.value.report) == {"lost_rows": 1}
    assert "lost_rows" in plan(verify_job(tmp_path))["beyond_repair"]
    assert embed.run(job_of(tmp_path, texts)).written == 1
    assert run(verify_job(tmp_path)).findings == []


def test_wrong_configuration_exits_2_and_says_what_to_do(tmp_path):
    lance.write_dataset(pa.table({"id": ["a"]}), str(tmp_path / "photos.lance"))
    misspelt = tessera("verify", f"table.uri={tmp_path}", "table.name=photo")
    assert (misspelt.returncode, misspelt.stdout) == (2, "")
    assert "did you mean 'photos'?" in misspelt.stderr
    foreign = tessera("verify", f"table.uri={tmp_path}", "table.name=photos")
    assert foreign.returncode == 2 and "was not made by Tessera" in foreign.stderr
    with pytest.raises(ConfigError, match="give `source`"):
        run(verify_job(tmp_path, sample=3))


def test_the_table_is_compared_with_its_source(cluster, tmp_path, texts):
    embed.run(job_of(tmp_path, texts))
    same = run(verify_job(tmp_path, source=lines(texts), sample=8))
    assert (same.source.listed, same.source.unchanged, same.source.sampled, same.findings) == (30, 30, 8, [])
    assert same.source.worst_cosine > 1 - 1e-6
    (texts / "new.txt").write_text("a new one")
    (texts / "i03.txt").write_text("changed its mind")
    (texts / "i04.txt").unlink()
    with pytest.raises(JobFailed) as failed:
        run(verify_job(tmp_path, source=lines(texts), encoder=HASHING))
    assert findings(failed.value.report) == {"missing_items": 1, "changed_items": 1, "vanished_items": 1}
    assert {f.code: f.examples for f in failed.value.report.findings}["missing_items"] == ["new"]


def test_containers_are_compared_with_their_source(cluster, tmp_path):
    folder = tmp_path / "ledgers"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.json").write_text(json.dumps([[f"{name}{i}", f"row {i} of {name}"] for i in range(25)]))
    ledgers = {"target": "tests.sources:Ledgers", "args": {"uri": str(folder)}}
    embed.run(job_of(tmp_path, folder, target="Ledgers"))
    same = run(verify_job(tmp_path, source=ledgers, sample=10))
    assert (same.source.listed, same.source.unchanged, same.source.sampled, same.findings) == (75, 75, 10, [])
    (folder / "d.json").write_text(json.dumps([["d0", "new"]]))
    os.utime(folder / "a.json", (1, 1))
    with pytest.raises(JobFailed) as failed:
        run(verify_job(tmp_path, source=ledgers))
    assert findings(failed.value.report) == {"missing_items": 1, "unread_containers": 1}


def test_a_sample_of_containers_without_rows_is_no_error(cluster, tmp_path):
    """Sampling an empty file raised `must pass at least one table`."""
    folder = tmp_path / "rows"
    folder.mkdir()
    pq.write_table(pa.table({"id": ["a"], "text": ["row"]}), folder / "a.parquet")
    rows = {"target": "pipeline.readers.parquet:Parquet", "args": {"uri": str(folder), "id": "id", "text": "text"}}
    job = job_of(tmp_path, folder)
    embed.run(job.model_copy(update={"source": Ref.model_validate(rows)}))
    pq.write_table(pa.table({"id": ["a"], "text": ["row"]}).slice(0, 0), folder / "a.parquet")
    report = run(verify_job(tmp_path, source=rows, sample=3))
    assert (report.source.sampled, set(findings(report))) == (0, {"unread_containers"})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_vector_that_the_encoder_does_not_give_again_is_found(cluster, tmp_path, texts, dtype):
    embed.run(job_of(tmp_path, texts, table={"dtype": dtype}))
    at = TableAt(uri=str(tmp_path / "db"), name="t")
    assert run(verify_job(tmp_path, source=lines(texts), sample=30)).findings == []
    rewrite(at, "i04", vector=row_of(at, "i05")["vector"][0].as_py())
    with pytest.raises(JobFailed) as failed:
        run(verify_job(tmp_path, source=lines(texts), sample=30))
    assert findings(failed.value.report) == {"other_vectors": 1}


def test_a_killed_workers_orphan_is_noted_and_deleted_when_it_is_old(cluster, tmp_path, texts):
    embed.run(job_of(tmp_path, texts, encoder={"target": "tests.sources:DiesAfterStaging", "args": {"dim": 16, "memory": str(tmp_path)}}))
    left = findings(run(verify_job(tmp_path)))
    assert set(left) == {"unreferenced_files"} and left["unreferenced_files"] in (1, 2), "two chunks may have been in flight"
    for path in (tmp_path / "db" / "t.lance" / "data").iterdir():
        age(path, days=8)
    assert findings(run(verify_job(tmp_path))) == {"orphaned_files": left["unreferenced_files"]}
    mended = run(verify_job(tmp_path, repair=True))
    assert (findings(mended), mended.facts.rows) == ({}, 30)


def start(tmp_path, source, *, seconds, commit_every_s):
    job = {
        "source": lines(source),
        "encoder": {"target": "tests.sources:Faulty", "args": {"dim": 16, "seconds": seconds}},
        "table": {"uri": str(tmp_path / "db"), "name": "t"},
        "compute": {"cpus": 1, "chunk_rows": 4},
        "sync": {"commit_every_s": commit_every_s},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.embed", str(tmp_path / "job.yaml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_what_a_killed_driver_leaves_is_noted_and_gone_after_the_rerun(tmp_path, texts):
    driver = start(tmp_path, texts, seconds=0.5, commit_every_s=1000)
    receipts = tmp_path / "db" / "t.staging" / "receipts"
    deadline = time.monotonic() + 120
    while not receipts.is_dir() or len(list(receipts.iterdir())) < 2:
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(2)  # its workers end
    report = run(verify_job(tmp_path))
    left, chunks = findings(report), report.facts.chunks
    assert (chunks.planned, chunks.present, chunks.rowless) == (8, 0, 0)
    assert chunks.staged >= 2 and chunks.missing >= 1 and chunks.staged + chunks.missing == 8
    assert left.pop("unreferenced_files", 0) <= 2, "fragments whose receipt was not written"
    assert left.pop("staged_receipts") >= 8
    assert left.pop("leftovers", 0) <= 2, "journals of the chunks in hand"
    assert left == {"unfinished_runs": 1, "empty_table": 1}
    rerun = start(tmp_path, texts, seconds=0, commit_every_s=0)
    out, err = rerun.communicate(timeout=300)
    assert rerun.returncode == 0, err[-2000:]
    assert json.loads(out)["adopted"] >= 8
    after = run(verify_job(tmp_path))
    assert set(findings(after)) <= {"unreferenced_files", "leftovers"}
    assert (after.facts.rows, after.facts.ids, after.facts.chunks.present, after.facts.chunks.missing) == (30, 30, 8, 0)


def test_repairs_beside_a_running_embed_lose_nothing(tmp_path, texts):
    out, err = start(tmp_path, texts, seconds=0, commit_every_s=0).communicate(timeout=300)
    assert json.loads(out)["written"] == 30, err[-2000:]
    at = TableAt(uri=str(tmp_path / "db"), name="t")
    for i in range(5, 25):
        (texts / f"i{i:02}.txt").write_text(f"changed {i}")
    for i in range(30, 50):
        (texts / f"i{i:02}.txt").write_text(f"text number {i}")
    job = start(tmp_path, texts, seconds=0.3, commit_every_s=0)
    rounds, mended = 0, 0
    while job.poll() is None:
        append(at, row_of(at, f"i{5 + rounds % 20:02}"))  # a row that the job is about to replace, or has replaced
        if row_of(at, f"i{rounds % 5:02}").num_rows:
            rewrite(at, f"i{rounds % 5:02}", vector=[0.0] * 16)
        report = run(verify_job(tmp_path, repair=True, max_deleted=1.0))
        mended += sum(done.count for done in report.repaired if report.facts.runs.get("started"))
        rounds += 1
    assert mended > 3, "the repairs should have met the running job"
    out, err = job.communicate()
    assert job.returncode == 0, err[-3000:]
    rerun = start(tmp_path, texts, seconds=0, commit_every_s=0)
    out, err = rerun.communicate(timeout=300)
    assert rerun.returncode == 0, err[-3000:]
    report = run(verify_job(tmp_path, source=lines(texts), sample=50))
    assert (report.facts.rows, report.facts.ids, report.source.unchanged, report.source.sampled) == (50, 50, 50, 50)
    assert report.wrong == 0


def test_a_table_in_s3_is_verified_and_mended(cluster, tmp_path, texts, store):
    table = {"uri": "s3://tables/verified", "name": "t", "storage_options": store}
    embed.run(job_of(tmp_path, texts, table=table))
    assert run(VerifyJob(table=table)).findings == []
    at = TableAt(**table)
    lance.write_dataset(row_of(at, "i03"), at.path(), mode="append", storage_options=store)
    lance.write_dataset(changed(row_of(at, "i04"), id="x", vector=[0.0] * 16), at.path(), mode="append", storage_options=store)
    orphan = tmp_path / "orphan"
    orphan.write_bytes(b"x" * 100)
    lance.file.LanceFileSession(at.path(), storage_options=store).upload_file(str(orphan), "data/orphan.lance")
    time.sleep(1.1)  # an object store keeps whole seconds
    second = 1 / (24 * 3600)
    with pytest.raises(JobFailed) as failed:
        run(VerifyJob(table=table, orphans_older_than_days=second))
    assert findings(failed.value.report) == {"duplicate_ids": 1, "zero_vectors": 1, "orphaned_files": 1}
    mended = run(VerifyJob(table=table, orphans_older_than_days=second, repair=True))
    assert mended.facts.rows == 30
    assert {done.code: done.count for done in mended.repaired} == {"duplicate_ids": 1, "zero_vectors": 1, "orphaned_files": 1}
    with pytest.raises(ConfigError, match="it has t;"):
        run(VerifyJob(table={**table, "name": "tt"}))
