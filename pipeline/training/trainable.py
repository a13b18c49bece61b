"""Trainable: a model that can be trained into an encoder, whatever it is. No base class.

Its constructor is cheap and raises ConfigError for what the job file can fix; `load` brings in the weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.training.batches import Told
from pipeline.training.tape import Vectors
from pipeline.vlm.card import Card


class Trainable(Protocol):
    """A model while it is trained."""

    def load(self, device: torch.device) -> None:
        """Load weights; what is drawn at random comes from torch's generator. What is trained has requires_grad."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """All that is trained or could be. Known after `load`."""

    def prepare(self, told: Told, *, query: bool) -> Any:
        """One message as `embed` takes it, on the CPU; as a query or as a document. Called from another thread, beside `embed`."""

    def embed(self, rows: Sequence[Any]) -> Vectors:
        """Vectors (n, D) with gradient; a row's does not depend on the others."""

    def save(self, folder: Path, card: Card) -> str:
        """Save an encoder that job files can name into a folder that is not there yet; its fingerprint."""


def set_mode(modules: Sequence[nn.Module], *, training: bool) -> None:
    """Training or evaluation mode; a batch norm that is not trained keeps its statistics, as its part of the model would otherwise move."""
    for module in modules:
        module.train(training)
        for part in module.modules():
            if isinstance(part, _BatchNorm) and not any(values.requires_grad for values in part.parameters()):
                part.eval()
