"""Backbone: a vision-language model without its language head, and the hidden states of rows at any layer.

Only the states that are asked for are kept, and layers deeper than the deepest of them are not computed. Several threads
may ask for states at the same time.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config import ConfigError
from pipeline.encoders.precision import DTYPES, device_of
from pipeline.encoders.sentence_model import without_progress_bars
from pipeline.vlm.adapter import with_adapter
from pipeline.vlm.base import Base
from pipeline.vlm.message import MARKER
from pipeline.vlm.preparer import Prepared, Preparer

LAST = -1
"""The last layer, for `Backbone.states`."""


class _DeepEnough(Exception):
    """Leaves the model's forward: every state that was asked for is there."""


@dataclass
class _Wanted(threading.local):
    """What one thread's forward has to leave behind, and what it has left."""

    layers: frozenset[int] = frozenset()
    found: dict[int, torch.Tensor] = field(default_factory=dict)
    deepest: int | None = None
    """The layer to stop after; None runs through to the end."""


class Backbone:
    """`model` is a base model of transformers: without lm_head. `preparer` makes the rows it takes."""

    def __init__(self, model: nn.Module, preparer: Preparer) -> None:
        self.model, self.preparer = model, preparer
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        self.decoder_layers: list[nn.Module] = list(decoder.layers)
        self.final_norm: nn.Module = decoder.norm
        self.num_layers = len(self.decoder_layers)
        self.hidden_size = int(decoder.config.hidden_size)
        self.image_token_id = preparer.image_token_id
        self._wanted = _Wanted()
        self.alone = threading.Lock()
        """For whoever puts hooks of one batch on the layers, as `prepending` does: other threads would run into them."""
        for depth, layer in enumerate(self.decoder_layers):
            layer.register_forward_pre_hook(self._keep(depth), with_kwargs=True)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def states(self, rows: list[Prepared], layers: tuple[int, ...] = (LAST,)) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Hidden states (B, T, D) after each of `layers`, under the final norm, and the mask (B, T) of what is not padding.

        Layers count from 1; 0 is what goes into the first, and negative ones count from the end as in Python. The keys are
        `layers` as given. Of Qwen3-VL's first layers the states have the deeper image features added already, as its next
        layer gets them; `output_hidden_states` of transformers has them without.
        """
        depths = {layer: self._depth(layer) for layer in layers}
        batch = {name: self._placed(values) for name, values in self.preparer.collate(rows).items()}
        wanted = self._wanted
        wanted.layers, wanted.found = frozenset(depths.values()) - {self.num_layers}, {}
        wanted.deepest = None if self.num_layers in depths.values() else max(depths.values())
        try:
            last = self.model(**batch, use_cache=False).last_hidden_state
        except _DeepEnough:
            last = None
        finally:
            found, wanted.layers, wanted.found = wanted.found, frozenset(), {}
        normed = {depth: self.final_norm(states) for depth, states in found.items()}
        return {layer: last if depth == self.num_layers else normed[depth] for layer, depth in depths.items()}, batch["attention_mask"]

    def _depth(self, layer: int) -> int:
        depth = layer if layer >= 0 else self.num_layers + 1 + layer
        if not 0 <= depth <= self.num_layers:
            raise ConfigError(f"layer={layer} must lie between 1 and {self.num_layers}, the number of the model's layers")
        return depth

    def _placed(self, values: torch.Tensor) -> torch.Tensor:
        dtype = next(self.model.parameters()).dtype if values.is_floating_point() else values.dtype
        return values.to(self.device, dtype, non_blocking=True)

    def _keep(self, depth: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            wanted = self._wanted
            if depth in wanted.layers:
                wanted.found[depth] = args[0] if args else kwargs["hidden_states"]
                if depth == wanted.deepest:
                    raise _DeepEnough

        return hook


def load_backbone(base: Base, preparer: Preparer, *, dtype: str, device: str | None, adapter: Path | None = None) -> Backbone:
    """Load a model's weights, merged with a LoRA adapter if one is given. Raises ConfigError if weights are missing."""
    from transformers import AutoModel

    # The weights are cast, also on CUDA: in float32 a model of 7 billion parameters takes 28 GB.
    with without_progress_bars(), _without_load_report():
        model, report = AutoModel.from_pretrained(base.with_weights(), dtype=DTYPES[dtype], attn_implementation="sdpa", output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(f"{base.folder} lacks {len(missing)} of the model's weights, which would be random numbers: {', '.join(missing[:3])}, ...")
    if adapter is not None:
        model = with_adapter(model, adapter)
    return Backbone(model.eval().requires_grad_(False).to(device_of(device)), preparer)


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers warns of the language head's weights, which are left out on purpose; what is missing is looked at here."""

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def check_images_reach(backbone: Backbone) -> None:
    """Raises ConfigError if two different images get the same states: images are dropped on their way into the model.

    Cheap: two small images through the vision tower and one layer of the decoder.
    """
    first, second = _two_images(backbone)
    with torch.inference_mode():
        states, mask_BT = backbone.states([first, second], (1,) if backbone.num_layers > 1 else (LAST,))
    found_BTD = next(iter(states.values())).float()
    if not torch.isfinite(found_BTD[mask_BT.bool()]).all():
        raise ConfigError(f"the model gives NaN or infinity for a plain image in {found_BTD.dtype}; try dtype=bfloat16 or float32")
    if torch.equal(found_BTD[0, len(first) - 1], found_BTD[1, len(second) - 1]):
        raise ConfigError("two different images get the same vector: images do not reach the model; check its processor and its configuration")


def check_images_matter(backbone: Backbone) -> None:
    """`check_images_reach`, and a gradient: raises ConfigError if the vector at the last token does not depend on the pixels."""
    check_images_reach(backbone)
    row, _ = _two_images(backbone)
    pixels = row.images["pixel_values"].clone().requires_grad_()
    states, _ = backbone.states([Prepared(row.input_ids, row.along, {**row.images, "pixel_values": pixels}, row.image_tokens)])
    size = states[LAST][0, len(row) - 1].float().norm(p=1)
    gradient = torch.autograd.grad(size, pixels, allow_unused=True)[0] if size.requires_grad else None
    if gradient is None or not gradient.abs().max() > 0:
        raise ConfigError("the gradient of a vector with respect to its image's pixels is zero: the vision tower is cut off")


def _two_images(backbone: Backbone) -> tuple[Prepared, Prepared]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    first, second = (backbone.preparer.prepare(f"{MARKER} .", (image,)) for image in images)
    return first, second
