"""A table that the embed job made of files and of containers, and copies of it to spoil."""

import json
import shutil

import pytest

from pipeline.table.at import TableAt
from tests.table.verifying import embed


@pytest.fixture(scope="package")
def sources(tmp_path_factory):
    """20 files of text, one of them empty, and two containers of 10 rows."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(20):
        (folder / f"i{i:02}.txt").write_text(f"text number {i}" if i else "  ")
    for name in "ab":
        (folder / f"{name}.json").write_text(json.dumps([[f"{name}{i}", f"row {i} of {name}"] for i in range(10)]))
    return folder


@pytest.fixture(scope="package")
def made(tmp_path_factory, sources, cluster):
    at = TableAt(uri=str(tmp_path_factory.mktemp("made")), name="t")
    embed(sources, at, "Lines")
    embed(sources, at, "Ledgers")
    return at


@pytest.fixture
def at(tmp_path, made):
    """A copy of the table and of all that lies beside it."""
    shutil.copytree(made.uri, tmp_path / "db")
    return TableAt(uri=str(tmp_path / "db"), name="t")
