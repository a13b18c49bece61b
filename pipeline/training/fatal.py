"""Errors that would come again: Ray starts the workers of a run anew after any error, and these need not be waited for twice."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import ConfigError, JobFailed

FATAL = "fatal.json"
"""In the run's folder: what ended an attempt, for the next one."""

COME_AGAIN = (ConfigError, ValueError, TypeError, FloatingPointError)
"""Each step is a function of its number and the weights, so these come again; a lost machine, a store or memory may do better next time."""


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """Keeps an error of COME_AGAIN in the folder as it passes; if one is there from another attempt, raises it at once.

    Raised again it is a ConfigError if it was one, else a JobFailed that names what it was.
    """
    if (folder / FATAL).is_file():
        before = json.loads((folder / FATAL).read_text())
        raise (ConfigError if before["config"] else JobFailed)(before["error"])
    try:
        yield
    except COME_AGAIN as error:
        config = isinstance(error, ConfigError)
        part = folder / f".{FATAL}.part"
        part.write_text(json.dumps({"config": config, "error": str(error) if config else f"{type(error).__name__}: {error}"}))
        part.replace(folder / FATAL)
        raise


def forget(folder: Path) -> None:
    """For a new start by a person, who may have mended what was wrong."""
    (folder / FATAL).unlink(missing_ok=True)
