"""A run's folder before and after its workers: which settings may change under way."""

import shutil

import pytest
import torch

from jobs.train import TrainJob, _settings, _task
from pipeline.config import ConfigError
from pipeline.training.loop import train
from pipeline.training.run import begin, finished
from pipeline.vlm.card import folder_card_text
from tests.encoders.models import save_bert
from tests.pairs.writing import jsonl
from tests.training.pairs import Folder, job_values, write_pairs


def test_what_decides_no_batch_and_no_gradient_may_change_under_way(tmp_path):
    """A run that ended at a bad image said to set bad_image: drop, and then refused it, as it did a smaller chunk after running out of memory."""

    def job(**sections):
        return TrainJob.model_validate(job_values(tmp_path, "model", **sections))

    first = job()
    (first.run.place / "checkpoint_1").mkdir(parents=True)
    begin(first.run, _settings(first), base_commit=None)
    free = job(
        choice={"bad_image": "drop"},
        optimisation={"chunk": 1, "compile": "inductor"},
        watching={"log_every": 5, "checkpoint_every": 7, "evaluate_every": 9, "patience": 1},
        model={"args": {"model": "model", "reading": {"pooling": "mean"}, "gradient_checkpointing": True}},
    )
    assert finished(free.run, _settings(free)) is None
    for section, changed in (("optimisation", {"learning_rate": 0.5}), ("watching", {"k": 9}), ("choice", {"max_negatives": 1})):
        other = job(**{section: changed})
        with pytest.raises(ConfigError, match=f"began with {section}.{next(iter(changed))}=.*give another run.name"):
            finished(other.run, _settings(other))


def test_the_base_models_commit_is_kept_and_a_run_goes_on_with_no_other(tmp_path, monkeypatch):
    """A branch of the hub moved while a run was under way: it went on from its checkpoint on other frozen weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    first, second = "a" * 40, "b" * 40
    hub = tmp_path / "hub" / "models--org--tiny"
    for commit in (first, second):
        (hub / "snapshots" / commit).mkdir(parents=True)
        shutil.copytree(save_bert(tmp_path / commit), hub / "snapshots" / commit, dirs_exist_ok=True)
    (hub / "refs").mkdir()
    write_pairs(tmp_path, num=0)
    jsonl(tmp_path / "train.jsonl", [{"qry": f"q{row}", "pos_text": f"d{row}"} for row in range(8)])

    def task(**more):
        args = {"model": "org/tiny", "cache_dir": str(tmp_path / "hub"), **more}
        model = {"target": "pipeline.training.sentence:TrainSentence", "args": args}
        job = TrainJob.model_validate(job_values(tmp_path, "", model=model) | {"held_out": []})
        assert finished(job.run, _settings(job)) is None
        return job, _task(job)

    (hub / "refs" / "main").write_text(first)
    job, begun = task()
    assert begun.card.base_commit == begun.card.training()["base_commit"] == first
    assert f"org/tiny at commit {first}" in folder_card_text(begun.card, "sentence", {})
    job.run.place.mkdir(parents=True)
    begin(job.run, _settings(job), base_commit=first)
    (hub / "refs" / "main").write_text(second)
    assert task()[1].card.base_commit == second, "before the first checkpoint nothing depends on it"
    (job.run.place / "checkpoint_1").mkdir()
    with pytest.raises(ConfigError, match=f"began with org/tiny at commit {first}.*stands for {second}; set model.args.revision={first}"):
        task()
    assert task(revision=first)[1].card.base_commit == first
    with pytest.raises(ConfigError, match=f"this worker finds org/tiny at commit {second}, and the run began with {first}"):
        train(begun, Folder(tmp_path / "link"), torch.device("cpu"))
