"""The console command: lists the jobs, runs the one that is named, is quick, and imports nothing else."""

import json
import subprocess
import sys
import time

import pytest

from jobs import __main__ as command


def tessera(*arguments):
    return subprocess.run([sys.executable, "-m", "jobs", *arguments], check=False, capture_output=True, text=True)


def test_help_lists_every_job_with_its_first_line():
    result = tessera("--help")
    assert result.returncode == 0
    for line in ("index      Build the indices", "search     Search a table"):
        assert line in result.stdout
    assert "__init__" not in result.stdout


def test_help_imports_no_job_and_is_quick():
    code = "import sys; sys.argv = ['tessera', '--help']; import jobs.__main__ as m; m.main(); print([n for n in sys.modules if n.split('.')[0] in "
    code += "('pipeline', 'schemas', 'pyarrow', 'pydantic', 'lance', 'ray', 'torch')])"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
    assert result.stdout.endswith("[]\n")
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    ("arguments", "said"), [(["serch"], "did you mean 'search'?"), (["xyz"], "the jobs are"), ([], "usage: tessera"), (["--serch"], "the jobs are")]
)
def test_an_unknown_job_exits_2_and_names_the_nearest(arguments, said):
    result = tessera(*arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stdout == ""


def test_version():
    assert tessera("--version").stdout.split()[0] == "tessera"


def test_the_named_job_gets_the_other_arguments():
    result = tessera("search", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: tessera search [JOB.yaml]")
    wrong = tessera("index", "tabel.uri=x")
    assert wrong.returncode == 2
    assert "did you mean 'table'?" in wrong.stderr


def test_every_job_says_in_its_first_line_what_it_does():
    assert all(line.endswith(".") for line in command.jobs().values()), command.jobs()


def test_a_setting_that_is_true_or_false_is_an_option_too():
    assert "[--repair]" in tessera("verify", "--help").stdout
    assert "[--repair]" not in tessera("embed", "--help").stdout
    checked = tessera("verify", "table.uri=x", "table.name=t", "--repair", "--check")
    assert json.loads(checked.stdout)["repair"] is True
    assert "did you mean '--repair'?" in tessera("verify", "--repare").stderr
