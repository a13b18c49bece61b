import datasets
import lance
import pyarrow as pa
import pytest

from pipeline.config import ConfigError
from pipeline.readers.huggingface import HuggingFace
from pipeline.readers.table import Table
from pipeline.testing import check_reader


def read(reader):
    return [row for table in reader.read(reader.split(reader.list())) for row in table.to_pylist()]


def test_a_lance_table_can_be_embedded_again(tmp_path):
    rows = pa.table({"id": [f"i{n}" for n in range(30)], "text": [f"text {n}" for n in range(30)], "uri": ["u"] * 30})
    lance.write_dataset(rows, tmp_path / "t.lance", max_rows_per_file=10)
    reader = Table(str(tmp_path), "t", image_uri=None)
    check_reader(reader)
    assert [row["id"] for row in read(reader)] == [f"i{n}" for n in range(30)]


def test_deleted_rows_of_a_table_are_not_read(tmp_path):
    rows = pa.table({"id": ["a", "b", "c"], "text": ["x", "y", "z"], "uri": ["u"] * 3})
    dataset = lance.write_dataset(rows, tmp_path / "t.lance")
    before = Table(str(tmp_path), "t", image_uri=None).list()["version"].to_pylist()
    dataset.delete("id = 'b'")
    reader = Table(str(tmp_path), "t", image_uri=None)
    assert [row["id"] for row in read(reader)] == ["a", "c"]
    assert reader.list()["version"].to_pylist() != before


def test_a_saved_dataset_is_read_as_it_is(tmp_path):
    datasets.Dataset.from_dict({"key": [f"k{n}" for n in range(12)], "words": [f"words {n}" for n in range(12)]}).save_to_disk(str(tmp_path / "d"))
    reader = HuggingFace(str(tmp_path / "d"), id="key", text="words")
    check_reader(reader)
    assert [(row["id"], row["text"]) for row in read(reader)] == [(f"k{n}", f"words {n}") for n in range(12)]


def test_a_folder_that_is_no_saved_dataset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="save_to_disk"):
        HuggingFace(str(tmp_path), text="words").list()
