"""What a frozen part of a model gives is the same each time: it is computed once for each input, and remembered."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MIB = 2**20


class Remembered:
    """Outputs of a frozen part by their input's key, on the CPU, up to `most_mib`; what comes after that is computed each time.

    Nothing is dropped for something newer: rows come in another order each epoch, so the oldest is as likely to come next.
    """

    def __init__(self, most_mib: int) -> None:
        self._left = most_mib * MIB
        self._outputs: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._outputs)

    def get(self, keys: Sequence[bytes], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """(N, ...), the outputs for N inputs. `compute`: the outputs of those at some places, (M, ...), on the model's device."""
        missing = [place for place, key in enumerate(keys) if key not in self._outputs]
        if not missing:
            return torch.stack([self._outputs[key] for key in keys])
        with torch.no_grad():
            new = compute(missing)
        if len(missing) == len(keys):
            outputs = new
        else:
            outputs = new.new_empty((len(keys), *new.shape[1:]))
            known = [place for place, key in enumerate(keys) if key in self._outputs]
            outputs[known] = torch.stack([self._outputs[keys[place]] for place in known]).to(new.device)
            outputs[missing] = new
        self._keep([keys[place] for place in missing], new.cpu())
        return outputs

    def _keep(self, keys: Sequence[bytes], outputs: Tensor) -> None:
        for key, output in zip(keys, outputs, strict=True):
            size = output.numel() * output.element_size()
            if key not in self._outputs and size <= self._left:
                self._left -= size
                self._outputs[key] = output.clone()
