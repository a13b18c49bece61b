"""The state of torch's random generators, taken and put back, so that dropout falls alike in two passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Of the CPU's generator and of one device's."""

    device: torch.device
    on_cpu: Tensor
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The state as it is."""
        on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), on_device)

    def restore(self) -> None:
        """Put the state back."""
        torch.set_rng_state(self.on_cpu)
        if self.on_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.on_device, self.device)


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Leaves the generators as they were before."""
    state = RandomState.now(device)
    try:
        yield
    finally:
        state.restore()
