"""A checkpoint: all that a run needs to go on as if it had not stopped, in one folder.

The trained weights (a frozen base is not copied), the loss' own, the optimizer's state, the plan's position, and what evaluation has found.
Learning rate, order of rows and random numbers are functions of the step (and, for dropout, of the worker), so there is no state of theirs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError

STATE, POSITION = "state.pt", "position.json"
FORM = 1


@dataclass
class Progress:
    """How far a run is; JSON types."""

    position: dict[str, Any]
    """`Plan.position` of the step that comes next."""
    before: dict[str, float] = field(default_factory=dict)
    """Metrics before the first step."""
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the best weights."""
    best_step: int | None = None
    stale: int = 0
    """Evaluations since the best one."""
    stopped: bool = False
    """By patience: nothing is left to be done."""


def trained(modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """What has a gradient, by module number and name."""
    return {f"{i}.{name}": values for i, module in enumerate(modules) for name, values in module.named_parameters() if values.requires_grad}


def write(folder: Path, progress: Progress, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Into an empty folder. The position goes last: a folder that has one is whole."""
    torch.save({"weights": plain(parameters), "optimizer": optimizer.state_dict()}, folder / STATE)
    (folder / POSITION).write_text(json.dumps({"form": FORM, **asdict(progress)}))


def read(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    """Put weights and optimizer back as they were. Raises ConfigError if they are of another model, or of a newer release."""
    position = json.loads((folder / POSITION).read_text())
    if position.pop("form") != FORM:
        raise ConfigError(f"{folder} was written by another release: go on with that one, or start a new run")
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    put(state["weights"], parameters, str(folder))
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**position)


def plain(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The values, on the CPU."""
    return {name: values.detach().cpu() for name, values in parameters.items()}


def put(weights: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], where: str) -> None:
    """Set the values. Raises ConfigError naming a weight that is there and not here, or here and not there."""
    if odd := sorted(set(weights) ^ set(parameters)):
        raise ConfigError(f"{where} holds {len(weights)} weights and {len(parameters)} are trained; not in both is {odd[0]}: was it another model?")
    with torch.no_grad():
        for name, values in parameters.items():
            values.copy_(weights[name])
