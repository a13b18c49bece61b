"""How wide a run is, and how that fits a cluster. Imports no ray: a run with nothing to do must not pay for it.

Memory. A worker holds its encoder and, for each of its threads, at most

    16 max_item_bytes + (b + 3) max_pixels + 2 max(128 MiB, 3 max_pixels) bytes

(`limits`; the last term is what goes to the encoder). b is what decoding takes a pixel: 7 for JPEG, 8 for PNG, TIFF, BMP, GIF
and CMYK, 10 for AVIF, 16 for WebP, 20 for JPEG 2000 (measured at 36 megapixels). What counts is the largest image there
is, not the limit: photographs of 24 megapixels and 10 MB take 0.6 GiB a thread. With it come two chunks with their rows, and
of a container the slice (64 MiB) that is being read. In a container no value is larger than 64 MiB; stepping over a larger
one costs nothing in a tar, three times 64 MiB in JSON Lines, sixteen times in CSV, but in Parquet four times that value,
because Arrow reads a page whole. tests/test_memory.py measures it.
"""

import math

import pydantic

from pipeline.config import ConfigError, Model

CPU_BATCH, GPU_BATCH = 16, 256
"""Images a call of the encoder, twice as many where there are enough: on a CPU 16 to 48 are as fast, a GPU wants to be filled (docs/decisions.md)."""


class Compute(Model):
    """Where and how wide the work runs. What is left out fits itself to the cluster."""

    address: str | None = None
    """A Ray cluster to connect to; none: the one that `ray job submit` started this in, else a Ray of its own on this machine."""
    actors: pydantic.PositiveInt | None = None
    """Encoder actors at most; none: one a GPU, or one a node without GPUs. The pool grows as the cluster has room; a cluster that starts
    machines by itself (`ray up`, KubeRay) is asked for room for all of them at once, or, with none, for more while those there are busy."""
    cpus: pydantic.PositiveFloat | None = None
    """CPUs that an actor takes; none: a node's share."""
    gpus: pydantic.NonNegativeFloat = 0
    """GPUs that an actor takes; 0: the encoder runs on CPUs, also where there are GPUs."""
    threads: pydantic.PositiveInt | None = None
    """Threads of an actor, each decoding and encoding; none: as many as its CPUs."""
    batch_size: pydantic.PositiveInt | None = None
    """Images that a thread gives the encoder at once, twice as many if there are enough for all threads; none: 16 on a CPU, 256 on a GPU.
    How many of them go through the model together is the encoder's own `batch_size`. Of texts at least so many, at most 2,048."""
    chunk_rows: pydantic.PositiveInt | None = None
    """Items that are staged and committed as one; none: by the amount of work, 128 to 8,192."""


class Sizes(Model):
    """What `Compute` comes to on a given cluster."""

    actors: int
    """Those that there is room for now, if `compute` does not say how many."""
    at_once: int
    """So many are asked for at the start, and the rest when those are busy."""
    at_most: int | None
    """None: as many as a growing cluster finds room for."""
    cpus: float
    gpus: float
    threads: int
    batch_size: int


def holds(compute: Compute, node: dict[str, float]) -> bool:
    """Whether a node of these resources (`CPU`, `GPU`) has room for an actor."""
    return node.get("CPU", 0) >= (compute.cpus or 1) and node.get("GPU", 0) >= compute.gpus


def sizes(compute: Compute, nodes: list[dict[str, float]], *, growing: bool = False) -> Sizes:
    """Fit `compute` to the nodes' resources. Raises ConfigError if no node can hold one actor.

    `growing`: the cluster starts machines when more is asked of it than it has.
    """
    node = max(nodes, key=lambda n: (n.get("GPU", 0), n.get("CPU", 0)))
    node_cpus, node_gpus = node.get("CPU", 0), node.get("GPU", 0)
    a_node = max(1, math.floor(node_gpus / compute.gpus)) if compute.gpus else 1
    # One CPU stays free for Ray Data's own tasks: a pool that takes every CPU can wait for them for ever.
    cpus = compute.cpus or max(1, math.floor((node_cpus - 1) / a_node))
    threads = compute.threads or (math.ceil(compute.cpus) if compute.cpus else max(1, math.floor(node_cpus / a_node)))
    if not holds(compute, node):
        have = f"the largest node has {node_cpus:g} CPUs and {node_gpus:g} GPUs"
        raise ConfigError(f"an actor takes compute.cpus={cpus:g} and compute.gpus={compute.gpus:g}, but {have}")
    in_all = sum(math.floor(n.get("GPU", 0) / compute.gpus) for n in nodes) if compute.gpus else len(nodes)
    actors = compute.actors or max(1, in_all)
    return Sizes(
        actors=actors,
        at_once=actors if growing and compute.actors else 1,
        at_most=None if growing and compute.actors is None else actors,
        cpus=cpus,
        gpus=compute.gpus,
        threads=threads,
        batch_size=compute.batch_size or (GPU_BATCH if compute.gpus else CPU_BATCH),
    )
