"""The fingerprint of a slide's content: the same wherever the file is, another one when the file is another."""

import shutil

import numpy as np
import pytest

from pipeline.slides.opening import open_slide
from tests.slides.build import write_ome, write_svs, write_tiff

IMAGE = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)


def fingerprint(path):
    return open_slide(str(path)).info.content_fp


@pytest.mark.parametrize("write", [write_svs, write_tiff, write_ome])
def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path, write):
    path = write(tmp_path / "a.tiff", IMAGE)
    before = fingerprint(path)
    (tmp_path / "deep").mkdir()
    assert fingerprint(shutil.copy(path, tmp_path / "deep" / "b.tif")) == before
    assert open_slide(str(path), fast=False).info.content_fp == before
    changed = IMAGE.copy()
    changed[300:, 300:] //= 2
    assert fingerprint(write(path, changed)) != before
    assert fingerprint(write(path, IMAGE, mpp=0.25)) != before


def test_one_pixel_more_in_one_tile_of_level_0_is_another_slide(tmp_path):
    """Its length in bytes gives it away."""
    changed = IMAGE.copy()
    changed[:64, :64] = 255
    assert fingerprint(write_svs(tmp_path / "a.svs", IMAGE)) != fingerprint(write_svs(tmp_path / "b.svs", changed))
