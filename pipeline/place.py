"""One file, whole, wherever it is: a path or a URI of fsspec's."""

from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.fetch import open_file
from pipeline.stores import filesystem, probe, reaching


def read_file(uri: str, storage_options: dict[str, Any] | None = None) -> bytes:
    """The bytes of a file. Raises ConfigError if there is none, naming the nearest one, or if its store cannot be reached."""
    if storage.find(uri, storage_options=storage_options)["unit"].to_pylist() != [storage.canonical(uri)]:
        raise ConfigError(f"{uri} is a folder or a pattern; name one file")
    with reaching(uri), open_file(uri, storage_options) as file:
        return file.read()


def check_place(uri: str, storage_options: dict[str, Any] | None = None) -> None:
    """Raises ConfigError unless a file may be put at `uri`: its folder, or in a store its bucket, must be there."""
    place = storage.canonical(uri)
    if "://" not in place:
        folder = Path(place).parent
        if not folder.is_dir():
            raise ConfigError(f"{uri}: there is no folder {folder}; make it, or correct the path")
        return
    bucket = "/".join(place.split("/", 3)[:3])
    if probe(bucket, storage_options or {}) is None:
        raise ConfigError(f"{uri}: there is no {bucket}; make it, or correct the URI")


def write_file(uri: str, data: bytes, storage_options: dict[str, Any] | None = None) -> None:
    """Put a file there, over one of that name. Raises ConfigError if its store cannot be reached or does not allow it."""
    place = storage.canonical(uri)
    if "://" not in place:
        Path(place).write_bytes(data)
        return
    with reaching(uri):
        store, path = filesystem(uri, storage_options or {})
        store.pipe_file(path, data)
