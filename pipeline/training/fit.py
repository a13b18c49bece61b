"""A training run on Ray Train: workers, restarts, checkpoints in the run's folder. What the workers do is in `loop`.

The same run name in the same folder goes on from its last checkpoint, also with another number of workers.
"""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from pipeline import embed
from pipeline.compute import Compute
from pipeline.config import ConfigError, JobFailed
from pipeline.training.fatal import forget, told
from pipeline.training.feed import Read, Reader
from pipeline.training.follow import followed
from pipeline.training.loop import JOURNAL, Link, Outcome, Task, train
from pipeline.training.settings import Workers

KEPT = 2
"""Checkpoints that are kept: the last, and the one before it."""


def check_gpus(workers: Workers) -> None:
    """Raises ConfigError if GPUs are asked for, Ray will run on this machine alone, and there are not as many."""
    wanted, found = workers.num * workers.gpus, torch.cuda.device_count()
    if not (workers.address or os.environ.get("RAY_ADDRESS")) and not ray.is_initialized() and wanted > found:
        raise ConfigError(
            f"workers.num={workers.num} with workers.gpus={workers.gpus} take {wanted} GPUs, and this machine has {found}; "
            "lower one of them, or name a cluster in workers.address"
        )


def check_room(workers: Workers, *, readers: int) -> None:
    """Raises ConfigError if the cluster is smaller than `num` workers and their `readers`, for which Ray would wait for ever. Ray must be running.

    A cluster that starts machines by itself is asked for them, and waited for.
    """
    lacking = _lacking(workers, readers, embed.cluster_nodes())
    if lacking and embed.growing():
        needs = [{"CPU": workers.cpus, "GPU": float(workers.gpus)}] * workers.num
        embed.await_machines(needs + [{"CPU": 1.0}] * (workers.num * readers))
        lacking = _lacking(workers, readers, embed.cluster_nodes())
    if lacking:
        raise ConfigError(lacking)


def _lacking(workers: Workers, readers: int, nodes: list[dict[str, float]]) -> str | None:
    """For what the nodes have no room, and what to do about it."""
    places = sum(min(int(node.get("CPU", 0) // workers.cpus), int(node.get("GPU", 0) // workers.gpus) if workers.gpus else 10**9) for node in nodes)
    if places < workers.num:
        have = f"{sum(node.get('CPU', 0) for node in nodes):g} CPUs and {sum(node.get('GPU', 0) for node in nodes):g} GPUs on {len(nodes)} nodes"
        return (
            f"workers.num={workers.num} with workers.cpus={workers.cpus:g} and workers.gpus={workers.gpus} do not fit the cluster, which has {have}: "
            f"there is room for {places} of them"
        )
    left = int(sum(node.get("CPU", 0) for node in nodes) - workers.num * workers.cpus)
    if left < workers.num * readers:
        return (
            f"feeding.workers={readers} for each of workers.num={workers.num} take {workers.num * readers} CPUs beside the workers' own, and the "
            f"cluster has {left} left; lower it, or set it to 0"
        )
    return None


def running_ray(workers: Workers) -> contextlib.AbstractContextManager[None]:
    """Connect to the cluster, or start a Ray of our own, and leave it afterwards."""
    return embed.running_ray(Compute(address=workers.address))


def fit(task: Task, workers: Workers) -> Outcome:
    """Train, and save the encoder. Ray must be running. Raises JobFailed if a worker's error, or their deaths, end the run."""
    check_room(workers, readers=task.feeding.workers)
    folder = Path(task.folder)
    # Paths of the job file are relative to where it runs: without this, each worker would be moved to a folder of Ray's own.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    forget(folder)
    for part in folder.glob(".*.part"):
        # Of a worker that was killed while it copied a checkpoint.
        shutil.rmtree(part, ignore_errors=True)
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"task": task},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.num if workers.most is None else (workers.num, workers.most),
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT),
        ),
    )
    try:
        with followed(folder / JOURNAL, steps=task.steps, batch_size=task.recipe.mixture.batch_size):
            found: Outcome = trainer.fit().return_value
    except WorkerGroupError as error:
        raise _failed(error) from error
    except (ControllerError, TrainingFailedError) as error:
        raise JobFailed(f"the run ended: {error}; run the same command again to go on from the last checkpoint") from error
    # Ray does not know of those that were copied when their worker died.
    for old in sorted(folder.glob("checkpoint_2*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return found


class Elsewhere:
    """A Reader in an actor."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def read(self, step: int, place: int) -> Read:
        """As `Reader.read`."""
        return self._reader.read(step, place)


def copy(source: Path, target: Path) -> None:
    """A folder, under another name until it is whole."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    part.replace(target)


def _failed(error: Any) -> Exception:
    """A worker's own error: what the job file can fix if there is that, else that of the first worker."""
    # Ray wraps an error in one whose text is the whole traceback, which its log has already.
    causes = [getattr(failure, "_base_exc", failure) for _, failure in sorted(error.worker_failures.items())]
    wrong = next((cause for cause in causes if isinstance(cause, ConfigError)), None)
    if wrong is not None:
        return ConfigError(str(wrong))
    # One that came again is what ended the run, whatever else the others' workers died of.
    again = next((cause for cause in causes if isinstance(cause, JobFailed)), None)
    if again is not None:
        return JobFailed(f"a worker failed: {again}; it would again: mend its cause, then run the same command to go on from the last checkpoint")
    cause = causes[0] if causes else error
    return JobFailed(f"a worker failed: {type(cause).__name__}: {cause}; run the same command again to go on from the last checkpoint")


def _work(config: dict[str, Any]) -> Outcome:
    """What Ray Train runs in every worker."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    link: Link = RayLink(Path(config["task"].folder), readers=config["task"].feeding.workers)
    with told(Path(config["task"].folder)):
        return train(config["task"], link, ray.train.torch.get_device())


class RayLink:
    """A worker's connection to Ray Train. Checkpoints are copied to the run's folder in a thread, one at a time, while training goes on."""

    def __init__(self, folder: Path, *, readers: int) -> None:
        self._folder, self._readers, self._copied = folder, readers, threading.Event()
        self._copied.set()

    @contextlib.contextmanager
    def restored(self) -> Iterator[Path | None]:
        """The last checkpoint, fetched."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def keep(self, folder: Path | None, metrics: dict[str, Any]) -> None:
        """Waits for the one before, should it still be on its way: a store that is too slow makes training wait, not the disk full."""
        self._copied.wait()
        if folder is None:
            ray.train.report(metrics)
            return
        self._copied.clear()
        mode = ray.train.CheckpointUploadMode.ASYNC
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=mode, checkpoint_upload_fn=self._upload)

    def _upload(self, checkpoint: Any, name: str) -> Any:
        """In Ray's thread. The folder has its name once all of it is there."""
        try:
            copy(Path(checkpoint.path), self._folder / name)
        finally:
            self._copied.set()
        return ray.train.Checkpoint.from_directory(self._folder / name)

    @contextlib.contextmanager
    def reading(self, reader: Reader) -> Iterator[Callable[[int, int], Read]]:
        """Each step by one of as many actors as are wanted, in turn. One that dies is started again, and reads its steps again: they are the same."""
        if not self._readers:
            yield reader.read
            return
        # By its own strategy: within the workers' placement group there is no room.
        made = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(Elsewhere)
        actors = [made.remote(reader) for _ in range(self._readers)]

        def read(step: int, place: int) -> Read:
            try:
                found: Read = ray.get(actors[step % len(actors)].read.remote(step, place))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            return found

        try:
            yield read
        finally:
            for actor in actors:
                ray.kill(actor)

    def noticed(self) -> bool:
        """Whether Ray knows that a node of the run is to be taken away."""
        return ray.train.get_preemption_info() is not None
