"""Sharding (FSDP2, torch's fully_shard): each worker holds a part of each weight, of its gradient and of the optimizer's state.

Checkpoints do not know of it: they hold whole values by name, so that a run goes on with any number of workers, sharded or not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.training.gather import world
from pipeline.training.tape import Vectors
from pipeline.training.trainable import Layered, Trainable


class Pass(nn.Module):
    """A model's whole pass as one module, so that all ranks unshard and shard together, whatever rows they have.

    What a rank's rows do not run through, such as a vision tower where no row has an image, gets a gradient of zeros: FSDP puts the
    gradients of a unit together, and waits for ever, or mixes them up, where ranks have those of different weights.
    """

    def __init__(self, model: Trainable, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(model.modules)
        self._embed = model.embed
        inner = {id(part) for layer in layers for part in layer.modules()}
        outer = [part for part in self.parts.modules() if id(part) not in inner]
        self._places = [(part, name) for part in outer for name, values in part.named_parameters(recurse=False) if values.requires_grad]
        self._ran: set[int] = set()
        for part in {id(part): part for part, _ in self._places}.values():
            part.register_forward_pre_hook(self._note)

    def forward(self, rows: Sequence[Any]) -> Vectors:
        """As `Trainable.embed`."""
        vectors = self._embed(rows)
        if not torch.is_grad_enabled():
            return vectors
        nothing = sum((getattr(part, name).reshape(-1)[:1].sum() * 0.0 for part, name in self._places), torch.zeros(()))
        if isinstance(vectors, tuple):
            return (vectors[0] + nothing.to(vectors[0]), *vectors[1:])
        return vectors + nothing.to(vectors)

    def drop_unused(self) -> None:
        """Take away the zeros again of weights that no rank's rows ran through: an optimizer leaves those as they are. Every rank must call it.

        A weight counts as used if its module ran, or if its gradient is not zero: some modules' weights are used by the module around them.
        """
        found = [(part, getattr(part, name)) for part, name in self._places]
        found = [(part, values) for part, values in found if isinstance(values, DTensor) and values.grad is not None]
        if found:
            used = torch.stack([(_local(values.grad) != 0).any() | (id(part) in self._ran) for part, values in found]).to(torch.int32)
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
            for (_, values), some in zip(found, used.tolist(), strict=True):
                if not some:
                    values.grad = None
        self._ran.clear()

    def _note(self, part: nn.Module, _: Any) -> None:
        if torch.is_grad_enabled():
            self._ran.add(id(part))


def shard(model: Trainable, device: torch.device) -> Pass:
    """Shard a loaded model over all ranks: each of its `layers` (`Layered`), and the rest together. Every rank must call it.

    Weights of a unit must be of one type: a module of another than the first's, such as a head in float32 on a model in bfloat16, is a unit too.
    """
    mesh = init_device_mesh(device.type, (world()[1],))
    layers = list(model.layers) if isinstance(model, Layered) else []
    first, *others = model.modules
    layers += [part for part in others if _types(first) and _types(part) - _types(first)]
    whole = Pass(model, layers)
    # FSDP cannot take single numbers apart; they stay as they are, and are averaged as without it.
    single = {values for values in whole.parameters() if values.dim() == 0}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=single)
    fully_shard(whole, mesh=mesh, ignored_params=single)
    return whole


def _types(module: nn.Module) -> set[torch.dtype]:
    return {values.dtype for values in module.parameters() if values.requires_grad}


def clip(parameters: Mapping[str, nn.Parameter], longest: float | None) -> Tensor:
    """Shorten the gradient of all parameters to `longest`; gives its norm as it was, the same on all ranks."""
    grads = [values.grad for values in parameters.values() if values.grad is not None]
    plain = [grad for grad in grads if not isinstance(grad, DTensor)]
    parts = [_local(grad) for grad in grads if isinstance(grad, DTensor)]
    squares = [torch.nn.utils.get_total_norm(group).square() for group in (plain, parts) if group]
    if parts:
        dist.all_reduce(squares[-1])
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    if longest is not None and squares:
        # As torch's clip_grad_norm_, which does not take both kinds together.
        torch._foreach_mul_([*plain, *parts], (longest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gathered(values: Tensor, *, keep: bool) -> Tensor:
    """A value as a whole, on the CPU; empty where it is not to be kept. Every rank must call it."""
    whole: Tensor = values.full_tensor() if isinstance(values, DTensor) else values
    return whole.detach().cpu() if keep else torch.empty(0)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole value, as `like` is: sharded, or the value itself."""
    if not isinstance(like, DTensor) or whole.dim() == 0:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _local(values: Tensor | None) -> Tensor:
    assert isinstance(values, DTensor)
    return values.to_local()
