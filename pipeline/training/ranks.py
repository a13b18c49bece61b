"""Runs a function as several ranks, on one machine's CPUs: for tests, and for `pipeline.testing.check_loss`."""

import tempfile
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """What `function(*args)` gives on each of `num_ranks` processes that form a gloo group, by rank; what torch.save can save.

    `function` and `args` must pickle, and a script that calls it needs `if __name__ == "__main__":`. A rank's error is raised here.
    """
    # A server that has imported torch forks the ranks: importing it costs each process 2.5 s.
    set_forkserver_preload(["torch.distributed.fsdp"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (num_ranks, folder, function, args), nprocs=num_ranks, start_method="forkserver")  # type: ignore[attr-defined, no-untyped-call]
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(num_ranks)]


def _rank(rank: int, num_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_ranks)
    try:
        torch.save(function(*args), Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()
