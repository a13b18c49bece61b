"""Sharded over two workers (FSDP2) a run is the same run: weights, checkpoints, the encoder. Some passes of a rank see no image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from jobs.train import TrainJob, _task
from pipeline.encoders.saved import open_encoder
from pipeline.training.loop import train
from pipeline.training.ranks import run_on_ranks
from pipeline.training.sharding import clip, gathered, part_of
from pipeline.vlm.message import Message
from tests.training.pairs import Folder, Stopped, job_values, losses, write_pairs
from tests.vlm.models import save_model

CPU = torch.device("cpu")
ADAPTER = {"lora": {"rank": 2, "modules": ["q_proj", "v_proj"]}}
HEAD = {"head": {"kind": "latent-attention", "latents": 4, "heads": 2}}
MODELS = {
    "whole": {},
    "adapter": ADAPTER,
    "a layer": {"reading": {"pooling": "mean", "layer": 1}},
    "checkpointing": {"gradient_checkpointing": True},
    "a head": HEAD,
    "a head in float32": HEAD | {"dtype": "bfloat16"},
}
MIXED = ("a head in float32",)
"""On a model in bfloat16. FSDP refused the two types in one unit."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    write_pairs(folder)
    save_model(folder / "model", "qwen2_vl")
    return folder


def task_of(place, name, args, steps=3, **sections):
    values = job_values(place, place / "model", name=name, steps=steps, **sections)
    values["model"]["args"] |= {"model": str(place / "model"), **args}
    task = _task(TrainJob.model_validate(values))
    Path(task.folder).mkdir(parents=True, exist_ok=True)
    return task


def trained(tasks):
    return [train(task, Folder(f"{task.folder}/checkpoints"), CPU) for task in tasks]


def state(task, step):
    return torch.load(f"{task.folder}/checkpoints/step-{step:04}/state.pt", weights_only=True)


def worst(left, right):
    assert left.keys() == right.keys() and all(left[name].dtype == right[name].dtype for name in left)
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_sharded_workers_come_to_the_weights_of_whole_ones(place):
    plain = [task_of(place, f"plain {name}".replace(" ", "-"), args) for name, args in MODELS.items()]
    sharded = [
        replace(task_of(place, f"sharded {name}".replace(" ", "-"), args, workers={"sharding": "fsdp2"}), steps=3) for name, args in MODELS.items()
    ]
    assert all(task.sharded for task in sharded)
    found = run_on_ranks(trained, 2, [*plain, *sharded])[0]
    for name, task, other, outcome, sharded_outcome in zip(MODELS, plain, sharded, found[: len(plain)], found[len(plain) :], strict=True):
        first, second = state(task, 3), state(other, 3)
        # A bfloat16 of 0.5 to 1 has steps of 2**-8, of which each of Adam's may be rounded the other way.
        limit, vectors_limit, relative = (1e-6, 1e-5, 1e-5) if name not in MIXED else (3 * 2**-8, 0.1, 0.02)
        assert worst(first["weights"], second["weights"]) < limit, task.folder
        assert first["optimizer"].keys() == second["optimizer"].keys()
        assert max(worst(first["optimizer"][name], second["optimizer"][name]) for name in first["optimizer"]) < limit
        assert list(losses(task.folder).values()) == pytest.approx(list(losses(other.folder).values()), rel=relative)
        ours, theirs = (open_encoder(each.encoder).encode_messages([Message("red cat")]) for each in (outcome, sharded_outcome))
        np.testing.assert_allclose(ours, theirs, atol=vectors_limit)


def interrupted(task, stop_after):
    try:
        train(task, Folder(f"{task.folder}/checkpoints", stop_after=stop_after), CPU)
    except Stopped:
        return True
    return False


def test_a_sharded_run_goes_on_with_one_worker_and_one_that_was_not_goes_on_sharded(place):
    whole = task_of(place, "one-go", {}, steps=6)
    train(whole, Folder(f"{whole.folder}/checkpoints"), CPU)
    wanted = state(whole, 6)["weights"]
    fewer = task_of(place, "fewer", {}, steps=6, workers={"sharding": "fsdp2"})
    assert run_on_ranks(interrupted, 2, fewer, 4) == [True, True]
    train(fewer, Folder(f"{fewer.folder}/checkpoints"), CPU)
    more = task_of(place, "more", {}, steps=6, workers={"sharding": "fsdp2"})
    assert interrupted(more, 2)
    run_on_ranks(trained, 2, [more])
    for task in (fewer, more):
        # Sums over another number of ranks differ in their last bits, which Adam's first steps make larger.
        assert worst(state(task, 6)["weights"], wanted) < 1e-4
        np.testing.assert_allclose(list(losses(task.folder).values()), list(losses(whole.folder).values()), rtol=1e-4)


def shortened(sharded):
    """Norm and gradients of a matrix that may be sharded and a number that is not, shortened to 0.5."""
    matrix, number = nn.Linear(4, 6, bias=False), nn.Parameter(torch.tensor(2.0))
    module = fully_shard(matrix, mesh=init_device_mesh("cpu", (2,))) if sharded else matrix
    parameters = {"matrix": module.weight, "number": number}
    whole = torch.arange(24.0).reshape(6, 4) / 24
    parameters["matrix"].grad, number.grad = part_of(whole, module.weight), torch.tensor(0.25)
    norm = clip(parameters, 0.5)
    return norm, gathered(parameters["matrix"].grad, keep=True), number.grad


def test_gradients_that_are_sharded_and_others_are_shortened_together():
    plain = [nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(()))]
    plain[0].grad, plain[1].grad = torch.arange(24.0).reshape(6, 4) / 24, torch.tensor(0.25)
    norm = nn.utils.clip_grad_norm_(plain, 0.5)
    for found in [shortened(False), *run_on_ranks(shortened, 2, True)]:
        for value, wanted in zip(found, (norm, plain[0].grad, plain[1].grad), strict=True):
            torch.testing.assert_close(value, wanted)
