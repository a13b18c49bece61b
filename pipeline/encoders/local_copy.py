"""What an encoder is made of, as a file or folder of this machine, wherever it is: a path as it is, a URI as a copy that is kept.

A copy is named after the names and versions of its files, appears whole or not at all, and is never changed: what is replaced in the store is
copied anew. Processes that want the same one wait for one copy. Copies are in $XDG_CACHE_HOME/tessera, else ~/.cache/tessera, and may be deleted
while nothing runs. Credentials and endpoint are the environment's, or an encoder's `storage_options`, which the table of models does not keep:
a search takes the environment's then, or those of an `encoder` of its own.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.encoders.new_folder import appearing
from pipeline.stores import filesystem, reaching


def is_uri(place: str) -> bool:
    """Whether `place` is written as a URI, which only `local_copy` makes a path of."""
    return "://" in place


def local_copy(place: str, storage_options: dict[str, Any] | None = None) -> Path:
    """The file or folder `place`, a path or any URI of fsspec's, on this machine. Raises ConfigError if a URI cannot be reached or has nothing."""
    if storage.is_local(place):
        return Path(place.partition("://")[2] or place).expanduser().absolute()
    found = storage.find(place, storage_options=storage_options)
    root, units = storage.canonical(place), found["unit"].to_pylist()
    names = [unit[len(root) :].strip("/") or unit.rpartition("/")[2] for unit in units]
    if any(".." in name.split("/") for name in names):
        raise ConfigError(f"{place}: a file's name has '..' in it; rename it")
    told = json.dumps([root, names, found["version"].to_pylist()])
    copy = _cache() / hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with (copy.parent / f"{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.is_dir():
            with appearing(copy) as part:
                _bring(place, {unit: part / name for unit, name in zip(units, names, strict=True)}, storage_options or {})
    return copy / names[0] if units == [root] else copy


def _bring(place: str, files: dict[str, Path], storage_options: dict[str, Any]) -> None:
    for target in files.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    with reaching(place):
        store, _ = filesystem(place, storage_options)
        store.get([store._strip_protocol(unit) for unit in files], [str(target) for target in files.values()])
    lacking = next((unit for unit, target in files.items() if not target.is_file()), None)
    if lacking is not None:
        raise ConfigError(f"{lacking} was deleted while {place} was copied; run again")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tessera"
