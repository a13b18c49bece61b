"""A training run before and after its workers: data sets prepared, settings checked and kept, the report. No Ray."""

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from pipeline.config import ConfigError, Model
from pipeline.pairs.prepare import Dataset, prepare
from pipeline.pairs.prepared import Prepared
from pipeline.training.curves import check_tensorboard
from pipeline.training.feed import Part, plan_of
from pipeline.training.journal import Journal
from pipeline.training.loop import JOURNAL, Outcome, Recipe, Task
from pipeline.training.page import PAGE, DataFacts, Facts, flat, write_page
from pipeline.training.plan import Plan
from pipeline.training.scan import check_kinds, check_negatives, overlaps
from pipeline.training.settings import Feeding, Workers
from pipeline.training.trainable import built
from pipeline.vlm.card import Card, DataSource

log = logging.getLogger(__name__)

SETTINGS, BASE, REPORT, LOCK = "job.json", "base.json", "report.json", ".lock"
"""What a run began with, and with which commit of its base model, what came of it, and who works on it, in its folder."""


FREE = (
    "choice.bad_image",
    "model.args.revision",
    "model.args.gradient_checkpointing",
    "optimisation.chunk",
    "optimisation.compile",
    *(f"watching.{name}" for name in ("log_every", "log_rows", "checkpoint_every", "evaluate_every", "patience", "notice_every")),
)
"""Settings that decide no batch and no gradient of rows that can be used: they may change while a run is under way. Of the base model the commit
counts, which a revision stands for."""


class RunAt(Model):
    """What a run is called, and where it is kept."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """The same name goes on with the same run."""
    folder: str = "runs"
    """Runs are kept here, each in a folder of its name, which all workers must see: metrics, checkpoints, the encoder."""
    prepared: str = "prepared"
    """Checked rows are kept here, for all runs."""
    tensorboard: bool = False
    """Whether curves are written for TensorBoard too, into the run's folder. report.html has them in any case."""
    base_licence: str | None = None
    """Of the model that is begun with, for the model card, such as apache-2.0."""

    @property
    def place(self) -> Path:
        """The run's folder. Raises ConfigError if it is none of a file system."""
        if "://" in self.folder:
            raise ConfigError(f"run.folder={self.folder!r}: a run needs a folder that all workers share; object stores are not implemented")
        return Path(self.folder).expanduser().absolute() / self.name

    @property
    def prepared_at(self) -> str:
        """Where checked rows are: absolute, as workers may run elsewhere."""
        return self.prepared if "://" in self.prepared else str(Path(self.prepared).expanduser().absolute())


@dataclass
class TrainReport:
    """What a training run did."""

    job: str = "train"
    status: str = "done"
    run: str = ""
    """Its folder: metrics.jsonl, checkpoints, the encoder."""
    steps: int = 0
    """That the whole run took."""
    rows: int = 0
    """Rows that this command trained on: fewer than the run's if it went on from a checkpoint."""
    seconds: float = 0.0
    """Of these rows, evaluations included, the start of Ray not."""
    rows_per_s: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step."""
    after: dict[str, float] = field(default_factory=dict)
    """Those of the weights that were saved; empty without held-out data, when the last ones are."""
    best_step: int | None = None
    data: dict[str, int] = field(default_factory=dict)
    """Rows of each data set."""
    rejects: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows of each data set that are not trained on, by reason."""
    overlap: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of each held-out data set, queries and documents that are trained on too."""
    dropped: int = 0
    """How often the whole run drew a row and left it out, by choice.bad_image; each is named in the log."""
    encoder: str = ""
    """The saved encoder's folder: encoder: {target: pipeline.encoders.saved:open_encoder, args: {folder: ...}}."""
    fingerprint: str = ""


def finished(at: RunAt, settings: dict[str, Any]) -> TrainReport | None:
    """The report of a run that has come to its end. Raises ConfigError naming a setting, none of FREE, that was another one when the run began."""
    folder = at.place
    if not (folder / SETTINGS).is_file():
        return None
    before, now = flat(json.loads((folder / SETTINGS).read_text())), flat(json.loads(json.dumps(settings)))
    changed = sorted(name for name in {*before, *now}.difference(FREE) if before.get(name) != now.get(name))
    # Before the first checkpoint nothing depends on them yet: a setting that was wrong may be mended.
    if changed and _has_checkpoint(folder):
        was, asked = (values.get(changed[0]) for values in (before, now))
        raise ConfigError(
            f"{folder} is a run that began with {changed[0]}={was!r}, not {asked!r}; go on with what it began with, or give another run.name"
        )
    if not (folder / REPORT).is_file():
        return None
    log.info("%s is done", folder)
    return TrainReport(**json.loads((folder / REPORT).read_text()))


def task_of(
    recipe: Recipe,
    at: RunAt,
    *,
    data: Sequence[Dataset],
    held_out: Sequence[Dataset],
    workers: Workers,
    settings: dict[str, Any],
    feeding: Feeding,
) -> Task:
    """What the workers are told; data sets are prepared where they are not yet. Raises ConfigError for what the job file can fix."""
    names = [dataset.name for dataset in (*data, *held_out)]
    if len(set(names)) < len(names):
        raise ConfigError(f"data and held_out are named {', '.join(names)}: each data set needs a name of its own")
    most = workers.most or workers.num
    if recipe.mixture.batch_size < most:
        raise ConfigError(f"mixture.batch_size={recipe.mixture.batch_size} is less than {most} workers; each needs a row of every batch")
    if at.tensorboard:
        check_tensorboard()
    # Built here for their errors alone; neither loads weights.
    model, _ = built(recipe.model, recipe.loss)
    base, base_commit = str(recipe.model.args.get("model", recipe.model.target)), getattr(model, "base_commit", None)
    _check_base(at.place, base, base_commit)
    parts = tuple(Part(prepare(dataset, at.prepared_at), dataset.weight) for dataset in data)
    held = tuple(prepare(dataset, at.prepared_at) for dataset in held_out)
    check_kinds(model, [*(part.prepared for part in parts), *held])
    check_negatives(recipe.choice, [part.prepared for part in parts])
    told = _instructions([part.prepared for part in parts])
    _warn_of(told, _instructions(held))
    plan = plan_of(parts, recipe.mixture)
    steps = recipe.optimisation.steps or plan.steps(recipe.optimisation.epochs)
    sources = tuple(DataSource(name=part.prepared.name, rows=part.prepared.num_rows()) for part in parts)
    card = Card(name=at.name, base=base, base_commit=base_commit, base_licence=at.base_licence, data=sources, settings=settings, instructions=told)
    return Task(
        recipe=recipe,
        parts=parts,
        held_out=held,
        steps=steps,
        folder=str(at.place),
        card=card,
        facts=Facts(at.name, steps, recipe.mixture.batch_size, _data_facts(plan, parts, held), settings),
        tensorboard=at.tensorboard,
        feeding=feeding,
        sharded=workers.sharding is not None,
    )


def _instructions(data: Sequence[Prepared]) -> dict[str, tuple[str, ...]]:
    """Of each side, all that rows of these data sets are told."""
    found = [each.instructions() for each in data]
    return {side: tuple(dict.fromkeys(told for each in found for told in each[side])) for side in ("query", "document")}


def _warn_of(told: dict[str, tuple[str, ...]], held_out: dict[str, tuple[str, ...]]) -> None:
    """An encoder is saved with one instruction a side: say where rows are trained, or measured, under another."""
    for side, given in told.items():
        if len(given) > 1:
            log.warning(
                "rows' %s side is told different instructions (%s): the saved encoder has none of them, but its own prompt (see model.args)",
                side,
                ", ".join(repr(each) for each in given[:3]),
            )
        elif other := [each for each in held_out[side] if each not in given]:
            log.warning(
                "held-out rows' %s side is told %r, those that are trained on %r; the encoder is saved with the latter", side, other[0], given[0]
            )


def _data_facts(plan: Plan, parts: Sequence[Part], held_out: Sequence[Prepared]) -> tuple[DataFacts, ...]:
    shares = dict(zip(plan.names, plan.shares.tolist(), strict=True))
    trained = tuple(DataFacts(part.prepared.name, part.prepared.num_rows(), part.prepared.rejected(), shares[part.prepared.name]) for part in parts)
    seen = overlaps([part.prepared for part in parts], held_out)
    return (*trained, *(DataFacts(data.name, data.num_rows(), data.rejected(), None, seen.get(data.name, {})) for data in held_out))


def _has_checkpoint(folder: Path) -> bool:
    return any(path.is_dir() for path in folder.glob("checkpoint_*"))


def _check_base(folder: Path, base: str, commit: str | None) -> None:
    """Raises ConfigError if the run's checkpoints are of another commit of its base: frozen weights are not in them."""
    if not (folder / BASE).is_file() or not _has_checkpoint(folder):
        return
    before = json.loads((folder / BASE).read_text())["commit"]
    if before is not None and commit != before:
        raise ConfigError(
            f"{folder} began with {base} at commit {before}, and that name now stands for {commit or 'a folder'}; "
            f"set model.args.revision={before}, or give another run.name"
        )


def begin(at: RunAt, settings: dict[str, Any], *, base_commit: str | None) -> None:
    """Keep what the run begins with. It must be held."""
    _write(at.place / BASE, {"commit": base_commit})
    _write(at.place / SETTINGS, settings)


@contextlib.contextmanager
def held(at: RunAt) -> Iterator[None]:
    """Hold the run while the block runs; the death of the process lets go of it. Raises ConfigError if another process holds it."""
    try:
        at.place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.folder={at.folder!r}: {at.place} cannot be made ({error.strerror}); correct run.folder") from error
    with (at.place / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{at.place} is under way in another process: wait for it, or give another run.name") from None
        yield


def done(at: RunAt, outcome: Outcome, task: Task) -> TrainReport:
    """The report of a run whose workers are done; kept, so that the run is not done again."""
    lines = Journal(at.place / JOURNAL).lines()
    losses = [line["loss"] for line in lines if "loss" in line]
    report = TrainReport(
        run=str(at.place),
        steps=outcome.steps,
        rows=outcome.rows,
        seconds=outcome.seconds,
        rows_per_s=round(outcome.rows / outcome.seconds, 2) if outcome.rows else None,
        loss_first=losses[0],
        loss_last=losses[-1],
        before=outcome.before,
        after=outcome.after,
        best_step=outcome.best_step,
        data={data.name: data.rows for data in task.facts.data},
        rejects={data.name: data.rejects for data in task.facts.data if data.rejects},
        overlap={data.name: data.overlap for data in task.facts.data if data.overlap},
        dropped=outcome.dropped,
        encoder=outcome.encoder,
        fingerprint=outcome.fingerprint,
    )
    _write(at.place / REPORT, asdict(report))
    write_page(at.place, task.facts, lines, status="done")
    log.info("%s is done; %s shows how it went", at.place, at.place / PAGE)
    return report


def ended(at: RunAt, task: Task, why: str) -> None:
    """The page of a run that has failed says so."""
    write_page(at.place, task.facts, Journal(at.place / JOURNAL).lines(), status=f"ended: {why}")


def _write(path: Path, value: Any) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2))
    part.replace(path)
