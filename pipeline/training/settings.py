"""What a training run does, beside its model, its loss and its data: sections of its job file. No torch."""

import math
import re
from typing import Literal

import pydantic

from pipeline.config import Model


class Optimisation(Model):
    """AdamW (arXiv 1711.05101), a schedule, and how a batch is computed."""

    learning_rate: float = pydantic.Field(default=1e-4, gt=0)
    """Highest learning rate; 1e-4 suits LoRA, 1e-5 whole models."""
    learning_rates: dict[str, pydantic.PositiveFloat] = {}
    """Other highest learning rates, as {projector: 1e-3}: of weights in whose names the key, a regular expression, is found; the first counts."""
    weight_decay: float = pydantic.Field(default=0.01, ge=0)
    """Of matrices; biases, norms and temperatures have none."""
    warmup: float = pydantic.Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """How it falls after that, to 0 at the last step."""
    clip: float | None = pydantic.Field(default=1.0, gt=0)
    """Longest gradient; longer ones are shortened. Null: none is."""
    epochs: float = pydantic.Field(default=1.0, gt=0)
    """How many rows are drawn, over how many there are."""
    steps: pydantic.PositiveInt | None = None
    """Number of steps, instead of `epochs`."""
    chunk: pydantic.PositiveInt | None = 32
    """Rows that a worker computes at once (GradCache): decides memory, changes no result. Null: its whole part of the batch."""
    autocast: Literal["bfloat16"] | None = None
    """Matrix products in bfloat16, weights as they are; for GPUs. Null: in the weights' own format."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """torch.compile's backend, for the model's layers; the first steps take minutes. aot_eager makes nothing faster: it finds out whether a model
    can be compiled. Null: not compiled."""

    @pydantic.field_validator("learning_rates")
    @classmethod
    def _compile(cls, rates: dict[str, float]) -> dict[str, float]:
        for pattern in rates:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return rates

    def learning_rate_of(self, name: str) -> float:
        """The highest learning rate of a weight."""
        return next((rate for pattern, rate in self.learning_rates.items() if re.search(pattern, name)), self.learning_rate)

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of so many: a function of the step and of nothing that must be saved."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        left = 1 - (step - warm) / max(1, steps - warm)
        shapes = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
        return self.learning_rate * shapes[self.decay]


class Watching(Model):
    """When the run is looked at, and saved."""

    log_every: pydantic.PositiveInt = 10
    """Steps from one line of metrics.jsonl to the next; the first and the last step have one too."""
    log_rows: bool = False
    """Whether each line names the rows of its batch; with log_every=1 that is a record of every row that was trained on."""
    checkpoint_every: pydantic.PositiveInt = 500
    """Steps from one checkpoint to the next: what a crash costs at most."""
    evaluate_every: pydantic.PositiveInt = 500
    """Steps from one evaluation to the next; there is one before the first step and one after the last too."""
    k: pydantic.PositiveInt = 10
    """Recall, MRR and nDCG are of the first k documents."""
    best_by: Literal["recall", "mrr", "ndcg"] = "recall"
    """The metric, at `k` and as the mean over the held-out data sets, by which the best weights are chosen."""
    patience: pydantic.PositiveInt | None = None
    """Evaluations without a better one after which the run ends; null: it goes on to its last step."""
    notice_every: pydantic.PositiveInt = 10
    """Steps from one look for a notice of preemption to the next; the workers wait for each other there. A notice makes a checkpoint."""


class Feeding(Model):
    """How a worker's rows are read, decoded and prepared, in threads beside its training. Changes no result."""

    workers: pydantic.NonNegativeInt = 0
    """Ray actors for each training worker that read and decode for it, of one CPU each, wherever the cluster has one; at least so many steps are then
    made ready ahead. For GPU nodes with few CPUs beside CPU nodes: decoded images travel whole. 0: the training worker does it itself."""
    ahead: pydantic.PositiveInt = 2
    """Steps that are made ready before they are needed; each holds its rows and images in memory."""
    threads: pydantic.PositiveInt = 2
    """Steps that are worked on at once. More help where training waits for rows (report.html says so) and there are idle cores; `workers.cpus`
    says how many a worker has."""


class Workers(Model):
    """Where and how wide a run is. A run may go on with another number of workers: batches and results stay the same."""

    address: str | None = None
    """A Ray cluster to connect to; none: the one that `ray job submit` started this in, else a Ray of its own on this machine."""
    num: pydantic.PositiveInt = 1
    """Workers; at least so many if `most` is given."""
    most: pydantic.PositiveInt | None = None
    """Elastic: as many workers as the cluster has room for, up to this. Null: `num`, always."""
    cpus: pydantic.PositiveFloat = 1
    """CPUs that a worker takes."""
    gpus: pydantic.NonNegativeInt = 0
    """GPUs that a worker takes: 1, or 0 to train on CPUs."""
    sharding: Literal["fsdp2"] | None = None
    """fsdp2: each worker holds a part of weights, gradients and optimizer's state, for models that one GPU has no room to train; more traffic.
    Null: each holds all. A run may go on with the other."""
    max_failures: pydantic.NonNegativeInt = 3
    """How often workers may die before the run does; it goes on from the last checkpoint. Preemptions do not count. An error that would come
    again, such as a bad row or a loss that is not finite, ends it without another try."""

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> "Workers":
        if self.most is not None and self.most < self.num:
            raise ValueError(f"workers.most={self.most} is less than workers.num={self.num}")
        if self.gpus > 1:
            raise ValueError(f"workers.gpus={self.gpus}: a worker uses one GPU; for several take more workers")
        return self
