"""One encoder's part of GradCache: vectors chunk by chunk without gradient, and the way back through each chunk."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.training.replay import RandomState, kept

Vectors = Tensor | tuple[Tensor, ...]
Embed = Callable[[Sequence[Any]], Vectors]

MOST_CHANGED = 0.05
"""A chunk's second vectors may differ from its first by this share of the largest coordinate: kernels differ with and without
gradient (1e-2 in bfloat16); another dropout mask changes far more."""


class Tape:
    """Runs `embed` on the chunks of `rows` without gradient; `layers` are the vectors of all rows, leaves that collect the loss' gradient.

    `chunks`: row numbers; each row stands in one chunk. `num_idle`: further passes that count for nothing, of one row each.
    """

    def __init__(self, embed: Embed, rows: Sequence[Any], chunks: list[list[int]], *, num_idle: int, device: torch.device) -> None:
        self._embed, self._rows, self._chunks, self._num_idle, self._device = embed, rows, chunks, num_idle, device
        self._states: list[RandomState] = []
        self.layers: tuple[Tensor, ...] = ()
        self._is_tuple = False
        with torch.no_grad():
            for chunk in chunks:
                self._states.append(RandomState.now(device))
                self._keep(chunk, self._run(chunk))
            for _ in range(num_idle):
                self._run(self._idle_chunk())
        for layer in layers_of(self.vectors):
            layer.requires_grad_()

    @property
    def vectors(self) -> Vectors:
        """`layers` in the form that `embed` gives: a tensor, or a tuple."""
        return self.layers if self._is_tuple else self.layers[0]

    def backward(self, before: Callable[[bool], None]) -> None:
        """Take the gradient that `layers` collected through each chunk, again and with gradient; `before(last)` is called before each pass.

        RuntimeError if a chunk's vectors are not those of the first pass.
        """
        if all(layer.grad is None for layer in self.layers):
            return
        changed = []
        with kept(self._device):
            for place in range(self._num_idle):
                before(place + 1 == self._num_idle + len(self._chunks))
                self._back(self._idle_chunk(), 0.0)
            for place, (chunk, state) in enumerate(zip(self._chunks, self._states, strict=True)):
                before(place + 1 == len(self._chunks))
                state.restore()
                found = self._back(chunk, 1.0)
                changed.append(torch.stack([self._change(layer, new, chunk) for layer, new in zip(self.layers, found, strict=True)]).max())
        worst = float(torch.stack(changed).max())
        if not worst <= MOST_CHANGED:
            raise RuntimeError(
                f"the second pass gave other vectors than the first (off by {worst:.2g} of the largest coordinate), so gradients are wrong: "
                "the encoder keeps state from call to call, or draws random numbers other than torch's"
            )

    def _run(self, chunk: list[int]) -> Vectors:
        return self._embed([self._rows[row] for row in chunk])

    def _idle_chunk(self) -> list[int]:
        # The last row of the last chunk: where rows are sorted by cost, the cheapest.
        return self._chunks[-1][-1:]

    def _keep(self, chunk: list[int], vectors: Vectors) -> None:
        self._is_tuple, found = isinstance(vectors, tuple), layers_of(vectors)
        for layer in found:
            if layer.dim() != 2 or len(layer) != len(chunk):
                raise ValueError(f"embed was given {len(chunk)} rows and must give ({len(chunk)}, dim), not {tuple(layer.shape)}")
        if not self.layers:
            self.layers = tuple(layer.new_empty((len(self._rows), layer.shape[1])) for layer in found)
        for layer, new in zip(self.layers, found, strict=True):
            layer[chunk] = new

    def _back(self, chunk: list[int], factor: float) -> tuple[Tensor, ...]:
        found = layers_of(self._run(chunk))
        paths = [(new, layer.grad[chunk] * factor) for layer, new in zip(self.layers, found, strict=True) if layer.grad is not None]
        # A frozen tower has no path back.
        paths = [(new, grad) for new, grad in paths if new.requires_grad]
        if paths:
            torch.autograd.backward([new for new, _ in paths], [grad for _, grad in paths])
        return tuple(new.detach() for new in found)

    def _change(self, layer: Tensor, new: Tensor, chunk: list[int]) -> Tensor:
        first = layer.detach()[chunk].float()
        return (new.float() - first).abs().max() / first.abs().max().clamp(min=1e-12)


def layers_of(vectors: Vectors) -> tuple[Tensor, ...]:
    """An encoder's vectors as a tuple, one for each layer it gives."""
    return vectors if isinstance(vectors, tuple) else (vectors,)
