"""A search whose job file, image and contact sheet are in an object store: a real S3 server on this machine."""

import io
import json

import pyarrow as pa
import pytest
from PIL import Image

from jobs.search import SearchJob, run
from pipeline.config import ConfigError, load
from pipeline.media import to_pixels
from schemas.items import encoder_schema
from tests.jobs.test_search import HASHING, at, tessera  # noqa: F401
from tests.tables import rows_of, write

BUCKET = "search"


@pytest.fixture(scope="module")
def store(s3_server):
    """A bucket with an image; the client, and fsspec's options."""
    client, options = s3_server
    client.create_bucket(Bucket=BUCKET)
    image = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(image, "PNG")
    client.put_object(Bucket=BUCKET, Key="red.png", Body=image.getvalue())
    return client, options


def two_texts():
    return pa.Table.from_arrays([pa.array(["a", "b"]), pa.array(["a fox", "an owl"]), to_pixels([None] * 2)], schema=encoder_schema())


def job_of(at, options, **changes):  # noqa: F811
    return SearchJob.model_validate({"table": at.model_dump(), "query": {"text": "a fox"}, "storage_options": options, **changes})


@pytest.mark.parametrize(("name", "holds"), [("hits.html", b"data:image/jpeg;base64,"), ("deep/hits.png", b"\x89PNG")])
def test_query_image_hits_and_sheet_are_in_a_store(tmp_path, store, name, holds):
    """Options could not be given: the image of a query was `missing` in any store but the environment's."""
    client, options = store
    rows = rows_of(HASHING.build().encode(two_texts()), fingerprint=HASHING.build().fingerprint)
    place = rows.schema.get_field_index("uri")
    at = write(tmp_path, rows.set_column(place, rows.schema.field(place), [[f"s3://{BUCKET}/red.png"] * 2]))  # noqa: F811
    query = {"image": f"s3://{BUCKET}/red.png"}
    report = run(job_of(at, options, query=query, encoder=HASHING.model_dump(), sheet=f"s3://{BUCKET}/{name}"))
    assert len(report.hits) == 2
    assert holds in client.get_object(Bucket=BUCKET, Key=name)["Body"].read()


@pytest.mark.parametrize("place", ["s3://nowhere/hits.html", "nowhere/hits.html", "unknown://x/hits.html"])
def test_a_place_where_no_sheet_can_be_put_is_refused_before_the_search(at, store, place):  # noqa: F811
    with pytest.raises(ConfigError, match=r"nowhere|unknown"):
        run(job_of(at, store[1], sheet=place, encoder={"target": "tests.sources:Forbidden"}))


def test_the_job_file_may_be_in_a_store(at, store, s3_environment, monkeypatch, capsys):  # noqa: F811
    s3_environment.put_object(Bucket=BUCKET, Key="jobs/fox.yaml", Body=b"query: {text: a fox, k: 1}")
    assert tessera(at, monkeypatch, f"s3://{BUCKET}/jobs/fox.yaml") == 0
    assert json.loads(capsys.readouterr().out)["queries"] == [{"text": "a fox", "k": 1}]
    with pytest.raises(ConfigError, match=r"jobs/fix.yaml does not exist; did you mean 'fox.yaml'"):
        load(SearchJob, f"s3://{BUCKET}/jobs/fix.yaml")
    with pytest.raises(ConfigError, match="name one file"):
        load(SearchJob, f"s3://{BUCKET}/jobs")
