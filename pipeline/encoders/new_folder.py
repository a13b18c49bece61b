"""A new folder for a saved encoder, which appears whole or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import ConfigError


def check_new(folder: Path) -> None:
    """Raises ConfigError if there is something in `folder`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; an encoder is saved into a new folder, never over another one")


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside it to write into: it becomes `folder` at the end, or is gone if the block raises."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
