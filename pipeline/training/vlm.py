"""TrainVlm: a vision-language model on its way to be an encoder: whole, some of its parts, or a LoRA adapter (arXiv 2106.09685)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import torch
from torch import Tensor, nn

from pipeline.config import ConfigError, Model
from pipeline.encoders.precision import Dtype, check_dtype
from pipeline.training.batches import Told
from pipeline.training.lora import adapted, lora_of
from pipeline.vlm.backbone import Backbone, load_backbone
from pipeline.vlm.base import base_of
from pipeline.vlm.card import Card
from pipeline.vlm.causality import make_bidirectional
from pipeline.vlm.export import save_encoder
from pipeline.vlm.preparer import Prepared, Preparer
from pipeline.vlm.prepending import check_span
from pipeline.vlm.reading import read
from pipeline.vlm.settings import Prompt, Reading, Sizes
from pipeline.vlm.spec import EncoderSpec
from pipeline.vlm.templates import template_of, with_placeholder

S = TypeVar("S", bound=Model)


class TrainVlm:
    """A model of `pipeline.vlm.base.SUPPORTED`.

    `model`: a folder, or a name on the Hugging Face hub, optionally at `revision`. `lora`: the keys of `pipeline.training.lora.Lora`; None
    trains the weights themselves. `parts`: regular expressions; weights whose names one of them is found in are trained, the others are frozen.
    None: all. `prompt`, `reading`, `sizes`: the keys of `pipeline.vlm.settings`. Weights are in `dtype`; with bfloat16 small steps are lost, better
    use `optimisation.autocast`. `gradient_checkpointing`: less memory, a third more work.
    """

    def __init__(
        self,
        model: str,
        *,
        lora: Mapping[str, Any] | None = None,
        parts: Sequence[str] | None = None,
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
        self._reading = _section(Reading, reading, "reading")
        spec = EncoderSpec(prompt=_section(Prompt, prompt, "prompt"), sizes=_section(Sizes, sizes, "sizes"), reading=self._reading, dtype=dtype)
        if self._reading.prepending is not None:
            check_span(self._reading.prepending, self._reading.layer or 10**6)
        self._spec = spec
        template = template_of(spec.prompt.template)
        self._template = template if self._reading.prepending is None else with_placeholder(template)
        self._preparer = Preparer(self._base, spec.sizes)
        self._checkpointing = gradient_checkpointing
        self._backbone: Backbone | None = None
        self._whole: nn.Module | None = None

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
        if not any(values.requires_grad for values in backbone.model.parameters()):
            some = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in backbone.model.named_parameters()))
            raise ConfigError(f"parts={[part.pattern for part in self._parts or []]} is found in no weight's name; the model's begin with {some}")
        backbone.model.train()

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The model without its language head."""
        return [self._loaded().model]

    def prepare(self, told: Told, *, query: bool) -> Prepared:
        """One row. Where neither the row nor its data set has an instruction, the prompt's counts."""
        prompt = self._spec.prompt
        own = prompt.query_instruction if query and prompt.query_instruction is not None else prompt.instruction
        return self._preparer.read(told.message, self._template, instruction=told.instruction or own, query=query)

    def embed(self, rows: Sequence[Prepared]) -> Tensor:
        """Vectors (n, D), norm 1, with gradient."""
        return read(self._loaded(), list(rows), self._reading)

    def save(self, folder: Path, card: Card) -> str:
        """An encoder for `pipeline.encoders.saved:open_encoder`, an adapter merged into its weights and kept beside them."""
        assert self._whole is not None, "load first"
        self._whole.eval()
        if self._checkpointing:
            self._loaded().model.gradient_checkpointing_disable()  # type: ignore[operator]
        return save_encoder(folder, self._whole, preparer=self._preparer, spec=self._spec, card=card).fingerprint

    def _loaded(self) -> Backbone:
        assert self._backbone is not None, "load first"
        return self._backbone


def _section(model: type[S], given: Mapping[str, Any] | None, name: str) -> S:
    try:
        return model.model_validate(dict(given or {}))
    except pydantic.ValidationError as error:
        problems = [f"{name}.{'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r})" for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None
