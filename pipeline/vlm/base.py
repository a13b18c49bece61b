"""Base: a vision-language model's folder or hub repository, known before any weights load."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.encoders.lineage import sha256_of_all
from pipeline.encoders.sentence_folder import TOKENIZER, WEIGHTS, Source, locate

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TILED = ("idefics3", "smolvlm")
SUPPORTED = (*QWEN, *TILED, "llava", "llava_next", "llava_onevision", "fast_vlm", "paligemma")
"""Model types that are tested, as `config.json` names them. Phi-3.5-vision needs code of its own from the hub and is not."""

PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_NO_VECTORS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")
"""Keys of a configuration that change no vector."""


@dataclass(frozen=True)
class Base:
    """A vision-language model that is on disk, or on the Hugging Face hub at a commit."""

    source: Source

    @property
    def folder(self) -> Path:
        """Where its configuration, tokenizer and image processor are."""
        return self.source.folder

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return found

    @property
    def kind(self) -> str:
        """The model type, one of SUPPORTED."""
        return str(self.config["model_type"])

    def with_weights(self) -> Path:
        """The folder, once its weights are in it."""
        return self.source.with_weights()

    def lineage(self) -> dict[str, object]:
        """What it is: digests of its weights, or the hub's repository and commit, and of whatever else changes vectors."""
        return {
            "weights": self._weights(),
            "config": _without(self.config),
            "tokenizer": sha256_of_all(self.folder, TOKENIZER),
            "processor": sha256_of_all(self.folder, PROCESSOR),
        }

    def _weights(self) -> dict[str, str]:
        if self.source.repo and self.source.commit:
            return {"repo": self.source.repo, "commit": self.source.commit}
        safe, pickled = (sha256_of_all(self.folder, [pattern]) for pattern in WEIGHTS)
        if not (safe or pickled):
            raise ConfigError(f"{self.folder} holds no weights: there is no model.safetensors in it")
        return safe or pickled


def base_of(model: str, revision: str | None = None, cache_dir: str | None = None, *, storage_options: dict[str, Any] | None = None) -> Base:
    """The vision-language model that `model`, a folder or a name on the hub, stands for. Raises ConfigError if it is none."""
    base = Base(locate(model, revision, cache_dir, storage_options))
    if not (base.folder / "config.json").is_file():
        raise ConfigError(f"{base.folder} holds no model: config.json is not in it")
    if base.config.get("model_type") not in SUPPORTED:
        raise ConfigError(
            f"{model} is of type {base.config.get('model_type')!r}; vision-language models that are tested are {', '.join(SUPPORTED)}. "
            "For texts alone use pipeline.encoders.sentence:Sentence, for a pair of towers pipeline.encoders.openclip:OpenClip"
        )
    if not any((base.folder / name).is_file() for name in PROCESSOR):
        raise ConfigError(
            f"{base.folder} has a tokenizer but no image processor ({' or '.join(PROCESSOR)}): images would never reach the model. "
            "Save the processor (AutoProcessor), not the tokenizer, beside the weights"
        )
    return base


def _without(config: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in _NO_VECTORS}
    return {name: _without(value) if isinstance(value, dict) else value for name, value in kept.items()}
