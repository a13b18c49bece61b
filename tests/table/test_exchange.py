"""An exchange: rows of some containers go and others come in one commit, which anyone else's change to them makes stale."""

import lance
import pyarrow as pa
import pytest
from lance.commit import CommitConflictError
from lance.fragment import write_fragments

from pipeline.table.at import create_dataset
from pipeline.table.swap import exchange, insert

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False)])


def staged(dataset, *ids):
    return write_fragments(pa.table({"id": list(ids)}, schema=SCHEMA), dataset, mode="append", data_storage_version="2.2")


@pytest.fixture
def dataset(tmp_path):
    """Two fragments: a, b and c, d."""
    empty = create_dataset(str(tmp_path / "t.lance"), SCHEMA, {})
    first = insert(empty, staged(empty, "a", "b"), None)
    return insert(first, staged(first, "c", "d"), None)


def ids(dataset):
    return sorted(lance.dataset(dataset.uri).to_table()["id"].to_pylist())


def test_rows_go_and_come_in_one_version(dataset):
    after = exchange(dataset, staged(dataset, "e"), without=["a", "c", "d"], touching={0, 1}, options=None)
    assert ids(after) == ["b", "e"]
    assert after.version == dataset.version + 1


@pytest.mark.parametrize("without", [[], ["a"], ["c"], ["a", "b", "c", "d"]])
def test_two_exchanges_of_the_same_containers_cannot_both_add(dataset, without):
    exchange(dataset, staged(dataset, "new"), without=["a"], touching={0, 1}, options=None)
    with pytest.raises(CommitConflictError):
        exchange(dataset, staged(dataset, "new"), without=without, touching={0, 1}, options=None)
    assert ids(dataset) == ["b", "c", "d", "new"]


def test_an_exchange_after_somebodys_insert_is_stale(dataset):
    insert(dataset, staged(dataset, "new"), None)
    with pytest.raises(CommitConflictError):
        exchange(dataset, staged(dataset, "new"), without=["a"], touching={0, 1}, options=None)
    assert ids(dataset) == ["a", "b", "c", "d", "new"]
