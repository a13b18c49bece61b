"""Errors that come again are not waited for twice."""

import pytest

from pipeline.config import ConfigError, JobFailed
from pipeline.training.fatal import forget, told


@pytest.mark.parametrize(
    ("error", "again", "text"),
    [(ConfigError("row 7"), ConfigError, "^row 7$"), (FloatingPointError("step 3: nan"), JobFailed, "^FloatingPointError: step 3: nan$")],
)
def test_an_error_that_would_come_again_is_raised_at_once_until_a_new_start(tmp_path, error, again, text):
    """A bad row or a loss of NaN was run into four times, each time from the last checkpoint on."""
    with pytest.raises(type(error)), told(tmp_path):
        raise error
    for _ in range(2):
        with pytest.raises(again, match=text), told(tmp_path):
            pytest.fail("no second try")
    forget(tmp_path)
    with told(tmp_path):
        pass


def test_an_error_that_may_pass_is_tried_again(tmp_path):
    for error in (RuntimeError("connection closed by peer"), OSError("store is away")):
        with pytest.raises(type(error)), told(tmp_path):
            raise error
    with told(tmp_path):
        pass
