"""What a training run would do: rows, steps, tokens, and where it would go on. No weights are loaded, and no Ray is started."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.training.checkpoint import POSITION
from pipeline.training.feed import plan_of
from pipeline.training.loop import Task

LOOKED_AT = 200
"""Batches that are drawn for their lengths."""


@dataclass
class DataEstimate:
    """One data set."""

    rows: int
    rejects: dict[str, int]
    """Rows that are not trained on, by reason."""
    share: float | None
    """Of the batches; null for held-out data, which is measured only."""
    epochs: float | None
    """How often its rows are gone through."""
    overlap: dict[str, int]
    """Of held-out data, queries and documents that are trained on too."""
    tokens_a_row: float
    """Estimated: a query, its positives and its negatives."""


@dataclass
class Estimate:
    """Tokens are estimates: characters and images by the data set's `tokens_per_image`, negatives that are not drawn included."""

    job: str = "train"
    run: str = ""
    steps: int = 0
    batch_size: int = 0
    rows: int = 0
    """That are drawn in all steps."""
    tokens_a_step: int = 0
    """Mean of the first batches."""
    tokens_a_step_most: int = 0
    tokens: int = 0
    """In all steps."""
    data: dict[str, DataEstimate] = field(default_factory=dict)
    goes_on_at: int | None = None
    """The step that the run's last checkpoint goes on at; null if there is none."""
    checkpoint_bytes: int | None = None
    """Of that checkpoint; null if there is none. Two are kept."""


def estimate(task: Task) -> Estimate:
    """Of a task whose data sets are prepared."""
    plan = plan_of(task.parts, task.recipe.mixture)
    costs = {source.name: source.costs for source in plan.sources}
    looked = []
    for step in range(min(task.steps, LOOKED_AT)):
        draw = plan.batch(step)
        of_rows = [costs[plan.names[dataset]] for dataset in draw.dataset.tolist()]
        looked.append(sum(int(each[row]) for each, row in zip(of_rows, draw.row.tolist(), strict=True) if each is not None))
    mean = round(sum(looked) / len(looked))
    epochs = plan.epochs_at(task.steps)
    held = {data.name: float(data.keys()["cost"].to_numpy().mean()) for data in task.held_out}
    tokens = held | {name: float(each.mean()) for name, each in costs.items() if each is not None}
    goes_on_at, size = _last_checkpoint(Path(task.folder))
    return Estimate(
        run=task.folder,
        steps=task.steps,
        batch_size=plan.mixture.batch_size,
        rows=task.steps * plan.mixture.batch_size,
        tokens_a_step=mean,
        tokens_a_step_most=max(looked),
        tokens=mean * task.steps,
        data={
            data.name: DataEstimate(
                data.rows,
                data.rejects,
                data.share,
                None if data.share is None else round(epochs[data.name], 3),
                data.overlap,
                round(tokens[data.name], 1),
            )
            for data in task.facts.data
        },
        goes_on_at=goes_on_at,
        checkpoint_bytes=size,
    )


def _last_checkpoint(folder: Path) -> tuple[int | None, int | None]:
    """Step and bytes of the last whole one."""
    found = [(json.loads(path.read_text())["position"]["step"], path.parent) for path in folder.glob(f"checkpoint_*/{POSITION}")]
    if not found:
        return None, None
    step, place = max(found)
    return step, sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
