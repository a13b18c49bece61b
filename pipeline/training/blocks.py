"""Sums over the rows of a large comparison, a block of rows at a time, so that no N x N matrix ever stands in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 2_097_152
"""Cells of the comparison that are computed at once: 8 MiB in float32 for each intermediate result."""

Tensors = tuple[Tensor, ...]
Block = Callable[[int, Tensors, Tensors], Tensor]


def sum_over_rows(block: Block, num_columns: int, rows: Tensors, shared: Tensors, *, cells: int = BLOCK) -> Tensor:
    """`sum(block(start, rows[start:stop], shared))` over blocks of rows; a scalar with gradient, exact.

    `block` gives the sum of its rows' terms. `rows`: tensors of which each block gets its rows; `shared`: tensors that every block gets whole;
    the gradient reaches these tensors only, none that `block` sees otherwise. Each block's gradient is computed with its
    value, so nothing is computed twice and nothing of a block outlives it; in return there is one backward pass, and no second derivative.
    """
    num_rows = max(1, cells // max(1, num_columns))
    if not torch.is_grad_enabled():
        return _sum(block, num_rows, rows, shared)
    total: Tensor = _Blocks.apply(block, num_rows, len(rows), *rows, *shared)
    return total


def _sum(block: Block, num_rows: int, rows: Tensors, shared: Tensors) -> Tensor:
    total = rows[0].new_zeros(())
    for start in range(0, len(rows[0]), num_rows):
        total = total + block(start, tuple(tensor[start : start + num_rows] for tensor in rows), shared)
    return total


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Block, num_rows: int, num_rowed: int, *tensors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        grads = [torch.zeros_like(tensor) if need else None for tensor, need in zip(tensors[:num_rowed], needed, strict=False)]
        shared = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors[num_rowed:], needed[num_rowed:], strict=True)]
        total = tensors[0].new_zeros(())
        for start in range(0, len(tensors[0]), num_rows):
            stop = start + num_rows
            own = [tensor[start:stop].detach().requires_grad_(need) for tensor, need in zip(tensors[:num_rowed], needed, strict=False)]
            with torch.enable_grad():
                value = block(start, tuple(own), tuple(shared))
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
            total += value.detach()
            for grad, leaf in zip(grads, own, strict=True):
                if grad is not None and leaf.grad is not None:
                    grad[start:stop] = leaf.grad
        ctx.grads = [*grads, *(leaf.grad for leaf in shared)]
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("sum_over_rows goes back once: its gradients are given away, not copied; compute the loss again")
        return None, None, None, *(None if grad is None else grad.mul_(outputs[0]) for grad in grads)
