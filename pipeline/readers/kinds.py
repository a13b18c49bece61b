"""Types of metadata columns: their names in a job file, and how values of other types become them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import ConfigError, nearest
from schemas.vectors import RESERVED

KINDS = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "timestamp[utc]": pa.timestamp("us", tz="UTC"),
    "binary": pa.binary(),
}
TAKEN = RESERVED | {"reject_reason", "reject_detail", "changed"}


def kind(name: str) -> pa.DataType:
    """The Arrow type that a job file calls `name`: int64, string, list<string>, ... Raises ConfigError naming the nearest."""
    inner = re.fullmatch(r"list<(.+)>", name)
    if inner:
        return pa.list_(kind(inner[1]))
    if name not in KINDS:
        raise ConfigError(f"{name!r} is no type of a metadata column{nearest(name, KINDS)}; the types are {', '.join(KINDS)}, list<...>")
    return KINDS[name]


def declared(metadata: Sequence[str] | Mapping[str, str] | None) -> dict[str, pa.DataType | None]:
    """Metadata columns as a job file gives them: names, or names and types. Type None: as the source has it.

    Raises ConfigError for a name that the vector table uses itself, and for an unknown type.
    """
    names = dict(metadata) if isinstance(metadata, Mapping) else dict.fromkeys(metadata or [])
    for name in names:
        if name in TAKEN or name.startswith("_"):
            raise ConfigError(
                f"metadata column {name!r} has a name that the vector table uses itself; rename it in the source. "
                f"Taken are {', '.join(sorted(TAKEN))} and names that begin with '_'"
            )
    return {name: None if given is None else kind(given) for name, given in names.items()}


def plain(of: pa.DataType) -> pa.DataType:
    """The type that values of type `of` are kept as: no dictionaries, no large or view variants."""
    if pa.types.is_dictionary(of):
        return plain(of.value_type)
    if pa.types.is_large_string(of) or pa.types.is_string_view(of) or pa.types.is_null(of):
        return pa.string()
    if pa.types.is_large_binary(of) or pa.types.is_binary_view(of) or pa.types.is_fixed_size_binary(of):
        return pa.binary()
    if pa.types.is_list(of) or pa.types.is_large_list(of):
        return pa.list_(plain(of.value_type))
    return of


def convert(values: pa.Array | list[Any], to: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """`values` as type `to`, and which of them (bool, one a row) could not be: those are null."""
    good = np.zeros(len(values), bool)
    try:
        if not isinstance(values, list):
            return values.cast(to), good
        if not pa.types.is_string(to) and all(value is None or isinstance(value, str) for value in values):
            return pa.array(values, pa.string()).cast(to), good
        if not any(_misread(value, to) for value in values):
            return pa.array(values, to), good
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass  # some value is at fault: find out which
    singles = [_single(value if isinstance(values, list) else value.as_py(), to) for value in values]
    bad = np.array([single is None for single in singles])
    missing = pa.nulls(1, to)
    return pa.concat_arrays([missing if single is None else single for single in singles]), bad


def _misread(value: Any, to: pa.DataType) -> bool:
    """Whether pyarrow would take a Python value and change it: it makes 1 of 1.5, and a list of letters of a word."""
    if isinstance(value, float):
        return bool(pa.types.is_integer(to)) and not value.is_integer()
    return isinstance(value, str) and bool(pa.types.is_list(to))


def _single(value: Any, to: pa.DataType) -> pa.Array | None:
    if value is None:
        return pa.nulls(1, to)
    if _misread(value, to):
        return None
    try:
        return pa.array([value], to)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    try:
        # "5" is a number, and "2024-05-01" a date, but 5 is no text: text that was not written as text is a mistake.
        return None if pa.types.is_string(to) or not isinstance(value, str) else pa.array([value], pa.string()).cast(to)
    except (pa.ArrowException, UnicodeEncodeError):
        return None
