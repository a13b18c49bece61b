"""Vlm: a vision-language model of transformers as an encoder: any number of images and text, in any order, to one vector.

Queries and documents may be put under different instructions. Rows are put together by length and cut by a budget of
tokens, those of images included; a row's vector does not depend on what else is in its batch.
"""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from pipeline.config import ConfigError, section
from pipeline.encoders.lineage import fingerprint_of
from pipeline.encoders.local_copy import local_copy
from pipeline.encoders.once import Once
from pipeline.encoders.precision import Dtype, check_dtype
from pipeline.encoders.sentence import batches
from pipeline.media import from_pixels
from pipeline.vlm.adapter import adapter_lineage
from pipeline.vlm.backbone import Backbone, check_images_reach, load_backbone
from pipeline.vlm.base import Base, base_of
from pipeline.vlm.causality import make_bidirectional
from pipeline.vlm.drawn import drawn
from pipeline.vlm.message import MARKER, Message
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.prepending import check_span
from pipeline.vlm.reading import Head, TrainedHead, read
from pipeline.vlm.settings import Prompt, Reading, Sizes
from pipeline.vlm.templates import Template, template_of, with_placeholder
from pipeline.vlm.textimage import Page, page_lineage

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.004}
"""How far two vectors of one message may lie apart, in any coordinate, because of what else is in the batch.

Measured on a CPU with random weights: 4e-7, 0.0125 and 0.0015 at most for models of every family 3 layers deep and 32 wide,
1.1e-7, 0.0032 and 0.0003 for one in the shape of SmolVLM-256M. Not measured on CUDA, nor with published weights.
"""

Parts = Literal["all", "image", "text"]


class Vlm:
    """A vision-language model that embeds.

    `model`: a folder, its URI (`storage_options`: fsspec's, also for `adapter`), or a name on the Hugging Face hub, optionally
    at `revision`: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM, LLaVA, LLaVA-NeXT, LLaVA-OneVision, FastVLM, PaliGemma.
    `adapter`: the folder of a LoRA adapter of PEFT. `prompt`,
    `reading` and `sizes`: the keys of `pipeline.vlm.settings`; `head`, a trained one instead of a pooling, those of
    `pipeline.vlm.reading.TrainedHead`; `page`, which draws texts as pixels, those of `pipeline.vlm.textimage.Page`. `of`: what
    of an item is embedded: "all" that it has, its "image" or its "text". `token_budget`: tokens computed at once, padding
    included; None is 2,048 on a CPU, 16,384 on CUDA. Weights are kept in `dtype`, also on CUDA.

    An encoder that was saved with all its settings is opened by `pipeline.encoders.saved:open_encoder` instead.
    """

    def __init__(
        self,
        model: str,
        *,
        adapter: str | None = None,
        prompt: Mapping[str, Any] | Prompt | None = None,
        reading: Mapping[str, Any] | Reading | None = None,
        sizes: Mapping[str, Any] | Sizes | None = None,
        head: Mapping[str, Any] | TrainedHead | None = None,
        page: Mapping[str, Any] | Page | None = None,
        of: Parts = "all",
        dtype: Dtype = "float32",
        device: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        token_budget: int | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        check_dtype(dtype)
        if of not in ("all", "image", "text"):
            raise ConfigError(f"of={of!r} must be 'all' (whatever an item has), 'image' or 'text'")
        if token_budget is not None and token_budget < 1:
            raise ConfigError(f"token_budget={token_budget} must be at least 1")
        base = base_of(model, revision, cache_dir, storage_options=storage_options)
        lora = None if adapter is None else local_copy(adapter, storage_options)
        self._reading = complete(section(Reading, reading, "reading"), base)
        self._of, self._query, self._token_budget = of, False, token_budget
        asked = section(Prompt, prompt, "prompt")
        template = template_of(asked.template)
        self._template = template if self._reading.prepending is None else with_placeholder(template)
        self._instruction, self._query_instruction = _instructions(asked, self._template)
        sized = section(Sizes, sizes, "sizes")
        trained = None if head is None else section(TrainedHead, head, "head")
        self._page = None if page is None else section(Page, page, "page")
        self._preparer = Once(functools.partial(Preparer, base, sized))
        self._backbone = Once(functools.partial(_load, base, self._preparer, dtype=dtype, device=device, adapter=lora, reading=self._reading))
        self._head = Once(functools.partial(_load_head, trained, self._backbone, self._reading))

        self.dim = int(self._reading.width or 0)
        self.tolerance = TOLERANCE[dtype]
        self.inputs = frozenset({"image", "text"}) if of == "all" else frozenset({of})
        self.lineage: dict[str, object] = {
            "encoder": "vlm",
            **base.lineage(),
            "adapter": None if lora is None else adapter_lineage(lora),
            "template": _samples(self._template),
            "instruction": self._instruction,
            "query_instruction": self._query_instruction,
            "reading": self._reading.model_dump(mode="json"),
            "images": self._preparer().pixels,
            "max_tokens": sized.max_tokens,
            "of": of,
            "dtype": dtype,
            **({} if trained is None else {"head": trained.lineage()}),
            **({} if self._page is None else {"page": page_lineage(self._page)}),
        }
        self.fingerprint = fingerprint_of(self.lineage)
        self.training: dict[str, object] = {}
        """The run that made it, where a saved folder says so."""

    def for_queries(self) -> "Vlm":
        """The same encoder under the query's instruction; takes whatever a query has. Shares the weights."""
        queries = copy.copy(self)
        queries._query, queries._of = True, "all"
        queries.inputs = frozenset({"image", "text"})
        return queries

    def load(self) -> None:
        """Load the weights now."""
        self._head()

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The image no larger than the model reads it, uint8 (h, w, 3): the vector stays the same."""
        return self._preparer().resized(image)

    def encode(self, items: pa.Table) -> np.ndarray:
        """Vectors of items, each by its image, its text or both: (N, dim) float32, norm 1.

        Image markers in a text say where the image stands. Raises ValueError naming the first item without what is asked for.
        """
        return self.encode_messages(_messages(items, self._of))

    def encode_messages(self, messages: list[Message]) -> np.ndarray:
        """Vectors of messages, each with any number of images: (N, dim) float32, norm 1."""
        instruction = self._query_instruction if self._query else self._instruction
        preparer = self._preparer()
        messages = messages if self._page is None else [drawn(message, self._page) for message in messages]
        rows = [preparer.read(message, self._template, instruction=instruction, query=self._query) for message in messages]
        vectors = np.zeros((len(rows), self.dim), np.float32)
        if not rows:
            return vectors
        backbone, head = self._backbone(), self._head()
        budget = self._token_budget or (2_048 if backbone.device.type == "cpu" else 16_384)
        for chosen in batches([len(row) for row in rows], budget):
            with torch.inference_mode():
                vectors[chosen] = read(backbone, [rows[row] for row in chosen], self._reading, head).cpu().numpy()
        return vectors


def _load(base: Base, preparer: Once[Preparer], *, dtype: str, device: str | None, adapter: Path | None, reading: Reading) -> Backbone:
    backbone = load_backbone(base, preparer(), dtype=dtype, device=device, adapter=adapter)
    if reading.bidirectional:
        make_bidirectional(backbone.model)
    check_images_reach(backbone)
    return backbone


def _load_head(trained: TrainedHead | None, backbone: Once[Backbone], reading: Reading) -> Head | None:
    loaded = backbone()
    return None if trained is None else trained.load(loaded.hidden_size, layers=reading.layer or loaded.num_layers, device=loaded.device)


def complete(reading: Reading, base: Base) -> Reading:
    """`reading` with the model's own layer and width where none is given. Raises ConfigError if the model has not as many."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(base.folder).get_text_config()
    layer, width = reading.layer or text.num_hidden_layers, reading.width or text.hidden_size
    if layer > text.num_hidden_layers:
        raise ConfigError(f"reading.layer={layer} must lie between 1 and {text.num_hidden_layers}, the number of the model's layers")
    if width > text.hidden_size:
        raise ConfigError(f"reading.width={width} must lie between 1 and {text.hidden_size}, the length of the model's states")
    if reading.prepending is not None:
        check_span(reading.prepending, layer)
    return reading.model_copy(update={"layer": layer, "width": width})


def _instructions(prompt: Prompt, template: Template) -> tuple[str, str]:
    """For documents and for queries."""
    document = template.instruction if prompt.instruction is None else prompt.instruction
    return document, document if prompt.query_instruction is None else prompt.query_instruction


def _samples(template: Template) -> list[object]:
    """What a template does, whatever its name: itself on a text, and on an image with a text."""
    pixel = np.zeros((1, 1, 3), np.uint8)
    messages = [Message("{input}"), Message("{input}", (pixel,)), Message("", (pixel,)), Message(f"{{input}}{MARKER}", (pixel,))]
    rendered = [render("{instruction}", message) for render in (template.query, template.document) for message in messages]
    return [template.bare, *rendered]


def _messages(items: pa.Table, of: Parts) -> list[Message]:
    ids = items["id"].to_pylist()
    images = [None] * len(ids) if of == "text" else from_pixels(items["image"])
    texts: list[str | None] = [None] * len(ids) if of == "image" else items["text"].to_pylist()
    for id, image, text in zip(ids, images, texts, strict=True):
        if image is None and text is None:
            raise ValueError(f"item {id!r} has {'neither an image nor a text' if of == 'all' else f'no {of}'} to embed")
    return [Message(text or "", () if image is None else (image,)) for image, text in zip(images, texts, strict=True)]
