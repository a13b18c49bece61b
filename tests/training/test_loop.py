import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.train import TrainJob, _task
from pipeline.config import ConfigError
from pipeline.training.feed import plan_of
from pipeline.training.journal import Journal
from pipeline.training.loop import train
from pipeline.training.ranks import run_on_ranks
from pipeline.training.settings import Optimisation
from pipeline.vlm.message import Message
from pipeline.vlm.saved import open_vlm
from tests.training.pairs import Folder, Stopped, job_values, journal, losses, rows, write_pairs
from tests.vlm.models import save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pairs, and a small Qwen2-VL."""
    folder = tmp_path_factory.mktemp("train")
    write_pairs(folder)
    save_model(folder / "model", "qwen2_vl")
    return folder


def task_of(place, name, **sections):
    task = _task(TrainJob.model_validate(job_values(place, place / "model", name=name, **sections)))
    (place / "runs" / name).mkdir(parents=True)
    return task


def in_one_go(place, name, link=None, **sections):
    task = task_of(place, name, **sections)
    return train(task, link or Folder(f"{task.folder}/checkpoints"), CPU), task.folder


def interrupted(task, stop_after):
    with pytest.raises(Stopped):
        train(task, Folder(f"{task.folder}/checkpoints", stop_after=stop_after), CPU)


def ranks_interrupted(task, stop_after):
    try:
        train(task, Folder(f"{task.folder}/checkpoints", stop_after=stop_after), CPU)
    except Stopped:
        return True
    return False


@pytest.fixture(scope="module")
def whole(place):
    """A run of 6 steps on one worker that was not interrupted: what it gave, and its folder."""
    return in_one_go(place, "whole")


def test_a_run_draws_each_row_once_an_epoch_and_learns(place, whole):
    outcome, folder = whole
    found = rows(folder)
    assert sorted(found) == list(range(6))
    drawn = [key for step in range(5) for key in found[step]]
    assert len(drawn) == len(set(drawn)) == 40
    assert losses(folder)[5] < losses(folder)[0]
    assert (outcome.steps, outcome.rows) == (6, 48)
    assert [line["step"] for line in journal(folder) if "held_out" in line] == [0, 3, 6]


def test_an_interrupted_run_on_two_workers_goes_on_with_one_as_if_nothing_had_been(place, whole):
    task = task_of(place, "resumed")
    assert run_on_ranks(ranks_interrupted, 2, task, 4) == [True, True]
    assert max(losses(task.folder)) == 3
    # A step that a crash left in the journal without a checkpoint is done again.
    Journal(place / "runs" / "resumed" / "metrics.jsonl").add({"step": 4, "loss": 99.0})
    outcome = train(task, Folder(f"{task.folder}/checkpoints"), CPU)
    assert (outcome.steps, outcome.rows) == (6, 16)
    assert rows(task.folder) == rows(whole[1])
    first, second = losses(task.folder), losses(whole[1])
    np.testing.assert_allclose([first[step] for step in range(6)], [second[step] for step in range(6)], rtol=1e-4)
    assert outcome.before == pytest.approx(whole[0].before, abs=1e-6)
    assert outcome.best_step == whole[0].best_step
    ours, theirs = (open_vlm(each).encode_messages([Message("red cat"), Message("moon")]) for each in (outcome.encoder, whole[0].encoder))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_an_interrupted_run_has_its_optimizer_back(place, whole):
    task = task_of(place, "again")
    interrupted(task, 2)
    train(task, Folder(f"{task.folder}/checkpoints"), CPU)
    # Not to the bit: matrix products on a CPU depend on where memory lies. Without Adam's moments the first step would differ by 1e-2.
    first, second = losses(task.folder), losses(whole[1])
    np.testing.assert_allclose([first[step] for step in range(6)], [second[step] for step in range(6)], rtol=1e-5)


def test_what_is_saved_is_the_encoder_that_was_measured_best(place, whole):
    outcome, folder = whole
    held = {line["step"]: line["held_out"]["recall@3"] for line in journal(folder) if "held_out" in line}
    assert outcome.best_step == max(held, key=lambda step: (held[step], -step))
    assert outcome.after["held/recall@3"] == held[outcome.best_step]
    encoder = open_vlm(outcome.encoder)
    assert encoder.fingerprint == outcome.fingerprint
    lines = [json.loads(line) for line in (place / "held.jsonl").read_text().splitlines()]
    texts = [row for row in lines if not row["qry_image_path"]]
    assert len(texts) == 9
    vectors = encoder.encode_messages([Message(row["pos_text"]) for row in texts])
    assert vectors.shape == (9, encoder.dim)


def test_the_instruction_of_all_rows_is_saved_with_the_encoder_and_different_ones_are_told(place, caplog):
    """Rows were trained and measured under their data set's instruction; the saved encoder lacked it, and its vectors were other ones."""
    words = job_values(place, place / "model")["data"][0]
    sections = {"optimisation": {"steps": 1}, "model": {"args": {"model": str(place / "model"), "prompt": {"instruction": "Own."}}}}
    values = job_values(place, place / "model", name="told", **sections) | {"data": [words | {"instruction_q": "Find."}], "held_out": []}
    task = _task(TrainJob.model_validate(values))
    assert not caplog.records
    Path(task.folder).mkdir(parents=True)
    outcome = train(task, Folder(f"{task.folder}/checkpoints"), CPU)
    lineage = open_vlm(outcome.encoder).lineage
    assert (lineage["query_instruction"], lineage["instruction"]) == ("Find.", "Own.")
    two = [words | {"instruction_q": "Find."}, words | {"name": "other", "instruction_q": "Search."}]
    found = _task(TrainJob.model_validate(values | {"data": two}))
    assert "query side is told different instructions ('Find.', 'Search.')" in caplog.text
    assert found.card.instruction("query") is None and found.card.instructions["query"] == ("Find.", "Search.")


def test_a_lora_adapter_is_trained_alone_and_comes_merged(place):
    model = {
        "target": "pipeline.training.vlm:TrainVlm",
        "args": {"model": str(place / "model"), "lora": {"rank": 2, "modules": ["q_proj", "v_proj"]}},
    }
    outcome, folder = in_one_go(place, "lora", model=model, optimisation={"steps": 2, "learning_rate": 0.01}, mixture={"batch_size": 4})
    state = torch.load(f"{folder}/checkpoints/step-0002/state.pt", weights_only=True)
    assert state["weights"] and all("lora_" in name for name in state["weights"])
    before = open_vlm(outcome.encoder).encode_messages([Message("red cat")])
    assert before.shape == (1, 32)
    assert (place / "runs" / "lora" / "encoder" / "adapter" / "adapter_config.json").is_file()


def test_parts_of_a_model_are_trained_and_the_others_stay(place):
    args = {"model": str(place / "model"), "parts": ["visual.merger"], "gradient_checkpointing": True}
    _, folder = in_one_go(place, "parts", model={"args": args}, optimisation={"steps": 1}, mixture={"batch_size": 4})
    state = torch.load(f"{folder}/checkpoints/step-0001/state.pt", weights_only=True)
    assert state["weights"] and all("visual.merger" in name for name in state["weights"])
    with pytest.raises(ConfigError, match=r"found in no weight's name; the model's begin with"):
        in_one_go(place, "none", model={"args": {"model": str(place / "model"), "parts": ["nowhere"]}})


def test_compiled_layers_learn_the_same(place):
    """With aot_eager: the compiler's tracing and its backward graphs, without a C++ compiler's time."""
    few = {"optimisation": {"steps": 2, "chunk": 8}, "mixture": {"batch_size": 4}, "watching": {"evaluate_every": 100}}
    states = []
    for name, backend in (("eager", None), ("compiled", "aot_eager")):
        values = job_values(place, place / "model", name=name, **few)
        values["optimisation"]["compile"], values["held_out"] = backend, []
        task = _task(TrainJob.model_validate(values))
        Path(task.folder).mkdir(parents=True)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        train(task, Folder(f"{task.folder}/checkpoints"), CPU)
        states.append(torch.load(f"{task.folder}/checkpoints/step-0002/state.pt", weights_only=True)["weights"])
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > before) == (backend is not None)
    for name, values in states[0].items():
        np.testing.assert_allclose(states[1][name], values, atol=1e-6, err_msg=name)


def test_a_notice_of_preemption_makes_one_checkpoint_more(place):
    link = Folder(place / "noticed", notice_at=(3, 4))
    in_one_go(place, "noticed", link, optimisation={"steps": 5}, watching={"checkpoint_every": 100, "evaluate_every": 100})
    assert link.kept == [0, 3, 5]


def test_a_run_without_progress_ends_early_and_stays_ended(place):
    sections = {"optimisation": {"learning_rate": 1e-12, "steps": 50}, "watching": {"patience": 2, "evaluate_every": 1}}
    outcome, folder = in_one_go(place, "early", **sections)
    assert (outcome.steps, outcome.best_step) == (2, 0)
    task = replace(_task(TrainJob.model_validate(job_values(place, place / "model", name="early", **sections))))
    again = train(task, Folder(f"{folder}/checkpoints"), CPU)
    assert (again.rows, again.fingerprint) == (0, outcome.fingerprint)


def test_the_learning_rate_rises_and_falls():
    settings = Optimisation(learning_rate=1.0, warmup=0.2)
    assert [settings.rate_at(step, 10) for step in range(10)] == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = Optimisation(learning_rate=2.0, warmup=0.0, decay="cosine")
    assert [cosine.rate_at(step, 4) for step in range(4)] == pytest.approx([1 + np.cos(np.pi * step / 4) for step in range(4)])
    assert Optimisation(learning_rate=3.0, warmup=0.0, decay="constant").rate_at(7, 8) == 3.0


def test_patience_and_the_best_weights_survive_an_interruption(place):
    sections = {"optimisation": {"learning_rate": 1e-12, "steps": 50}, "watching": {"patience": 3, "evaluate_every": 1, "checkpoint_every": 1}}
    task = task_of(place, "patient", run={"tensorboard": True}, **sections)
    interrupted(task, 2)
    outcome = train(task, Folder(f"{task.folder}/checkpoints"), CPU)
    assert (outcome.steps, outcome.rows, outcome.best_step) == (3, 8, 0)
    assert [line["event"] for line in journal(task.folder) if "event" in line] == ["begun", "resumed", "early_stop"]
    assert "ended early" in (Path(task.folder) / "report.html").read_text()
    assert len(list((Path(task.folder) / "tensorboard").iterdir())) == 2


def test_autocast_computes_in_bfloat16_and_keeps_weights_as_they_are(place, whole):
    _, folder = in_one_go(place, "autocast", optimisation={"autocast": "bfloat16"})
    state = torch.load(f"{folder}/checkpoints/step-0006/state.pt", weights_only=True)
    assert {values.dtype for values in state["weights"].values()} == {torch.float32}
    found, wanted = losses(folder), losses(whole[1])
    assert 0 < abs(found[0] - wanted[0]) < 0.05 * wanted[0]
    assert found[5] < found[0]


def with_damage(place, name):
    """A task of 3 steps of 4 rows, of which all rows that the second step gives to the second worker of two are damaged once they are prepared."""
    folder = place / name
    write_pairs(folder, num=48, held_out=4)
    lines = [line for line in (folder / "train.jsonl").read_text().splitlines() if '"qry_image_path": ""' not in line]
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    values = job_values(folder, place / "model", name=name, steps=3, mixture={"batch_size": 4}, choice={"bad_image": "drop"})
    task = _task(TrainJob.model_validate(values | {"held_out": []}))
    (part,) = task.parts
    draw = plan_of(task.parts, task.recipe.mixture).batch(1).part(1, 2)
    for row in part.prepared.take(draw.row).to_pylist():
        Path(row["query"]["images"][0]["uri"]).write_bytes(b"damaged")
    return task


def beside(task, name):
    """The task in another folder."""
    folder = Path(task.folder).with_name(name)
    folder.mkdir(parents=True)
    return replace(task, folder=str(folder))


def trained_each(tasks):
    return [train(task, Folder(f"{task.folder}/checkpoints"), CPU) for task in tasks]


def test_a_worker_whose_rows_are_all_left_out_takes_part_without_them(place):
    """It ended the run, where fewer workers would have gone on with the other rows of the batch."""
    task = with_damage(place, "damaged")
    one, two, sharded = (beside(task, f"damaged-{name}") for name in ("one", "two", "sharded"))
    (alone,) = trained_each([one])
    both = run_on_ranks(trained_each, 2, [two, replace(sharded, sharded=True)])
    # Of all workers, and not of the first, which left out none.
    assert {(outcome.rows, outcome.dropped) for outcome in (alone, *both[0], *both[1])} == {(10, 2)}
    assert [line["rejects"] for line in journal(two.folder) if "loss" in line] == [0, 2, 2]
    wanted = torch.load(f"{one.folder}/checkpoints/step-0003/state.pt", weights_only=True)["weights"]
    for folder in (two.folder, sharded.folder):
        np.testing.assert_allclose(list(losses(folder).values()), list(losses(one.folder).values()), rtol=1e-4)
        found = torch.load(f"{folder}/checkpoints/step-0003/state.pt", weights_only=True)["weights"]
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("where", "problem"), [("loss", "the loss is nan"), ("gradient", "the gradient's norm is nan")])
def test_a_loss_that_is_no_number_ends_the_run_by_name_and_the_checkpoint_before_stays(place, where, problem):
    loss = {"target": "tests.training.pairs:Broken", "args": {"at": 3, "where": where}}
    task = task_of(place, f"nan-{where}", loss=loss, watching={"checkpoint_every": 2, "evaluate_every": 100})
    with pytest.raises(FloatingPointError, match=rf"^step 3: .*{problem}; .*optimisation.learning_rate"):
        train(task, Folder(f"{task.folder}/checkpoints"), CPU)
    assert sorted(path.name for path in Path(task.folder, "checkpoints").iterdir()) == ["step-0000", "step-0002"]
    state = torch.load(f"{task.folder}/checkpoints/step-0002/state.pt", weights_only=True)
    assert all(values.isfinite().all() for values in state["weights"].values()) and max(losses(task.folder)) == 2
