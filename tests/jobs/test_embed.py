"""The embed job on a real Ray and a real table: what a run writes, and what a second run does not."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from jobs import embed
from jobs.embed import EmbedJob, plan, run
from pipeline.config import ConfigError, JobFailed, Ref
from pipeline.encoders.hashing import Hashing
from pipeline.fill import Filling
from pipeline.table.at import TableAt
from pipeline.table.stage import Staging
from tests.sources import items

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"i{i:02}.txt").write_text(f"text number {i} of thirty")
    return folder


def job_of(tmp_path, source, *, target="Lines", encoder=None, **changes):
    values = {
        "source": {"target": f"tests.sources:{target}", "args": {"uri": str(source)}},
        "encoder": encoder or {"target": "pipeline.encoders.hashing:Hashing", "args": {"dim": 16}},
        "table": {"uri": str(tmp_path / "db"), "name": "t"},
        "compute": {"cpus": 1, "chunk_rows": 8},
        "limits": {"max_rejects": 1.0},
    }
    for key, value in changes.items():
        values.setdefault(key, {}).update(value)
    return EmbedJob.model_validate(values)


def faulty(**args):
    return {"target": "tests.sources:Faulty", "args": {"dim": 16, **args}}


def table(tmp_path):
    return TableAt(uri=str(tmp_path / "db"), name="t")


def vectors(tmp_path):
    rows = table(tmp_path).require().to_table(columns=["id", "vector"]).to_pylist()
    assert len(rows) == len({row["id"] for row in rows}), "an id stands twice"
    return {row["id"]: row["vector"] for row in rows}


def rejects(tmp_path):
    dataset = table(tmp_path).open(".rejects")
    return {row["id"]: row["reason"] for row in dataset.to_table().to_pylist()} if dataset else {}


def adds_up(report):
    return report.listed == report.unchanged + report.written + report.replaced + report.rejected + report.failed


def test_every_item_is_in_the_table_with_the_encoders_vector(tmp_path, texts):
    report = run(job_of(tmp_path, texts))
    assert (report.listed, report.written, report.rows_in_table) == (30, 30, 30)
    stored = vectors(tmp_path)
    names = sorted(stored)
    batch = items(names, names, names, [(texts / f"{name}.txt").read_text() for name in names]).select(["id", "text"])
    from pipeline.media import to_pixels

    expected = Hashing(dim=16).encode(batch.append_column("image", to_pixels([None] * len(names))))
    np.testing.assert_allclose(np.array([stored[name] for name in names]), expected, atol=1e-6)


def test_rerun_changes_nothing_and_adds_no_version(tmp_path, texts):
    first = run(job_of(tmp_path, texts))
    second = run(job_of(tmp_path, texts))
    assert (second.listed, second.unchanged, second.written, second.commits) == (30, 30, 0, 0)
    assert second.table_version == first.table_version
    assert adds_up(second)


def test_new_changed_and_vanished_items_fall_out_of_one_subtraction(tmp_path, texts):
    run(job_of(tmp_path, texts))
    (texts / "new.txt").write_text("a new one")
    (texts / "i03.txt").write_text("changed its mind")
    (texts / "i04.txt").unlink()
    assert {k: plan(job_of(tmp_path, texts))[k] for k in ("to_do", "changed", "unchanged", "vanished")} == {
        "to_do": 2,
        "changed": 1,
        "unchanged": 28,
        "vanished": 1,
    }
    report = run(job_of(tmp_path, texts))
    assert (report.written, report.replaced, report.unchanged, report.vanished, report.deleted) == (1, 1, 28, 1, 0)
    assert "i04" in vectors(tmp_path)
    report = run(job_of(tmp_path, texts, sync={"vanished": "delete"}))
    assert (report.deleted, report.rows_in_table) == (1, 30)
    assert "i04" not in vectors(tmp_path)
    assert adds_up(report)


def test_a_source_that_lost_most_of_its_items_deletes_nothing(tmp_path, texts):
    run(job_of(tmp_path, texts))
    for i in range(20):
        (texts / f"i{i:02}.txt").unlink()
    with pytest.raises(JobFailed, match="max_vanished"):
        run(job_of(tmp_path, texts, sync={"vanished": "delete"}))
    assert len(vectors(tmp_path)) == 30


def test_bad_items_are_rejects_with_a_reason_and_take_nobody_along(tmp_path, texts):
    (texts / "bad1.txt").write_text("   ")
    (texts / "bad2.txt").write_text("please raise now")
    (texts / "bad3.txt").write_text("this is nan")
    report = run(job_of(tmp_path, texts, encoder=faulty()))
    assert rejects(tmp_path) == {"bad1": "empty", "bad2": "encode_failed", "bad3": "not_finite"}
    assert (report.written, report.rejected, report.rows_in_table) == (30, 3, 30)
    assert adds_up(report)
    again = run(job_of(tmp_path, texts, encoder=faulty()))
    assert (again.unchanged, again.rejected, again.commits) == (30, 3, 0)


def test_a_mended_item_is_embedded_and_its_reject_forgotten(tmp_path, texts):
    (texts / "bad.txt").write_text(" ")
    run(job_of(tmp_path, texts))
    assert rejects(tmp_path) == {"bad": "empty"}
    (texts / "bad.txt").write_text("good now")
    report = run(job_of(tmp_path, texts))
    assert (report.written, report.rejected) == (1, 0)
    assert rejects(tmp_path) == {}


@pytest.mark.parametrize("target", ["Lines", "Ledgers"])
def test_a_reject_that_is_tried_again_and_succeeds_is_forgotten(tmp_path, target):
    """It used to stay in the rejects, and a container that held it was not read again."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_text("raise")
    (folder / "b.txt").write_text("fine")
    (folder / "c.json").write_text(json.dumps([["a", "raise"], ["b", "fine"]]))
    first = run(job_of(tmp_path, folder, target=target, encoder=faulty()))
    assert (first.written, first.rejected, rejects(tmp_path)) == (1, 1, {"a": "encode_failed"})
    assert run(job_of(tmp_path, folder, target=target)).rejected == 1
    retried = run(job_of(tmp_path, folder, target=target, sync={"retry_rejects": True}))
    assert (retried.unchanged, retried.written, retried.rejected, rejects(tmp_path)) == (1, 1, 0, {})


@pytest.mark.parametrize("target", ["tests.sources:Pointers", "pipeline.readers.jsonl:JsonLines"])
def test_what_was_missing_is_tried_again_by_the_next_run(tmp_path, target):
    """A mount that was away for a minute made rejects that no later run tried again: neither the item nor its container had changed."""
    source, away, mount = tmp_path / "source", tmp_path / "away", tmp_path / "mount"
    source.mkdir()
    away.mkdir()
    (away / "b.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8), (9, 90, 200)).save(away / "a.png")
    uris = {name: str(mount / f"{name}.png") for name in "abc"}
    for name, uri in uris.items():
        (source / f"{name}.txt").write_text(uri)
    (source / "all.jsonl").write_text("".join(json.dumps({"id": name, "picture": uri}) + "\n" for name, uri in uris.items()))
    args = {"uri": str(source), **({"id": "id", "image_uri": "picture"} if "JsonLines" in target else {})}
    job = job_of(tmp_path, source, encoder={"target": "tests.sources:Quadrants"}).model_copy(update={"source": Ref(target=target, args=args)})
    first = run(job)
    assert (first.written, first.rejected, rejects(tmp_path)) == (0, 3, dict.fromkeys("abc", "missing"))
    away.rename(mount)
    second = run(job)
    assert (second.written, second.rejected, rejects(tmp_path)) == (1, 2, {"b": "not_an_image", "c": "missing"})
    third = run(job)
    assert (third.written, third.unchanged, third.rejected, third.commits) == (0, 1, 2, 0)
    assert rejects(tmp_path) == {"b": "not_an_image", "c": "missing"}
    assert adds_up(third)


def test_too_many_rejects_fail_the_job_and_leave_the_table_consistent(tmp_path, texts):
    for i in range(4):
        (texts / f"bad{i}.txt").write_text(" ")
    with pytest.raises(JobFailed, match="max_rejects") as failure:
        run(job_of(tmp_path, texts, limits={"max_rejects": 0.1}))
    assert adds_up(failure.value.report)
    assert set(vectors(tmp_path)) <= {f"i{i:02}" for i in range(30)}
    report = run(job_of(tmp_path, texts, limits={"max_rejects": 0.2}))
    assert (report.rows_in_table, report.rejected) == (30, 4)


def test_an_encoder_that_always_fails_fails_the_job_not_the_items(tmp_path, texts):
    for path in texts.iterdir():
        path.write_text("raise")
    with pytest.raises(JobFailed, match="told to raise") as failure:
        run(job_of(tmp_path, texts, encoder=faulty()))
    assert failure.value.report.failed == 30
    assert rejects(tmp_path) == {}


def test_another_encoder_is_refused_before_anything_is_written(tmp_path, texts):
    run(job_of(tmp_path, texts))
    version = table(tmp_path).require().version
    with pytest.raises(ConfigError, match=r"choose another table\.name"):
        run(job_of(tmp_path, texts, encoder=faulty(dim=32)))
    assert table(tmp_path).require().version == version


def test_an_item_that_kills_its_worker_is_found_and_rejected(tmp_path, texts):
    (texts / "poison.txt").write_text("kill")
    report = run(job_of(tmp_path, texts, encoder=faulty()))
    assert rejects(tmp_path) == {"poison": "worker_died"}
    assert (report.written, report.rejected, report.failed) == (30, 1, 0)


def test_items_that_kill_their_workers_take_no_chunk_along_that_is_worked_on_beside_them(tmp_path, texts):
    for number in range(0, 30, 10):
        (texts / f"i{number:02}-poison.txt").write_text("kill")
    report = run(
        job_of(tmp_path, texts, encoder={"target": "tests.sources:Faulty", "args": {"seconds": 0.05}}, compute={"chunk_rows": 4, "threads": 2})
    )
    assert rejects(tmp_path) == dict.fromkeys(("i00-poison", "i10-poison", "i20-poison"), "worker_died")
    assert (report.written, report.failed) == (30, 0)


def test_a_hanging_item_cannot_outlive_its_time(tmp_path, texts):
    (texts / "slow.txt").write_text("hang")
    report = run(job_of(tmp_path, texts, encoder=faulty(), limits={"max_rejects": 1.0, "item_timeout_s": 0.2}))
    assert rejects(tmp_path) == {"slow": "worker_died"}
    assert report.written == 30


def test_containers_are_subtracted_row_by_row_and_then_as_a_whole(tmp_path):
    folder = tmp_path / "ledgers"
    folder.mkdir()
    rows = [[f"r{i}", f"row number {i}"] for i in range(25)]
    (folder / "one.json").write_text(json.dumps(rows))
    (folder / "two.json").write_text(json.dumps([["s1", "another"], ["s2", " "]]))
    first = run(job_of(tmp_path, folder, target="Ledgers"))
    assert (first.listed, first.written, first.rejected) == (27, 26, 1)
    second = run(job_of(tmp_path, folder, target="Ledgers"))
    assert (second.unchanged, second.rejected, second.commits) == (26, 1, 0)
    assert plan(job_of(tmp_path, folder, target="Ledgers"))["chunks"] == 0
    rows[3][1] = "row number three"
    del rows[20]
    (folder / "one.json").write_text(json.dumps([*rows, ["r99", "new"]]))
    third = run(job_of(tmp_path, folder, target="Ledgers", sync={"vanished": "delete"}))
    assert (third.written, third.replaced, third.unchanged, third.rejected, third.deleted) == (1, 1, 24, 1, 1)
    assert plan(job_of(tmp_path, folder, target="Ledgers"))["chunks"] == 0
    assert set(vectors(tmp_path)) == {r[0] for r in rows} | {"r99", "s1"}


def test_rows_that_move_to_another_container_are_not_embedded_again(tmp_path):
    folder = tmp_path / "ledgers"
    folder.mkdir()
    rows = [[f"r{i}", f"row number {i}"] for i in range(12)]
    (folder / "one.json").write_text(json.dumps(rows))
    run(job_of(tmp_path, folder, target="Ledgers"))
    (folder / "one.json").unlink()
    (folder / "part-a.json").write_text(json.dumps(rows[:6]))
    (folder / "part-b.json").write_text(json.dumps(rows[6:]))
    report = run(job_of(tmp_path, folder, target="Ledgers", sync={"vanished": "delete"}))
    assert (report.unchanged, report.written, report.deleted, report.rows_in_table) == (12, 0, 0, 12)


def test_ids_that_repeat_in_containers_are_rejects_on_every_run(tmp_path):
    folder = tmp_path / "ledgers"
    folder.mkdir()
    rows = [[f"r{i}", f"row number {i}"] for i in range(15)]
    (folder / "one.json").write_text(json.dumps([*rows, ["r1", "again"], ["r1", "row number 1"], ["r2", "row number 2"]]))
    first = run(job_of(tmp_path, folder, target="Ledgers"))
    assert (first.listed, first.written, first.rejected) == (18, 15, 3)
    os.utime(folder / "one.json", (1, 1))
    second = run(job_of(tmp_path, folder, target="Ledgers"))
    assert (second.unchanged, second.rejected, second.written, second.replaced) == (15, 3, 0, 0)


def test_a_restored_table_is_filled_again(tmp_path):
    folder = tmp_path / "ledgers"
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps([[f"r{i}", f"row {i}"] for i in range(5)]))
    run(job_of(tmp_path, folder, target="Ledgers"))
    dataset = table(tmp_path).require()
    dataset.delete("id = 'r3'")
    assert run(job_of(tmp_path, folder, target="Ledgers")).written == 1
    assert len(vectors(tmp_path)) == 5


def test_the_ledger_and_the_model_say_what_was_done(tmp_path, texts):
    job = job_of(tmp_path, texts, table={"uri": str(tmp_path / "db"), "name": "t", "storage_options": {"secret_access_key": "hush"}})
    report = run(job)
    runs = table(tmp_path).open(".runs").to_table().to_pylist()
    assert [(r["run"], r["status"]) for r in runs] == [(report.run, "started"), (report.run, "done")]
    assert "hush" not in runs[0]["config"]
    assert json.loads(runs[1]["report"])["written"] == 30
    from pipeline.table.at import model_of

    model = model_of(table(tmp_path), report.fingerprint)
    assert Ref(target=model["target"], args=json.loads(model["args"])).build().fingerprint == report.fingerprint


def test_staged_work_of_a_dead_run_is_adopted(tmp_path, texts):
    from pipeline.prepare import prepare
    from pipeline.report import EmbedReport
    from pipeline.work import ChunkWorker

    job = job_of(tmp_path, texts)
    prepared = prepare(job.source, job.encoder, job.table, sync=job.sync, chunk_rows=8)
    filling = Filling(prepared, job.encoder, job.limits, job.sync, EmbedReport())
    filling.open()
    worker = ChunkWorker(filling.task(batch_size=4, threads=1))
    for chunk in prepared.plan.chunks[:2]:
        assert worker(chunk.id, chunk.work).error is None
    (texts / "a-new-first.txt").write_text("shifts every chunk")
    report = run(job)
    assert (report.adopted, report.written, report.rows_in_table) == (16, 31, 31)
    assert Staging(job.table).receipts() == []


def test_a_staged_file_that_was_cleaned_away_is_computed_again(tmp_path, texts):
    from pipeline.prepare import prepare
    from pipeline.report import EmbedReport
    from pipeline.work import ChunkWorker

    job = job_of(tmp_path, texts)
    prepared = prepare(job.source, job.encoder, job.table, sync=job.sync, chunk_rows=8)
    filling = Filling(prepared, job.encoder, job.limits, job.sync, EmbedReport())
    filling.open()
    receipt = ChunkWorker(filling.task(batch_size=4, threads=1))(prepared.plan.chunks[0].id, prepared.plan.chunks[0].work)
    (tmp_path / "db" / "t.lance" / "data" / receipt.files()[0]).unlink()
    report = run(job)
    assert (report.adopted, report.written) == (0, 30)


def test_half_precision_tables_hold_the_same_directions(tmp_path, texts):
    run(job_of(tmp_path, texts, table={"dtype": "float16"}))
    assert str(table(tmp_path).require().schema.field("vector").type) == "fixed_size_list<item: halffloat>[16]"
    with pytest.raises(ConfigError, match=r"table\.dtype"):
        run(job_of(tmp_path, texts))


def test_a_run_deletes_nothing_that_an_overlapping_one_has_brought(tmp_path):
    """What another job committed after the listing, or before this one could, used to count as vanished."""
    folder = tmp_path / "ledgers"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps([[f"a{i}", f"text {i}"] for i in range(10)]))
    job = job_of(tmp_path, folder, target="Ledgers", sync={"vanished": "delete", "max_vanished": 1.0})
    run(job)
    (folder / "a.json").write_text(json.dumps([[f"a{i}", f"text {i}"] for i in range(11)]))
    late = embed._prepare(job)
    (folder / "b.json").write_text(json.dumps([["b0", "another"]]))
    assert run(job).written == 2
    report, problem, _ = embed._fill(job, late)
    assert (report.overtaken, report.vanished, report.deleted, problem) == (1, 0, 0, None)
    assert report.rows_in_table == 12
