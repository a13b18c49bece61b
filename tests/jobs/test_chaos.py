"""Long chaos: the driver killed again and again at random moments. `make chaos`; one kill of each kind is in `make test`."""

import random
import signal
import subprocess
import time

import pytest

from tests.jobs.test_embed_killed import ITEMS, finish, rows, start, texts  # noqa: F401


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_driver_killed_ten_times_leaves_what_one_run_would(tmp_path, texts):  # noqa: F811
    dice = random.Random(0)
    finish(start(tmp_path, texts, encoder="tests.sources:Faulty", db="whole"))
    for _ in range(10):
        driver = start(tmp_path, texts, encoder="tests.sources:Faulty", seconds=0.2)
        try:
            driver.wait(timeout=dice.uniform(5, 20))
        except subprocess.TimeoutExpired:
            driver.send_signal(signal.SIGKILL)
        driver.communicate()
        time.sleep(1)
    finish(start(tmp_path, texts, encoder="tests.sources:Faulty"))
    assert rows(tmp_path) == rows(tmp_path, "whole")
    assert len(rows(tmp_path)) == ITEMS
