"""GradCache (arXiv 2101.06983, section 3): the gradient of a large contrastive batch with the memory of a chunk of it, exactly.

Three passes: vectors of all chunks without gradient; the loss and its gradient at the vectors; each chunk again, with
gradient, and back from there. It costs one more forward pass. One implementation for one process, DDP and FSDP2.

A batch is sequences of rows, each whatever the encoder takes: token lists, prepared images with their own grids. `embed` collates the rows of
a chunk, so nothing collated is ever cut. An encoder whose vectors depend on the other rows of a chunk breaks exactness: batch norm is
refused; a mixture of experts that drops tokens beyond a capacity cannot be seen from here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pipeline.training import NO_NOTES, Notes
from pipeline.training.chunks import Chunk
from pipeline.training.gather import average_gradients, gather_sizes, mean_over_ranks, world
from pipeline.training.tape import Embed, Tape, Vectors, layers_of


@dataclass(frozen=True)
class GradCache:
    """Computes the gradients of a batch; zeroing, clipping and the optimizer's step are the caller's.

    `embed`: rows to vectors (n, D), or a tuple of these, one for each layer. `embed_documents`: of positives and negatives, for two towers;
    None: `embed` takes them too, and all rows are cut into one list of chunks. `modules`: all that is trained beside the loss: plain, under
    DDP, or under fully_shard. `chunk`: None computes the batch as a whole, with the same result. `sync_every_chunk`: between the first chunk and
    the last FSDP2 holds gradients unsharded; True shards them after each chunk, for more traffic. Gradients are added to what is there.
    """

    embed: Embed
    loss: Callable[..., Tensor]
    modules: Sequence[nn.Module]
    chunk: Chunk | None
    embed_documents: Embed | None = None
    sync_every_chunk: bool = False

    def step(
        self,
        queries: Sequence[Any],
        positives: Sequence[Any],
        *,
        negatives: Sequence[Sequence[Any]] = (),
        notes: Notes = NO_NOTES,
        stand_in: tuple[Any, Any] | None = None,
    ) -> Tensor:
        """Add the gradients of this batch to all parameters; gives the loss of the batch of all ranks, the same on each.

        FloatingPointError, on every rank, if that is no finite number; no gradient is then added.

        `negatives`: for each query as many as it has, none included; empty if no row has any. Every rank must call it. One that has no
        row gives query and positive of another's as `stand_in`: they are embedded, as passes may be collectives, and count for nothing.
        """
        _check_rows(queries, positives, negatives, stand_in)
        self._check_modules()
        flat = [row for own in negatives for row in own]
        query_rows, document_rows = ([*queries], [*positives, *flat]) if stand_in is None else ([stand_in[0]], [stand_in[1]])
        if self.embed_documents is None:
            sides = [(self.embed, [*query_rows, *document_rows])]
        else:
            sides = [(self.embed, query_rows), (self.embed_documents, document_rows)]
        counts = [len(own) for own in negatives]
        with self._no_sync():
            if self.chunk is None:
                loss = self._loss([embed(rows) for embed, rows in sides], len(queries), counts, notes)
                value = _finite_mean(loss)
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                tapes = [self._record(embed, rows, self.chunk) for embed, rows in sides]
                loss = self._loss([tape.vectors for tape in tapes], len(queries), counts, notes)
                value = _finite_mean(loss)
                loss.backward()  # type: ignore[no-untyped-call]
                for tape in tapes:
                    tape.backward(self._sync)
        average_gradients({id(parameter): parameter for module in self._trained() for parameter in module.parameters()}.values())
        return value

    def _record(self, embed: Embed, rows: list[Any], chunk: Chunk) -> Tape:
        chunks = chunk.cut(rows)
        device = next((parameter.device for module in self.modules for parameter in module.parameters()), torch.device("cpu"))
        # Under FSDP each pass is a collective: a rank with fewer chunks than another would leave that one waiting for ever.
        num_idle = max(gather_sizes(len(chunks), device)) - len(chunks) if self._sharded() else 0
        return Tape(embed, rows, chunks, num_idle=num_idle, device=device)

    def _loss(self, sides: list[Vectors], num: int, counts: list[int], notes: Notes) -> Tensor:
        """The loss of vectors of all rows: queries, positives, negatives one after the other, in one side or two."""
        # No copy of what may be the largest thing here.
        layers = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*map(layers_of, sides), strict=True)]
        has = _has_negative(counts, layers[0].device)
        queries = tuple(layer[:num] for layer in layers)
        positives = tuple(layer[num : 2 * num] for layer in layers)
        negatives = None if has is None else tuple(_unflatten(layer[2 * num :], has) for layer in layers)
        notes = notes if has is None else replace(notes, has_negative=has)
        if isinstance(sides[0], tuple):
            return self.loss(queries, positives, negatives, notes)
        return self.loss(queries[0], positives[0], None if negatives is None else negatives[0], notes)

    def _trained(self) -> list[nn.Module]:
        return [*self.modules, self.loss] if isinstance(self.loss, nn.Module) else list(self.modules)

    def _sharded(self) -> list[FSDPModule]:
        return [part for module in self.modules for part in module.modules() if isinstance(part, FSDPModule)]

    def _sync(self, last: bool) -> None:
        for part in self._sharded():
            part.set_requires_gradient_sync(last or self.sync_every_chunk, recurse=False)
            part.set_is_last_backward(last)

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        """DDP's own averaging off: it hangs or forgets gradients if the last chunk leaves a part of the model out (no image in it)."""
        with ExitStack() as stack:
            for module in self._trained():
                for part in module.modules():
                    if isinstance(part, DistributedDataParallel):
                        stack.enter_context(part.no_sync())
            try:
                yield
            finally:
                self._sync(last=True)

    def _check_modules(self) -> None:
        """ValueError if a vector would depend on which rows share its chunk, or if gradients would be averaged wrongly."""
        for module in self.modules:
            for name, part in module.named_modules():
                if isinstance(part, FullyShardedDataParallel):
                    raise ValueError(f"{name or 'the module'} is wrapped by FullyShardedDataParallel; shard it by torch.distributed.fsdp.fully_shard")
                if self.chunk is None and world()[1] == 1:
                    continue
                if isinstance(part, _BatchNorm) and part.training:
                    raise ValueError(
                        f"{name or 'the module'} is a {type(part).__name__} in training mode: its vectors depend on the chunk, so gradients would "
                        "not be those of the batch; put it in eval mode (frozen statistics), or use layer or group norm"
                    )


def _finite_mean(loss: Tensor) -> Tensor:
    """Over ranks; looked at before the way back, which would tell of vectors that are no numbers as of an encoder that keeps state."""
    value = mean_over_ranks(loss)
    if not torch.isfinite(value):
        raise FloatingPointError(f"the loss is {float(value):.4g}")
    return value


def _check_rows(queries: Sequence[Any], positives: Sequence[Any], negatives: Sequence[Sequence[Any]], stand_in: tuple[Any, Any] | None) -> None:
    if (len(queries) == 0) == (stand_in is None) or len(queries) != len(positives) or (negatives and len(negatives) != len(queries)):
        raise ValueError(
            f"{len(queries)} queries, {len(positives)} positives and negatives of {len(negatives)} rows: there must be at least one query or a "
            "stand_in, one positive for each, and negatives of every row (an empty list where it has none) or of no row"
        )


def _has_negative(counts: list[int], device: torch.device) -> Tensor | None:
    """bool (B, K), which negatives are there if the longest row has K; None if none are given."""
    if not counts:
        return None
    return torch.tensor(counts, device=device)[:, None] > torch.arange(max(counts), device=device)


def _unflatten(flat: Tensor, has: Tensor) -> Tensor:
    """(M, D) to (B, K, D), zeros where there is none."""
    negatives = flat.new_zeros((*has.shape, flat.shape[1]))
    negatives[has] = flat
    return negatives
