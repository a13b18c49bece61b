"""The loop: what every worker of a training run does, from the first step or from a checkpoint to the saved encoder. No Ray.

All that a step does is a function of the weights, the optimizer's state and the step's number. So a run that was interrupted goes
on with the same rows, on any number of workers, and comes to the same result (to the last bits, in which sums over other numbers of workers differ).
"""

import contextlib
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.config import ConfigError, Ref
from pipeline.pairs.keys import hash64
from pipeline.pairs.prepared import Prepared
from pipeline.training import Notes
from pipeline.training.batches import Choice
from pipeline.training.checkpoint import Progress, Values, put, read, state_of, trained, weights_of, write
from pipeline.training.chunks import Rows
from pipeline.training.feed import Feed, Part, Read, Reader, Ready
from pipeline.training.gather import gather_sizes, largest, world
from pipeline.training.gradcache import GradCache
from pipeline.training.held_out import evaluate
from pipeline.training.journal import all_keys
from pipeline.training.page import Facts
from pipeline.training.plan import Mixture, Plan
from pipeline.training.record import Record
from pipeline.training.settings import Feeding, Optimisation, Watching
from pipeline.training.sharding import clip, shard
from pipeline.training.tape import Vectors
from pipeline.training.trainable import Layered, Trainable, built, set_mode
from pipeline.training.watch import Watched
from pipeline.vlm.card import Card

log = logging.getLogger(__name__)

ENCODER, JOURNAL = "encoder", "metrics.jsonl"
"""The saved encoder, and the journal, in the run's folder."""

BESTS = 4
"""Checkpoints whose best weights stay there: the newest may not be kept yet, and Ray may not know yet of the one before it."""


class Link(Protocol):
    """What a worker is connected to: keeps checkpoints, and knows of preemptions. Every rank calls each method equally often."""

    def restored(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint; None at the beginning."""

    def keep(self, folder: Path | None, metrics: dict[str, Any]) -> None:
        """Keep a checkpoint that was written into `folder`, which is given away; None on other ranks than the first. May return before it is kept,
        but not before the one before it is."""

    def reading(self, reader: Reader) -> AbstractContextManager[Callable[[int, int], Read]]:
        """`reader.read`, here or elsewhere."""

    def noticed(self) -> bool:
        """Whether a machine of the run is to be taken away soon."""


@dataclass(frozen=True)
class Recipe:
    """What decides the result, beside the data."""

    model: Ref
    loss: Ref
    mixture: Mixture
    choice: Choice
    optimisation: Optimisation
    watching: Watching


@dataclass(frozen=True)
class Task:
    """What every worker is told. It pickles."""

    recipe: Recipe
    parts: tuple[Part, ...]
    held_out: tuple[Prepared, ...]
    steps: int
    folder: str
    """Of the run: metrics, best weights and the encoder go there. All workers see it."""
    card: Card
    facts: Facts
    feeding: Feeding
    tensorboard: bool = False
    sharded: bool = False
    """Whether weights are sharded over the workers."""


@dataclass
class Outcome:
    """What came of it."""

    steps: int
    rows: int
    """That this process trained on, with the other workers'; a resumed run counts from where it went on."""
    dropped: int
    """Rows that the whole run drew and left out."""
    seconds: float
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    encoder: str = ""
    fingerprint: str = ""


def train(task: Task, link: Link, device: torch.device) -> Outcome:
    """One worker's part of a run; torch.distributed is set up if there are several."""
    rank, num_ranks = world()
    reader = Reader(task.parts, task.recipe.mixture, task.recipe.choice, rank, num_ranks)
    with link.reading(reader) as read_at, _feed(task, read_at) as feed:
        run = _Run(task, link, device, reader.plan, feed)
        try:
            return run.run()
        finally:
            run.close()


def _feed(task: Task, read_at: Callable[[int, int], Read]) -> Feed:
    return Feed(read_at, num_ranks=world()[1], steps=task.steps, feeding=task.feeding, choice=task.recipe.choice)


class _Run:
    """A worker's model, optimizer and progress."""

    def __init__(self, task: Task, link: Link, device: torch.device, plan: Plan, feed: Feed) -> None:
        self.task, self.recipe, self.link, self.device, self.plan, self.feed = task, task.recipe, link, device, plan, feed
        self.folder = Path(task.folder)
        self.first = world()[0] == 0
        torch.manual_seed(self.recipe.mixture.seed)
        self.model, loss = built(self.recipe.model, self.recipe.loss)
        found, wanted = getattr(self.model, "base_commit", None), task.card.base_commit
        if found != wanted:
            raise ConfigError(
                f"this worker finds {task.card.base} at commit {found}, and the run began with {wanted}: set model.args.revision={wanted}"
            )
        self.model.load(device)
        if self.recipe.optimisation.compile is not None:
            _compile(self.model, self.recipe.optimisation.compile)
        self.sharded = shard(self.model, device) if task.sharded and world()[1] > 1 else None
        self.loss = Watched(loss).to(device)
        self.parameters = trained([*self.model.modules, self.loss])
        self.optimizer = _optimizer(self.parameters, self.recipe.optimisation)
        chunk = self.recipe.optimisation.chunk
        modules = self.model.modules if self.sharded is None else [self.sharded]
        self.cache = GradCache(self._embed, self.loss, modules, None if chunk is None else Rows(chunk))
        self.progress = Progress(plan.position(0))
        self.record = Record(self.folder / JOURNAL, task.facts, tensorboard=task.tensorboard) if self.first else None
        self.warned = False
        self.dropped: set[str] = set()
        self.bests: list[int | None] = []
        self.staging = Path(tempfile.gettempdir()) / f"tessera-{hash64(task.folder) % 2**64:016x}"

    def run(self) -> Outcome:
        """From where the last checkpoint is to the end."""
        started = time.perf_counter()
        begun = self._resume()
        dropped_before = self.progress.dropped
        if begun == 0 and not self.progress.before:
            self._evaluate(0)
            self._keep(0)
        done = begun
        for step in range(begun, self.task.steps):
            if self.progress.stopped:
                break
            self._step(step)
            done = step + 1
            self._after(done)
        seconds = time.perf_counter() - started
        dropped = self.progress.dropped
        outcome = Outcome(done, (done - begun) * self.recipe.mixture.batch_size - (dropped - dropped_before), dropped, round(seconds, 2))
        return self._finish(outcome)

    def close(self) -> None:
        """Close what is open."""
        if self.record is not None:
            self.record.close()
            # Empty, unless checkpoints are still on their way.
            with contextlib.suppress(OSError):
                self.staging.rmdir()

    def _resume(self) -> int:
        with self.link.restored() as folder:
            if folder is not None:
                self.progress = read(folder, self.parameters, self.optimizer)
        step = self.plan.resume(self.progress.position)
        self.bests = [self.progress.best_step]
        if self.record is not None:
            # Of an attempt that died while it wrote or gave away a checkpoint.
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
            self.record.begin(step, workers=world()[1])
            log.info("step %d of %d, %d weights are trained", step, self.task.steps, sum(values.numel() for values in self.parameters.values()))
        return step

    def _step(self, step: int) -> None:
        rate = self.recipe.optimisation.rate_at(step, self.task.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        started = time.perf_counter()
        batch = self.feed.at(step, self.model)
        waited = time.perf_counter() - started
        self._mode(training=True)
        # Of the step and the rank alone, so that no generator's state must be kept.
        torch.manual_seed(hash64(str(self.recipe.mixture.seed), str(step), str(world()[0])))
        self.optimizer.zero_grad(set_to_none=True)
        try:
            notes = _placed(batch.notes, self.device)
            loss = self.cache.step(batch.queries, batch.positives, negatives=batch.negatives, notes=notes, stand_in=batch.stand_in)
        except FloatingPointError as error:
            raise _no_number(step, str(error)) from error
        if self.sharded is not None:
            self.sharded.drop_unused()
        norm = clip(self.parameters, self.recipe.optimisation.clip)
        if not torch.isfinite(norm):
            raise _no_number(step, f"the loss is {float(loss):.4g}, and the gradient's norm is {float(norm):.4g}")
        self.optimizer.step()
        self._note_dropped(step, batch)
        if step % self.recipe.watching.log_every == 0 or step + 1 == self.task.steps:
            # Of the worker that took longest: the others waited for it.
            took, waited = largest([time.perf_counter() - started, waited], self.device)
            times = {"seconds": round(took, 4), "waited": round(waited, 4)}
            self._write(step, batch, {"loss": float(loss), "learning_rate": rate, "gradient_norm": float(norm), **times})

    def _note_dropped(self, step: int, batch: Ready) -> None:
        """Count rows that were left out, and name each once."""
        if self.recipe.choice.bad_image == "drop":
            self.progress.dropped += sum(gather_sizes(batch.rejects.num_rows, self.device))
            for reject in batch.rejects.to_pylist():
                if reject["uri"] not in self.dropped:
                    self.dropped.add(reject["uri"])
                    log.warning("step %d: left out: %s: %s: %s", step, reject["uri"], reject["reason"], reject["detail"])

    def _write(self, step: int, batch: Ready, values: dict[str, float]) -> None:
        """A line of metrics. Every rank must call it: signs and rows are gathered."""
        with torch.no_grad():
            signs, similarities = self.loss.signs()
        keys = all_keys(batch.row_keys, self.device) if self.recipe.watching.log_rows else None
        if self.record is not None:
            line = {"step": step, **values, **signs, "similarities": similarities, "rejects": self.progress.dropped}
            self.record.step({**line, **({} if keys is None else {"rows": keys})})

    def _after(self, done: int) -> None:
        """What is due once `done` steps are: evaluation, checkpoint, a look for notices."""
        watching, last = self.recipe.watching, done == self.task.steps
        self.progress.position = self.plan.position(done)
        if last or done % watching.evaluate_every == 0:
            self._evaluate(done)
        if last or self._noticed(done) or self.progress.stopped or done % watching.checkpoint_every == 0:
            self._keep(done)

    def _noticed(self, done: int) -> bool:
        """True once, when a machine is to be taken away: one checkpoint more, and training goes on until it is."""
        if done % self.recipe.watching.notice_every or not self.link.noticed() or self.warned:
            return False
        self.warned = True
        if self.record is not None:
            self.record.event("notice", done)
            log.warning("step %d: a machine of this run is to be taken away; a checkpoint is made", done)
        return True

    def _evaluate(self, done: int) -> None:
        if not self.task.held_out:
            return
        self._mode(training=False)
        k, chunk = self.recipe.watching.k, self.recipe.optimisation.chunk
        metrics = evaluate(self.model, self._embed, self.task.held_out, choice=self.recipe.choice, k=k, chunk=chunk)
        if self.record is not None:
            self.record.held_out(done, metrics)
            log.info("step %d: %s", done, ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if "/" not in name))
        by = f"{self.recipe.watching.best_by}@{self.recipe.watching.k}"
        progress = self.progress
        progress.before = progress.before or metrics
        if progress.best_step is None or metrics[by] > progress.best[by]:
            progress.best, progress.best_step, progress.stale = metrics, done, 0
            weights = weights_of(self.parameters, keep=self.first)
            if self.first:
                _save_whole(self._best_path(done), weights)
        else:
            progress.stale += 1
            progress.stopped = self.recipe.watching.patience is not None and progress.stale >= self.recipe.watching.patience
            if progress.stopped and self.record is not None:
                self.record.event("early_stop", done)

    def _keep(self, done: int) -> None:
        metrics = {"step": done}
        state = state_of(self.parameters, self.optimizer, keep=self.first)
        if not self.first:
            self.link.keep(None, metrics)
            return
        folder = Path(tempfile.mkdtemp(dir=self.staging))
        write(folder, self.progress, state)
        self.link.keep(folder, metrics)
        # Only now, and not those of the last: a run that goes on from an earlier checkpoint needs the weights that it names as the best.
        self.bests = [*self.bests, self.progress.best_step][-BESTS:]
        for path in self.folder.glob("best-*.pt"):
            if path not in {self._best_path(step) for step in self.bests}:
                path.unlink()

    def _finish(self, outcome: Outcome) -> Outcome:
        progress = self.progress
        outcome.before, outcome.after, outcome.best_step = progress.before, progress.best, progress.best_step
        weights = weights_of(self.parameters, keep=self.first) if progress.best_step is None else {}
        if self.first:
            if progress.best_step is not None:
                weights = torch.load(self._best_path(progress.best_step), map_location="cpu", weights_only=True)
            model = self._with(weights)
            metrics = {name: value for name, value in progress.best.items() if "/" in name}
            folder = self.folder / ENCODER
            outcome.encoder = str(folder)
            # Of an attempt that ended between here and its report.
            shutil.rmtree(folder, ignore_errors=True)
            outcome.fingerprint = model.save(folder, self.task.card.model_copy(update={"metrics": metrics}))
        return outcome

    def _with(self, weights: Values) -> Trainable:
        """The model with these weights: itself, or one of its own that is whole, on the CPU, where this one is sharded."""
        model = self.model
        if self.sharded is not None:
            model, _ = built(self.recipe.model, self.recipe.loss)
            torch.manual_seed(self.recipe.mixture.seed)
            model.load(torch.device("cpu"))
        own = trained(model.modules)
        put({name: weights[name] for name in weights if name in own}, own, self.task.folder)
        return model

    def _mode(self, *, training: bool) -> None:
        set_mode(self.model.modules, training=training)

    def _embed(self, rows: Sequence[Any]) -> Vectors:
        embed = self.model.embed if self.sharded is None else self.sharded
        if self.recipe.optimisation.autocast is None:
            return embed(rows)
        with torch.autocast(self.device.type, torch.bfloat16):
            return embed(rows)

    def _best_path(self, step: int | None) -> Path:
        return self.folder / f"best-{step}.pt"


def _optimizer(parameters: Mapping[str, nn.Parameter], settings: Optimisation) -> torch.optim.Optimizer:
    """AdamW that shrinks matrices only. Raises ConfigError if a pattern of `learning_rates` is found in no weight's name."""
    # Sharded values are groups of their own: torch computes a group's at once, and cannot mix the two kinds.
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, values in parameters.items():
        decay = settings.weight_decay if values.dim() >= 2 else 0.0
        share = settings.learning_rate_of(name) / settings.learning_rate
        groups.setdefault((share, decay, isinstance(values, DTensor)), []).append(values)
    for pattern in settings.learning_rates:
        if not any(re.search(pattern, name) for name in parameters):
            raise ConfigError(f"optimisation.learning_rates: {pattern!r} is found in no trained weight's name; they are {', '.join(parameters)}")
    return torch.optim.AdamW(
        [{"params": values, "weight_decay": decay, "share": share} for (share, decay, _), values in groups.items()], lr=settings.learning_rate
    )


def _compile(model: Trainable, backend: str) -> None:
    """Layer by layer: layers of one kind are compiled once, and what stands around them, images above all, stays as it is.

    Hooks stay outside, so that those of FSDP and of `Backbone` work as ever. With and without gradient, mask, a single row: each is compiled
    anew (7 forms of Qwen2-VL's layer were counted), and beyond torch's limit of 8 nothing is, so the limit is higher here.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in model.layers if isinstance(model, Layered) else model.modules:
        module.forward = torch.compile(module.forward, backend=backend, dynamic=True)  # type: ignore[method-assign]


def _no_number(step: int, what: str) -> FloatingPointError:
    return FloatingPointError(
        f"step {step}: {what}; checkpoints before it are as they were. In a new run, lower optimisation.learning_rate or raise "
        "optimisation.warmup; at the first steps it may be the weights' format (dtype, optimisation.autocast) or the base model"
    )


def _placed(notes: Notes, device: torch.device) -> Notes:
    values = {each.name: getattr(notes, each.name) for each in fields(notes)}
    return replace(notes, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})  # type: ignore[arg-type]


def _save_whole(path: Path, weights: Mapping[str, Tensor]) -> None:
    part = path.with_name(f".{path.name}.part")
    torch.save(dict(weights), part)
    part.replace(path)
