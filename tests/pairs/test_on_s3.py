"""Pairs and their images in an object store, prepared there and read at random."""

import json

import numpy as np
import pytest

from pipeline.config import ConfigError, Ref
from pipeline.pairs.prepare import Dataset, prepare
from pipeline.training.batches import Choice, collate
from pipeline.training.feed import Feed, Part, Reader
from pipeline.training.held_out import _Reader
from pipeline.training.plan import Mixture
from pipeline.training.settings import Feeding
from tests.pairs.writing import picture


@pytest.fixture(scope="module")
def store(s3_server):
    """A bucket of a real S3 server: fsspec's options, and Lance's."""
    client, options = s3_server
    client.create_bucket(Bucket="pairs")
    rows = [{"qry": "<|image_1|> what?", "qry_image_path": f"{i}.png", "pos_text": f"caption {i}"} for i in range(6)]
    client.put_object(Bucket="pairs", Key="train.jsonl", Body="".join(json.dumps(row) + "\n" for row in rows).encode())
    for i in range(5):
        client.put_object(Bucket="pairs", Key=f"images/{i}.png", Body=picture(10 * i) if i != 4 else b"")
    aws = {
        "aws_access_key_id": "k",
        "aws_secret_access_key": "s",
        "aws_region": "us-east-1",
        "aws_endpoint": options["endpoint_url"],
        "allow_http": "true",
    }
    return options, aws


def data(options, **given):
    args = {"uri": "s3://pairs/train.jsonl", "image_dir": "s3://pairs/images", "storage_options": options}
    return Dataset(name="x", reader=Ref(target="pipeline.pairs.mmeb:Mmeb", args=args), storage_options=options, **given)


@pytest.mark.parametrize("images", ["exist", "store"])
def test_pairs_of_a_bucket_are_prepared_in_a_bucket(store, images):
    options, aws = store
    with pytest.raises(ConfigError, match=r"s3://pairs/train.jsonl#4"):
        prepare(data(options, images=images), "s3://pairs/cache", aws)
    prepared = prepare(data(options, images=images, max_rejects=0.5), "s3://pairs/cache", aws)
    assert [(row["uri"][-2:], row["reason"]) for row in prepared.rejects().to_pylist()] == [("#4", "bad_image"), ("#5", "missing")]
    batch = collate(prepared.take(np.array([3, 1])), np.zeros(2, int), Choice(storage_options=options), step=0)
    assert [told.message.images[0][0, 0, 0] for told in batch.queries] == [30, 10]
    assert [told.message.text for told in batch.positives] == ["caption 3", "caption 1"]


def test_credentials_are_no_part_of_what_is_prepared(store):
    """Another key for the same bucket made everything be prepared again."""
    options, aws = store
    first = prepare(data(options, max_rejects=0.5), "s3://pairs/cache", aws)
    assert prepare(data(options | {"key": "other"}, max_rejects=0.5), "s3://pairs/cache", aws).path == first.path


class Told:
    """Stands for a model: rows stay what they are."""

    def prepare(self, told, *, query):
        return told


def test_each_data_sets_own_options_reach_training(store, tmp_path):
    """Training used the options of `choice` for all of them, so that only preparing found a bucket of another account."""
    options, _ = store
    (tmp_path / "0.png").write_bytes(picture(90))
    (tmp_path / "train.jsonl").write_text(json.dumps({"qry": "<|image_1|> what?", "qry_image_path": "0.png", "pos_text": "here"}) + "\n")
    local = Dataset(name="local", reader=Ref(target="pipeline.pairs.mmeb:Mmeb", args={"uri": str(tmp_path / "train.jsonl")}))
    parts = [Part(prepare(dataset, str(tmp_path / "cache"))) for dataset in (data(options, max_rejects=0.5), local)]
    mixture = Mixture(batch_size=5, batches="interleaved", interleave=1)
    with Feed(Reader(tuple(parts), mixture, Choice(), 0, 1).read, num_ranks=1, steps=1, feeding=Feeding(), choice=Choice()) as feed:
        ready = feed.at(0, Told())
    assert sorted({told.message.images[0][0, 0, 0] for told in ready.queries}) == [0, 10, 20, 30, 90]
    messages = _Reader(Told(), None, parts[0].prepared, Choice())._told([(2, None), (0, 0)])
    assert messages[0][0].message.images[0][0, 0, 0] == 20 and messages[1][0].message.text == "caption 0"
