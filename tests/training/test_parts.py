"""Parts of a model: at learning rates of their own, or frozen."""

import pytest
import torch
from safetensors.torch import load_file

from jobs.train import TrainJob, _task
from pipeline.config import ConfigError
from pipeline.training.loop import _optimizer, train
from pipeline.training.settings import Optimisation
from tests.training.pairs import Folder, job_values, write_pairs
from tests.vlm.models import save_model


def parameters(*names):
    return {name: torch.nn.Parameter(torch.zeros((2,) if name.endswith("bias") else (2, 2))) for name in names}


def test_weights_learn_at_the_rate_of_the_first_pattern_that_is_found_in_their_name():
    given = parameters("0.projector.weight", "0.projector.bias", "0.layers.weight", "1.temperature.bias")
    settings = Optimisation(learning_rate=1e-4, learning_rates={"projector": 1e-3, "weight$|temperature": 2e-4}, weight_decay=0.1)
    groups = _optimizer(given, settings).param_groups
    found = {
        name: (group["share"], group["weight_decay"]) for name, each in given.items() for group in groups if any(each is p for p in group["params"])
    }
    assert found == {
        "0.projector.weight": (pytest.approx(10), 0.1),
        "0.projector.bias": (pytest.approx(10), 0.0),
        "0.layers.weight": (pytest.approx(2), 0.1),
        "1.temperature.bias": (pytest.approx(2), 0.0),
    }
    with pytest.raises(ConfigError, match=r"'tower' is found in no trained weight's name; they are 0\.projector"):
        _optimizer(given, Optimisation(learning_rates={"tower": 1.0}))
    with pytest.raises(ValueError, match="is no regular expression"):
        Optimisation(learning_rates={"(": 1.0})


def test_a_frozen_tower_with_batch_norms_stays_as_it_is_while_the_rest_learns(tmp_path):
    write_pairs(tmp_path)
    base = save_model(tmp_path / "model", "fast_vlm")
    values = job_values(tmp_path, base, steps=2, model={"args": {"model": str(base), "parts": ["projector"]}})
    task = _task(TrainJob.model_validate({**values, "held_out": []}))
    (tmp_path / "runs" / "run").mkdir(parents=True)
    train(task, Folder(tmp_path / "checkpoints"), torch.device("cpu"))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "runs" / "run" / "encoder" / "model.safetensors")
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[f"model.{name}"])}
    assert changed == {"multi_modal_projector"}
