"""LoRA adapters of PEFT on a base model, whichever class of transformers they were trained on."""

from pathlib import Path

from torch import nn

from pipeline.config import ConfigError
from pipeline.encoders.lineage import sha256_of_all

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_RENAMED = (
    ("base_model.model.model.", "base_model.model."),  # trained with the language head on
    ("base_model.model.model.layers.", "base_model.model.language_model.layers."),  # and before transformers 4.52
    ("base_model.model.language_model.model.", "base_model.model.language_model."),  # LLaVA, likewise
)
"""How the same weight is called by the base model alone."""


def adapter_lineage(folder: Path) -> dict[str, str]:
    """Digests of an adapter's files. Raises ConfigError if the folder holds none."""
    found = sha256_of_all(folder, (CONFIG, *_WEIGHTS))
    if CONFIG not in found or len(found) < 2:
        raise ConfigError(f"{folder} holds no adapter: {CONFIG} and {_WEIGHTS[0]} must be in it")
    return found


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter merged into its weights. Raises ConfigError unless every weight of the adapter has its place."""
    try:
        from peft import PeftConfig, get_peft_model
        from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise ConfigError("an adapter needs another package: pip install 'tessera[lora]'") from error

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    known = set(get_peft_model_state_dict(wrapped))
    weights = {_renamed(name, known): values for name, values in load_peft_weights(str(folder), device="cpu").items()}
    lost, bare = sorted(set(weights) - known), sorted(known - set(weights))
    if lost or bare:
        raise ConfigError(
            f"the adapter in {folder} does not fit the model: {len(lost)} of its {len(weights)} weights have no place ({', '.join(lost[:2])}), "
            f"{len(bare)} places get none ({', '.join(bare[:2])}); was it trained on another base?"
        )
    set_peft_model_state_dict(wrapped, weights)
    merged: nn.Module = wrapped.merge_and_unload()  # type: ignore[operator]
    return merged


def _renamed(name: str, known: set[str]) -> str:
    if name in known:
        return name
    candidates = (new + name.removeprefix(old) for old, new in _RENAMED if name.startswith(old))
    return next((candidate for candidate in candidates if candidate in known), name)
