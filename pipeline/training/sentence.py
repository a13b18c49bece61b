"""TrainSentence: a text encoder of sentence-transformers' kind on its way to be another: whole, some of its parts, or a LoRA adapter."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.encoders.folder import FolderSpec, save_folder
from pipeline.encoders.precision import Dtype, check_dtype
from pipeline.encoders.sentence import check_length
from pipeline.encoders.sentence_folder import SETTINGS, locate, read_folder, settings_of, transformer_settings_file
from pipeline.encoders.sentence_model import SentenceModel, load_model
from pipeline.training.batches import Told
from pipeline.training.lora import Lora, adapted, lora_of
from pipeline.vlm.card import Card
from pipeline.vlm.merged import merged

_OWN = ("README.md", "tessera.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Not copied: they say something of the weights that were begun with."""


@dataclass(frozen=True)
class Text:
    """One text: what the tokenizer gives by name, and how many tokens at its start are left out of the pooling."""

    tokens: Mapping[str, list[int]]
    skipped: int


class TrainSentence:
    """Any encoder that `pipeline.encoders.sentence:Sentence` takes: `model`, a folder or a name on the Hugging Face hub, optionally at `revision`.

    `prompt` and `query_prompt` go before documents and queries where neither the row nor its data set has an instruction; None takes the
    model's own, and they are saved with it. `max_tokens` cuts longer texts. `lora`: the keys of `pipeline.training.lora.Lora`; None trains the
    weights themselves. `parts`: regular expressions; weights whose names one of them is found in are trained, the others are frozen. None: all.
    Weights are in `dtype`; with bfloat16 small steps are lost, better use `optimisation.autocast`.
    """

    def __init__(
        self,
        model: str,
        *,
        prompt: str | None = None,
        query_prompt: str | None = None,
        max_tokens: int | None = None,
        lora: Mapping[str, Any] | None = None,
        parts: Sequence[str] | None = None,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        check_dtype(dtype)
        if lora is not None and parts is not None:
            raise ConfigError("lora trains an adapter and parts some of the weights: give one of the two (lora.modules says where an adapter goes)")
        self._source = locate(model, revision, cache_dir)
        self._layout = read_folder(self._source.folder)
        check_length(max_tokens, settings_of(self._source.folder, self._layout)["config"].get("max_position_embeddings"))
        self._prompts = {"document": prompt, "query": query_prompt}
        self._max_tokens, self._dtype, self._checkpointing = max_tokens, dtype, gradient_checkpointing
        self._lora: Lora | None = None if lora is None else lora_of(lora)
        self._parts = None if parts is None else [re.compile(part) for part in parts]
        self._model: SentenceModel | None = None
        self._whole: nn.Module | None = None
        self._skipped = lru_cache(maxsize=1024)(self._count)

    @property
    def base_commit(self) -> str | None:
        """Of the hub's repository that is begun with; None for a folder."""
        return self._source.commit

    def load(self, device: torch.device) -> None:
        """Load the weights, add the adapter, and freeze what is not trained. Raises ConfigError if nothing would be trained."""
        model = load_model(self._source, self._layout, max_tokens=self._max_tokens, dtype=self._dtype, device=str(device))
        transformer: Any = model.transformer
        if self._checkpointing:
            transformer.gradient_checkpointing_enable({"use_reentrant": False})
        self._model, self._whole = model, transformer if self._lora is None else adapted(transformer, self._lora)
        if self._lora is None:
            names = {f"{side}.{name}": values for side, part in self._sides().items() for name, values in part.named_parameters()}
            for name, values in names.items():
                values.requires_grad_(self._parts is None or any(part.search(name) for part in self._parts))
            if not any(values.requires_grad for values in names.values()):
                some = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
                raise ConfigError(f"parts={[part.pattern for part in self._parts or []]} is found in no weight's name; the model's begin with {some}")
        for part in self.modules:
            part.train()

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The transformer, and the dense layers if there are any."""
        return list(self._sides().values())

    def check(self, told: Told) -> None:
        """Raises ConfigError for a row with an image."""
        if told.message.images:
            raise ConfigError(
                f"{told.uri}: a sentence encoder takes texts, and this row has an image; train a model of two towers "
                "(pipeline.training.openclip:TrainOpenClip) or a vision-language model (pipeline.training.vlm:TrainVlm) on it"
            )

    def prepare(self, told: Told, *, query: bool) -> Text:
        """The tokens of a text. Raises ConfigError for a row with an image."""
        self.check(told)
        prompt = told.instruction or self._prompt(query=query)
        tokens = self._loaded().tokenise([prompt + told.message.text])
        return Text({name: values[0] for name, values in tokens.items()}, self._skipped(prompt))

    def embed(self, rows: Sequence[Text]) -> Tensor:
        """Vectors (n, D), with gradient."""
        found, order = [], []
        for skipped in sorted({row.skipped for row in rows}):
            places = [place for place, row in enumerate(rows) if row.skipped == skipped]
            tokens = {name: [rows[place].tokens[name] for place in places] for name in rows[0].tokens}
            found.append(self._loaded().pooled(tokens, skipped))
            order += places
        return torch.cat(found)[torch.tensor(order).argsort().to(found[0].device)]

    def save(self, folder: Path, card: Card) -> str:
        """An encoder for `pipeline.encoders.saved:open_encoder`, which sentence-transformers itself loads; an adapter is merged.

        Its prompts are what rows were trained under: the instruction of all of a side, else the constructor's.
        """
        prompts = {side: card.instruction(side) or own for side, own in self._prompts.items()}
        return save_folder(
            folder, lambda part: self._write(part, prompts), spec=FolderSpec(encoder="sentence", args={"dtype": self._dtype}), card=card
        ).fingerprint

    def _prompt(self, *, query: bool) -> str:
        own = self._prompts["query" if query else "document"]
        return own if own is not None else self._layout.query_prompt() if query else self._layout.document_prompt()

    def _count(self, prompt: str) -> int:
        return 0 if self._layout.include_prompt or not prompt else self._loaded().prompt_tokens(prompt)

    def _sides(self) -> dict[str, nn.Module]:
        model = self._loaded()
        return {"transformer": model.transformer, **({"dense": model.dense} if self._layout.dense else {})}

    def _write(self, part: Path, prompts: Mapping[str, str | None]) -> None:
        self._copy_settings(part)
        for name, module in self._sides().items():
            module.eval()
            if name == "dense":
                self._write_dense(module, part)
        whole: Any = self._whole
        if self._checkpointing:
            self._loaded().transformer.gradient_checkpointing_disable()  # type: ignore[operator]
        if self._lora is not None:
            whole = merged(whole)
        whole.save_pretrained(part / self._layout.transformer)
        if not (part / "modules.json").is_file():
            _write_modules(part)
        _update(part / "config_sentence_transformers.json", "prompts", {name: prompt for name, prompt in prompts.items() if prompt is not None})
        if self._max_tokens is not None:
            _update(transformer_settings_file(part / self._layout.transformer), "max_seq_length", self._max_tokens)

    def _copy_settings(self, part: Path) -> None:
        source = self._source.with_weights()
        listed = json.loads((source / "modules.json").read_text()) if (source / "modules.json").is_file() else []
        for path in dict.fromkeys(["", *(entry["path"] for entry in listed)]):
            (part / path).mkdir(exist_ok=True, parents=True)
            for file in sorted({file for pattern in SETTINGS for file in (source / path).glob(pattern)}):
                if file.name not in _OWN:
                    shutil.copyfile(file, part / path / file.name)

    def _write_dense(self, module: nn.Module, part: Path) -> None:
        from safetensors.torch import save_file

        for layer, linear in zip(self._layout.dense, module.children(), strict=True):
            state = {f"linear.{name}": values.detach().cpu().contiguous() for name, values in linear.get_submodule("0").state_dict().items()}
            save_file(state, part / layer.path / "model.safetensors")

    def _loaded(self) -> SentenceModel:
        assert self._model is not None, "load first"
        return self._model


def _write_modules(part: Path) -> None:
    """What makes a plain transformer's folder one of sentence-transformers', pooled as it was trained: by the mean."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)]
    (part / "modules.json").write_text(json.dumps(modules, indent=2))
    (part / "1_Pooling").mkdir()
    width = json.loads((part / "config.json").read_text())["hidden_size"]
    (part / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}, indent=2))


def _update(path: Path, key: str, value: Any) -> None:
    """Set a key of a JSON file, of a section what is in `value`; an empty section changes nothing."""
    if value == {}:
        return
    values = json.loads(path.read_text()) if path.is_file() else {}
    values[key] = {**(values.get(key) or {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False))
