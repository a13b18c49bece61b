"""A job as a command: arguments in, one JSON line out, exit status 0 (done), 1 (failed) or 2 (wrong configuration, nothing ran)."""

import contextlib
import inspect
import json
import logging
import os
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic

from pipeline.config import ConfigError, JobFailed, Model, T, load, nearest, references
from pipeline.keys import arguments, keys
from pipeline.redact import without_secrets

USAGE = """usage: {command} [JOB.yaml] [key.sub=value ...] {switches}[{flags}]

{doc}

A value is YAML, but a text is taken as it is typed. An entry of a list that the file has is named by its place: grids.0.mpp=1.

--check   validate the job, import every target, print the resolved job as JSON, stop
{plan}--keys    print every key with its default and meaning, stop; --keys package.module:Name prints the arguments of a target
"""
PLAN = """--plan    also list the source and print what would be done, stop
"""
YAML = (".yaml", ".yml")


def main(model: type[T], run: Callable[[T], Any], *, plan: Callable[[T], Any] | None = None, show: Callable[[Any], None] | None = None) -> None:
    """Run a job module as a command: read its arguments, run it, print one JSON line, exit 0, 1 or 2.

    `show` prints the report for a person instead, where stdout is a terminal.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Ray starts its processes by fork and exec at once, which is safe; lance cannot know and warns.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        doc = inspect.getdoc(sys.modules[run.__module__]) or ""
        flags, told = ("--check", "") if plan is None else ("--check | --plan", PLAN)
        switches = "".join(f"[{switch}] " for switch in _switches(model))
        print(USAGE.format(command=f"tessera {Path(sys.argv[0]).stem}", doc=doc, switches=switches, flags=flags, plan=told))
        raise SystemExit(0)
    if "--keys" in given:
        raise SystemExit(_print_keys(model, [name for name in given if name != "--keys" and "=" not in name and not name.endswith(YAML)]))
    raise SystemExit(_run(model, run, plan, given, show=show if sys.stdout.isatty() else None))


def _print_keys(model: type[Model], targets: list[str]) -> int:
    try:
        print("\n".join([line for target in targets for line in arguments(target)] if targets else keys(model)))
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _stdout_for_the_report() -> Iterator[None]:
    """While a job runs, what libraries and Ray's workers print to stdout goes to stderr: stdout is for the report alone."""
    sys.stdout.flush()
    real, printed = os.dup(1), sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = printed
        os.dup2(real, 1)
        os.close(real)


def _interrupt(signum: int, frame: types.FrameType | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_at_once)
    raise KeyboardInterrupt


def _stop_at_once(signum: int, frame: types.FrameType | None) -> None:
    # Ray's shut-down does not bear an exception in its midst, it crashes. A commit is whole or not there.
    os.write(2, b"stopped at once; what was committed stays, run the same command again to go on\n")
    os._exit(1)


def _run(
    model: type[T], run: Callable[[T], Any], plan: Callable[[T], Any] | None, arguments: list[str], *, show: Callable[[Any], None] | None
) -> int:
    try:
        with _stdout_for_the_report():
            job, action = _parse(model, run, plan, arguments)
            report = action(job)
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except JobFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        if error.report is not None:
            print(to_json(error.report), flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was committed stays, run the same command again to go on", file=sys.stderr)
        return 1
    if show is not None and action is run:
        show(report)
    else:
        print(to_json(report), flush=True)
    return 0


def _parse(model: type[T], run: Callable[[T], Any], plan: Callable[[T], Any] | None, arguments: list[str]) -> tuple[T, Callable[[T], Any]]:
    switches = _switches(model)
    arguments = [switches.get(argument, argument) for argument in arguments]
    flags = [a for a in arguments if a.startswith("--")]
    unknown = [f for f in flags if f not in ("--check", "--plan")]
    if unknown:
        raise ConfigError(
            f"unknown option {unknown[0]}{nearest(unknown[0], [*switches, '--check', '--plan', '--keys', '--help'])}; settings are given as key=value"
        )
    plain = [a for a in arguments if not a.startswith("--")]
    files, overrides = [a for a in plain if _is_path(a)], [a for a in plain if not _is_path(a)]
    if len(files) > 1:
        raise ConfigError(f"of {' and '.join(map(repr, files))} all but one are neither a job file nor key=value")
    job = load(model, files[0] if files else None, overrides)
    for reference in references(job):
        reference.load()
    if "--check" in flags:
        return job, lambda checked: without_secrets(to_plain(checked))
    if "--plan" in flags:
        if plan is None:
            raise ConfigError("this job has no --plan; use --check")
        return job, plan
    return job, run


def _switches(model: type[Model]) -> dict[str, str]:
    """Options that stand for a setting: `--repair` for `repair=true`, of every key that is true or false."""
    return {f"--{name}": f"{name}=true" for name, entry in model.model_fields.items() if entry.annotation is bool}


def _is_path(argument: str) -> bool:
    return "=" not in argument or "://" in argument.partition("=")[0]


def to_plain(value: Any) -> Any:
    """A report, a job or a plain value, as JSON types."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json")
    if hasattr(value, "__dataclass_fields__"):
        return {name: to_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {name: to_plain(each) for name, each in value.items()}
    return value


def to_json(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(to_plain(value), default=str)
