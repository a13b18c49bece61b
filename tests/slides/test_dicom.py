"""DICOM whole slides: OpenSlide reads them; the files of a folder are one slide."""

import shutil

import fsspec
import numpy as np
import pytest

from pipeline.slides import BadSlide, BadTile
from pipeline.slides.cache import SlideCache
from pipeline.slides.dicom import series_of
from pipeline.slides.opening import open_slide
from tests.slides.build import drawn_textures, render, some_scene
from tests.slides.dicom import write_dicom

pydicom = pytest.importorskip("pydicom")


@pytest.fixture(scope="module")
def image():
    """A drawn blob, 1024 x 768 px."""
    textures = {"dense": drawn_textures()["dense"]}
    return render(some_scene(["dense"], width_um=512, height_um=384), textures, mpp=0.5).image


@pytest.fixture(scope="module")
def series(image, tmp_path_factory):
    """The image as a series of two levels."""
    return write_dicom(tmp_path_factory.mktemp("dicom") / "series", image)


def test_a_dicom_slide_is_read_by_any_of_its_files_or_its_folder(series, image):
    for place in (series, series / "level-0.dcm", series / "level-1.dcm"):
        slide = open_slide(str(place))
        info = slide.info
        assert (info.vendor, info.width, info.height, info.objective, info.tile_width) == ("dicom", 1024, 768, 20, 256)
        assert [(level.width, level.height, level.downsample) for level in info.levels] == [(1024, 768, 1), (256, 192, 4)]
        assert (info.mpp, info.mpp_source) == (pytest.approx(0.5), "openslide")
        pixels = slide.read((200, 150), level=0, size=(300, 300))
        assert (pixels[..., 3] == 255).all()
        assert np.abs(pixels[..., :3].astype(int) - image[150:450, 200:500]).mean() < 4  # JPEG
    assert open_slide(str(series)).info.content_fp == open_slide(str(series / "level-1.dcm")).info.content_fp


def test_a_folder_of_two_slides_is_refused_by_name(series, image, tmp_path):
    """One of them was silently left out."""
    folder = tmp_path / "study"
    shutil.copytree(series, folder)
    other = write_dicom(tmp_path / "other", image[::-1].copy())
    (other / "level-0.dcm").rename(folder / "second-0.dcm")
    with pytest.raises(BadSlide, match=r"2 slides \(DICOM series\), e\.g\. level-0\.dcm and second-0\.dcm; put those of each") as refused:
        open_slide(str(folder))
    assert refused.value.reason == "unsupported"
    assert open_slide(str(folder / "second-0.dcm")).info.levels[0].width == 1024, "by its file it is meant"
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/study", recursive=True)
    with pytest.raises(BadSlide, match="2 slides"):
        open_slide("memory://study", cache=SlideCache(tmp_path / "cache", max_bytes=10**8))


def test_other_dicom_objects_beside_a_slide_do_no_harm(series, tmp_path):
    """A report comes first by name, and has a series of its own; its sequences have no stated length."""
    folder = tmp_path / "with-report"
    shutil.copytree(series, folder)
    report = pydicom.dcmread(folder / "level-0.dcm", stop_before_pixels=True)
    item = pydicom.Dataset()
    item.SeriesInstanceUID, item.is_undefined_length_sequence_item = "1.2.3", True
    report.ReferencedSeriesSequence = [item]
    report["ReferencedSeriesSequence"].is_undefined_length = True
    report.SeriesInstanceUID = "1.2.4"
    report.save_as(folder / "a-slide.dcm", enforce_file_format=True)
    assert series_of(folder / "a-slide.dcm") == "1.2.4"
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.22"
    (folder / "a-slide.dcm").unlink()
    report.save_as(folder / "a-report.dcm", enforce_file_format=True)
    (folder / "cut.dcm").write_bytes((folder / "level-0.dcm").read_bytes()[:300])
    (folder / "text.dcm").write_text("no DICOM")
    assert [series_of(folder / name) for name in ("a-report.dcm", "cut.dcm", "text.dcm")] == [None] * 3
    assert series_of(folder / "level-0.dcm") == series_of(folder / "level-1.dcm") == str(pydicom.dcmread(folder / "level-1.dcm").SeriesInstanceUID)
    assert open_slide(str(folder)).info.width == 1024


def test_a_damaged_frame_of_a_dicom_slide_is_a_bad_tile(series, image, tmp_path):
    folder = write_dicom(tmp_path / "damaged", image)
    file = folder / "level-0.dcm"
    data = bytearray(file.read_bytes())
    frames = [at for at in range(len(data) - 3) if data[at : at + 3] == b"\xff\xd8\xff"]
    start, end = frames[5], frames[6]
    data[start : end - 8] = bytes(end - 8 - start)
    file.write_bytes(data)
    slide = open_slide(str(folder))
    with pytest.raises(BadTile):
        slide.read((256, 256), level=0, size=(256, 256))
    assert slide.read((0, 0), level=0, size=(256, 256)).any()


def test_a_cut_dicom_file_is_refused_or_its_frames_are_bad(series, tmp_path, image):
    folder = write_dicom(tmp_path / "cut", image, downsamples=())
    file = folder / "level-0.dcm"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises((BadSlide, BadTile)):
        open_slide(str(folder)).read((768, 512), level=0, size=(256, 256))


def test_a_dicom_series_in_a_store_is_copied_whole(series, tmp_path, s3_server):
    client, options = s3_server
    client.create_bucket(Bucket="dicom")
    for file in series.iterdir():
        client.upload_file(str(file), "dicom", f"case/{file.name}")
    cache = SlideCache(tmp_path / "cache", max_bytes=10**8)
    for place in ("s3://dicom/case", "s3://dicom/case/level-1.dcm"):
        slide = open_slide(place, storage_options=options, cache=cache)
        local = open_slide(str(series))
        assert slide.info.content_fp == local.info.content_fp
        assert np.array_equal(slide.read((9, 9), level=0, size=(64, 64)), local.read((9, 9), level=0, size=(64, 64)))
        slide.close()
