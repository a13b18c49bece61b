"""The index of a slides run, asked for in the job file."""

import io
import re

import pytest
from PIL import Image

from pipeline.config import ConfigError, load
from pipeline.slides.job import SlidesJob
from tests.slides.runs import Lab, write

NEEDED = ["slides.uri=s", "encoder.target=a:B", "table.uri=t", "table.name=t"]


@pytest.mark.usefixtures("cluster")
def test_a_run_leaves_a_page_of_all_slides_and_a_rerun_renews_it(tmp_path):
    lab = Lab(tmp_path / "slides", tmp_path / "db")
    write(lab.folder / "good.svs", 1)
    (lab.folder / "empty.svs").write_bytes(b"")
    report = lab.run(page=str(tmp_path / "page"), survey={"thumbnail_px": 200})
    assert report.page == str(tmp_path / "page" / "index.html")
    text = (tmp_path / "page" / "index.html").read_text()
    assert re.findall(r"<b>(\w+\.svs)</b>", text) == ["empty.svs", "good.svs"]  # the one that failed comes first
    assert "zero bytes" in text and str(lab.db) in text
    [picture] = (tmp_path / "page" / "pictures").glob("*.jpg")
    assert Image.open(picture).width == 1024
    assert max(Image.open(io.BytesIO(lab.slides()["good.svs"]["thumbnail"])).size) == 200  # finer than tissue is looked for, at 8 um
    drawn = picture.stat().st_mtime_ns
    write(lab.folder / "new.svs", 2)
    lab.run(page=str(tmp_path / "page"), survey={"thumbnail_px": 200})
    assert re.findall(r"<b>(\w+\.svs)</b>", (tmp_path / "page" / "index.html").read_text()) == ["empty.svs", "good.svs", "new.svs"]
    assert picture.stat().st_mtime_ns == drawn


def test_a_page_goes_into_a_local_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for page in ("s3://bucket/page", str(tmp_path / "file")):
        with pytest.raises(ConfigError, match="must be a local folder"):
            load(SlidesJob, None, [*NEEDED, f"page={page}"])
    assert load(SlidesJob, None, [*NEEDED, f"page={tmp_path / 'new'}"]).page
