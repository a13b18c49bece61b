"""Where microns per pixel come from, in which order, and what is not believed."""

import math

import numpy as np
import pytest
import tifffile

from pipeline.slides.job import list_slides
from pipeline.slides.mpp import settle
from pipeline.slides.opening import open_slide
from pipeline.slides.survey import survey
from tests.slides import runs
from tests.slides.build import write_ome, write_svs, write_tiff

IMAGE = np.full((256, 256, 3), 200, np.uint8)


def opened(path, *, mpp=None):
    info = open_slide(str(path), mpp=mpp).info
    assert open_slide(str(path), mpp=mpp, fast=False).info.mpp_source in (info.mpp_source, None)
    return info


@pytest.mark.parametrize("mpp", [0.2204, 0.25, 0.2999, 0.3001, 0.4603, 0.5])
def test_every_format_gives_its_scanners_mpp(tmp_path, mpp):
    for write, source in ((write_svs, "openslide"), (write_tiff, "tiff"), (write_ome, "ome.PhysicalSize")):
        info = opened(write(tmp_path / f"{source}.tiff", IMAGE, mpp=mpp, downsamples=()))
        assert (info.mpp_x, info.mpp_y) == (pytest.approx(mpp, rel=1e-4),) * 2
        assert (info.mpp_source, info.mpp_flags) == (source, ())


def test_ome_sizes_are_in_their_unit(tmp_path):
    for unit in ("µm", "nm", "mm"):
        assert opened(write_ome(tmp_path / "x.ome.tiff", IMAGE, mpp=0.25, unit=unit, downsamples=())).mpp == pytest.approx(0.25)


@pytest.mark.parametrize("dpi", [72, 96, 300])
def test_a_density_for_printers_is_no_mpp(tmp_path, dpi):
    info = opened(write_tiff(tmp_path / "x.tiff", IMAGE, dpi=dpi, downsamples=()))
    assert (info.mpp, info.mpp_source, info.mpp_flags) == (None, None, ("implausible",))
    assert "no scanner has" in " ".join(info.notes)


def test_a_slide_that_does_not_say_has_none(tmp_path):
    info = opened(write_tiff(tmp_path / "x.tiff", IMAGE, mpp=None, downsamples=()))
    assert (info.mpp, info.mpp_x, info.mpp_source, info.mpp_flags) == (None, None, None, ())
    assert opened(write_ome(tmp_path / "x.ome.tiff", IMAGE, mpp=None, downsamples=())).mpp is None
    assert opened(write_svs(tmp_path / "x.svs", IMAGE, mpp=None, power=None, downsamples=())).mpp is None


def test_the_objective_is_an_estimate_and_comes_last(tmp_path):
    info = opened(write_svs(tmp_path / "x.svs", IMAGE, mpp=None, power=40, downsamples=()))
    assert (info.mpp, info.mpp_source, info.objective) == (0.25, "objective", 40)
    assert "estimated" in " ".join(info.notes)
    assert opened(write_svs(tmp_path / "y.svs", IMAGE, mpp=0.2204, power=40, downsamples=())).mpp == pytest.approx(0.2204)


def test_px_that_are_not_square_are_flagged_and_their_mean_is_used(tmp_path):
    info = opened(write_tiff(tmp_path / "x.tiff", IMAGE, mpp=(0.5, 0.6), downsamples=()))
    assert (info.mpp_x, info.mpp_y) == (pytest.approx(0.5), pytest.approx(0.6))
    assert info.mpp == pytest.approx(math.sqrt(0.3))
    assert info.mpp_flags == ("anisotropic",)
    assert opened(write_tiff(tmp_path / "y.tiff", IMAGE, mpp=(0.5, 0.505), downsamples=())).mpp_flags == ()


def test_the_users_value_wins_and_a_disagreement_is_said(tmp_path):
    path = write_svs(tmp_path / "x.svs", IMAGE, mpp=0.2514, downsamples=())
    info = opened(path, mpp=0.23)
    assert (info.mpp_x, info.mpp_y, info.mpp_source, info.mpp_flags) == (0.23, 0.23, "user", ("disagrees",))
    assert "0.2514" in " ".join(info.notes)
    assert opened(path, mpp=0.25).mpp_flags == ()  # by less than 1 %
    nothing = opened(write_tiff(tmp_path / "y.tiff", IMAGE, dpi=72, downsamples=()), mpp=0.25)
    assert (nothing.mpp, nothing.mpp_source, nothing.mpp_flags) == (0.25, "user", ("implausible",))


def test_inches_and_centimetres_are_told_apart(tmp_path):
    path = tmp_path / "x.tiff"
    tifffile.imwrite(path, IMAGE, tile=(256, 256), photometric="rgb", resolution=(50800, 50800), resolutionunit="inch", metadata=None)
    assert opened(path).mpp == pytest.approx(0.5)


def test_the_first_believable_saying_counts():
    good, wild, other = ("aperio.MPP", 0.25, 0.25), ("openslide", 264.6, 264.6), ("tiff", 0.5, 0.5)
    assert settle([wild, good, other]).source == "aperio.MPP"
    assert settle([good, other]).flags == ()
    assert settle([], objective=2000).x is None
    assert settle([wild], objective=20).source == "objective"


def test_the_users_mpp_is_better_than_an_estimate_from_the_objective(tmp_path):
    """A slide that states its objective alone was read at ten over its power, whatever slides.mpp said."""
    lab = runs.Lab(tmp_path / "slides", tmp_path / "db")
    runs.write(lab.folder / "a.svs", said=None)
    for mpp, expected in [(None, (0.5, "objective")), (0.46, (0.46, "user"))]:
        work = list_slides(lab.job(slides={"mpp": mpp}))
        row = survey(work.inventory.slides[0], work.look, before=None)
        assert (row["mpp"], row["mpp_source"]) == expected
        assert any("estimated from the objective" in note for note in row["notes"])
        assert any("0.46 um/px that was given is used" in note for note in row["notes"]) == (mpp is not None)
