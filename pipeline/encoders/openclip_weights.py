"""Which model and which weights a name of open_clip's stands for, found out before any weights load.

Four kinds of names: a model of open_clip with a pretrained tag or a checkpoint file; `local-dir:FOLDER`, a path or a URI;
`hf-hub:ORG/NAME`, optionally with @REVISION.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, nearest
from pipeline.encoders.lineage import hub_commit, sha256_of, sha256_of_all, snapshot
from pipeline.encoders.local_copy import is_uri, local_copy

LOCAL, HUB = "local-dir:", "hf-hub:"
CONFIG = "open_clip_config.json"
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
TEXT = "text"
"""Folder within a saved one that has the configuration of a Hugging Face text tower."""
_HUB_SETTINGS = ["*.json", "*.txt", "*.model"]
_HUB_WEIGHTS = [*_HUB_SETTINGS, "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]


@dataclass(frozen=True)
class Resolved:
    """A model with its weights: what `open_clip.create_model` is asked for, and what the fingerprint is made of."""

    name: str
    """For create_model and get_tokenizer: a name of open_clip's, or local-dir:FOLDER."""
    pretrained: str | None
    """For create_model: a tag or a checkpoint file."""
    config: dict[str, Any]
    """open_clip's model configuration: embed_dim, vision_cfg, text_cfg, ..."""
    preprocess: dict[str, Any]
    """open_clip's preprocess configuration: size, mean, std, interpolation, resize_mode, fill_color."""
    weights: dict[str, object]
    """What the weights are: sha256 of a file, the hub's repository and commit, or the tag's own entry."""
    repo: tuple[str, str, str | None] | None = None
    """Hub repository, commit and cache folder, if the weights have to be fetched from there."""

    def complete(self) -> str:
        """`name`, once its weights are where open_clip looks for them."""
        if self.repo is None:
            return self.name
        repo, commit, cache_dir = self.repo
        return LOCAL + str(snapshot(repo, commit, cache_dir, _HUB_WEIGHTS))

    def tokenizer_name(self, name: str) -> str:
        """For get_tokenizer: `name`, or the hub's repository where the tokenizer is in another one, which it names."""
        elsewhere = self.repo and self.config["text_cfg"].get("hf_tokenizer_name") and not sha256_of_all(Path(name.removeprefix(LOCAL)), TOKENIZER)
        return f"{HUB}{self.repo[0]}" if self.repo and elsewhere else name

    def moved(self) -> dict[str, Any]:
        """For create_model: the text tower's place where the folder is no longer where its configuration says."""
        text = self.config["text_cfg"]
        # open_clip would look for weights there too, if it were not told that they are in the checkpoint.
        return {"text_cfg": {**text, "hf_model_pretrained": False}} if text.get("hf_model_name") and self.name.startswith(LOCAL) else {}


def resolve(model: str, pretrained: str | None, cache_dir: str | None, storage_options: dict[str, Any] | None = None) -> Resolved:
    """What `model` and `pretrained` stand for. Raises ConfigError naming the nearest right name; loads no weights."""
    if model.startswith((LOCAL, HUB)) and pretrained is not None:
        raise ConfigError(f"pretrained={pretrained!r} does not go with {model}, which has its own weights; leave it out")
    if model.startswith(LOCAL):
        return _folder(local_copy(model.removeprefix(LOCAL), storage_options))
    if model.startswith(HUB):
        repo, _, revision = model.removeprefix(HUB).partition("@")
        return _hub(repo, revision or None, cache_dir)
    if is_uri(model) or (Path(model).expanduser() / CONFIG).is_file():
        raise ConfigError(f"model={model!r} is a folder; write {LOCAL}{model}")
    return _builtin(model.replace("/", "-"), pretrained, storage_options)


def identity_of(config: dict[str, Any]) -> dict[str, Any]:
    """A model configuration as the fingerprint has it: a local text tower or tokenizer by its content, not by its place."""
    text = dict(config["text_cfg"])
    for key, patterns in (("hf_model_name", ("config.json",)), ("hf_tokenizer_name", TOKENIZER)):
        if text.get(key) and Path(text[key]).is_dir():
            text[key] = sha256_of_all(Path(text[key]), patterns)
    return {**config, "text_cfg": text}


def _folder(folder: Path) -> Resolved:
    config, preprocess = _read(folder)
    if Path(config["text_cfg"].get("hf_tokenizer_name") or "").is_absolute():
        config["text_cfg"]["hf_tokenizer_name"] = str(folder)  # where open_clip looks for it, whatever is written there
    # The order in which open_clip itself looks for a checkpoint.
    from open_clip.factory import _find_checkpoint_in_dir

    checkpoint = _find_checkpoint_in_dir(folder)
    if checkpoint is None:
        raise ConfigError(f"{folder} holds no weights: neither .safetensors nor .bin nor .pth is in it")
    weights: dict[str, object] = {"sha256": sha256_of(checkpoint), "tokenizer": sha256_of_all(folder, TOKENIZER)}
    return Resolved(LOCAL + str(folder), None, config, preprocess, weights)


def _hub(repo: str, revision: str | None, cache_dir: str | None) -> Resolved:
    commit = hub_commit(repo, revision, cache_dir)
    folder = snapshot(repo, commit, cache_dir, _HUB_SETTINGS)
    config, preprocess = _read(folder)
    return Resolved(LOCAL + str(folder), None, config, preprocess, {"repo": repo, "commit": commit}, (repo, commit, cache_dir))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / CONFIG
    if not path.is_file():
        there = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ConfigError(f"{folder} is no open_clip model: {CONFIG} is not in it{nearest(folder.name, set(there) - {folder.name})}")
    found = json.loads(path.read_text(encoding="utf-8"))
    if "model_cfg" not in found:
        raise ConfigError(f"{path} has no model_cfg")
    config = found["model_cfg"]
    text = config["text_cfg"].get("hf_model_name")
    if text and not Path(text).is_dir() and (folder / TEXT / "config.json").is_file():
        config["text_cfg"]["hf_model_name"] = str(folder / TEXT)
    return config, _preprocess(config, found.get("preprocess_cfg", {}))


def _builtin(name: str, pretrained: str | None, storage_options: dict[str, Any] | None) -> Resolved:
    import open_clip

    names = open_clip.list_models()
    config = open_clip.get_model_config(name)
    if config is None:
        raise ConfigError(f"open_clip has no model {name!r}{nearest(name, names)}; list them with open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(name)
    offer = f"the tags of {name} are {', '.join(tags)}" if tags else f"{name} has no tags: give a checkpoint file"
    if pretrained is None:
        raise ConfigError(f"pretrained is required, or the weights would be random; {offer}")
    entry = open_clip.get_pretrained_cfg(name, pretrained)
    if entry:
        _check_activation(name, pretrained, config, entry, names)
        source = {key: entry[key] for key in ("hf_hub", "url", "file") if entry.get(key)}
        return Resolved(name, pretrained, config, _preprocess(config, entry), source)
    path = local_copy(pretrained, storage_options)
    if not path.is_file():
        raise ConfigError(f"pretrained={pretrained!r} is neither a tag nor a file{nearest(pretrained, tags)}; {offer}")
    return Resolved(name, str(path), config, _preprocess(config, {}), {"sha256": sha256_of(path)})


def _check_activation(name: str, tag: str, config: dict[str, Any], entry: dict[str, Any], names: list[str]) -> None:
    """open_clip only warns of this, and gives wrong vectors."""
    wanted = bool(entry.get("quick_gelu", False))
    other = f"{name}-quickgelu" if wanted else name.removesuffix("-quickgelu")
    if wanted != bool(config.get("quick_gelu", False)) and other in names:
        raise ConfigError(f"the weights {tag!r} were trained with{'' if wanted else 'out'} QuickGELU and do not fit model {name!r}; use {other!r}")


def _preprocess(config: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """As open_clip puts it together: its defaults, what the weights' entry says, and the size that the tower has."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    size = config["vision_cfg"].get("image_size", 224)
    return {**merge_preprocess_dict(asdict(PreprocessCfg()), overlay), "size": tuple(size) if isinstance(size, list) else size}
