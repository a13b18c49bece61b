"""What may be written into a job file: the keys of a job, and the arguments of a target, each with its default and meaning."""

import inspect
import json
import typing
from collections.abc import Callable
from typing import Any

import pydantic

from pipeline.config import Model, Ref, imported, section_in, section_of


def keys(model: type[Model], prefix: str = "") -> list[str]:
    """Every key of a job file as `key = default   # meaning`."""
    lines = []
    for name, entry in model.model_fields.items():
        section = section_of(model, (name,))
        if section is not None and section is not Ref:
            many = "[]" if typing.get_origin(entry.annotation) in (tuple, list) else ""
            lines += keys(section, f"{prefix}{name}{many}.")
            continue
        default = "required" if entry.is_required() else _shown(entry.get_default(call_default_factory=True))
        lines.append(f"{prefix}{name} = {default}   # {' '.join((entry.description or '').split())}")
    return lines


def arguments(target: str) -> list[str]:
    """Every argument of a class or function as `args.name = default   # type`, after what its docstring says of them.

    Raises ConfigError if the target cannot be imported.
    """
    found = imported(target)
    maker: Callable[..., Any] = found.__init__ if inspect.isclass(found) else found  # type: ignore[misc]
    docs = [inspect.cleandoc(doc) for doc in dict.fromkeys([found.__doc__, maker.__doc__]) if doc]
    lines = [f"# {line}".rstrip() for doc in docs for line in doc.splitlines()]
    hints = typing.get_type_hints(maker)
    for name, parameter in inspect.signature(found).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        section = section_in(hints.get(name))
        if section is not None and section is not Ref:
            lines += keys(section, f"args.{name}.")
            continue
        default = "required" if parameter.default is parameter.empty else _shown(parameter.default)
        lines.append(f"args.{name} = {default}   # {_type(hints[name]) if name in hints else ''}".rstrip(" #"))
    return lines


def _type(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint).replace("typing.", "").replace("collections.abc.", "")


def _shown(value: Any) -> str:
    return json.dumps(value.model_dump(mode="json") if isinstance(value, pydantic.BaseModel) else value, default=str)
