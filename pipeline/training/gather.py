"""Rows of all ranks with gradient, and the one rule by which terms are averaged. One process needs no process group."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET = 16_777_216
"""Gradients are averaged in buckets of so many numbers: few collectives, and 64 MiB of room."""


def world() -> tuple[int, int]:
    """This process' rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    """All ranks' rows, equally many each; backwards, each rank gets the sum of what all ranks found for its rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        _, ranks = world()
        gathered = rows.new_empty((ranks * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        _, ranks = world()
        own = grad.new_empty((len(grad) // ranks, *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def gather_sizes(number: int, device: torch.device) -> list[int]:
    """One whole number of each rank, by rank."""
    _, ranks = world()
    if ranks == 1:
        return [number]
    numbers = torch.empty(ranks, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(numbers, torch.tensor([number], device=device))
    sizes: list[int] = numbers.tolist()
    return sizes


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, rank after rank, with gradient. Ranks may hold different numbers of rows, none included.

    Shorter ranks are padded for the collective. All ranks must call it, and with a gradient on all of them or on none.
    """
    if world()[1] == 1:
        return rows
    sizes = gather_sizes(len(rows), rows.device)
    longest = max(sizes)
    if longest == 0:
        return rows
    if min(sizes) == longest:
        return _gather(rows)
    gathered = _gather(torch.cat([rows, rows.new_zeros((longest - len(rows), *rows.shape[1:]))]))
    return torch.cat([part[:size] for part, size in zip(torch.split(gathered, longest), sizes, strict=True)])


def _gather(rows: Tensor) -> Tensor:
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def global_mean(total: Tensor, count: int) -> Tensor:
    """The sum of a rank's `count` terms, scaled so that its average over ranks is the mean of the terms of all ranks.

    The reduction of every loss. A mean over each rank's own rows would weigh ranks, not rows, where these differ in number.
    """
    sizes = gather_sizes(count, total.device)
    return total * (len(sizes) / max(1, sum(sizes)))


def mean_over_ranks(value: Tensor) -> Tensor:
    """The average over ranks of a tensor, without gradient."""
    _, ranks = world()
    value = value.detach().clone()
    if ranks > 1:
        dist.all_reduce(value)
    return value / ranks


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """Of each number the largest that a rank has. Every rank must call it."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    if world()[1] > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    most: list[float] = found.tolist()
    return most


def of_first(values: Sequence[float], device: torch.device) -> list[float]:
    """The first rank's numbers, for what all ranks decide by: their own may differ in the last bit. Every rank must call it."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    if world()[1] > 1:
        dist.broadcast(found, src=0)
    first: list[float] = found.tolist()
    return first


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its average over ranks; averaging twice changes nothing. Shards of FSDP (DTensors) are left as they are.

    A parameter unused on this rank but used on another counts as zero here; one unused everywhere keeps no gradient, as in one process.
    """
    _, ranks = world()
    plain = [parameter for parameter in parameters if parameter.requires_grad and not isinstance(parameter, DTensor)]
    if ranks == 1 or not plain:
        return
    used = torch.tensor([parameter.grad is not None for parameter in plain], dtype=torch.int32, device=plain[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, some in zip(plain, used.tolist(), strict=True):
        if some and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if some and parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= ranks
        for gradient, part in zip(bucket, torch.split(flat, [gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Gradients in order, cut where the type changes or a bucket is full."""
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        if not buckets or buckets[-1][0].dtype != gradient.dtype or gradient.numel() > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(gradient)
        room -= gradient.numel()
    return buckets
