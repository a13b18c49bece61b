"""`--keys`: what a target takes, with defaults and types."""

import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import imported
from pipeline.keys import arguments

ROOT = Path(__file__).parent.parent


def asked(*arguments):
    return subprocess.run([sys.executable, "-m", "jobs", "embed", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


def named_in_the_readme():
    """Every target of README's tables and examples."""
    text = (ROOT / "README.md").read_text()
    tables = [(f"pipeline.{kind}", line.split("|")[1]) for kind in ("readers", "encoders") for line in _table(text, f"in `pipeline.{kind}`")]
    short = {f"{package}.{name}" for package, cell in tables for name in re.findall(r"`(\w+:\w+)`", cell)}
    return sorted(short | set(re.findall(r"pipeline[.\w]+:\w+", text)))


def _table(text, head):
    return itertools.takewhile(lambda line: line.startswith("|"), text[text.index(head) :].splitlines()[2:])


@pytest.mark.parametrize("target", named_in_the_readme())
def test_the_arguments_of_whatever_the_readme_names_can_be_listed(target):
    lines = arguments(target)
    taken = list(inspect.signature(imported(target)).parameters)
    assert lines[0].startswith("# ") and taken
    for name in taken:
        assert any(line.startswith((f"args.{name} = ", f"args.{name}.")) for line in lines), name


def test_keys_of_a_target_are_printed_with_defaults_and_types_and_a_wrong_one_is_named():
    done = asked("--keys", "pipeline.readers.images:Images")
    assert done.returncode == 0, done.stderr
    assert "args.uri = required   # str | Sequence[str]\n" in done.stdout
    assert 'args.text_key = "caption"   # str\n' in done.stdout
    assert "# `captions`: `txt` takes the text of photo.jpg" in done.stdout
    wrong = asked("--keys", "pipeline.readers.images:Image")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "did you mean 'Images'?" in wrong.stderr
