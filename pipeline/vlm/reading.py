"""Rows to vectors: the states of one layer, pooled or given to a trained head, cut to a width, scaled to norm 1."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.config import ConfigError, Model
from pipeline.encoders.lineage import sha256_of
from pipeline.encoders.pooling import Mode, pool
from pipeline.vlm.backbone import Backbone
from pipeline.vlm.heads import HeadShape, LatentAttention, MultiLayerPooling, head_of
from pipeline.vlm.preparer import Prepared
from pipeline.vlm.prepending import prepending
from pipeline.vlm.settings import Pooling, Reading

_MODES: dict[Pooling, Mode] = {"last": "lasttoken", "mean": "mean", "cls": "cls", "weightedmean": "weightedmean"}

Head = LatentAttention | MultiLayerPooling


class TrainedHead(Model):
    """A head with its weights."""

    shape: HeadShape
    """What it is."""
    weights: str
    """A .safetensors file of its state."""

    def lineage(self) -> dict[str, object]:
        """Its shape, and the digest of its weights. Raises ConfigError if there is no such file."""
        if not Path(self.weights).is_file():
            raise ConfigError(f"the head's weights {self.weights} are not there; training and `save_encoder` write them beside the model")
        return {**self.shape.model_dump(mode="json"), "weights": sha256_of(self.weights)}

    def load(self, dim: int, *, layers: int, device: torch.device) -> Head:
        """The head for a model of this width and so many layers. Raises ConfigError if its weights are of another shape."""
        from safetensors.torch import load_file

        head = head_of(self.shape, dim, layers=layers)
        try:
            head.load_state_dict(load_file(self.weights))
        except RuntimeError as error:
            raise ConfigError(f"{self.weights} does not fit a {self.shape.kind} head for {layers} layers of width {dim}: {error}") from error
        return head.eval().requires_grad_(False).to(device)


def read(backbone: Backbone, rows: list[Prepared], reading: Reading, head: Head | None = None) -> torch.Tensor:
    """One vector a row: (B, dim), norm 1, float32 whatever the model computes in. Gradients flow.

    `head` takes the place of `reading.pooling`; one of several layers reads those up to `reading.layer`.
    """
    return read_layers(backbone, rows, reading, (reading.layer or backbone.num_layers,), head)[0]


def read_layers(
    backbone: Backbone, rows: list[Prepared], reading: Reading, layers: tuple[int, ...], head: Head | None = None
) -> tuple[torch.Tensor, ...]:
    """`read` at each of `layers` instead of `reading.layer`, in one pass of the model."""
    computed = tuple(range(1, max(layers) + 1)) if isinstance(head, MultiLayerPooling) else layers
    with _prepended(backbone, rows, reading):
        states, mask_BT = backbone.states(rows, computed)
    vectors = [_pooled(states, mask_BT, layer, reading, head) for layer in layers]
    return tuple(torch.nn.functional.normalize(each[:, : reading.width].float(), dim=-1) for each in vectors)


def _pooled(states: dict[int, torch.Tensor], mask_BT: torch.Tensor, layer: int, reading: Reading, head: Head | None) -> torch.Tensor:
    if head is None:
        return pool(states[layer], mask_BT, (_MODES[reading.pooling],))
    several = isinstance(head, MultiLayerPooling)
    pooled: torch.Tensor = head([states[each] for each in range(1, layer + 1)] if several else states[layer], mask_BT)
    return pooled


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
