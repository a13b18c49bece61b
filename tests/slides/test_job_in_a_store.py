"""The slides job over an object store: the same tiles and vectors as from a disk, by ranges and by the cache."""

import numpy as np
import pytest

from tests.slides.build import write_tiff, zero_tile
from tests.slides.runs import Lab, canvas, vectors, write
from tests.slides.slow import slow_store

pytestmark = pytest.mark.usefixtures("cluster")
BUCKET = "slides-job"


@pytest.fixture
def s3(s3_server):
    """A real S3 server with a bucket; gives the client and fsspec's storage options."""
    client, options = s3_server
    client.create_bucket(Bucket=BUCKET)
    return client, options


def test_slides_in_a_store_give_the_tiles_that_a_disk_gives(s3, tmp_path):
    client, options = s3
    lab = Lab(tmp_path / "slides", tmp_path / "db", name="local")
    write(lab.folder / "a" / "ranges.svs", 1)
    write_tiff(lab.folder / "cached.tiff", canvas(2).image, compression="deflate")
    zero_tile(write(lab.folder / "bad.svs", 3), (300, 380))
    (lab.folder / "empty.svs").write_bytes(b"")
    for file in lab.folder.rglob("*.*"):
        client.upload_file(str(file), BUCKET, f"lab/{file.relative_to(lab.folder)}")
    lab.run()
    remote = Lab(tmp_path / "none", tmp_path / "db", name="remote")
    there = {"uri": f"s3://{BUCKET}/lab", "storage_options": options}
    report = remote.run(slides=there, cache={"folder": str(tmp_path / "cache")})
    assert remote.statuses() == lab.statuses()
    assert remote.statuses()["bad.svs"] == ("partial", "bad_tiles")
    assert report.tiles.written == len(lab.tiles()) > 30
    for slide_id, row in lab.slides().items():
        assert remote.slides()[slide_id]["content_fp"] == row["content_fp"]
        ours, theirs = remote.tiles(slide_id), lab.tiles(slide_id)
        assert sorted((t["x"], t["y"]) for t in ours.values()) == sorted((t["x"], t["y"]) for t in theirs.values())
        if ours:
            np.testing.assert_allclose(np.sort(vectors(ours), axis=0), np.sort(vectors(theirs), axis=0), atol=1e-6)
    again = remote.run(slides=there, cache={"folder": str(tmp_path / "cache")})
    assert (again.opened, again.tiles.commits) == (0, 0)


def test_a_slide_that_is_copied_slowly_is_no_hang(tmp_path):
    """The copy was held against limits.slide_timeout_s, and then against the item_timeout_s of the first tile."""
    lab = Lab(tmp_path / "slides", tmp_path / "db")
    lab.folder.mkdir()
    write_tiff(lab.folder / "a.tiff", canvas(1).image, compression="deflate")
    with slow_store(lab.folder, seconds=5) as url:
        there = {"slides": {"uri": f"{url}/a.tiff"}, "limits": {"slide_timeout_s": 2, "item_timeout_s": 0.2}}
        report = lab.run(**there, cache={"folder": str(tmp_path / "surveyed")})
        assert (report.status, report.ok) == ("done", 1)
        other = {"grids": [{"mpp": 0.5, "tile_px": 64}], "cache": {"folder": str(tmp_path / "embedded")}}
        report = lab.run(**there, **other)
        assert (report.status, report.opened, report.ok, report.tiles.rejected) == ("done", 0, 1, 0)
        assert report.tiles.written == len(lab.tiles()) > 30
        assert report.tiles.stage_seconds["read"] > 4, "the copy has its place in the report"
