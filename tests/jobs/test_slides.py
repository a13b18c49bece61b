"""The slides job on a real Ray, real files and real tables: what a run writes, and what a second run does not."""

import numpy as np
import pytest

from jobs.slides import plan
from pipeline.config import ConfigError
from pipeline.encoders.hashing import Hashing
from pipeline.media import to_pixels
from pipeline.slides.cutting import tile_pixels
from pipeline.slides.opening import open_slide
from pipeline.slides.tiling import cut_of
from pipeline.tiles import Grid
from tests.slides.runs import Lab, write
from tests.sources import items

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path / "slides", tmp_path / "db")


def test_every_tile_is_in_the_table_with_the_encoders_vector_of_its_pixels(lab):
    write(lab.folder / "a" / "one.svs", 1)
    write(lab.folder / "two.svs", 2, mpp=0.25)
    report = lab.run()
    assert (report.status, report.listed, report.ok, report.tiles.rejected) == ("done", 2, 2, 0)
    slides = lab.slides()
    assert set(slides) == {"a/one.svs", "two.svs"}
    for slide_id, row in slides.items():
        tiles = lab.tiles(slide_id)
        assert len(tiles) == row["tiles"] == row["embedded"] > 10
        cut = cut_of(row, Grid(mpp=0.5, tile_px=128))
        slide = open_slide(row["id"])
        for tile in list(tiles.values())[:3]:
            image = tile_pixels(slide, (tile["x"], tile["y"]), cut=cut, white=tuple(row["white"]))
            batch = items(["x"], ["x"], ["x"], [None]).select(["id", "text"]).append_column("image", to_pixels([image]))
            np.testing.assert_allclose(tile["vector"], Hashing(dim=16).encode(batch)[0], atol=1e-6)
            assert tile["mpp_effective"] == pytest.approx(0.5, rel=0.002)
            assert tile["tissue_fraction"] >= 0.25
            assert tile["od_mean"] > 0
        slide.close()


def test_a_rerun_opens_no_slide_and_adds_no_version(lab):
    for seed in range(3):
        write(lab.folder / f"{seed}.svs", seed)
    first = lab.run()
    assert (first.opened, first.ok) == (3, 3)
    second = lab.run()
    assert (second.opened, second.unchanged, second.tiles.written, second.tiles.commits) == (0, 3, 0, 0)
    assert second.tiles.table_version == first.tiles.table_version
    assert second.tiles.unchanged == first.tiles.written


def test_another_encoder_is_refused_before_anything_is_opened(lab):
    write(lab.folder / "a.svs")
    lab.run()
    with pytest.raises(ConfigError, match=r"choose another table\.name"):
        lab.run(encoder={"args": {"dim": 32}})


def test_a_plan_opens_and_writes_nothing(lab):
    write(lab.folder / "a.svs")
    planned = plan(lab.job())
    assert (planned["listed"], planned["to_survey"], planned["slides_to_survey"]) == (1, 1, ["a.svs"])
    assert not lab.db.exists()
    lab.run()
    write(lab.folder / "b.svs", 1)
    planned = plan(lab.job())
    assert (planned["unchanged"], planned["to_survey"]) == (1, 1)
    assert planned["tiles_estimated"] == pytest.approx(len(lab.tiles()), rel=0.5)
