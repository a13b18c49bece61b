"""The slides job on a real Ray, real files and real tables: what a run writes, and what a second run does not."""

from pathlib import Path

import numpy as np
import pytest

from jobs import search, verify
from jobs.slides import SlidesJob, plan
from pipeline import config
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


def test_a_rerun_over_twelve_slides_opens_none_and_one_replaced_slide_costs_itself_only(lab):
    for seed in range(12):
        write(lab.folder / f"{seed}.svs", seed)
    first = lab.run()
    assert (first.opened, first.ok) == (12, 12)
    second = lab.run()
    assert (second.opened, second.unchanged, second.tiles.written, second.tiles.commits) == (0, 12, 0, 0)
    assert second.tiles.table_version == first.tiles.table_version
    assert second.tiles.unchanged == first.tiles.written
    assert second.seconds < 0.05 * first.seconds
    write(lab.folder / "5.svs", 20)
    third = lab.run()
    assert (third.opened, third.unchanged, third.ok) == (1, 11, 1)
    assert third.tiles.written == len(lab.tiles("5.svs"))
    assert third.removed > 0


def test_a_table_of_tiles_is_sound_and_can_be_searched_by_id_by_picture_and_by_text(lab, tmp_path):
    write(lab.folder / "a.svs", 1)
    write(lab.folder / "b.svs", 2)
    inner = {"target": "pipeline.encoders.hashing:Hashing", "args": {"dim": 64}}
    encoder = {"target": "pipeline.encoders.tile:TileEncoder", "args": {"encoder": inner}}
    assert lab.run(encoder=encoder, table={"thumbnail_px": 128}).status == "done"
    (lab.folder / "a.svs").rename(lab.folder / "moved.svs")
    lab.run(encoder=encoder, table={"thumbnail_px": 128})
    # A note on where a slide lay before is out of date, which is worth knowing and no fault.
    report = verify.run(verify.VerifyJob.model_validate({"table": lab.at.model_dump()}))
    assert {finding.code for finding in report.findings} <= {"outdated_notes"}
    tile = next(iter(lab.tiles().values()))
    picture = tmp_path / "tile.jpg"
    picture.write_bytes(tile["thumbnail"])
    queries = [
        {"id": tile["id"], "itself": True, "k": 3},
        {"image": str(picture), "k": 1},
        {"text": "mitosis", "k": 3, "where": "slide_id = 'b.svs'"},
    ]
    found = search.run(search.SearchJob.model_validate({"table": lab.at.model_dump(), "queries": queries})).hits
    assert found[0]["id"] == tile["id"]
    assert found[0]["similarity"] == pytest.approx(1)
    [by_picture] = [hit for hit in found if hit["_query"] == 1]
    assert by_picture["id"] == tile["id"]
    assert by_picture["similarity"] > 0.99
    assert {hit["slide_id"] for hit in found if hit["_query"] == 2} == {"b.svs"}
    # With normalised pixels it is another encoder.
    encoder["args"]["stain"] = "reinhard"
    with pytest.raises(ConfigError, match=r"choose another table\.name"):
        lab.run(encoder=encoder)
    normal = Lab(lab.folder, lab.db, name="normal")
    normal.run(encoder=encoder)
    assert set(normal.tiles()) == set(lab.tiles())
    assert all(row["stain"] for row in normal.slides().values())
    assert any(normal.tiles()[item]["vector"] != row["vector"] for item, row in lab.tiles().items())


def test_the_job_file_is_valid():
    assert config.load(SlidesJob, Path("jobs/slides.yaml")).table.name == "tiles"
    with pytest.raises(ConfigError, match="did you mean 'tile_px'"):
        config.load(SlidesJob, Path("jobs/slides.yaml"), ["grids=[{mpp: 0.5, tile_p: 256}]"])
    with pytest.raises(ConfigError, match="twice"):
        config.load(SlidesJob, Path("jobs/slides.yaml"), ["grids=[{mpp: 0.5}, {mpp: 0.5, min_tissue_fraction: 0}]"])


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
    finer = plan(lab.job(grids=[{"mpp": 0.5, "tile_px": 64}]))
    assert (finer["grids"], finer["to_count_anew"], planned["to_count_anew"]) == (["0.5um/64px"], 1, 0)
    assert (finer["tiles_to_remove"], planned["tiles_to_remove"]) == (len(lab.tiles()), 0)
    assert finer["tiles_counted_anew"] == pytest.approx(4 * len(lab.tiles()), rel=0.5)
    # Another folder beside the first is another source, which would write the same slides' rows in turn.
    places = {"uri": [str(lab.folder), str(lab.db)], "suffixes": [".svs", ".lance", ".txn"]}
    with pytest.raises(ConfigError, match=r"set slides\.name to it"):
        plan(lab.job(slides=places))
    assert plan(lab.job(slides=places | {"name": lab.job().slides.source}))["unchanged"] == 1
