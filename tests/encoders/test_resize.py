"""Resize: the pixels of open_clip's own transform, from torch."""

from dataclasses import asdict

import numpy as np
import pytest
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from pipeline.encoders.resize import Resize

SHAPES = [(600, 400), (401, 777), (224, 300), (100, 53), (2000, 31), (300, 1500), (1080, 1920), (1, 1), (64, 64)]  # width, height


@pytest.fixture(scope="module")
def photo():
    """Detail of all sizes, as a photograph has: noise that is smooth at eight scales."""
    rng = np.random.default_rng(0)
    layers = [
        Image.fromarray(rng.integers(0, 256, (2**k, 2**k, 3), dtype=np.uint8)).resize((512, 512), Image.Resampling.BICUBIC) for k in range(2, 10)
    ]
    return Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8))


@pytest.mark.parametrize("size", [64, (96, 48)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_open_clips(photo, size, mode, interpolation):
    config = PreprocessCfg(size=size, resize_mode=mode, interpolation=interpolation, fill_color=114, mean=(0, 0, 0), std=(1, 1, 1))
    theirs, ours = image_transform_v2(config, is_train=False), Resize.of(asdict(config))
    for shape in SHAPES:
        image = photo.resize(shape)
        wanted = theirs(image).permute(1, 2, 0).numpy() * 255
        found = ours(np.asarray(image))
        assert found.dtype == np.uint8 and found.shape == wanted.shape
        assert np.abs(found - wanted).mean() <= 0.05, f"{shape}: {np.abs(found - wanted).mean()}"


def test_random_sizes_are_rounded_as_open_clip_rounds_them():
    rng = np.random.default_rng(1)
    for mode in ("shortest", "longest", "squash"):
        config = PreprocessCfg(size=40, resize_mode=mode, mean=(0, 0, 0), std=(1, 1, 1))
        theirs, ours = image_transform_v2(config, is_train=False), Resize.of(asdict(config))
        for _ in range(60):
            image = rng.integers(0, 256, (*rng.integers(5, 300, 2), 3), dtype=np.uint8)
            wanted = theirs(Image.fromarray(image)).permute(1, 2, 0).numpy() * 255
            assert np.abs(ours(image) - wanted).mean() <= 0.05, f"{mode} {image.shape}"


def test_a_prepared_image_comes_back_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (100, 60, 3), dtype=np.uint8)
    for mode in ("shortest", "longest", "squash"):
        resize = Resize(32, 32, mode)
        assert (resize(resize(image)) == resize(image)).all()


def test_read_only_pixels_are_taken_and_left_alone():
    image = np.random.default_rng(0).integers(0, 256, (100, 60, 3), dtype=np.uint8)
    copy = image.copy()
    image.flags.writeable = False
    Resize(32, 32)(image)
    assert (image == copy).all()


def test_an_image_of_extreme_shape_costs_what_its_middle_costs():
    """1 x 65,500 px were scaled to 224 x 14,672,000 (9.9 GB), and cropped then."""
    column = np.random.default_rng(0).integers(0, 256, (65_500, 1, 3), dtype=np.uint8)
    resize = Resize(224, 224)
    found = resize(column)
    # A pixel becomes 224 rows, and the middle of the image is the border between its two middle pixels.
    weights_of_two = resize(column[65_500 // 2 - 8 : 65_500 // 2 + 8])
    np.testing.assert_array_equal(found, weights_of_two)
    np.testing.assert_array_equal(resize(column.swapaxes(0, 1)), found.swapaxes(0, 1))


@pytest.mark.parametrize("shape", [(3001, 10), (10, 3000), (31, 4000), (2, 4097)])
def test_what_is_cut_off_beforehand_is_not_missed(photo, shape):
    config = PreprocessCfg(size=64, mean=(0, 0, 0), std=(1, 1, 1))
    theirs, ours = image_transform_v2(config, is_train=False), Resize.of(asdict(config))
    image = photo.resize(shape)
    found, wanted = ours(np.asarray(image)), theirs(image).permute(1, 2, 0).numpy() * 255
    assert np.abs(found - wanted).mean() <= 0.5
