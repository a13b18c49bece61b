"""How a run fits a cluster: one test a rule."""

import pytest

from pipeline.compute import CPU_BATCH, GPU_BATCH, Compute, holds, sizes
from pipeline.config import ConfigError

LAPTOP = {"CPU": 2.0}
CPUS = {"CPU": 8.0}
GPUS = {"CPU": 16.0, "GPU": 4.0}


def test_without_gpus_each_node_holds_one_actor_and_one_cpu_stays_free():
    fit = sizes(Compute(), [CPUS, CPUS])
    assert (fit.actors, fit.at_once, fit.at_most, fit.cpus, fit.gpus, fit.threads, fit.batch_size) == (2, 1, 2, 7, 0, 8, CPU_BATCH)
    assert sizes(Compute(), [LAPTOP]).cpus == 1
    assert sizes(Compute(), [{"CPU": 1.0}]).cpus == 1


def test_with_gpus_each_gpu_has_an_actor_and_a_share_of_the_cpus():
    fit = sizes(Compute(gpus=1), [CPUS, GPUS, GPUS])
    assert (fit.actors, fit.cpus, fit.gpus, fit.threads, fit.batch_size) == (8, 3, 1, 4, GPU_BATCH)
    assert sizes(Compute(gpus=0.5), [GPUS]).actors == 8
    assert sizes(Compute(gpus=2), [GPUS]).actors == 2


def test_what_is_given_counts():
    fit = sizes(Compute(actors=5, cpus=2.5, threads=9, batch_size=3), [CPUS])
    assert (fit.actors, fit.at_once, fit.at_most, fit.cpus, fit.threads, fit.batch_size) == (5, 1, 5, 2.5, 9, 3)
    assert sizes(Compute(cpus=2.5), [CPUS]).threads == 3


@pytest.mark.parametrize(
    ("compute", "words"), [(Compute(gpus=1), "compute.gpus=1, but the largest node has 8 CPUs and 0 GPUs"), (Compute(cpus=9), "cpus=9")]
)
def test_what_no_node_can_hold_is_refused(compute, words):
    assert not holds(compute, CPUS)
    with pytest.raises(ConfigError, match=words):
        sizes(compute, [CPUS, LAPTOP])


def test_a_growing_cluster_is_asked_for_all_actors_that_are_named_at_once():
    fit = sizes(Compute(actors=3), [CPUS], growing=True)
    assert (fit.at_once, fit.at_most) == (3, 3)


def test_on_a_growing_cluster_the_machines_that_are_there_bound_nothing():
    """The pool was bounded by the nodes alive when the job began: one, so that it never grew."""
    fit = sizes(Compute(), [CPUS], growing=True)
    assert (fit.actors, fit.at_once, fit.at_most) == (1, 1, None)
