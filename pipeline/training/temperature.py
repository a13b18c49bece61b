"""The temperature of a softmax, and SigLIP's bias: fixed numbers, or learned."""

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """A learned temperature t = exp(-a), never below `lowest` (CLIP, arXiv 2103.00020, section 2.3: start 0.07, lowest 0.01).

    Its one parameter has no dimension: decay weights of two dimensions and more only.
    """

    def __init__(self, start: float = 0.07, *, lowest: float = 0.01) -> None:
        super().__init__()
        if not 0 < lowest <= start:
            raise ValueError(f"start={start} and lowest={lowest} must be above 0, start not below lowest")
        self.a = nn.Parameter(torch.tensor(-math.log(start)))
        self._highest = -math.log(lowest)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        return {"a"}

    def forward(self) -> Tensor:
        """1 / t, what similarities are multiplied by."""
        # The parameter itself is put back: clamping the value alone would have no gradient there, and it would never come back.
        self.a.data.clamp_(max=self._highest)
        return self.a.exp()


class Bias(nn.Module):
    """A learned number added to every logit; SigLIP (arXiv 2303.15343, section 3.2) starts at -10, as most pairs are negatives."""

    def __init__(self, start: float = -10.0) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(start))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        return {"b"}

    def forward(self) -> Tensor:
        """The number."""
        return self.b


def check_temperature(temperature: float | Temperature) -> None:
    """ValueError unless it is above 0."""
    if isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; 0.01 to 0.1 are usual")


def scale_of(temperature: float | Temperature, like: Tensor) -> Tensor:
    """1 / t as a tensor of the type of `like`."""
    return temperature().to(like) if isinstance(temperature, Temperature) else like.new_tensor(1 / temperature)
