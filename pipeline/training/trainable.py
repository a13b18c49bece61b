"""Trainable: a model that can be trained into an encoder, whatever it is. No base class.

Its constructor is cheap and raises ConfigError for what the job file can fix; `load` brings in the weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import ConfigError, Ref
from pipeline.training.batches import Told
from pipeline.training.tape import Vectors
from pipeline.vlm.card import Card


class Trainable(Protocol):
    """A model while it is trained.

    Three things are optional, and looked for by name. `learn_at(cuts: pipeline.training.matryoshka.Cuts)`, which a loss over several layers or
    widths needs. It comes before `load`; `embed` then gives a tuple of vectors where the cuts name layers, and `save` says what was trained.
    `check(told: Told)` raises ConfigError for a kind of message that the model cannot take; before `load`, for one of each kind that is in the data.
    `base_commit: str | None`, known before `load`: of a repository that is begun with; all workers of a run must have the same.
    """

    def load(self, device: torch.device) -> None:
        """Load weights; what is drawn at random comes from torch's generator. What is trained has requires_grad."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """All that is trained or could be. Known after `load`."""

    def prepare(self, told: Told, *, query: bool) -> Any:
        """One message as `embed` takes it, on the CPU; as a query or as a document. Called from several threads, beside `embed`.

        Raises ValueError for a row that it cannot take, which `choice.bad_image` may leave out; ConfigError for one that must not be there.
        """

    def embed(self, rows: Sequence[Any]) -> Vectors:
        """Vectors (n, D) with gradient; a row's does not depend on the others."""

    def save(self, folder: Path, card: Card) -> str:
        """Save an encoder that job files can name into a folder that is not there yet; its fingerprint.

        `card.instruction` says what the rows of a side were told, where the encoder has prompts to save.
        """


@runtime_checkable
class Layered(Protocol):
    """A Trainable that is most of its weights in layers of one kind. One that is not is sharded and compiled as a whole."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Layers that each row runs through in every pass, within `modules`. Known after `load`."""


def built(model: Ref, loss: Ref) -> tuple[Trainable, Callable[..., Tensor]]:
    """Both, without weights; the model knows at which layers and widths the loss looks. Raises ConfigError if it has no such thing."""
    trainable: Trainable = model.build("load", "prepare", "embed", "save")
    made = loss.build("__call__")
    inner = getattr(made, "loss", made)
    if not callable(inner):
        raise ConfigError(f"{loss.target}: loss={inner!r} must name a loss by target and args: {{target: pipeline.training.infonce:InfoNCE}}")
    cuts = getattr(made, "cuts", None)
    if cuts is not None:
        if not hasattr(trainable, "learn_at"):
            raise ConfigError(f"{loss.target} trains several layers or widths, of which {model.target} could save none; give another loss")
        trainable.learn_at(cuts)
    return trainable, made


def set_mode(modules: Sequence[nn.Module], *, training: bool) -> None:
    """Training or evaluation mode; a batch norm that is not trained keeps its statistics, as its part of the model would otherwise move."""
    for module in modules:
        module.train(training)
        for part in module.modules():
            if isinstance(part, _BatchNorm) and not any(values.requires_grad for values in part.parameters()):
                part.eval()
