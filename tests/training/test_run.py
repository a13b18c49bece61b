"""A run's folder before and after its workers: which settings may change under way."""

import pytest

from jobs.train import TrainJob, _settings
from pipeline.config import ConfigError
from pipeline.training.run import begin, finished
from tests.training.pairs import job_values


def test_what_decides_no_batch_and_no_gradient_may_change_under_way(tmp_path):
    """A run that ended at a bad image said to set bad_image: drop, and then refused it, as it did a smaller chunk after running out of memory."""

    def job(**sections):
        return TrainJob.model_validate(job_values(tmp_path, "model", **sections))

    first = job()
    (first.run.place / "checkpoint_1").mkdir(parents=True)
    begin(first.run, _settings(first))
    free = job(
        choice={"bad_image": "drop"},
        optimisation={"chunk": 1, "compile": "inductor"},
        watching={"log_every": 5, "checkpoint_every": 7, "evaluate_every": 9, "patience": 1},
        model={"args": {"model": "model", "reading": {"pooling": "mean"}, "gradient_checkpointing": True}},
    )
    assert finished(free.run, _settings(free)) is None
    for section, changed in (("optimisation", {"learning_rate": 0.5}), ("watching", {"k": 9}), ("choice", {"max_negatives": 1})):
        other = job(**{section: changed})
        with pytest.raises(ConfigError, match=f"began with {section}.{next(iter(changed))}=.*give another run.name"):
            finished(other.run, _settings(other))
