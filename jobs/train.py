"""Train an encoder on pairs, and save it as a folder that the embed job takes.

    tessera train jobs/train.yaml run.name=first

Run it again after a crash: it goes on from its last checkpoint, also with another number of workers. A run that is done stays done.
"""

import pydantic

from pipeline import command
from pipeline.config import ConfigError, JobFailed, Model, Ref
from pipeline.pairs.prepare import Dataset
from pipeline.redact import without_secrets
from pipeline.training.batches import Choice
from pipeline.training.estimate import Estimate, estimate
from pipeline.training.loop import Recipe, Task
from pipeline.training.plan import Mixture
from pipeline.training.run import RunAt, TrainReport, begin, done, ended, finished, held, task_of
from pipeline.training.settings import Feeding, Optimisation, Watching, Workers


class TrainJob(Model):
    """Everything that one training run needs."""

    run: RunAt
    model: Ref
    """What is trained: `pipeline.training.vlm:TrainVlm`, `pipeline.training.openclip:TrainOpenClip`, `pipeline.training.sentence:TrainSentence`, or a
    class of your own (`pipeline.training.trainable`)."""
    loss: Ref = Ref(target="pipeline.training.infonce:InfoNCE")
    """The loss, e.g. `pipeline.training.infonce:InfoNCE`, or a class of your own (`pipeline.training.Loss`)."""
    data: tuple[Dataset, ...] = pydantic.Field(min_length=1)
    """What is trained on."""
    held_out: tuple[Dataset, ...] = ()
    """What the model is measured on, before, during and after: each query against the positives of all rows. None: the last weights are saved."""
    mixture: Mixture
    choice: Choice = Choice()
    optimisation: Optimisation = Optimisation()
    watching: Watching = Watching()
    feeding: Feeding = Feeding()
    workers: Workers = Workers()


def plan(job: TrainJob) -> Estimate:
    """What a run would do, without Ray or weights. Data sets that are not prepared yet are: the run finds them then."""
    finished(job.run, _settings(job))
    return estimate(_task(job))


def run(job: TrainJob) -> TrainReport:
    """Train, or go on with it. Raises ConfigError before work starts; JobFailed if it cannot come to its end."""
    earlier = finished(job.run, _settings(job))
    if earlier is not None:
        return earlier
    from pipeline.training.fit import check_gpus, fit, running_ray  # ray: only a run that has work pays for it

    check_gpus(job.workers)
    task = _task(job)
    with held(job.run):
        begin(job.run, _settings(job), base_commit=task.card.base_commit)
        try:
            with running_ray(job.workers):
                outcome = fit(task, job.workers)
        except (ConfigError, JobFailed, KeyboardInterrupt) as error:
            ended(job.run, task, str(error) or "interrupted")
            raise
        return done(job.run, outcome, task)


def _task(job: TrainJob) -> Task:
    return task_of(
        Recipe(job.model, job.loss, job.mixture, job.choice, job.optimisation, job.watching),
        job.run,
        data=job.data,
        held_out=job.held_out,
        workers=job.workers,
        settings=_settings(job),
        feeding=job.feeding,
    )


def _settings(job: TrainJob) -> dict[str, object]:
    """What the run is kept and shown with, credentials left out; what decides the result may not change while it is under way."""
    settings: dict[str, object] = without_secrets(job.model_dump(mode="json", exclude={"run", "workers", "feeding"}))
    return settings


def main() -> None:
    """The command."""
    command.main(TrainJob, run, plan=plan)


if __name__ == "__main__":
    main()
