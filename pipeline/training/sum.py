"""Losses added, such as contrastive and distillation. All average over the rows of all ranks, so their balance stays on any number of ranks."""

import torch
from torch import Tensor, nn

from pipeline.training import NO_NOTES, Notes


class Sum(nn.Module):
    """sum_i weight_i * loss_i. LLM-Embedder's (arXiv 2310.07554) is `Sum((0.2, InfoNCE(0.01)), (1.0, StableKL(0.01)))`."""

    def __init__(self, *weighted: tuple[float, nn.Module]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in weighted]
        self.losses = nn.ModuleList([loss for _, loss in weighted])

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        total = queries.new_zeros((), dtype=torch.float32)
        for weight, loss in zip(self.weights, self.losses, strict=True):
            total = total + weight * loss(queries, positives, negatives, notes)
        return total
