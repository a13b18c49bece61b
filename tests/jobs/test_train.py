"""The train job on Ray Train. Each fit takes 25 seconds to start, so there are few, and tests share them."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jobs.embed import EmbedJob
from jobs.embed import run as embed
from jobs.train import TrainJob, _settings, _task, plan, run
from pipeline.command import to_json
from pipeline.config import ConfigError
from pipeline.table.at import TableAt
from pipeline.training.estimate import estimate
from pipeline.training.feed import Reader
from pipeline.training.fit import RayLink
from pipeline.training.journal import Journal
from pipeline.training.loop import train
from pipeline.training.run import finished, held
from pipeline.vlm.message import Message
from pipeline.vlm.saved import open_vlm
from tests.training.pairs import Folder, deadly, job_values, losses, rows, write_pairs
from tests.vlm.models import save_model

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pairs, and a small Qwen2-VL."""
    folder = tmp_path_factory.mktemp("job")
    write_pairs(folder)
    save_model(folder / "model", "qwen2_vl")
    return folder


def job(place, name, **sections):
    return TrainJob.model_validate(job_values(place, place / "model", name=name, steps=STEPS, **sections))


@pytest.fixture(scope="module")
def killed_worker(place, cluster):
    """A run on 2 workers, one of which is killed at step 5, once."""
    report = run(job(place, "worker", workers={"num": 2, "max_failures": 1}, loss=deadly(5, place / "killed")))
    assert (place / "killed").exists()
    return report


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The same run by one process, without Ray: its folder."""
    task = _task(job(place, "uninterrupted"))
    (place / "runs" / "uninterrupted").mkdir(parents=True)
    train(task, Folder(place / "uninterrupted"), torch.device("cpu"))
    return place / "runs" / "uninterrupted"


def start(place, values, log):
    path = place / f"{values['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(values))
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.train", str(path)], stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
        )


@pytest.fixture(scope="module")
def killed_driver(place):
    """A run on 2 workers whose driver is killed after its 6th step, and that goes on with 1."""
    values = job_values(place, place / "model", name="driver", steps=STEPS, workers={"num": 2}, loss=slow(0.3))
    folder = place / "runs" / "driver"
    process = start(place, values, place / "driver.log")
    deadline = time.monotonic() + 240
    while max((line["step"] for line in Journal(folder / "metrics.jsonl").lines() if "loss" in line), default=0) < 6:
        assert process.poll() is None and time.monotonic() < deadline, (place / "driver.log").read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = Journal(folder / "metrics.jsonl").lines()[-1]["step"]
    assert before < STEPS - 1 and not (folder / "report.json").exists()
    process = start(place, {**values, "workers": {"num": 1}}, place / "driver2.log")
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, (place / "driver2.log").read_text()[-3000:]
    return json.loads(out)


def slow(seconds):
    return {"target": "tests.training.pairs:Slow", "args": {"seconds": seconds}}


def test_a_killed_driver_resumes_with_another_number_of_workers_and_a_killed_worker_changes_nothing(
    place, killed_worker, killed_driver, uninterrupted
):
    assert killed_worker.status == killed_driver["status"] == "done"
    assert killed_worker.steps == killed_driver["steps"] == STEPS
    assert 0 < killed_driver["rows"] < STEPS * 8
    first, second = (place / "runs" / name for name in ("worker", "driver"))
    assert rows(first) == rows(second) == rows(uninterrupted)
    assert sorted(rows(first)) == list(range(STEPS))
    drawn = [key for step in range(10) for key in rows(first)[step]]
    assert all(drawn.count(key) == 2 for key in drawn), "in 10 steps of 8, each of 40 rows comes twice"
    wanted = losses(uninterrupted)
    for folder in (first, second):
        # Sums over two workers differ in their last bits from those over one, and Adam's first steps make that larger.
        found = losses(folder)
        np.testing.assert_allclose([found[step] for step in range(STEPS)], [wanted[step] for step in range(STEPS)], rtol=1e-3)
    events = {folder.name: [line for line in Journal(folder / "metrics.jsonl").lines() if "event" in line] for folder in (first, second)}
    assert [(line["event"], line["workers"]) for line in events["worker"]] == [("begun", 2), ("resumed", 2)]
    assert [(line["event"], line["workers"]) for line in events["driver"]] == [("begun", 2), ("resumed", 1)]
    # The checkpoint after 4 steps may not have been kept yet when step 5 was the worker's last.
    assert events["worker"][1]["step"] in (0, 2, 4) and events["worker"][1]["again"] == 5 - events["worker"][1]["step"]
    assert killed_worker.after["recall@3"] == pytest.approx(killed_driver["after"]["recall@3"], abs=1e-6)


class DiesOnce(Reader):
    """A Reader whose process is killed at step 3, once: a file remembers it."""

    def read(self, step, place=0):
        memory = Path(self.parts[0].prepared.path).parent / "read"
        if step == 3 and not memory.exists():
            memory.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(step, place)


def told(read):
    sides = [
        [(told.message.text, [image.tobytes() for image in told.message.images]) for told in side]
        for side in (read.batch.queries, read.batch.positives)
    ]
    return sides, read.row_keys, read.batch.notes.positive_keys.tolist(), read.batch.notes.groups.tolist(), read.batch.rejects


def test_rows_read_by_actors_are_the_same_also_when_one_dies(place, cluster):
    task = _task(job(place, "read"))
    given = (task.parts, task.recipe.mixture, task.recipe.choice, 0, 2)
    with RayLink(place, readers=2).reading(DiesOnce(*given)) as read, ThreadPoolExecutor(3) as threads:
        found = list(threads.map(read, range(6), [0] * 6))
    assert (place / "prepared" / "read").exists()
    assert [told(each) for each in found] == [told(Reader(*given).read(step)) for step in range(6)]


def test_an_actor_tells_of_a_bad_image_as_the_worker_would(place, cluster):
    class Bad(Reader):
        def read(self, step, place=0):
            raise ConfigError("row 7: mend it")

    task = _task(job(place, "read"))
    bad = Bad(task.parts, task.recipe.mixture, task.recipe.choice, 0, 1)
    with RayLink(place, readers=1).reading(bad) as read, pytest.raises(ConfigError, match="row 7: mend it"):
        read(0, 0)


def test_a_run_whose_rows_are_read_by_an_actor_is_the_same_run(place, cluster, uninterrupted):
    report = run(job(place, "elsewhere", feeding={"workers": 1}))
    assert report.steps == STEPS
    folder = place / "runs" / "elsewhere"
    assert rows(folder) == rows(uninterrupted)
    np.testing.assert_allclose(list(losses(folder).values()), list(losses(uninterrupted).values()), rtol=1e-4)


def test_the_report_says_what_was_done(place, killed_worker):
    assert killed_worker.data == {"words": 40, "held": 12}
    assert killed_worker.loss_last < killed_worker.loss_first
    assert set(killed_worker.before) == {f"{part}{metric}@3" for part in ("", "held/") for metric in ("recall", "mrr", "ndcg")}
    assert killed_worker.rows_per_s > 0
    line = next(each for each in reversed(Journal(place / "runs" / "worker" / "metrics.jsonl").lines()) if "loss" in each)
    assert {"learning_rate", "gradient_norm", "cosine_positive", "cosine_negative", "effective_rank"} <= set(line)
    assert 1 <= line["effective_rank"] <= 8


def test_a_run_that_is_done_stays_done_and_other_settings_are_refused(place, killed_worker):
    again = job(place, "worker", workers={"num": 1}, loss=deadly(5, place / "killed"))
    assert run(again) == killed_worker
    with pytest.raises(ConfigError, match=r"began with optimisation.learning_rate=0.001, not 0.5; .*give another run.name"):
        run(job(place, "worker", optimisation={"learning_rate": 0.5}, loss=deadly(5, place / "killed")))


def test_settings_that_are_kept_and_shown_hold_no_credentials(place):
    reader = {"target": "pipeline.pairs.mmeb:Mmeb", "args": {"uri": "s3://bucket/x", "storage_options": {"secret_access_key": "hidden"}}}
    data = [{"name": "far", "reader": reader, "storage_options": {"token": "hidden"}}]
    settings = _settings(TrainJob.model_validate({**job_values(place, place / "model"), "data": data}))
    assert "hidden" not in json.dumps(settings) and settings["data"][0]["reader"]["args"]["uri"] == "s3://bucket/x"


def test_the_encoder_fills_a_table_and_a_query_finds_its_row(place, killed_worker):
    (place / "texts").mkdir()
    for name in ("RED CAT", "BLUE MOON", "GREEN TEA"):
        (place / "texts" / f"{name}.txt").write_text(name)
    encoder = {"target": "pipeline.vlm.saved:open_vlm", "args": {"folder": killed_worker.encoder}}
    source = {"target": "pipeline.readers.text:TextFiles", "args": {"uri": str(place / "texts")}}
    table = {"uri": str(place / "vectors"), "name": "t"}
    report = embed(EmbedJob.model_validate({"source": source, "encoder": encoder, "table": table, "compute": {"cpus": 1}}))
    assert (report.written, report.fingerprint) == (3, killed_worker.fingerprint)
    found = TableAt(**table).require().to_table(columns=["text", "vector"]).to_pylist()
    query = open_vlm(killed_worker.encoder).for_queries().encode_messages([Message("BLUE MOON")])[0]
    scores = {row["text"]: float(np.dot(row["vector"], query)) for row in found}
    assert max(scores, key=scores.get) == "BLUE MOON"


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"mixture": {"batch_size": 2}, "workers": {"num": 3}}, "batch_size=2 is less than 3 workers"),
        ({"mixture": {"batch_size": 64}}, "has 40 rows and a batch takes 64"),
        ({"workers": {"gpus": 1, "num": 9}}, "take 9 GPUs, and this machine has"),
        ({"model": {"target": "pipeline.training.vlm:TrainVlm", "args": {"model": "nowhere/at/all"}}}, "nowhere"),
        ({"model": {"target": "pipeline.training.vlm:TrainVml"}}, "did you mean 'TrainVlm'"),
        ({"loss": {"target": "pipeline.training.infonce:InfoNCE", "args": {"temperature": -1}}}, "must be above 0"),
        ({"run": {"folder": "s3://bucket/runs"}}, "a folder that all workers share"),
    ],
)
def test_what_the_job_file_can_fix_is_told_before_ray_starts(place, monkeypatch, sections, problem):
    monkeypatch.setattr("pipeline.training.fit.ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=problem):
        run(job(place, "wrong", **sections))
    assert not (place / "runs" / "wrong").exists()


def test_a_plan_says_what_a_run_would_do_and_where_it_would_go_on(place, monkeypatch):
    monkeypatch.setattr("pipeline.training.fit.ray.init", lambda **_: pytest.fail("a plan starts no Ray"))
    found = plan(job(place, "planned", optimisation={"steps": 5}, mixture={"batch_size": 8}))
    assert (found.steps, found.batch_size, found.rows) == (5, 8, 40)
    assert 0 < found.tokens_a_step <= found.tokens_a_step_most and found.tokens == 5 * found.tokens_a_step
    assert json.loads(to_json(found))["data"]["words"]["rows"] == 40
    words, held = found.data["words"], found.data["held"]
    assert (words.rows, words.rejects, words.share, words.epochs) == (40, {}, 1.0, 1.0)
    # One epoch in batches of 8 of 40 rows: the mean of its steps is that of its rows.
    assert found.tokens_a_step == pytest.approx(8 * words.tokens_a_row, abs=1)
    assert (held.rows, held.share, held.epochs) == (12, None, None)
    assert (found.goes_on_at, found.checkpoint_bytes) == (None, None)
    assert not (place / "runs" / "planned").exists()
    under_way = place / "runs" / "planned" / "checkpoint_1"
    under_way.mkdir(parents=True)
    (under_way / "position.json").write_text('{"position": {"step": 3}}')
    (under_way / "state.pt").write_bytes(b"x" * 100)
    again = estimate(_task(job(place, "planned", optimisation={"steps": 5})))
    assert (again.goes_on_at, again.checkpoint_bytes) == (3, 100 + len('{"position": {"step": 3}}'))


def test_a_run_that_another_process_works_on_is_left_alone(place, monkeypatch):
    busy = job(place, "busy")
    monkeypatch.setattr("pipeline.training.fit.fit", lambda *_: pytest.fail("nothing may start"))
    with held(busy.run), pytest.raises(ConfigError, match="busy is under way in another process"):
        run(busy)


def test_a_cluster_that_is_too_small_is_told_and_not_waited_for(place, cluster):
    with pytest.raises(ConfigError, match="there is room for 2 of them"):
        run(job(place, "large", workers={"num": 5}))
    with pytest.raises(ConfigError, match=r"feeding.workers=2 .* take 2 CPUs beside the workers' own, and the cluster has 1 left"):
        run(job(place, "large", feeding={"workers": 2}))


def test_a_workers_error_is_told_and_a_setting_may_be_mended_before_the_first_checkpoint(place, cluster):
    args = {"model": str(place / "model"), "parts": ["nowhere"]}
    with pytest.raises(ConfigError, match=r"parts=\['nowhere'\] is found in no weight's name"):
        run(job(place, "mended", model={"args": args}, workers={"max_failures": 1}))
    assert (place / "runs" / "mended" / "job.json").exists()
    mended = job(place, "mended", model={"args": {**args, "parts": ["visual"]}})
    assert finished(mended.run, _settings(mended)) is None
