"""The version of a listed container follows the settings that decide which items it gives, and no other ones.

It was the file's alone: with another column a container passed for unchanged, and every vector stayed what it was.
"""

import json
import tarfile

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.readers.csv import Csv
from pipeline.readers.huggingface import HuggingFace
from pipeline.readers.images import Images
from pipeline.readers.jsonl import JsonLines
from pipeline.readers.parquet import Parquet
from pipeline.readers.table import Table
from pipeline.readers.text import TextFiles
from pipeline.readers.webdataset import WebDataset

ROWS = pa.table({"a": ["x"], "b": ["y"]})


def version(reader):
    return reader.list()["version"][0].as_py()


@pytest.fixture
def folder(tmp_path):
    pq.write_table(ROWS, tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"a": "x", "b": "y"}')
    (tmp_path / "x.csv").write_text("a,b\nx,y\n")
    (tmp_path / "x.txt").write_text("one two")
    (tmp_path / "x.json").write_text(json.dumps({"caption": "c", "title": "t"}))
    (tmp_path / "x.jpg").touch()
    tarfile.open(tmp_path / "x.tar", "w").close()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))
    with pa.ipc.new_stream(str(tmp_path / "hf/x.arrow"), ROWS.schema) as stream:
        stream.write_table(ROWS)
    lance.write_dataset(ROWS, str(tmp_path / "t.lance"))
    return tmp_path


READERS = {
    "parquet": lambda folder, **given: Parquet(f"{folder}/x.parquet", **given),
    "jsonl": lambda folder, **given: JsonLines(f"{folder}/x.jsonl", **given),
    "csv": lambda folder, **given: Csv(f"{folder}/x.csv", **given),
    "huggingface": lambda folder, **given: HuggingFace(f"{folder}/hf", **given),
    "table": lambda folder, **given: Table(str(folder), "t", image_uri=None, **{"id": "a", **given}),
}


@pytest.mark.parametrize("name", READERS)
def test_columns_are_part_of_it_and_storage_options_are_not(folder, name):
    make = READERS[name]
    base = version(make(folder, text="a"))
    assert base == version(make(folder, text="a")) == version(make(folder, text="a", storage_options={"allow_http": "true"}))
    others = [{"text": "b"}, {"text": "a", "id": "b"}, {"text": "a", "version": "b"}, {"text": "a", "metadata": ["b"]}]
    assert len({base, *(version(make(folder, **other)) for other in others)}) == 5


def test_members_of_samples_are_part_of_it_and_weights_are_not(folder):
    others = [{}, {"image": "png"}, {"text": "caption"}, {"json_field": "c"}, {"metadata": {"n": "int64"}}, {"metadata": {"n": "int32"}}]
    assert len({version(WebDataset(f"{folder}/x.tar", **other)) for other in others}) == 6
    assert version(WebDataset(f"{folder}/x.tar", weights=[2])) == version(WebDataset(f"{folder}/x.tar"))


def test_a_delimiter_the_cutting_of_texts_and_the_key_of_captions_are_part_of_it(folder):
    assert version(Csv(f"{folder}/x.csv", text="a,b", delimiter=";")) != version(Csv(f"{folder}/x.csv", text="a,b", delimiter="|"))
    assert len({version(TextFiles(f"{folder}/x.txt", chunk_tokens=size, overlap_tokens=overlap)) for size, overlap in ((9, 1), (9, 2), (8, 2))}) == 3
    assert version(Images(str(folder), captions="json")) != version(Images(str(folder), captions="json", text_key="title"))
