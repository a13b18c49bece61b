"""Rows to vectors: the states of one layer, pooled, cut to a width, scaled to norm 1."""

import torch

from pipeline.encoders.pooling import Mode, pool
from pipeline.vlm.backbone import LAST, Backbone
from pipeline.vlm.preparer import Prepared
from pipeline.vlm.settings import Pooling, Reading

_MODES: dict[Pooling, Mode] = {"last": "lasttoken", "mean": "mean", "cls": "cls", "weightedmean": "weightedmean"}


def read(backbone: Backbone, rows: list[Prepared], reading: Reading) -> torch.Tensor:
    """One vector a row: (B, dim), norm 1, float32 whatever the model computes in. Gradients flow."""
    layer = LAST if reading.layer is None else reading.layer
    states, mask_BT = backbone.states(rows, (layer,))
    vectors = pool(states[layer], mask_BT, (_MODES[reading.pooling],))
    return torch.nn.functional.normalize(vectors[:, : reading.width], dim=-1)
