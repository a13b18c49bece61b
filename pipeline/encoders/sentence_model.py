"""The part of a text encoder that needs its weights: tokenizer, transformer, pooling, dense layers."""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.encoders.pooling import pool
from pipeline.encoders.precision import autocast, device_of, place, unit
from pipeline.encoders.sentence_folder import ENCODER_HALVES, DenseLayer, Folder, Source

Tokens = dict[str, list[list[int]]]
"""What the tokenizer gives, by name (input_ids, ...): a list of numbers for each text, unpadded."""


class SentenceModel:
    """A text encoder in memory, safe to use from several threads."""

    def __init__(self, layout: Folder, tokenizer: Any, transformer: torch.nn.Module, dense: torch.nn.Module, *, max_tokens: int, dtype: str) -> None:
        self.device = next(transformer.parameters()).device
        self._layout, self._tokenizer, self.transformer, self.dense = layout, tokenizer, transformer, dense
        self._max_tokens, self._dtype = max_tokens, dtype
        self._accepts = set(inspect.signature(transformer.forward).parameters)
        self._lock = threading.Lock()

    def tokenise(self, texts: list[str]) -> Tokens:
        """Tokens of each text, cut to the model's limit, unpadded."""
        # A tokenizer keeps its settings in itself while it runs, and refuses a second thread.
        with self._lock:
            encoded = self._tokenizer(texts, truncation=self._max_tokens < 10**9, max_length=self._max_tokens, padding=False)
        return {name: values for name, values in encoded.items() if name in self._accepts}

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens at the start of a text are its prompt's: a special token at the prompt's own end does not count."""
        ids = self.tokenise([prompt])["input_ids"][0]
        return len(ids) - (ids[-1] in self._tokenizer.all_special_ids)

    def vectors(self, tokens: Tokens, prompt_tokens: int) -> np.ndarray:
        """Vectors of one batch: float32, norm 1. `prompt_tokens` at the start of each text are left out of the pooling."""
        with torch.inference_mode():
            return unit(self.pooled(tokens, prompt_tokens))

    def pooled(self, tokens: Tokens, prompt_tokens: int) -> torch.Tensor:
        """The same, (N, D), of whatever norm, with gradient where weights have one."""
        features = {name: self._pad(name, values) for name, values in tokens.items()}
        mask_BT = features["attention_mask"]
        if "use_cache" in self._accepts:
            features["use_cache"] = False
        with autocast(self.device, self._dtype):
            tokens_BTD = self.transformer(**features).last_hidden_state
        vectors: torch.Tensor = self.dense(pool(tokens_BTD, mask_BT, self._layout.modes, prompt_tokens=prompt_tokens))
        return vectors

    def _pad(self, name: str, rows: list[list[int]]) -> Any:
        filling = {"input_ids": self._tokenizer.pad_token_id or 0, "token_type_ids": self._tokenizer.pad_token_type_id}.get(name, 0)
        width = max(1, *(len(row) for row in rows))
        padded = torch.full((len(rows), width), filling, dtype=torch.long)
        for index, row in enumerate(rows):
            start = width - len(row) if self._tokenizer.padding_side == "left" else 0
            padded[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        return padded.to(self.device)


def load_model(source: Source, layout: Folder, *, max_tokens: int | None, dtype: str, device: str | None) -> SentenceModel:
    """Load a text encoder's weights and tokenizer."""
    import transformers

    folder = source.with_weights()
    place_on = device_of(device)
    config = transformers.AutoConfig.from_pretrained(folder / layout.transformer)
    kind = getattr(transformers, ENCODER_HALVES.get(config.model_type, "AutoModel"))
    with without_progress_bars():
        transformer = kind.from_pretrained(folder / layout.transformer, config=config, dtype=torch.float32)
    tokenizer = _tokenizer(folder / layout.transformer, lower_case=layout.lower_case)
    limit = max_tokens or layout.max_tokens
    if limit is None:
        positions = getattr(config, "max_position_embeddings", None)
        limit = min(tokenizer.model_max_length, positions if positions and positions > 0 else tokenizer.model_max_length)
    dense = torch.nn.Sequential(*(_dense(folder, layer) for layer in layout.dense)).eval().requires_grad_(False).to(place_on)
    return SentenceModel(layout, tokenizer, place(transformer, place_on, dtype), dense, max_tokens=limit, dtype=dtype)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws a bar while it loads weights; a worker's log is no place for it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer(folder: Path, *, lower_case: bool) -> Any:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if lower_case:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])])
    return tokenizer


def _dense(folder: Path, layer: DenseLayer) -> torch.nn.Module:
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias)
    path = folder / layer.path / "model.safetensors"
    if path.is_file():
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path.with_name("pytorch_model.bin"), map_location="cpu", weights_only=True)
    linear.load_state_dict({name.removeprefix("linear."): weight.float() for name, weight in state.items()})
    return torch.nn.Sequential(linear, getattr(torch.nn, layer.activation)())
