"""An adapter of PEFT put into the weights that it was trained on, for encoders that are saved whole."""

import copy
import logging
import math
from typing import Any

import torch

log = logging.getLogger(__name__)

MOST_LOST = 0.01
"""Share of the adapter that rounding may take before it is told. float32 takes 1e-4 at most, bfloat16 some percent of a small adapter."""


def merged(model: Any) -> Any:
    """The whole model, on the CPU, the adapter merged into it.

    The one given stays as it is. It is moved to the CPU meanwhile and back, so that a GPU needs no room for two. Weights keep their number
    format; what its rounding does to the adapter is told.
    """
    device = next(model.parameters()).device
    try:
        whole = copy.deepcopy(model.to("cpu"))
    finally:
        model.to(device)
    lost = _merge(whole)
    if lost > MOST_LOST:
        log.warning(
            "rounding to the weights' number format changed the adapter by %.1f%% as it was merged: the saved encoder's vectors are not quite those "
            "that were measured; train with dtype: float32 and optimisation.autocast, or use the adapter that is saved beside where there is one",
            100 * lost,
        )
    return whole.unload()


@torch.no_grad()
def _merge(whole: Any) -> float:
    """Merge each layer's adapter; the length of what rounding changed, as a share of the adapter's."""
    lost = total = 0.0
    for layer in whole.modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        weight = layer.get_base_layer().weight
        wanted = weight.data.float() + sum(layer.get_delta_weight(name).float() for name in layer.active_adapters)
        total += float((wanted - weight.data.float()).square().sum())
        layer.merge()
        lost += float((weight.data.float() - wanted).square().sum())
    return math.sqrt(lost / total) if total else 0.0
