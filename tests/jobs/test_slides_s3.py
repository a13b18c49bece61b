"""Slides and tables in an object store: surveyed and embedded where they lie, replaced there, and not opened again."""

import pytest

from tests.jobs.test_slides import lab  # noqa: F401
from tests.slides.runs import write
from tests.slides.test_in_a_store import BUCKET, put, s3  # noqa: F401

# ruff: noqa: F811


@pytest.mark.usefixtures("cluster")
def test_slides_of_a_store_are_kept_current(lab, s3, tmp_path):
    client, options = s3
    put(s3, write(tmp_path / "a.svs", 1), "lab/a.svs")
    put(s3, write(tmp_path / "b.svs", 2), "lab/sub/b.svs")
    table = {"uri": f"s3://{BUCKET}/db", "storage_options": lance_options(options)}
    settings = {"slides": {"uri": f"s3://{BUCKET}/lab", "storage_options": options}, "cache": {"folder": str(tmp_path / "cache")}, "table": table}
    first = lab.run(**settings)
    assert (first.listed, first.ok, first.statuses) == (2, 2, {"ok": 2})
    again = lab.run(**settings)
    assert (again.opened, again.unchanged, again.tiles.commits) == (0, 2, 0)
    put(s3, write(tmp_path / "c.svs", 3), "lab/sub/b.svs")
    client.delete_object(Bucket=BUCKET, Key="lab/a.svs")
    third = lab.run(**settings, sync={"vanished": "delete"})
    assert (third.opened, third.ok, third.statuses) == (1, 1, {"deleted": 1, "ok": 1})
    assert third.tiles.rows_in_table == third.tiles.written > 0


def lance_options(options):
    """The same store in Lance's words."""
    return {
        "aws_access_key_id": options["key"],
        "aws_secret_access_key": options["secret"],
        "aws_endpoint": options["endpoint_url"],
        "aws_region": "us-east-1",
        "allow_http": "true",
    }
