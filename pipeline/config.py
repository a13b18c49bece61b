"""Configuration, the one way: a pydantic model <- a YAML file <- `key.sub=value` overrides, later wins."""

import difflib
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from pipeline.redact import hides, without_secrets


class ConfigError(Exception):
    """What the job file can fix: says what was given, what is allowed and what to do. Raised before work starts."""


class JobFailed(Exception):
    """The job ran and its result is not good enough. `report` says what was done."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class Model(pydantic.BaseModel):
    """A section of a job file: immutable, documented field by field, unknown keys refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


T = TypeVar("T", bound=Model)
"""A job's model."""


class Ref(Model):
    """A class named by its import path, with its arguments: the only way to plug in code."""

    target: str
    """`package.module:Name`, importable from where the job runs and on the cluster's workers."""
    args: dict[str, Any] = {}
    """Keyword arguments for it. One that has a target and args itself is built first: a loss takes another one so."""

    def load(self) -> Callable[..., Any]:
        """Import the target and check that `args` fit its signature, building nothing.

        Raises ConfigError naming the nearest right name.
        """
        target = imported(self.target)
        try:
            inspect.signature(target).bind(**self.args)
        except TypeError as error:
            names = list(inspect.signature(target).parameters)
            wrong = next((a for a in self.args if a not in names), "")
            raise ConfigError(f"{self.target}: {error}{nearest(wrong, names)}; it takes {inspect.signature(target)}") from error
        return target

    def build(self, *needs: str) -> Any:
        """The object itself. Raises ConfigError if its constructor does, or refuses a value, or if it lacks what it `needs` to have."""
        target = self.load()
        args = {**self.args, **{name: ref.build() for name, ref in self.within().items()}}
        try:
            built = target(**args)
        except (TypeError, ValueError, OSError) as error:
            raise ConfigError(f"{self.target}: {error}") from error
        lacking = [name for name in needs if not _has(built, name)]
        if lacking:
            raise ConfigError(
                f"{self.target} is not what is wanted in this place of the job file: it has no {', '.join(lacking)}; name another target"
            )
        return built

    def within(self) -> dict[str, "Ref"]:
        """The arguments that are references themselves, by name. Raises ConfigError for one with a wrong key."""
        return {name: self._within(name, value) for name, value in self.args.items() if _is_ref(value)}

    def _within(self, name: str, value: dict[str, Any]) -> "Ref":
        try:
            return Ref.model_validate(value)
        except pydantic.ValidationError as error:
            raise ConfigError("\n".join(f"{self.target}: {_explain(Ref, problem, within=name)}" for problem in error.errors())) from None


def _has(built: Any, name: str) -> bool:
    if name == "__call__":
        return callable(built)  # any class has one: it makes objects
    return hasattr(type(built), name) or hasattr(built, name)  # the class first: a property may be known later only


def _is_ref(value: Any) -> bool:
    """Whether an argument names a class, also with a wrong key beside it."""
    target = value.get("target") if isinstance(value, dict) else None
    return isinstance(target, str) and (":" in target or set(value) <= set(Ref.model_fields))


def imported(target: str) -> Callable[..., Any]:
    """The class or function that a target names. Raises ConfigError naming the nearest right name."""
    module_name, _, name = target.partition(":")
    if not name:
        raise ConfigError(f"target {target!r} must read 'package.module:Name'")
    module = _import(module_name, target)
    if not hasattr(module, name):
        raise ConfigError(f"target {target!r}: {module_name} has no {name!r}{nearest(name, _public(module))}")
    found: Callable[..., Any] = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"target {target!r} is a {type(found).__name__}; it must be a class or a function")
    return found


def _import(module_name: str, target: str) -> types.ModuleType:
    if str(Path.cwd()) not in sys.path:  # a user's module lies beside the job file; a console command does not see it otherwise
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"target {target!r}: {error}{_nearest_module(module_name)}; run from the folder that has it, or install it") from error
    except ImportError as error:
        raise ConfigError(f"target {target!r} cannot be imported: {error}") from error


def _public(module: types.ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))]


def _nearest_module(name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    try:
        paths = list(importlib.import_module(parent).__path__) if parent else []
    except ImportError:
        return ""
    return nearest(leaf, [entry.stem for path in paths for entry in Path(path).glob("[!_]*.py")])


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` if one of `names` is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def load(model: type[T], path: str | Path | None, overrides: Iterable[str] = ()) -> T:
    """The job that a file, a path or a URI, and overrides describe. Raises ConfigError naming each wrong key and the nearest right one."""
    values = _read_yaml(path) if path else {}
    for override in overrides:
        _apply(model, values, override)
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        problems = error.errors()
        # A list with a wrong entry counts as shorter by it.
        within = {problem["loc"][:depth] for problem in problems for depth in range(1, len(problem["loc"]))}
        told = [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in within]
        explained = [_explain(model, problem) for problem in told]
        if not path and any(problem["type"] == "missing" for problem in told):
            explained.append("no job file was named: name one (JOB.yaml), or give these as key=value; --keys prints them all")
        raise ConfigError("\n".join(explained)) from None


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(_text(path))
    except FileNotFoundError:
        hint = nearest(Path(path).name, _yaml_names(path)) or f"; it was looked for in {Path(path).parent.absolute()}"
        raise ConfigError(f"job file {str(path)!r} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"job file {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"job file {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"job file {str(path)!r} must hold keys and values, not {type(values).__name__}")
    return values


def _text(path: str | Path) -> str:
    if "://" not in str(path):
        return Path(path).read_text(encoding="utf-8")
    from pipeline.place import read_file  # it imports this module

    return read_file(str(path)).decode()


def _yaml_names(path: str | Path) -> list[str]:
    folder = Path(path).parent
    return [entry.name for entry in folder.glob("*.yaml")] if folder.is_dir() else []


def _apply(model: type[Model], values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must read key=value, e.g. table.uri=vectors")
    *parents, leaf = key.split(".")
    place: Any = values
    for depth, parent in enumerate(parents):
        if isinstance(place, dict) and parent not in place:
            place[parent] = {}
        place = _entry(place, parent, override)
        if not isinstance(place, dict | list):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])!r} is not a section")
    if isinstance(place, list):
        _entry(place, leaf, override)  # an entry is replaced, not added
        place[int(leaf)] = _value(override, text)
    elif leaf.isdigit() and not place:
        raise ConfigError(f"override {override!r}: the job file has no list {'.'.join(parents)!r}; give it whole: {'.'.join(parents)}=[...]")
    else:
        place[leaf] = _value(override, text) if (kind := _text_kind(model, (*parents, leaf))) is None else _verbatim(text, kind)


def _entry(place: Any, part: str, override: str) -> Any:
    """What a part of a key leads to; in a list a part is a place, from 0."""
    if isinstance(place, dict):
        return place[part]
    if not part.isdigit() or int(part) >= len(place):
        raise ConfigError(f"override {override!r}: {part!r} is not a place in a list of {len(place)}, from 0; a longer list is given whole: [...]")
    return place[int(part)]


def _value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value: {error}") from error


def _text_kind(model: type[Model], key: tuple[str, ...]) -> Any:
    """The type of the field at a key if it holds text and nothing else: `str` or `str | None`."""
    section = section_of(model, tuple(int(part) if part.isdigit() else part for part in key[:-1]))
    found = section.model_fields.get(key[-1]) if section else None
    kind = found.annotation if found else None
    return kind if kind is str or set(typing.get_args(kind)) == {str, type(None)} else None


def _verbatim(text: str, kind: Any) -> str | None:
    """Text as it was typed: as YAML, `shoes #1` would lose its end, and `007` and `no` would be no texts."""
    return None if text == "null" and kind is not str else text


def _explain(model: type[Model], problem: Any, *, within: str = "") -> str:
    where = (within + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])).removeprefix(".")
    if problem["type"] == "extra_forbidden":
        found = section_of(model, problem["loc"][:-1])
        names = list(found.model_fields) if found else []
        return f"{where}: unknown key{nearest(str(problem['loc'][-1]), names)}; the keys here are {', '.join(names)}"
    if problem["type"] == "missing":
        return f"{where}: required, and not given"
    said = problem["msg"].removeprefix("Value error, ")
    # A section as a whole is no help, and may be long.
    shown = not hides(problem["loc"]) and not isinstance(problem["input"], dict)
    return f"{where}: {said}".removeprefix(": ") + (f" (got {without_secrets(problem['input'])!r})" if shown else "")


def section(model: type[T], given: Any, name: str) -> T:
    """The section that an argument is: a mapping of its keys, the section itself, or None. Raises ConfigError as `load` does."""
    try:
        return model.model_validate({} if given is None else dict(given) if isinstance(given, Mapping) else given)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(model, problem, within=name) for problem in error.errors())) from None


def section_of(model: type[Model], location: tuple[Any, ...]) -> type[Model] | None:
    """The section that keys and places in lists lead to; None if they lead to none."""
    for part in location:
        if isinstance(part, int):  # a place in a list, whose entries are all of one model
            continue
        found = model.model_fields.get(str(part))
        if found is None:
            return None
        section = section_in(found.annotation)
        if section is None:
            return None
        model = section
    return model


def section_in(annotation: Any) -> type[Model] | None:
    """The first model in a type such as `tuple[Dataset, ...] | None`."""
    if inspect.isclass(annotation) and issubclass(annotation, Model):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := section_in(part)) is not None), None)


def references(model: Model) -> list[Ref]:
    """Every Ref in a job, at any depth, also within the arguments of another."""
    if isinstance(model, Ref):
        return [model, *(found for ref in model.within().values() for found in references(ref))]
    found = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        for entry in value if isinstance(value, list | tuple) else [value]:
            if isinstance(entry, Model):
                found += references(entry)
    return found
