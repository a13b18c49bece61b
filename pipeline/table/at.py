"""Where a vector table is, and how it is opened. Everything beside it is named after it.

A table `photos` in the database `vectors` is `vectors/photos.lance`; beside it lie `photos.rejects`, `photos.runs`,
`photos.units` (Lance tables), the folder `photos.staging`, and `models`, which all tables of the database share.
"""

import re
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pydantic
from lance.file import LanceFileSession

from pipeline.config import ConfigError, Model, nearest
from schemas.vectors import DIM, FINGERPRINT, TABLE


class TableAt(Model):
    """A vector table of a LanceDB database."""

    uri: str
    """The database: a folder, or an object store's URI such as s3://bucket/vectors."""
    name: str
    """The table's name: letters, digits, `_` and `-`."""
    storage_options: dict[str, str] = {}
    """Settings of the object store, in Lance's words (region, endpoint, allow_http, ...). Credentials are better left to the environment."""

    @pydantic.field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "models":
            raise ValueError("a table's name is letters, digits, '_' and '-', and not 'models'")
        return name

    @pydantic.field_validator("uri")
    @classmethod
    def _absolute(cls, uri: str) -> str:
        # Workers have another working directory than the driver.
        if not uri:
            raise ValueError("a folder or an object store's URI is required")
        return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())

    def path(self, suffix: str = "") -> str:
        """URI of the Lance dataset, or of one of its companions: `.rejects`, `.runs`, `.units`."""
        return f"{self.uri}/{self.name}{suffix}.lance"

    @property
    def options(self) -> dict[str, str] | None:
        """`storage_options` as Lance's functions take them: None if there are none."""
        return self.storage_options or None

    @property
    def models_path(self) -> str:
        """URI of the database's table of models."""
        return f"{self.uri}/models.lance"

    @property
    def staging(self) -> str:
        """URI of the folder that receipts of uncommitted work are kept in."""
        return f"{self.uri}/{self.name}.staging"

    def open(self, suffix: str = "") -> lance.LanceDataset | None:
        """The newest version of the table or a companion, or None if it does not exist."""
        return open_dataset(self.path(suffix), self.storage_options)

    def require(self) -> lance.LanceDataset:
        """The newest version of the table. Raises ConfigError naming the tables that exist if it does not."""
        dataset = self.open()
        if dataset is None:
            names = self.neighbours()
            if self.name in names:
                raise ConfigError(f"{self.path()} is a folder without a table in it; run the embed job, which makes one there, or correct table.name")
            there = f"{nearest(self.name, names)}; it has {', '.join(names)}" if names else ""
            raise ConfigError(f"there is no table {self.name!r} in {self.uri}{there}; run the embed job first, or correct uri and name")
        return dataset

    def neighbours(self) -> list[str]:
        """Names of the vector tables of the database; none if it does not exist."""
        folders = LanceFileSession(self.uri, storage_options=self.options).list_with_delimiter("").common_prefixes
        names = sorted(folder.rstrip("/").rpartition("/")[2].removesuffix(".lance") for folder in folders if folder.rstrip("/").endswith(".lance"))
        return [name for name in names if "." not in name and name != "models"]


def open_dataset(path: str, storage_options: dict[str, str]) -> lance.LanceDataset | None:
    """The dataset at `path`, or None if there is none. Raises ConfigError if the store cannot be reached."""
    try:
        return lance.dataset(path, storage_options=storage_options or None)
    except ValueError as error:
        if "was not found" in str(error):
            return None
        raise ConfigError(_closed(path, error)) from error
    except OSError as error:
        raise ConfigError(_closed(path, error)) from error


def _closed(path: str, error: Exception) -> str:
    """Why a dataset cannot be opened, and what to look at."""
    if "://" not in path:
        return f"cannot open {path}: {told(error)}; correct the place, or restore what was damaged"
    if "builder error" in str(error):
        return f'cannot open {path}: an endpoint with http:// needs allow_http: "true" in storage_options ({told(error)})'
    return (
        f"cannot open {path}: {told(error)}; correct the URI, the credentials in the environment, or storage_options, in Lance's words: "
        "endpoint, region, allow_http"
    )


def told(error: Exception) -> str:
    """What the engine says of an error, without where in its source it arose."""
    return re.sub(r",? /\S+\.rs:\d+:\d+", "", str(error))


def create_dataset(path: str, schema: pa.Schema, storage_options: dict[str, str]) -> lance.LanceDataset:
    """An empty dataset, or the one that another job created first."""
    try:
        # Storage version 2.2 ("stable"): lancedb 0.40 carries an older Lance core that cannot read newer ones.
        return lance.write_dataset(schema.empty_table(), path, mode="create", data_storage_version="2.2", storage_options=storage_options or None)
    except OSError as error:
        existing = open_dataset(path, storage_options)
        if existing is None:
            raise ConfigError(f"cannot create {path}: {told(error)}") from error
        return existing


def fingerprint_of(dataset: lance.LanceDataset) -> str:
    """The fingerprint of the encoder whose vectors a table holds. Raises ConfigError if the table is not Tessera's."""
    metadata: dict[bytes, bytes] = dataset.schema.metadata or {}
    if FINGERPRINT not in metadata:
        raise ConfigError(f"{dataset.uri} was not made by Tessera: it does not say which encoder its vectors are of; choose another table.name")
    return metadata[FINGERPRINT].decode()


def identity_of(dataset: lance.LanceDataset) -> tuple[bytes | None, bytes | None]:
    """What tells a table from another one at the same place: the encoder's fingerprint, and the name it was given when it was made."""
    metadata: dict[bytes, bytes] = dataset.schema.metadata or {}
    return metadata.get(FINGERPRINT), metadata.get(TABLE)


def dim_of(dataset: lance.LanceDataset) -> int:
    """Length of the table's vectors."""
    return int((dataset.schema.metadata or {})[DIM])


def model_of(at: TableAt, fingerprint: str) -> dict[str, Any] | None:
    """The MODEL row of a fingerprint, or None."""
    models = open_dataset(at.models_path, at.storage_options)
    if models is None:
        return None
    rows = models.to_table(filter=f"fingerprint = '{fingerprint}'", limit=1).to_pylist()
    return rows[0] if rows else None
