"""Rows to vectors: the states of one layer, pooled or given to a trained head, cut to a width, scaled to norm 1."""

import contextlib
from collections.abc import Iterator

import torch

from pipeline.encoders.pooling import Mode, pool
from pipeline.vlm.backbone import Backbone
from pipeline.vlm.heads import LatentAttention, MultiLayerPooling
from pipeline.vlm.preparer import Prepared
from pipeline.vlm.prepending import prepending
from pipeline.vlm.settings import Pooling, Reading

_MODES: dict[Pooling, Mode] = {"last": "lasttoken", "mean": "mean", "cls": "cls", "weightedmean": "weightedmean"}

Head = LatentAttention | MultiLayerPooling


def read(backbone: Backbone, rows: list[Prepared], reading: Reading, head: Head | None = None) -> torch.Tensor:
    """One vector a row: (B, dim), norm 1, float32 whatever the model computes in. Gradients flow.

    `head` takes the place of `reading.pooling`; one of several layers reads those up to `reading.layer`.
    """
    layer = reading.layer or backbone.num_layers
    layers = tuple(range(1, layer + 1)) if isinstance(head, MultiLayerPooling) else (layer,)
    with _prepended(backbone, rows, reading):
        states, mask_BT = backbone.states(rows, layers)
    if head is None:
        vectors = pool(states[layer], mask_BT, (_MODES[reading.pooling],))
    elif isinstance(head, MultiLayerPooling):
        vectors = head([states[each] for each in layers], mask_BT)
    else:
        vectors = head(states[layer], mask_BT)
    return torch.nn.functional.normalize(vectors[:, : reading.width].float(), dim=-1)


@contextlib.contextmanager
def _prepended(backbone: Backbone, rows: list[Prepared], reading: Reading) -> Iterator[None]:
    if reading.prepending is None:
        yield
        return
    places = [row.place for row in rows]
    if None in places:
        raise ValueError("a row has no placeholder for Token Prepending: put its template through templates.with_placeholder")
    place_B, last_B = torch.tensor(places), torch.tensor([len(row) - 1 for row in rows])
    with backbone.alone, prepending(backbone.decoder_layers, reading.prepending, place_B=place_B, last_B=last_B):
        yield
