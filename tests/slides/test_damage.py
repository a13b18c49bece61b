"""Damaged slides and files that are no slides: each is told by its reason, and what is sound is still read."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.slides import BadSlide, BadTile
from pipeline.slides.opening import open_slide
from schemas.slides import REASONS
from tests.slides.build import cut, drawn_textures, half_zero_tile, render, some_scene, write_ome, write_svs, write_tiff, zero_tile

SOUND, BROKEN = (256, 256), (768, 512)


@pytest.fixture(scope="session")
def image():
    """One drawn blob of 1280 x 1024 px: every stored tile of its middle has tissue."""
    textures = {"dense": drawn_textures()["dense"]}
    return render(some_scene(["dense"], width_um=640, height_um=512), textures, mpp=0.5).image


@pytest.fixture(scope="session")
def whole(image, tmp_path_factory):
    """The image as SVS."""
    return write_svs(tmp_path_factory.mktemp("whole") / "slide.svs", image)


@pytest.fixture
def svs(whole, tmp_path):
    """A copy that may be damaged."""
    return shutil.copy(whole, tmp_path / "slide.svs")


def refused(path, reason):
    with pytest.raises(BadSlide) as raised:
        open_slide(str(path))
    assert raised.value.reason == reason
    assert reason in REASONS
    assert raised.value.detail
    return raised.value.detail


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("damage", [zero_tile, half_zero_tile])
@pytest.mark.parametrize("write", [write_svs, write_tiff, write_ome])
def test_a_damaged_tile_costs_only_itself(tmp_path, image, write, damage, fast):
    """Also by OpenSlide, whose handle is dead after an error."""
    path = write(tmp_path / "slide.tiff", image)
    before = open_slide(str(path)).read(SOUND, level=0, size=(256, 256))
    damage(path, BROKEN)
    slide = open_slide(str(path), fast=fast)
    assert slide.info.reader.startswith("tiled-jpeg" if fast else "openslide")
    for _ in range(2):
        with pytest.raises(BadTile):
            slide.read(BROKEN, level=0, size=(256, 256))
        with pytest.raises(BadTile):
            slide.read((BROKEN[0] - 100, BROKEN[1] - 100), level=0, size=(256, 256))
        assert np.array_equal(slide.read(SOUND, level=0, size=(256, 256)), before)


def test_a_tile_that_comes_damaged_once_is_read_again(whole):
    """What a store or a network disk garbled once was written down as damage of the slide, for every later run."""

    class Garbled:
        def __init__(self, ranges, times):
            self.ranges, self.times, self.size = ranges, times, ranges.size

        def read(self, offset, length):
            self.times -= 1
            return self.ranges.read(offset, length) if self.times < 0 else bytes([self.times]) * length

    expected = open_slide(str(whole)).read(SOUND, level=0, size=(256, 256))
    slide = open_slide(str(whole))
    slide._ranges = Garbled(slide._ranges, times=1)
    slide._kept = type(slide._kept)(4, 256 * 256 * 3)
    assert np.array_equal(slide.read(SOUND, level=0, size=(256, 256)), expected)
    slide._ranges.times = 2
    with pytest.raises(BadTile):
        slide.read((SOUND[0] + 512, SOUND[1]), level=0, size=(256, 256))


def test_a_slide_of_nothing_but_damaged_tiles_says_that_nothing_was_compared(tmp_path, image):
    path = write_svs(tmp_path / "slide.svs", image[:300, :500], downsamples=())
    for place in ((0, 0), (256, 0), (0, 256), (256, 256)):
        zero_tile(path, place)
    slide = open_slide(str(path))
    assert "to be compared" in slide.info.notes[-1]
    with pytest.raises(BadTile):
        slide.read((0, 0), level=0, size=(10, 10))


def test_what_is_left_of_a_cut_file_is_read(svs, whole):
    cut(svs)
    slide = open_slide(str(svs))
    assert "may be damaged" in slide.info.notes[0]
    assert "of 20 stored tiles of level 0 are not in it" in slide.info.notes[1]
    assert (slide.info.width, slide.info.height, slide.info.mpp, slide.info.mpp_source) == (1280, 1024, 0.5, "aperio.MPP")
    sound = open_slide(str(whole))
    assert np.array_equal(slide.read((0, 0), level=0, size=(700, 500)), sound.read((0, 0), level=0, size=(700, 500)))
    with pytest.raises(BadTile, match="the file ends before it"):
        slide.read((1024, 768), level=0, size=(256, 256))


@pytest.mark.parametrize("share", [0.00001, 0.0001, 0.001, 0.01])
def test_a_file_cut_to_almost_nothing_is_unreadable_or_no_slide(svs, share):
    cut(svs, share)
    with pytest.raises(BadSlide) as raised:
        slide = open_slide(str(svs))
        with pytest.raises(BadTile):  # its directories may just be there
            slide.read(SOUND, level=0, size=(256, 256))
        raise BadSlide("unreadable")
    assert raised.value.reason in ("unreadable", "unsupported")


def test_files_that_are_no_slides_say_so(tmp_path, image):
    (tmp_path / "empty.svs").touch()
    assert "no bytes" in refused(tmp_path / "empty.svs", "empty")
    assert "does not exist" in refused(tmp_path / "gone.svs", "missing")
    (tmp_path / "text.svs").write_text("not a slide")
    assert "not a sl" in refused(tmp_path / "text.svs", "unsupported")
    Image.fromarray(image).save(tmp_path / "photo.jpg")
    (tmp_path / "photo.jpg").rename(tmp_path / "photo.svs")
    refused(tmp_path / "photo.svs", "unsupported")
    Image.fromarray(image).save(tmp_path / "flat.tiff")
    assert "vips" in refused(tmp_path / "flat.tiff", "unsupported")
    (tmp_path / "folder").mkdir()
    assert "DICOM" in refused(tmp_path / "folder", "unsupported")
    (tmp_path / "random.svs").write_bytes(b"II*\0" + np.random.default_rng(0).bytes(5000))
    assert refused(tmp_path / "random.svs", "unsupported")


def test_a_slide_may_have_another_suffix(svs):
    assert open_slide(str(svs.rename(svs.with_suffix(".jpg")))).info.vendor == "aperio"


def test_a_mirax_slide_without_its_folder_names_the_folder(tmp_path):
    (tmp_path / "x.mrxs").write_bytes(b"\xff\xd8\xff")
    assert "x/" in refused(tmp_path / "x.mrxs", "missing")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "Slidedat.ini").write_text("[GENERAL]\n")
    refused(tmp_path / "x.mrxs", "unreadable")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_slide_that_may_not_be_read_is_missing(svs):
    svs.chmod(0)
    refused(svs, "missing")


def test_a_disk_that_fails_is_no_slides_fault(svs, monkeypatch):
    """A network disk that was away for a moment made `missing` slides, which no later run looked at again."""

    def stale(self, *rest, **more):
        raise OSError(errno.ESTALE, "Stale file handle", str(self))

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(OSError, match="Stale"):
        open_slide(str(svs))


def test_jpeg_2000_in_a_generic_tiff_is_unsupported(tmp_path, image):
    """OpenSlide refuses it."""
    pytest.importorskip("imagecodecs")
    assert "ompression" in refused(write_tiff(tmp_path / "j2k.tiff", image, compression="jpeg2000"), "unsupported")


@pytest.mark.parametrize("fast", [True, False])
def test_a_slide_that_is_overwritten_while_it_is_open_is_not_believed(svs, image, fast):
    slide = open_slide(str(svs), fast=fast)
    slide.read((0, 0), level=0, size=(256, 256))
    write_svs(svs, image[::-1].copy())
    with pytest.raises(BadTile, match="changed"):
        slide.read((512, 512), level=0, size=(256, 256))


def test_a_sound_tile_is_read_while_other_threads_meet_a_damaged_one(svs):
    from concurrent.futures import ThreadPoolExecutor

    expected = open_slide(str(svs)).read(SOUND, level=0, size=(256, 256))
    zero_tile(svs, BROKEN)
    slide = open_slide(str(svs), fast=False)

    def read(place):
        try:
            return slide.read(place, level=0, size=(256, 256))
        except BadTile:
            return None

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, [SOUND, BROKEN] * 20))
    assert all(np.array_equal(pixels, expected) for pixels in found[::2])
    assert all(pixels is None for pixels in found[1::2])


@pytest.mark.parametrize("write", [write_svs, write_tiff, write_ome])
def test_bytes_overwritten_at_random_give_a_bad_slide_or_a_bad_tile_and_nothing_else(tmp_path, image, write):
    """Mostly in the directories, where a wrong number may ask for gigabytes, or for a tile of no width."""
    path = write(tmp_path / "slide.tiff", image[:512, :512])
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        starts = [0, *(page.offset for page in tiff.pages)]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        damaged = bytearray(whole)
        for _ in range(4):
            at = int(rng.choice(starts) + rng.integers(400)) if rng.random() < 0.8 else int(rng.integers(len(whole)))
            damaged[min(at, len(whole) - 1)] = int(rng.choice([0, 1, 255, rng.integers(256)]))
        path.write_bytes(damaged)
        with contextlib.suppress(BadSlide, BadTile):
            slide = open_slide(str(path))
            for level in range(len(slide.info.levels)):
                assert slide.read((0, 0), level=level, size=(300, 200)).shape == (200, 300, 4)
