"""What a folder of a text encoder says, read without sentence-transformers: its modules, prompts, lengths and files.

A folder without `modules.json` is a plain Hugging Face model: mean pooling, no prompts.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.config import ConfigError, nearest
from pipeline.encoders.lineage import hub_commit, sha256_of_all, snapshot
from pipeline.encoders.local_copy import is_uri, local_copy
from pipeline.encoders.pooling import MODES, Mode

MODULES = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
"""The modules of sentence-transformers that are implemented. Dropout does nothing outside training."""
SETTINGS = ["*.json", "*.txt", "*.model", "*.tiktoken"]
"""Every file that is read beside weights: what is fetched from the hub before they are."""
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")

ENCODER_HALVES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Encoder-decoder models of which the encoder is used, and the class of transformers that loads it."""

_LEGACY_MODES: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Older folders name this file after the model.
_TRANSFORMER_SETTINGS = [f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")]
_HARMLESS = {"unpad_inputs", "module_output_name", "max_seq_length", "do_lower_case", "modality_config"}
_TEXT_ONLY = {"method": "forward", "method_output_name": "last_hidden_state"}


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer after pooling: its weights are in the subfolder `path`."""

    path: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    """Name of a class of torch.nn."""


@dataclass(frozen=True)
class Folder:
    """What a folder says. `transformer`: the subfolder that holds the model and its tokenizer; "" for the folder itself."""

    transformer: str
    dim: int
    modes: tuple[Mode, ...] = ("mean",)
    include_prompt: bool = True
    dense: list[DenseLayer] = field(default_factory=list)
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)

    def document_prompt(self) -> str:
        """What is put before a document: the first of the folder's document, passage and corpus prompts that says something.

        That is what sentence-transformers documents for `encode_document`. Release 6.2 itself never gets beyond the
        empty document prompt that it adds to every model, and so leaves a passage prompt out.
        """
        return next((prompt for name in ("document", "passage", "corpus") if (prompt := self.prompts.get(name))), "")

    def query_prompt(self) -> str:
        """What is put before a query: the folder's query prompt, else nothing, as `encode_query` does."""
        return self.prompts.get("query", "")


@dataclass(frozen=True)
class Source:
    """Where an encoder's files are. From the hub (`repo`, `commit`), `folder` has the settings; the weights come when they are needed."""

    folder: Path
    repo: str | None = None
    commit: str | None = None
    cache_dir: str | None = None

    def identity(self, layout: Folder) -> dict[str, str]:
        """What the weights are: digests of their files, or the hub's repository and commit."""
        return {"repo": self.repo, "commit": self.commit} if self.repo and self.commit else weights_of(self.folder, layout)

    def with_weights(self) -> Path:
        """The folder, once its weights are in it."""
        return snapshot(self.repo, self.commit, self.cache_dir, None) if self.repo and self.commit else self.folder


def locate(model: str, revision: str | None, cache_dir: str | None, storage_options: dict[str, Any] | None = None) -> Source:
    """The folder that `model` names; else the hub's repository. Raises ConfigError if it is neither."""
    folder = local_copy(model, storage_options) if is_uri(model) else Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision={revision!r} is for models of the hub; {model} is a folder")
        return Source(folder.absolute())
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        there = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ConfigError(f"there is no folder {model}{nearest(folder.name, there)}; give a model's folder, or its name on the Hugging Face hub")
    commit = hub_commit(model, revision, cache_dir)
    return Source(snapshot(model, commit, cache_dir, SETTINGS), model, commit, cache_dir)


def read_folder(folder: Path) -> Folder:
    """Read a text encoder's folder. Raises ConfigError naming what it has that is not implemented."""
    if not (folder / "modules.json").is_file():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} holds no text encoder: neither modules.json nor config.json is in it")
        _check_transformer(folder)
        return Folder(transformer="", dim=_hidden_size(folder))
    modules = [(_module_name(entry["type"], folder), entry["path"]) for entry in _read(folder / "modules.json")]
    names = [name for name, _ in modules]
    if names[:2] != ["Transformer", "Pooling"] or "Transformer" in names[1:] or "Pooling" in names[2:]:
        raise ConfigError(f"{folder}: modules {' > '.join(names)} are not implemented; they must begin Transformer > Pooling, each once")
    if "Dense" in names and "Normalize" in names[: len(names) - names[::-1].index("Dense")]:
        raise ConfigError(f"{folder}: modules {' > '.join(names)} are not implemented; Normalize must come after every Dense")
    transformer = modules[0][1]
    settings = _transformer_settings(folder / transformer)
    pooling = _read(folder / modules[1][1] / "config.json")
    modes = _modes(pooling, folder)
    dense = [_dense(folder, path) for name, path in modules if name == "Dense"]
    saved = _read(folder / "config_sentence_transformers.json")
    if saved.get("truncate_dim") is not None:
        raise ConfigError(f"{folder}: truncate_dim={saved['truncate_dim']} in config_sentence_transformers.json is not implemented; remove it")
    return Folder(
        transformer=transformer,
        dim=dense[-1].out_features if dense else len(modes) * _hidden_size(folder / transformer),
        modes=modes,
        include_prompt=bool(pooling.get("include_prompt", True)),
        dense=dense,
        max_tokens=settings.get("max_seq_length"),
        lower_case=bool(settings.get("do_lower_case", False)),
        prompts={name: prompt for name, prompt in (saved.get("prompts") or {}).items() if prompt is not None},
    )


def weights_of(folder: Path, layout: Folder) -> dict[str, str]:
    """sha256 of the files that hold the weights, by their path: safetensors where there are both kinds."""
    found = {}
    for path in [layout.transformer, *(layer.path for layer in layout.dense)]:
        safe, pickled = (sha256_of_all(folder / path, [pattern]) for pattern in WEIGHTS)
        if not (safe or pickled):
            raise ConfigError(f"{folder / path} holds no weights: there is no model.safetensors in it")
        found.update({f"{path}/{name}".lstrip("/"): digest for name, digest in (safe or pickled).items()})
    return found


def settings_of(folder: Path, layout: Folder) -> dict[str, dict[str, Any]]:
    """What else of the transformer's folder changes vectors: its configuration, and digests of the tokenizer's files."""
    ignored = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
    config = {name: value for name, value in _read(folder / layout.transformer / "config.json").items() if name not in ignored}
    return {"config": config, "tokenizer": sha256_of_all(folder / layout.transformer, TOKENIZER)}


def _module_name(kind: str, folder: Path) -> str:
    package, _, name = kind.rpartition(".")
    if package.split(".")[0] != "sentence_transformers" or name not in MODULES:
        raise ConfigError(f"{folder}: module {kind} is not implemented{nearest(name, MODULES)}; implemented are {', '.join(MODULES)}")
    return name


def _transformer_settings(folder: Path) -> dict[str, Any]:
    _check_transformer(folder)
    settings: dict[str, Any] = next((found for name in _TRANSFORMER_SETTINGS if (found := _read(folder / name))), {})
    unknown = {name for name, value in settings.items() if name not in _HARMLESS and value not in (None, {}, "feature-extraction")}
    text = settings.get("modality_config", {"text": _TEXT_ONLY})
    if list(text) != ["text"] or text["text"] | _TEXT_ONLY != text["text"]:
        unknown.add("modality_config")
    if unknown:
        raise ConfigError(f"{folder}: the transformer's settings {', '.join(sorted(unknown))} are not implemented")
    return settings


def transformer_settings_file(folder: Path) -> Path:
    """Where the length of texts is, or would be, set in a transformer's folder."""
    return next((folder / name for name in _TRANSFORMER_SETTINGS if (folder / name).is_file()), folder / _TRANSFORMER_SETTINGS[0])


def _check_transformer(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} holds an adapter (adapter_config.json), not a whole model; merge it into its base model and save that")
    config = _read(folder / "config.json")
    if config.get("is_encoder_decoder") and config.get("model_type") not in ENCODER_HALVES:
        raise ConfigError(f"{folder}: of encoder-decoder models only {', '.join(ENCODER_HALVES)} are implemented, not {config.get('model_type')}")


def _modes(pooling: dict[str, Any], folder: Path) -> tuple[Mode, ...]:
    given = pooling.get("pooling_mode")
    modes = [given] if isinstance(given, str) else given
    if modes is None:
        modes = [mode for name, mode in _LEGACY_MODES.items() if pooling.get(name)] or ["mean"]
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"{folder}: pooling mode {mode!r} is not implemented{nearest(mode, MODES)}")
    return tuple(cast(list[Mode], modes))


def _dense(folder: Path, path: str) -> DenseLayer:
    settings = _read(folder / path / "config.json")
    activation = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    sides = {settings.get("module_input_name") or "sentence_embedding", settings.get("module_output_name") or "sentence_embedding"}
    if (
        not activation.startswith("torch.nn.")
        or not hasattr(torch.nn, activation.rpartition(".")[2])
        or settings.get("use_residual")
        or sides != {"sentence_embedding"}
    ):
        raise ConfigError(f"{folder / path}: a Dense module with {settings} is not implemented")
    return DenseLayer(path, settings["in_features"], settings["out_features"], settings.get("bias", True), activation.rpartition(".")[2])


def _hidden_size(folder: Path) -> int:
    config = _read(folder / "config.json")
    for name in ("hidden_size", "d_model", "dim", "n_embd", "emb_dim"):  # as transformers' configurations name it
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ConfigError(f"{folder / 'config.json'} does not say how long a token's vector is (hidden_size)")


def _read(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
