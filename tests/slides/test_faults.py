"""Slides with every fault that the field has met: each gets its status, and costs no other slide a tile."""

import numpy as np
import pytest

import pipeline.readers.slides
from pipeline.readers import UnitChanged
from pipeline.readers.slides import Tiles
from pipeline.slides.handles import Cache
from pipeline.slides.ledger import forget_slides, record_slides
from pipeline.table.stage import Staging
from schemas.slides import TILE
from tests.slides.build import Piece, Scene, cut, drawn_textures, half_zero_tile, render, write_svs, write_tiff, zero_tile
from tests.slides.runs import Lab, canvas, vectors, write

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path / "slides", tmp_path / "db")


def glass(path, *, pen=False):
    line = ((100.0, 60.0), (250.0, 300.0), (420.0, 80.0))
    scene = Scene(512, 384, (), pen=line if pen else (), pen_um=80)
    return write_svs(path, render(scene, drawn_textures(), mpp=0.5).image)


def test_every_fault_has_its_status_and_costs_no_other_slide_a_tile(lab):
    folder = lab.folder
    write(folder / "sound.svs", 1)
    write(folder / "zeroed.svs", 2)
    zero_tile(folder / "zeroed.svs", (300, 380))
    write(folder / "half.svs", 3)
    half_zero_tile(folder / "half.svs", (300, 380))
    write(folder / "short.svs", 4)
    cut(folder / "short.svs")
    (folder / "empty.svs").write_bytes(b"")
    (folder / "wrong.svs").write_text("a letter, not a slide")
    write(folder / "a" / "twin.svs", 5)
    write(folder / "b" / "twin.svs", 6)
    write_tiff(folder / "nompp.tiff", canvas(7).image, mpp=None)
    write(folder / "dense.svs", 8, mpp=1.0, said=1.0)
    write_tiff(folder / "dpi.tiff", canvas(9).image, mpp=None, dpi=72)
    write_tiff(folder / "square.tiff", canvas(10).image, mpp=(0.45, 0.5))
    cores = tuple(Piece("dense", 90.0 + 160 * i, 100.0 + 170 * j, 45.0) for i in range(3) for j in range(2))
    write_svs(folder / "array.svs", render(Scene(512, 384, cores), drawn_textures(), mpp=0.5).image)
    glass(folder / "blank.svs")
    glass(folder / "pen.svs", pen=True)

    report = lab.run()
    statuses = lab.statuses()
    assert (
        statuses["sound.svs"] == statuses["a/twin.svs"] == statuses["b/twin.svs"] == statuses["square.tiff"] == statuses["array.svs"] == ("ok", None)
    )
    assert statuses["zeroed.svs"] == statuses["half.svs"] == ("partial", "bad_tiles")
    assert statuses["empty.svs"] == ("failed", "empty")
    assert statuses["wrong.svs"][0] == "failed"
    assert statuses["nompp.tiff"] == statuses["dpi.tiff"] == ("needs_mpp", "no_mpp")
    assert statuses["dense.svs"] == ("failed", "too_coarse")
    assert statuses["blank.svs"] == ("no_tissue", "blank")
    assert statuses["pen.svs"] == ("no_tissue", "pen_only")
    assert statuses["short.svs"] == ("partial", "bad_tiles")
    assert report.tiles.rejects.keys() <= {"corrupt_tile"}

    slides = lab.slides()
    assert slides["square.tiff"]["mpp"] == pytest.approx(np.sqrt(0.45 * 0.5))
    assert slides["square.tiff"]["mpp_flags"] == ["anisotropic"]
    for name in ("zeroed.svs", "half.svs"):
        row = slides[name]
        assert row["rejected"] == 4, "a stored tile of 256 px is four of the grid's"
        assert len(row["bad_tiles"]) == 4
        assert row["embedded"] == len(lab.tiles(name)) == row["tiles"] - 4
    for tile in lab.tiles().values():
        assert tile["white_frac"] < 0.95
        assert tile["black_frac"] < 0.5
    assert len(lab.tiles("sound.svs")) == slides["sound.svs"]["tiles"] > 0
    assert len(lab.tiles("array.svs")) == slides["array.svs"]["tiles"] > 0

    again = lab.run()
    assert (again.opened, again.unchanged, again.tiles.commits) == (0, 15, 0)

    write(folder / "zeroed.svs", 2)  # the same slide, whole: its fingerprint is the same
    glass(folder / "sound.svs")
    lost = len(lab.tiles("sound.svs"))
    told = lab.run(slides={"mpp": 0.5})
    assert lab.statuses()["zeroed.svs"] == ("ok", None)
    assert (lab.statuses()["sound.svs"], lab.tiles("sound.svs"), told.removed) == (("no_tissue", "blank"), {}, lost)
    assert lab.statuses()["nompp.tiff"] == lab.statuses()["dpi.tiff"] == ("ok", None)
    assert told.tiles.written == 4 + sum(lab.slides()[name]["tiles"] for name in ("nompp.tiff", "dpi.tiff"))


def test_slides_that_end_their_workers_cost_themselves_only(lab):
    for seed in range(2):
        write(lab.folder / f"{seed}.svs", seed)
    image = canvas(3).image
    widths = {"kills": 512, "hangs": 640, "raises": 768}
    for name, px in widths.items():
        write_svs(lab.folder / f"{name}.svs", image[:, :px])
    # 16 px of a slide of 0.5 um/px are one px of its overview.
    mask = {"target": "tests.slides.faults:Deadly", "args": {name: px // 16 for name, px in widths.items()}}
    report = lab.run(survey={"mask": mask}, limits={"slide_timeout_s": 3})
    assert lab.statuses() == {
        "0.svs": ("ok", None),
        "1.svs": ("ok", None),
        "kills.svs": ("failed", "worker_died"),
        "hangs.svs": ("failed", "worker_died"),
        "raises.svs": ("failed", "mask_failed"),
    }
    assert len(report.bad) == 3


def test_what_fails_for_a_moment_is_not_held_against_the_slide(lab, tmp_path):
    """The slide was failed until the next run."""
    write(lab.folder / "a.svs")
    (tmp_path / "order").touch()
    report = lab.run(survey={"mask": {"target": "tests.slides.faults:Short", "args": {"order": str(tmp_path / "order")}}})
    assert not (tmp_path / "order").exists()
    assert (report.ok, lab.slides()["a.svs"]["attempts"]) == (1, 1)


def test_what_may_have_passed_is_looked_at_again(lab):
    """A store that failed for a moment in a survey, or a right that was not given yet, was held against the slide by every later run."""
    write(lab.folder / "a.svs")
    lab.run()
    row = lab.slides()["a.svs"]
    lost = dict.fromkeys(("content_fp", "reader", "tiling", "mask", "thumbnail", "contour", "tiles", "embedded", "rejected"))
    for reason, attempts, opened in [("error", 1, 1), ("missing", 7, 1), ("error", 7, 0), ("unsupported", 1, 0)]:
        record_slides(lab.at, [row | lost | {"status": "failed", "reason": reason, "attempts": attempts}])
        report = lab.run()
        assert (report.opened, report.ok, report.tiles.commits) == (opened, opened, 0), reason
        assert lab.statuses()["a.svs"] == (("ok", None) if opened else ("failed", reason))
        assert lab.slides()["a.svs"]["attempts"] == attempts + opened


def test_a_slide_that_is_replaced_while_it_is_read_is_never_mixed(lab, tmp_path):
    slide = write(lab.folder / "a.svs", 1)
    write(lab.folder / "b.svs", 2)
    other = write(tmp_path / "other.svs", 3)
    encoder = {"target": "tests.slides.faults:Replaces", "args": {"dim": 16, "file": str(slide), "by": str(other)}}
    report = lab.run(encoder=encoder, compute={"threads": 1, "chunk_rows": 10})
    assert report.status == "failed"
    assert lab.statuses() == {"a.svs": ("failed", "changed"), "b.svs": ("ok", None)}
    assert lab.tiles("a.svs") == {}
    assert Staging(lab.at).receipts() == [], "nothing that nobody will commit is kept"
    report = lab.run(encoder=encoder)
    assert (report.status, report.opened) == ("done", 1)
    assert lab.statuses()["a.svs"] == ("ok", None)
    fresh = Lab(lab.folder, lab.db, name="fresh")
    fresh.run()
    assert set(fresh.tiles()) == set(lab.tiles())
    np.testing.assert_array_equal(vectors(fresh.tiles()), vectors(lab.tiles()))


def test_a_slide_that_another_run_has_moved_or_surveyed_anew_fails_alone(lab, tmp_path, monkeypatch):
    """The run ended at it, whatever else it had in hand."""
    monkeypatch.setattr(pipeline.readers.slides, "ROWS_KEPT", 1)  # so that the driver reads the row when it commits, as with many slides
    slide, order = write(lab.folder / "a.svs", 1), tmp_path / "order"
    write(lab.folder / "b.svs", 2)
    encoder = {"target": "tests.slides.faults:Forgets", "args": {"order": str(order), "uri": str(slide), "table": str(lab.db)}}
    lab.run(encoder=encoder)
    before = lab.tiles("a.svs")
    finer = {"grids": [{"mpp": 0.5, "tile_px": 64}], "encoder": encoder}
    order.touch()
    report = lab.run(**finer)
    assert (report.status, report.ok, report.tiles.failed) == ("failed", 1, report.tiles.listed - report.tiles.written)
    assert "a.svs: it was surveyed anew" in report.tiles.errors[0]
    assert not order.exists()
    assert lab.tiles("a.svs") == before, "half of it is never there"
    assert lab.statuses() == {"b.svs": ("ok", None)}
    assert Staging(lab.at).receipts() == []
    report = lab.run(**finer)
    assert (report.status, report.opened, report.ok, report.removed) == ("done", 1, 1, len(before))
    assert len(lab.tiles("a.svs")) == lab.slides()["a.svs"]["tiles"]


def test_tiles_of_a_slide_that_was_surveyed_anew_are_told_from_those_that_were_planned(lab):
    write(lab.folder / "a.svs", 1)
    lab.run()
    row = lab.slides()["a.svs"]
    lost = dict.fromkeys(("content_fp", "white", "mpp", "tiling", "mask"))

    def planned():
        carried = {row["id"]: {}}
        return Tiles(lab.at, row["source"], grids=lab.job().grids, columns=TILE, carried=carried, cache=Cache())

    whole = planned()
    work = whole.split(whole.list())
    assert len(whole.tiles(row["id"], row["tiling"])) == row["tiles"]
    for change in (lambda: record_slides(lab.at, [row | lost]), lambda: forget_slides(lab.at, [row["id"]])):
        change()
        with pytest.raises(UnitChanged, match="surveyed anew"):
            list(planned().read(work))
        with pytest.raises(UnitChanged, match="surveyed anew"), planned().hold(work, lambda: None):
            pass
        with pytest.raises(UnitChanged, match="surveyed anew"):
            planned().confirm(work)
    assert whole.pixels(whole.tiles(row["id"], row["tiling"]).to_pylist()[0])[0].shape == (128, 128, 3), "what is under way goes on to its end"
