"""OpenClip: any image-text model of open_clip: CLIP, SigLIP, MobileCLIP, one's own checkpoint.

Images are resized by `resize.Resize` (torch) with open_clip's geometry and travel as uint8. On a CPU bfloat16 weights
run at twice the rate of float32 where the CPU has such instructions; int8 is not offered, it breaks vectors.
"""

import copy
import functools
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.config import ConfigError
from pipeline.encoders.inputs import Of, check_of, inputs_of
from pipeline.encoders.lineage import fingerprint_of
from pipeline.encoders.once import Once
from pipeline.encoders.openclip_model import lengths_of, load_open_clip, padding_of
from pipeline.encoders.openclip_weights import Resolved, identity_of, resolve
from pipeline.encoders.pixels import Pixels
from pipeline.encoders.precision import Dtype, autocast, check_dtype, device_of, place, unit
from pipeline.encoders.resize import Resize

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.01, "float16": 0.001}
"""How far two vectors of one item may lie apart, in any coordinate, because of what else is in the batch.

Measured on a CPU with ViT-B-32 and SigLIP's kind: 1.3e-7, 0, 0; with a Hugging Face text tower as in `sentence.TOLERANCE`.
Not measured on CUDA.
"""


@dataclass(frozen=True)
class _Loaded:
    model: Any
    tokenizer: Any
    device: torch.device
    padding: int | None
    """The token that fills up texts, where texts may be cut behind it."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class OpenClip:
    """Both towers of an open_clip model.

    `model`: a name of open_clip's with `pretrained`, a tag or a checkpoint file; or `hf-hub:ORG/NAME` (optionally
    @REVISION) or `local-dir:FOLDER`, which have their own weights. File and folder may be URIs (`storage_options`: fsspec's).
    `of`: what of an item is embedded; "auto" takes its image, else its text. `batch_size`: items computed at once; None is
    32 on a CPU, where more is not faster, 256 on CUDA.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        *,
        of: Of = "auto",
        dtype: Dtype = "float32",
        device: str | None = None,
        cache_dir: str | None = None,
        batch_size: int | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        check_dtype(dtype)
        check_of(of)
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        found = resolve(model, pretrained, cache_dir, storage_options)
        self._resize = Resize.of(found.preprocess)
        self._pixels = Pixels(tuple(found.preprocess["mean"]), tuple(found.preprocess["std"]))
        self._of, self._dtype, self._batch_size = of, dtype, batch_size
        self._loaded = Once(functools.partial(_load, found, dtype, device, cache_dir))

        self.dim = int(found.config["embed_dim"])
        self.tolerance = TOLERANCE[dtype]
        self.lineage: dict[str, object] = {
            "encoder": "openclip",
            "weights": found.weights,
            "config": identity_of(found.config),
            "preprocess": {**found.preprocess, "resize": "torch"},
            "of": of,
            "dtype": dtype,
        }
        self.fingerprint = fingerprint_of(self.lineage)
        self.training: dict[str, object] = {}
        """The run that made it, where a saved folder says so."""

    def for_queries(self) -> "OpenClip":
        """The same encoder for queries, which may be an image or a text whatever the table holds. Shares the weights."""
        queries = copy.copy(self)
        queries._of = "auto"
        return queries

    def load(self) -> None:
        """Load the weights now."""
        self._loaded()

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The image at the model's size, uint8."""
        return self._resize(image)

    def encode(self, items: pa.Table) -> np.ndarray:
        """Vectors of the images, and of the texts of items without one: (N, dim) float32, norm 1."""
        inputs = inputs_of(items, self._of)
        return inputs.merge(self._encode_images(inputs.images), self._encode_texts(inputs.texts))

    def _encode_images(self, images: list[np.ndarray]) -> np.ndarray:
        vectors = np.zeros((len(images), self.dim), np.float32)
        for rows in self._slices(len(images)):
            loaded = self._loaded()
            pixels = self._pixels.batch([self.prepare(image) for image in images[rows]], loaded.device, _dtype_of(loaded.model))
            with torch.inference_mode(), autocast(loaded.device, self._dtype):
                vectors[rows] = unit(loaded.model.encode_image(pixels, normalize=False))
        return vectors

    def _encode_texts(self, texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dim), np.float32)
        if not texts:
            return vectors
        loaded = self._loaded()
        with loaded.lock:  # a tokenizer keeps its settings in itself while it runs
            tokens_NT = loaded.tokenizer(texts)
        lengths_N = lengths_of(tokens_NT, loaded.padding)
        order_N = torch.argsort(lengths_N, stable=True)
        for rows in self._slices(len(texts)):
            chosen = order_N[rows]
            batch = tokens_NT[chosen, : int(lengths_N[chosen].max())].to(loaded.device)
            with torch.inference_mode(), autocast(loaded.device, self._dtype):
                vectors[chosen.numpy()] = unit(loaded.model.encode_text(batch, normalize=False))
        return vectors

    def _slices(self, count: int) -> list[slice]:
        if count == 0:
            return []
        size = self._batch_size or (32 if self._loaded().device.type == "cpu" else 256)
        return [slice(start, start + size) for start in range(0, count, size)]


def _load(found: Resolved, dtype: str, device: str | None, cache_dir: str | None) -> _Loaded:
    model, tokenizer = load_open_clip(found, cache_dir)
    placed_on = device_of(device)
    return _Loaded(place(model, placed_on, dtype), tokenizer, placed_on, padding_of(model))


def _dtype_of(model: torch.nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
