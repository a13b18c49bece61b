"""The readers read from an object store as from a folder: the same items, in slices that start in the middle of a file."""

import gzip
import io
import json
import tarfile

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.fetch import fetch
from pipeline.readers import lines
from pipeline.readers.csv import Csv
from pipeline.readers.huggingface import HuggingFace
from pipeline.readers.images import Images
from pipeline.readers.jsonl import JsonLines
from pipeline.readers.parquet import Parquet
from pipeline.readers.table import Table
from pipeline.readers.text import TextFiles
from pipeline.readers.webdataset import WebDataset
from pipeline.testing import check_reader
from tests.readers.reading import read_all

COUNT = 40
TEXTS = [f"caption {i}, ü" for i in range(COUNT)]


@pytest.fixture(scope="module")
def bucket(s3_server):
    """Puts files into a bucket of a real S3 server; gives fsspec's storage options."""
    client, options = s3_server
    client.create_bucket(Bucket="readers")
    for key, body in files().items():
        client.put_object(Bucket="readers", Key=key, Body=body)
    return client, options


def files():
    table = pa.table({"text": TEXTS, "path": [f"img/{i}.jpg" for i in range(COUNT)]})
    parquet, stream, shard = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet, row_group_size=8)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=8)
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for i, text in enumerate(TEXTS):
            for name, body in ((f"{i:03}.jpg", b"jpeg"), (f"{i:03}.txt", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    jsonl = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
    csv = "text,n\n" + "\n".join(f'"{text}",{i}' for i, text in enumerate(TEXTS))
    found = {
        "parquet/a b.parquet": parquet.getvalue(),
        "jsonl/x.jsonl.gz": gzip.compress(jsonl),
        "plain/x.jsonl": jsonl,
        "csv/x.csv": csv.encode(),
        "wds/000.tar": shard.getvalue(),
        "hf/data-00000-of-00001.arrow": stream.getvalue(),
        "hf/state.json": json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}).encode(),
        "text/all.txt": "\n".join(TEXTS).encode(),
    }
    images = {f"images/{i:03} #.jpg": b"jpeg" for i in range(COUNT)} | {f"images/{i:03} #.txt": text.encode() for i, text in enumerate(TEXTS)}
    return found | images


READERS = {
    "parquet": lambda **o: Parquet("s3://readers/parquet", text="text", image_uri="path", **o),
    "jsonl": lambda **o: JsonLines("s3://readers/jsonl", text="text", **o),
    "plain": lambda **o: JsonLines("s3://readers/plain/*.jsonl", text="text", **o),
    "csv": lambda **o: Csv("s3://readers/csv", text="text", metadata={"n": "int64"}, **o),
    "webdataset": lambda **o: WebDataset("s3://readers/wds/{000..000}.tar", **o),
    "huggingface": lambda **o: HuggingFace("s3://readers/hf/", text="text", **o),
    "text": lambda **o: TextFiles("s3://readers/text", chunk_tokens=3, overlap_tokens=0, **o),
    "images": lambda **o: Images("s3://readers/images/", captions="txt", **o),
}


@pytest.mark.parametrize("name", READERS)
def test_items_are_the_same_as_on_a_disk(bucket, name, monkeypatch):
    monkeypatch.setattr(lines, "MAX_SLICE_ROWS", 15)
    reader = READERS[name](storage_options=bucket[1])
    check_reader(reader)
    rows = read_all(reader)
    assert [row["text"] for row in rows] == TEXTS
    assert not any(row["reject_reason"] for row in rows)
    assert all(row["uri"].startswith("s3://readers/") for row in rows)
    if name == "parquet":
        assert rows[3]["image_uri"] == "s3://readers/parquet/img/3.jpg"
    if name == "images":
        pictures = fetch([row["image_uri"] for row in rows], max_bytes=100, storage_options=reader.storage_options)
        assert pictures == [b"jpeg"] * COUNT


def test_a_lance_table_is_read_from_a_store_and_its_images_are_fetched_there(bucket):
    _, options = bucket
    lances = {"endpoint": options["endpoint_url"], "allow_http": "true", "region": "us-east-1", "access_key_id": "k", "secret_access_key": "s"}
    uris = [f"s3://readers/images/{i:03} #.jpg" for i in range(COUNT)]
    rows = pa.table({"id": [f"i{i}" for i in range(COUNT)], "uri": uris, "text": TEXTS, "_unit": pa.nulls(COUNT, pa.string())})
    lance.write_dataset(rows, "s3://readers/db/t.lance", max_rows_per_file=15, storage_options=lances)
    reader = Table("s3://readers/db", "t", storage_options=lances, fetch_options=options)
    check_reader(reader)
    found = read_all(reader)
    assert [(row["id"], row["text"], row["image_uri"]) for row in found] == [(f"i{i}", TEXTS[i], uris[i]) for i in range(COUNT)]
    assert fetch(uris[:2], max_bytes=100, storage_options=reader.storage_options) == [b"jpeg"] * 2
    before = reader.list()["version"].to_pylist()
    lance.dataset("s3://readers/db/t.lance", storage_options=lances).delete("id = 'i20'")
    after = reader.list()["version"].to_pylist()
    assert [new == old for new, old in zip(after, before, strict=True)] == [True, False, True]
    assert len(read_all(reader)) == COUNT - 1


def test_an_object_that_is_gone_after_the_listing_rejects_its_rows(bucket):
    client, options = bucket
    client.put_object(Bucket="readers", Key="gone/x.jsonl", Body=b'{"text": "a"}\n{"text": "b"}')
    reader = JsonLines("s3://readers/gone", text="text", storage_options=options)
    work = reader.split(reader.list())
    client.delete_object(Bucket="readers", Key="gone/x.jsonl")
    assert [row["reject_reason"] for table in reader.read(work) for row in table.to_pylist()] == ["unreadable"] * 2


def test_a_store_that_fails_while_reading_is_no_items_fault(bucket):
    """Else a network that is down for a minute would reject everything that was to be read in it."""
    _, options = bucket
    readers = [READERS[name](storage_options=options) for name in ("parquet", "jsonl", "csv", "webdataset", "huggingface")]
    work = [reader.split(reader.list()) for reader in readers]
    dead = {**options, "endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"connect_timeout": 1, "retries": {"max_attempts": 1}}}
    for reader, part in zip(readers, work, strict=True):
        reader.storage_options = dead
        with pytest.raises(Exception, match=r"[Cc]onnect"):
            list(reader.read(part))
