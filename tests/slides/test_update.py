"""A table of tiles that is kept current: slides that are new, replaced, moved, copied and deleted, and settings that change."""

import os
import shutil

import numpy as np
import pytest

from jobs.slides import plan, run
from pipeline.config import JobFailed
from tests.slides.build import write_tiff, zero_tile
from tests.slides.runs import Lab, canvas, vectors, write

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path / "slides", tmp_path / "db")


def test_new_replaced_moved_and_deleted_slides_cost_what_they_must(lab):
    for seed, name in enumerate(["stays", "replaced", "moved", "deleted"]):
        write(lab.folder / f"{name}.svs", seed)
    first = lab.run()
    before = {name: lab.tiles(f"{name}.svs") for name in ("stays", "replaced", "moved", "deleted")}
    write(lab.folder / "replaced.svs", 11)
    (lab.folder / "sub").mkdir()
    (lab.folder / "moved.svs").rename(lab.folder / "sub" / "renamed.svs")
    (lab.folder / "deleted.svs").unlink()
    write(lab.folder / "new.svs", 12)

    report = lab.run()
    assert (first.ok, report.unchanged, report.ok) == (4, 1, 3)
    assert (report.opened, report.moved, report.deleted) == (3, 1, 1)
    assert lab.statuses() == dict.fromkeys(("stays.svs", "replaced.svs", "sub/renamed.svs", "new.svs"), ("ok", None)) | {
        "deleted.svs": ("deleted", None)
    }
    after = lab.tiles()
    new, replaced = lab.tiles("new.svs"), lab.tiles("replaced.svs")
    assert report.tiles.written == len(new) + len(replaced), "only what is new may be embedded"
    assert not set(before["replaced"]) & set(after), "the old tiles of a replaced slide are gone"
    renamed = lab.tiles("sub/renamed.svs")
    assert set(renamed) == set(before["moved"])
    np.testing.assert_array_equal(vectors(renamed), vectors(before["moved"]))
    assert {row["_unit"] for row in renamed.values()} == {str(lab.folder / "sub" / "renamed.svs")}
    assert all(row["uri"].startswith(row["_unit"] + "#xywh=") for row in after.values())
    assert lab.tiles("deleted.svs") == before["deleted"], "a tombstone keeps its tiles"
    assert lab.tiles("stays.svs") == before["stays"]
    assert report.tiles.vanished == len(before["deleted"])

    again = lab.run()
    assert (again.opened, again.unchanged, again.tiles.commits) == (0, 4, 0)
    report = lab.run(sync={"vanished": "delete"})
    assert report.tiles.deleted == len(before["deleted"])
    assert not set(before["deleted"]) & set(lab.tiles())
    assert lab.statuses()["deleted.svs"] == ("deleted", None)


def test_slides_that_change_places_keep_their_vectors(lab):
    a, b = (write(lab.folder / f"{name}.svs", seed) for seed, name in enumerate("ab"))
    lab.run()
    before = {name: lab.tiles(f"{name}.svs") for name in "ab"}
    os.rename(a, lab.folder / "x")
    os.rename(b, a)
    os.rename(lab.folder / "x", b)
    report = lab.run()
    assert (report.ok, report.tiles.written, report.removed) == (2, 0, 0)
    after = {name: lab.tiles(f"{name}.svs") for name in "ab"}
    assert (set(after["a"]), set(after["b"])) == (set(before["b"]), set(before["a"]))
    np.testing.assert_array_equal(vectors(after["a"]), vectors(before["b"]))
    assert lab.run().tiles.commits == 0


def test_copies_of_a_slide_are_embedded_once_and_take_over_when_it_goes(lab):
    a = write(lab.folder / "a.svs")
    (lab.folder / "copies").mkdir()
    shutil.copy(a, lab.folder / "copies" / "a.svs")
    report = lab.run()
    assert (report.ok, report.duplicate) == (1, 1)
    assert lab.statuses() == {"a.svs": ("ok", None), "copies/a.svs": ("duplicate", None)}
    assert lab.slides()["copies/a.svs"]["duplicate_of"] == str(a)
    before = lab.tiles("a.svs")
    assert lab.run().unchanged == 2
    a.unlink()
    report = lab.run()
    assert (report.opened, report.ok, report.tiles.written, report.revised) == (0, 1, 0, len(before))
    assert lab.statuses() == {"copies/a.svs": ("ok", None)}
    assert set(lab.tiles("copies/a.svs")) == set(before)


def test_a_changed_threshold_opens_no_slide_and_touches_only_the_tiles_it_is_about(lab):
    write(lab.folder / "a.svs")
    lab.run(grids=[{"mpp": 0.5, "tile_px": 128, "min_tissue_fraction": 0.25}])
    before = lab.tiles()
    report = lab.run(grids=[{"mpp": 0.5, "tile_px": 128, "min_tissue_fraction": 0.75}])
    kept = {item: row for item, row in before.items() if row["tissue_fraction"] >= 0.75}
    assert 0 < len(kept) < len(before)
    assert (report.opened, report.tiles.written, report.revised, report.removed) == (0, 0, 0, len(before) - len(kept))
    assert lab.tiles() == kept
    report = lab.run(grids=[{"mpp": 0.5, "tile_px": 128, "min_tissue_fraction": 0.25}])
    assert (report.opened, report.tiles.written, report.tiles.unchanged) == (0, len(before) - len(kept), len(kept))
    after = lab.tiles()
    assert set(after) == set(before)
    np.testing.assert_array_equal(vectors(after), vectors(before))
    assert lab.slides()["a.svs"]["tiles"] == len(before)


def test_another_mask_embeds_what_it_adds_and_rewrites_the_shares_of_the_rest(lab):
    write(lab.folder / "a.svs")
    lab.run()
    before = lab.tiles()
    pale = {"mask": {"target": "pipeline.slides.tissue:Saturation", "args": {"threshold": 60}}}
    report = lab.run(survey=pale)
    after = lab.tiles()
    both = set(before) & set(after)
    assert both
    assert report.tiles.written == len(set(after) - set(before))
    assert report.removed == len(set(before) - set(after))
    changed = {item for item in both if after[item]["tissue_fraction"] != before[item]["tissue_fraction"]}
    assert report.revised >= len(changed) > 0
    for item in both:
        assert after[item]["vector"] == before[item]["vector"]
        assert after[item]["_run"] == before[item]["_run"]
    fresh = Lab(lab.folder, lab.db, name="fresh")
    fresh.run(survey=pale)
    assert {item: row["tissue_fraction"] for item, row in fresh.tiles().items()} == {item: row["tissue_fraction"] for item, row in after.items()}


def test_metadata_is_joined_by_path_and_corrected_without_embedding(lab, tmp_path):
    write(lab.folder / "a" / "x.svs", 1)
    write(lab.folder / "b" / "x.svs", 2)
    table = tmp_path / "cases.csv"
    settings = {"metadata": {"uri": str(table), "columns": {"patient_id": "string", "age": "int32"}, "mpp": "um"}}
    table.write_text("slide,patient_id,age,um\na/x.svs,007,61,\nb/x.svs,008,,\nc/x.svs,009,1,\n")
    report = lab.run(slides=settings)
    assert report.unmatched == ["c/x.svs"]
    assert {(row["patient_id"], row["age"]) for row in lab.tiles("a/x.svs").values()} == {("007", 61)}
    assert {(row["patient_id"], row["age"]) for row in lab.tiles("b/x.svs").values()} == {("008", None)}
    table.write_text("slide,patient_id,age,um\na/x.svs,017,61,\nb/x.svs,008,,0.25\n")
    report = lab.run(slides=settings)
    assert {row["patient_id"] for row in lab.tiles("a/x.svs").values()} == {"017"}
    assert (report.opened, report.unchanged) == (1, 0), "the stated mpp of b needs another look, the patient of a needs none"
    assert report.revised == len(lab.tiles("a/x.svs"))
    b = lab.slides()["b/x.svs"]
    assert (b["mpp"], b["mpp_source"]) == (0.25, "user")
    assert {row["footprint_l0"] for row in lab.tiles("b/x.svs").values()} == {256}


def test_several_grids_come_in_one_run_and_name_their_parents(lab):
    write(lab.folder / "a.svs", mpp=0.25)
    grids = [{"mpp": 0.5, "tile_px": 64}, {"mpp": 1.0, "tile_px": 64}, {"mpp": 0.25, "tile_px": 64, "overlap_px": 16}]
    lab.run(grids=grids, sync={"whole": False}, compute={"chunk_rows": 50})
    tiles = lab.tiles()
    assert lab.slides()["a.svs"]["tiles"] == len(tiles) > 100
    assert {row["grid"] for row in tiles.values()} == {"0.5um/64px", "1um/64px", "0.25um/64px/overlap16"}
    linked = 0
    for row in tiles.values():
        if row["parent_id"] is None:
            continue
        parent = tiles[row["parent_id"]]
        linked += 1
        centre_x, centre_y = row["x"] + row["footprint_l0"] / 2, row["y"] + row["footprint_l0"] / 2
        assert parent["mpp"] == row["mpp"] * 2
        assert parent["x"] <= centre_x <= parent["x"] + parent["footprint_l0"]
        assert parent["y"] <= centre_y <= parent["y"] + parent["footprint_l0"]
    assert linked > len(tiles) / 2
    report = lab.run(grids=grids[:2])
    assert (report.opened, report.tiles.written) == (0, 0)
    assert {row["grid"] for row in lab.tiles().values()} == {"0.5um/64px", "1um/64px"}


def test_a_folder_that_was_away_for_one_run_is_settled_when_it_is_back(lab):
    """Its slides were surveyed again, their tiles found complete by the note on them, and nothing ever took the status `surveyed` away."""
    write(lab.folder / "stays.svs", 1)
    write(lab.folder / "away" / "whole.svs", 2)
    zero_tile(write(lab.folder / "away" / "damaged.svs", 3), (300, 380))
    lab.run()
    before = lab.slides()
    (lab.folder / "away").rename(lab.folder.parent / "elsewhere")
    lab.run()
    assert lab.statuses()["away/whole.svs"] == ("deleted", None)
    (lab.folder.parent / "elsewhere").rename(lab.folder / "away")
    report = lab.run()
    assert (report.ok, report.partial, report.surveyed, report.tiles.commits) == (1, 1, 0, 0)
    assert lab.statuses() == {"stays.svs": ("ok", None), "away/whole.svs": ("ok", None), "away/damaged.svs": ("partial", "bad_tiles")}
    for slide_id, row in lab.slides().items():
        assert {name: row[name] for name in ("embedded", "rejected", "bad_tiles")} == {
            name: before[slide_id][name] for name in ("embedded", "rejected", "bad_tiles")
        }
    assert plan(lab.job())["to_finish"] == 0


def test_a_mask_that_finds_nothing_and_a_scale_that_is_left_out_take_no_tiles_away(lab):
    """One wrong setting deleted every tile of the table, without a word."""
    lab.folder.mkdir()
    write_tiff(lab.folder / "a.tiff", canvas(1).image, mpp=None)
    write_tiff(lab.folder / "b.tiff", canvas(2).image, mpp=None)
    lab.run(slides={"mpp": 0.5})
    before = lab.tiles()
    assert lab.run().needs_mpp == 2
    assert lab.tiles() == before
    back = lab.run(slides={"mpp": 0.5})
    assert (back.ok, back.tiles.written, back.tiles.commits, lab.tiles()) == (2, 0, 0, before)
    wrong = {"slides": {"mpp": 0.5}, "survey": {"mask": {"target": "pipeline.slides.tissue:Saturation", "args": {"threshold": 254}}}}
    for _ in range(2):
        with pytest.raises(JobFailed, match=r"no tissue is found on their 2 slides any more.*raise sync\.max_vanished"):
            run(lab.job(**wrong))
        assert lab.tiles() == before
    meant = lab.run(**wrong, sync={"max_vanished": 1})
    assert (meant.status, meant.removed, lab.tiles()) == ("done", len(before), {})
