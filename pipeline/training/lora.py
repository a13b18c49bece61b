"""LoRA (arXiv 2106.09685): a low-rank adapter of PEFT on a model of transformers."""

from collections.abc import Mapping
from typing import Any

import pydantic
from torch import nn

from pipeline.config import ConfigError, Model, section


class Lora(Model):
    """A low-rank adapter."""

    rank: pydantic.PositiveInt = 16
    alpha: pydantic.PositiveFloat = 32
    """What the adapter adds is scaled by alpha / rank."""
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the layers that get one, without what stands before the last dot."""


def lora_of(given: Mapping[str, Any]) -> Lora:
    """Raises ConfigError naming each wrong key."""
    return section(Lora, given, "lora")


def adapted(model: nn.Module, lora: Lora) -> nn.Module:
    """The model wrapped by PEFT; its layers are changed in place, so the model itself computes with the adapter too."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("an adapter needs another package: pip install 'tessera[lora]'") from error
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.modules))  # type: ignore[arg-type]
    try:
        wrapped: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"lora.modules={list(lora.modules)}: {error}") from error
    return wrapped
