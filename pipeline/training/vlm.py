"""TrainVlm: a vision-language model on its way to be an encoder: whole, some of its parts, or a LoRA adapter (arXiv 2106.09685)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import ConfigError, section
from pipeline.encoders.precision import Dtype, check_dtype
from pipeline.encoders.vlm import complete
from pipeline.training.batches import Told
from pipeline.training.lora import adapted, lora_of
from pipeline.training.matryoshka import Cuts
from pipeline.training.tape import Vectors
from pipeline.vlm.backbone import Backbone, load_backbone
from pipeline.vlm.base import base_of
from pipeline.vlm.card import Card
from pipeline.vlm.causality import make_bidirectional
from pipeline.vlm.export import save_encoder
from pipeline.vlm.heads import HeadShape, head_of
from pipeline.vlm.preparer import Prepared, Preparer
from pipeline.vlm.prepending import check_span
from pipeline.vlm.reading import Head, read, read_layers
from pipeline.vlm.settings import Prompt, Reading, Sizes
from pipeline.vlm.spec import EncoderSpec
from pipeline.vlm.templates import template_of, with_placeholder

TEXT_TOKENS = 256
"""So many tokens must be left for text beside the largest image, or a quarter of a small `max_tokens`."""


class TrainVlm:
    """A model of `pipeline.vlm.base.SUPPORTED`.

    `model`: a folder, or a name on the Hugging Face hub, optionally at `revision`. `lora`: the keys of `pipeline.training.lora.Lora`; None
    trains the weights themselves. `parts`: regular expressions; weights whose names one of them is found in are trained, the others are frozen.
    None: all. `head`: the keys of `pipeline.vlm.heads.HeadShape`; it takes the place of a pooling and is trained from random weights, with parts=[]
    alone. `prompt`, `reading`, `sizes`: the keys of `pipeline.vlm.settings`. Weights are in `dtype`; with bfloat16 small steps are lost, better
    use `optimisation.autocast`. `gradient_checkpointing`: less memory, a third more work.
    """

    def __init__(
        self,
        model: str,
        *,
        lora: Mapping[str, Any] | None = None,
        parts: Sequence[str] | None = None,
        head: Mapping[str, Any] | None = None,
        prompt: Mapping[str, Any] | None = None,
        reading: Mapping[str, Any] | None = None,
        sizes: Mapping[str, Any] | None = None,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        check_dtype(dtype)
        if lora is not None and parts is not None:
            raise ConfigError("lora trains an adapter and parts some of the weights: give one of the two (lora.modules says where an adapter goes)")
        self._base = base_of(model, revision, cache_dir)
        self._lora = None if lora is None else lora_of(lora)
        self._parts = None if parts is None else [re.compile(part) for part in parts]
        self._reading = section(Reading, reading, "reading")
        spec = EncoderSpec(
            prompt=section(Prompt, prompt, "prompt"),
            sizes=section(Sizes, sizes, "sizes"),
            reading=self._reading,
            head=None if head is None else section(HeadShape, head, "head"),
            dtype=dtype,
        )
        if self._reading.prepending is not None:
            check_span(self._reading.prepending, self._reading.layer or 10**6)
        self._spec = spec
        template = template_of(spec.prompt.template)
        self._template = template if self._reading.prepending is None else with_placeholder(template)
        self._preparer = Preparer(self._base, spec.sizes)
        _check_room(self._preparer)
        self._checkpointing = gradient_checkpointing
        self._backbone: Backbone | None = None
        self._whole: nn.Module | None = None
        self._head: Head | None = None

    def learn_at(self, cuts: Cuts) -> None:
        """`embed` gives a vector of each of these layers and of the last, and the saved encoder opens at them and at these widths."""
        full = complete(self._reading, self._base)
        layers, widths = ((*cuts.layers, int(full.layer or 0)) if cuts.layers else (), (*cuts.widths, int(full.width or 0)) if cuts.widths else ())
        for name, asked in (("layers", layers), ("widths", widths)):
            if any(each >= asked[-1] for each in asked[:-1]):
                raise ConfigError(
                    f"the loss's {name} are {list(asked[:-1])}, and must be below {asked[-1]}, which the model has and always takes part"
                )
        if layers and self._spec.head is not None and self._spec.head.kind == "multi-layer":
            raise ConfigError(f"a multi-layer head reads all {layers[-1]} layers at once and cannot be trained at layers {list(layers[:-1])} too")
        self._spec = self._spec.model_copy(update={"layers": layers, "widths": widths})

    @property
    def base_commit(self) -> str | None:
        """Of the hub's repository that is begun with; None for a folder."""
        return self._base.source.commit

    def load(self, device: torch.device) -> None:
        """Load the weights, add the adapter, and freeze what is not trained. Raises ConfigError if nothing would be trained."""
        backbone = load_backbone(self._base, self._preparer, dtype=self._spec.dtype, device=str(device))
        if self._reading.bidirectional:
            make_bidirectional(backbone.model)
        if self._checkpointing:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self._backbone, self._whole = backbone, backbone.model if self._lora is None else adapted(backbone.model, self._lora)
        if self._lora is None:
            for name, values in backbone.model.named_parameters():
                values.requires_grad_(self._parts is None or any(part.search(name) for part in self._parts))
        if self._spec.head is not None:
            layers = self._reading.layer or backbone.num_layers
            self._head = head_of(self._spec.head, backbone.hidden_size, layers=layers).to(device)
        elif not any(values.requires_grad for values in backbone.model.parameters()):
            some = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in backbone.model.named_parameters()))
            raise ConfigError(f"parts={[part.pattern for part in self._parts or []]} is found in no weight's name; the model's begin with {some}")
        backbone.model.train()

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The model without its language head, and the head that makes vectors if there is one."""
        return [self._loaded().model, *([] if self._head is None else [self._head])]

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The language model's, up to the one that is read. A vision tower's see rows with images only."""
        return self._loaded().decoder_layers[: self._reading.layer]

    def prepare(self, told: Told, *, query: bool) -> Prepared:
        """One row. Where neither the row nor its data set has an instruction, the prompt's counts."""
        prompt = self._spec.prompt
        own = prompt.query_instruction if query and prompt.query_instruction is not None else prompt.instruction
        return self._preparer.read(told.message, self._template, instruction=told.instruction or own, query=query)

    def embed(self, rows: Sequence[Prepared]) -> Vectors:
        """Vectors (n, D), norm 1, with gradient; a tuple of these where several layers are trained."""
        if not self._spec.layers:
            return read(self._loaded(), list(rows), self._reading, self._head)
        return read_layers(self._loaded(), list(rows), self._reading, self._spec.layers, self._head)

    def save(self, folder: Path, card: Card) -> str:
        """An encoder for `pipeline.encoders.saved:open_encoder`, an adapter merged into its weights and kept beside them.

        Its prompt is what rows were trained under: the instruction of all of a side, else the constructor's.
        """
        assert self._whole is not None, "load first"
        self._whole.eval()
        if self._checkpointing:
            self._loaded().model.gradient_checkpointing_disable()  # type: ignore[operator]
        return save_encoder(folder, self._whole, preparer=self._preparer, spec=self._told(card), card=card, head=self._head).fingerprint

    def _told(self, card: Card) -> EncoderSpec:
        """The spec with the instruction that all rows of a side were trained under, where there is one."""
        prompt = self._spec.prompt
        document = self._template.instruction if prompt.instruction is None else prompt.instruction
        query = document if prompt.query_instruction is None else prompt.query_instruction
        found = {"instruction": card.instruction("document") or document, "query_instruction": card.instruction("query") or query}
        if found == {"instruction": document, "query_instruction": query}:
            return self._spec
        return self._spec.model_copy(update={"prompt": prompt.model_copy(update=found)})

    def _loaded(self) -> Backbone:
        assert self._backbone is not None, "load first"
        return self._backbone


def _check_room(preparer: Preparer) -> None:
    """Raises ConfigError if one large image would leave its text no room, which would be cut and not said so, or end the run."""
    room = preparer.max_tokens - min(TEXT_TOKENS, preparer.max_tokens // 4)
    most = preparer.most_image_tokens()
    if most is not None and most > room:
        raise ConfigError(
            f"sizes.max_pixels is {most * preparer.pixels_a_token} (the model's own if not given), so an image may take {most} tokens, and "
            f"sizes.max_tokens={preparer.max_tokens} would leave too few for text: set sizes.max_pixels to {room * preparer.pixels_a_token} or less, "
            "or raise sizes.max_tokens"
        )
