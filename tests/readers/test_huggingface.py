import io
import os

import datasets
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.config import ConfigError
from pipeline.readers.huggingface import HuggingFace
from pipeline.testing import check_reader
from tests.readers.reading import read_all, rejects


def picture(shade):
    target = io.BytesIO()
    Image.new("L", (4, 4), shade).save(target, "PNG")
    return target.getvalue()


def saved(folder, count=10, **options):
    rows = {"key": [f"k{i}" for i in range(count)], "image": [{"bytes": picture(i % 256), "path": None} for i in range(count)]}
    rows["caption"] = [f"caption {i}" for i in range(count)]
    rows["label"] = list(range(count))
    features = datasets.Features(
        {"key": datasets.Value("string"), "image": datasets.Image(), "caption": datasets.Value("string"), "label": datasets.Value("int32")}
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(str(folder), **options)
    return dataset


def test_a_saved_dataset_gives_images_text_and_metadata(tmp_path):
    saved(tmp_path / "d", 10, num_shards=3)
    reader = HuggingFace(str(tmp_path / "d"), id="key", image="image", text="caption", metadata=["label"])
    check_reader(reader)
    assert reader.metadata == pa.schema([("label", pa.int32())])
    rows = read_all(reader)
    expected = [(f"k{i}", picture(i), f"caption {i}", i) for i in range(10)]
    assert [(row["id"], row["image"], row["text"], row["label"]) for row in rows] == expected


def test_a_shuffled_and_filtered_dataset_is_read_as_it_was_saved(tmp_path):
    dataset = saved(tmp_path / "all", 50)
    chosen = dataset.shuffle(seed=0).select(range(20))
    chosen.save_to_disk(str(tmp_path / "some"))
    rows = read_all(HuggingFace(str(tmp_path / "some"), text="caption"))
    assert [row["text"] for row in rows] == chosen["caption"][:]


def test_slices_of_a_large_file(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(20_000)]})
    dataset.save_to_disk(str(tmp_path / "d"))
    reader = HuggingFace(str(tmp_path / "d"), text="text")
    check_reader(reader)
    assert reader.split(reader.list()).num_rows >= 3
    assert [row["text"] for row in read_all(reader)] == dataset["text"][:]


def test_a_split_is_chosen_by_name(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    reader = HuggingFace(str(tmp_path / "d"), split="test", text="text")
    check_reader(reader)
    assert [row["text"] for row in read_all(reader)] == ["test"]
    with pytest.raises(ConfigError, match="set `split` to one of train, test"):
        HuggingFace(str(tmp_path / "d"), text="text").list()
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        HuggingFace(str(tmp_path / "d"), split="trian", text="text").list()
    with pytest.raises(ConfigError, match="without splits"):
        HuggingFace(str(tmp_path / "d/train"), split="train", text="text").list()


def test_what_is_no_saved_dataset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no state.json"):
        HuggingFace(str(tmp_path), text="text").list()
    saved(tmp_path / "d")
    with pytest.raises(ConfigError, match="did you mean 'caption'"):
        HuggingFace(str(tmp_path / "d"), text="captions").list()


def test_a_truncated_file_rejects_what_cannot_be_read(tmp_path):
    saved(tmp_path / "d", 4000, num_shards=2)
    place = tmp_path / "d/data-00001-of-00002.arrow"
    reader = HuggingFace(str(tmp_path / "d"), id="key", text="caption")
    work = reader.split(reader.list())
    os.truncate(place, place.stat().st_size * 2 // 3)
    rows = [row for table in reader.read(work) for row in table.to_pylist()]
    assert len(rows) == 4000
    assert 2000 <= sum(not row.get("reject_reason") for row in rows) < 4000
    os.truncate(place, 100)
    check_reader(reader)
    assert len(rejects(read_all(reader))) == 1
