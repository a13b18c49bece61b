"""ConSE: an image-text encoder composed of an ImageNet classifier and a sentence encoder, with no training at all.

ConSE, Norouzi et al. 2014, arXiv:1312.5650, equation 3: an image's vector is the mean of the vectors of the classes it
may be of, weighted by their probability; a text's vector is the sentence encoder's. It knows what ImageNet's nouns know:
good for a demonstration with real weights of 110 MB, and no match for a CLIP model.
"""

import copy
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.config import ConfigError, nearest
from pipeline.encoders.inputs import inputs_of
from pipeline.encoders.lineage import fingerprint_of, sha256_of
from pipeline.encoders.local_copy import local_copy
from pipeline.encoders.once import Once
from pipeline.encoders.pixels import Pixels
from pipeline.encoders.precision import Dtype, autocast, check_dtype, device_of, place, unit
from pipeline.encoders.resize import Resize
from pipeline.encoders.sentence import Sentence

NUM_CLASSES = 1000
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.002}
"""As in `sentence.TOLERANCE`; measured on a CPU: 2e-7, 2.5e-3 and 2.8e-4."""


@dataclass(frozen=True)
class _Loaded:
    network: torch.nn.Module
    classes_CD: torch.Tensor
    device: torch.device


class ConSE:
    """Images through a classifier, texts through a sentence encoder, into one space.

    `classifier`: weights of a timm `architecture` over the 1,000 ImageNet classes: a state dict, its names may differ but
    not its order. `sentence`: as `Sentence` takes it. `temperature` softens the classifier; only the `top` likeliest
    classes count, None counts all. With the defaults a title finds its photo first for 0.81 of the 37 photographs of
    `demo.assets`, and among the first three for 0.92; settings near them differ by chance.
    """

    def __init__(
        self,
        classifier: str,
        sentence: str,
        *,
        architecture: str = "tf_efficientnet_lite0",
        temperature: float = 2.0,
        top: int | None = 20,
        dtype: Dtype = "float32",
        device: str | None = None,
        batch_size: int = 16,
    ) -> None:
        check_dtype(dtype)
        path = local_copy(classifier)
        if not path.is_file():
            raise ConfigError(f"there is no file {classifier}; for the demonstration's weights run python -m demo.assets")
        if temperature <= 0 or (top is not None and not 1 <= top <= NUM_CLASSES) or batch_size < 1:
            raise ConfigError(f"temperature={temperature} must be above 0, top={top} between 1 and {NUM_CLASSES}, batch_size={batch_size} at least 1")
        preprocess = _preprocess(architecture)
        self._sentence = Sentence(sentence, dtype=dtype, device=device)
        self._resize, self._pixels = Resize.of(preprocess), Pixels(preprocess["mean"], preprocess["std"])
        self._temperature, self._top, self._dtype, self._batch_size = temperature, top, dtype, batch_size
        self._loaded = Once(functools.partial(_load, path, architecture, self._sentence, dtype, device))

        self.dim = self._sentence.dim
        self.tolerance = TOLERANCE[dtype]
        self.lineage: dict[str, object] = {
            "encoder": "conse",
            "classifier": sha256_of(path),
            "architecture": architecture,
            "preprocess": preprocess,
            "classes": hashlib.sha256("\n".join(class_names()).encode()).hexdigest(),
            "sentence": self._sentence.lineage,
            "temperature": temperature,
            "top": top,
            "dtype": dtype,
        }
        self.fingerprint = fingerprint_of(self.lineage)

    def for_queries(self) -> "ConSE":
        """The same encoder, with the sentence encoder's query prompt. Shares the weights."""
        queries = copy.copy(self)
        queries._sentence = self._sentence.for_queries()
        return queries

    def load(self) -> None:
        """Load the weights now."""
        self._loaded()

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The image at the classifier's size, uint8."""
        return self._resize(image)

    def encode(self, items: pa.Table) -> np.ndarray:
        """Vectors of the images, and of the texts of items without one: (N, dim) float32, norm 1."""
        inputs = inputs_of(items)
        return inputs.merge(self._encode_images(inputs.images), self._sentence.encode_texts(inputs.texts))

    def _encode_images(self, images: list[np.ndarray]) -> np.ndarray:
        vectors = np.zeros((len(images), self.dim), np.float32)
        for start in range(0, len(images), self._batch_size):
            batch = [self.prepare(image) for image in images[start : start + self._batch_size]]
            vectors[start : start + len(batch)] = self._vectors(batch, self._loaded())
        return vectors

    def _vectors(self, images: list[np.ndarray], loaded: _Loaded) -> np.ndarray:
        with torch.inference_mode():
            weights = next(loaded.network.parameters())
            with autocast(loaded.device, self._dtype):
                logits_NC = loaded.network(self._pixels.batch(images, loaded.device, weights.dtype)).float()
            shares_NC = torch.softmax(logits_NC / self._temperature, dim=1)
            if self._top is not None:
                least_N1 = shares_NC.topk(self._top, dim=1).values[:, -1:]
                shares_NC = shares_NC * (shares_NC >= least_N1)
            return unit(shares_NC @ loaded.classes_CD)


def class_names() -> list[str]:
    """What the 1,000 classes are, with synonyms and definition, as timm ships them."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [str(info.index_to_description(index, detailed=True)) for index in range(NUM_CLASSES)]


def _preprocess(architecture: str) -> dict[str, Any]:
    """The classifier's preprocessing in open_clip's words. Raises ConfigError if timm has no such architecture."""
    import timm

    if not timm.is_model(architecture):
        raise ConfigError(f"timm has no architecture {architecture!r}{nearest(architecture, timm.list_models())}")
    found = timm.get_pretrained_cfg(architecture)
    if found is None:
        raise ConfigError(f"timm does not say how images are prepared for {architecture!r}; choose an architecture that has pretrained weights there")
    size, interpolation = tuple(found.input_size[1:]), found.interpolation
    return {"size": size, "mean": found.mean, "std": found.std, "resize_mode": "shortest", "interpolation": interpolation, "fill_color": 0}


def _load(path: Path, architecture: str, sentence: Sentence, dtype: str, device: str | None) -> _Loaded:
    import timm

    network = timm.create_model(architecture, pretrained=False, num_classes=NUM_CLASSES)
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(in_order(state, network.state_dict(), str(path)))
    classes_CD = torch.from_numpy(sentence.encode_texts(class_names()))
    placed_on = device_of(device)
    # Around their mean: what all class names share says nothing about an image.
    return _Loaded(place(network, placed_on, dtype), (classes_CD - classes_CD.mean(dim=0)).to(placed_on), placed_on)


def in_order(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """`given` under the names of `wanted`: the nth tensor is the nth. Raises ConfigError at the first that does not fit."""
    if len(given) != len(wanted):
        raise ConfigError(f"{path} holds {len(given)} tensors, the architecture has {len(wanted)}: these are weights of another one")
    renamed = {}
    for (name, tensor), (own_name, own) in zip(given.items(), wanted.items(), strict=True):
        if tensor.shape != own.shape:
            raise ConfigError(
                f"{path}: {name} is {tuple(tensor.shape)}, the architecture's {own_name} is {tuple(own.shape)}: these are weights of another one"
            )
        renamed[own_name] = tensor
    return renamed
