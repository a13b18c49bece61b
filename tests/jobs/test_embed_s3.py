"""The embed job with its table in an object store: a real S3 server on this machine."""

import pytest

from jobs.embed import run
from tests.jobs.test_embed import job_of, texts  # noqa: F401

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def store(s3_server):
    client, options = s3_server
    client.create_bucket(Bucket="tables")
    keys = {"region": "us-east-1", "access_key_id": options["key"], "secret_access_key": options["secret"]}
    return {"endpoint": options["endpoint_url"], "allow_http": "true", **keys}


def test_a_table_in_s3_is_filled_once_and_the_rerun_adds_no_version(tmp_path, texts, store):  # noqa: F811
    job = job_of(tmp_path, texts, table={"uri": "s3://tables/db", "name": "t", "storage_options": store})
    first = run(job)
    assert (first.written, first.rows_in_table) == (30, 30)
    (texts / "i03.txt").write_text("changed its mind")
    changed = run(job)
    assert (changed.replaced, changed.unchanged, changed.rows_in_table) == (1, 29, 30)
    again = run(job)
    assert (again.unchanged, again.commits, again.table_version) == (30, 0, changed.table_version)
