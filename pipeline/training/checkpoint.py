"""A checkpoint: all that a run needs to go on as if it had not stopped, in one folder.

The trained weights (a frozen base is not copied), the loss' own, the optimizer's state, the plan's position, and what evaluation has found.
Learning rate, order of rows and random numbers are functions of the step (and, for dropout, of the worker), so there is no state of theirs.
Values are whole and go by name, so a run goes on with any number of workers, its weights sharded or not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.training.sharding import gathered, part_of

STATE, POSITION = "state.pt", "position.json"
FORM = 2

Values = dict[str, Tensor]


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
    dropped: int = 0
    """Rows that were drawn and left out, by all workers."""


@dataclass(frozen=True)
class State:
    """Whole values by the parameters' names, on the CPU; those of other ranks than the first are empty."""

    weights: Values
    optimizer: dict[str, Values]


def trained(modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """What has a gradient, by module number and name."""
    return {f"{i}.{name}": values for i, module in enumerate(modules) for name, values in module.named_parameters() if values.requires_grad}


def weights_of(parameters: Mapping[str, nn.Parameter], *, keep: bool) -> Values:
    """The whole values. Every rank must call it; those that do not keep them hold one at a time."""
    return {name: gathered(values, keep=keep) for name, values in parameters.items()}


def state_of(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, keep: bool) -> State:
    """Weights and optimizer as they are. Every rank must call it."""
    moments = {
        name: {key: gathered(value, keep=keep) for key, value in optimizer.state[values].items()}
        for name, values in parameters.items()
        if values in optimizer.state
    }
    return State(weights_of(parameters, keep=keep), moments)


def write(folder: Path, progress: Progress, state: State) -> None:
    """Into an empty folder. The position goes last: a folder that has one is whole."""
    torch.save({"weights": state.weights, "optimizer": state.optimizer}, folder / STATE)
    (folder / POSITION).write_text(json.dumps({"form": FORM, **asdict(progress)}))


def read(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    """Put weights and optimizer back as they were. Raises ConfigError if they are of another model, or of another release."""
    position = json.loads((folder / POSITION).read_text())
    if position.pop("form") != FORM:
        raise ConfigError(f"{folder} was written by another release: go on with that one, or start a new run")
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    put(state["weights"], parameters, str(folder))
    _put_moments(state["optimizer"], parameters, optimizer)
    return Progress(**position)


def put(weights: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], where: str) -> None:
    """Set the values. Raises ConfigError naming a weight that is there and not here, or here and not there."""
    if odd := sorted(set(weights) ^ set(parameters)):
        raise ConfigError(f"{where} holds {len(weights)} weights and {len(parameters)} are trained; not in both is {odd[0]}: was it another model?")
    with torch.no_grad():
        for name, values in parameters.items():
            values.copy_(part_of(weights[name], values))


def _put_moments(moments: Mapping[str, Values], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """An optimizer numbers its parameters by its groups, which depend on what is sharded."""
    names = {id(values): name for name, values in parameters.items()}
    own = [names[id(values)] for group in optimizer.param_groups for values in group["params"]]
    # Copies: what is read lies in the checkpoint's file, which will be deleted.
    state = {
        number: {key: part_of(value, parameters[name]).clone() for key, value in moments[name].items()}
        for number, name in enumerate(own)
        if name in moments
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
