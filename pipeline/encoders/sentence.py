"""Sentence: any Hugging Face text encoder, with the vectors that sentence-transformers gives, without importing it.

Texts are put together by length and cut by a budget of tokens: padding is what batches of mixed lengths waste their
time on (3.6 times the rate of batches in order of arrival, on texts of 46 tokens at the median and 256 at most).
"""

import copy
import functools
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.encoders.inputs import inputs_of
from pipeline.encoders.lineage import fingerprint_of
from pipeline.encoders.once import Once
from pipeline.encoders.precision import Dtype, check_dtype
from pipeline.encoders.sentence_folder import locate, read_folder, settings_of
from pipeline.encoders.sentence_model import load_model

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.01, "float16": 0.001}
"""How far two vectors of one text may lie apart, in any coordinate, because of what else is in the batch.

Measured with MiniLM on a CPU: 2e-7, 2.5e-3 and 2.8e-4.
"""


class Sentence:
    """A text encoder of sentence-transformers' kind: transformer, pooling, dense layers.

    `model`: a folder, its URI (`storage_options`: fsspec's), or a name on the Hugging Face hub. `prompt` and `query_prompt` go before documents and
    queries; None takes the model's own. `max_tokens` cuts longer texts; None takes the model's own limit. `revision`: branch, tag
    or commit on the hub. `token_budget`: tokens computed at once, padding included; None is 1,024 on a CPU, 32,768 on CUDA.
    A folder without modules.json is pooled by the mean. Items are embedded by their text, also where they have an image.
    """

    def __init__(
        self,
        model: str,
        *,
        prompt: str | None = None,
        query_prompt: str | None = None,
        max_tokens: int | None = None,
        dtype: Dtype = "float32",
        device: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        token_budget: int | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        check_dtype(dtype)
        if token_budget is not None and token_budget < 1:
            raise ConfigError(f"token_budget={token_budget} must be at least 1")
        source = locate(model, revision, cache_dir, storage_options)
        self._layout = read_folder(source.folder)
        settings = settings_of(source.folder, self._layout)
        check_length(max_tokens, settings["config"].get("max_position_embeddings"))
        self._prompt = self._layout.document_prompt() if prompt is None else prompt
        self._query_prompt = self._layout.query_prompt() if query_prompt is None else query_prompt
        self._token_budget = token_budget
        self._model = Once(functools.partial(load_model, source, self._layout, max_tokens=max_tokens, dtype=dtype, device=device))

        self.dim = self._layout.dim
        self.tolerance = TOLERANCE[dtype]
        self.lineage: dict[str, object] = {
            "encoder": "sentence",
            "weights": source.identity(self._layout),
            **settings,
            "pooling": list(self._layout.modes),
            "include_prompt": self._layout.include_prompt,
            "dense": [[layer.activation, layer.in_features, layer.out_features] for layer in self._layout.dense],
            "max_tokens": max_tokens or self._layout.max_tokens,
            "lower_case": self._layout.lower_case,
            "prompt": self._prompt,
            "query_prompt": self._query_prompt,
            "dtype": dtype,
        }
        self.fingerprint = fingerprint_of(self.lineage)
        self.training: dict[str, object] = {}
        """The run that made it, where a saved folder says so."""

    def for_queries(self) -> "Sentence":
        """The same encoder, with the query prompt before each text. Shares the weights."""
        queries = copy.copy(self)
        queries._prompt = self._query_prompt
        return queries

    def load(self) -> None:
        """Load the weights now."""
        self._model()

    def encode(self, items: pa.Table) -> np.ndarray:
        """Vectors of the items' texts: (N, dim) float32, norm 1."""
        return self.encode_texts(inputs_of(items, "text").texts)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Vectors of plain texts: (N, dim) float32, norm 1."""
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        model = self._model()
        tokens = model.tokenise([self._prompt + text for text in texts])
        skipped = 0 if self._layout.include_prompt or not self._prompt else model.prompt_tokens(self._prompt)
        budget = self._token_budget or (1_024 if model.device.type == "cpu" else 32_768)
        vectors = np.empty((len(texts), self.dim), np.float32)
        for rows in batches([len(ids) for ids in tokens["input_ids"]], budget):
            vectors[rows] = model.vectors({name: [values[row] for row in rows] for name, values in tokens.items()}, skipped)
        return vectors


def check_length(max_tokens: int | None, positions: int | None) -> None:
    """Raises ConfigError unless a model of so many positions can take `max_tokens`."""
    if max_tokens is not None and not 1 <= max_tokens <= (positions or max_tokens):
        raise ConfigError(f"max_tokens={max_tokens} must lie between 1 and {positions or 'the longest the model can take'}")


def batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Rows put together by length so that (rows x longest) stays within the budget; a row beyond it goes alone."""
    result: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if result and (len(result[-1]) + 1) * lengths[row] <= token_budget:
            result[-1].append(row)
        else:
            result.append([row])
    return result
