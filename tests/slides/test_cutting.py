"""Pixels at a physical size: on the slide's white, area-averaged, and damage costs only what is damaged."""

import numpy as np
import pytest

from pipeline.slides import BadTile
from pipeline.slides.cutting import on_white, overview, resized, tile_pixels
from pipeline.slides.opening import open_slide
from pipeline.tiles import Grid, WrongScale, cut_for
from tests.slides.arrays import ArraySlide
from tests.slides.build import drawn_textures, write_svs, zero_tile


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_transparent_pixels_become_white_and_never_black():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (100, 100, 100, 128)
    white = (240, 241, 242)
    found = on_white(rgba, white)
    assert found[0, 0].tolist() == [10, 20, 30]
    assert found[0, 1].tolist() == [round((100 * 128 + w * 127) / 255) for w in white]
    assert (found[1] == white).all()


def test_a_tile_past_the_edge_is_filled_with_the_slides_white():
    slide = ArraySlide(np.full((300, 300, 3), 90, np.uint8))
    tile = tile_pixels(slide, (256, 0), cut=cut_for(Grid(mpp=0.5), mpp=0.5, downsamples=[1.0, 4.0]), white=(240, 241, 242))
    assert tile.shape == (256, 256, 3)
    assert (tile[:, :44] == 90).all()
    assert (tile[:, 44:] == (240, 241, 242)).all()


def test_a_tile_that_is_finer_is_averaged_by_area():
    image = noise(1024, 1024)
    tile = tile_pixels(ArraySlide(image, mpp=0.25), (512, 512), cut=cut_for(Grid(mpp=0.5), mpp=0.25, downsamples=[1.0, 4.0]))
    expected = image[512:, 512:].reshape(256, 2, 256, 2, 3).mean(axis=(1, 3))
    assert np.abs(tile - expected).max() <= 0.5 + 1e-9


def test_fractional_shrinking_weights_cut_pixels_by_their_area():
    image = noise(37, 53, seed=1)
    found = resized(image, (20, 16))

    def weights(length, target):
        edges = np.linspace(0, length, target + 1)
        starts = np.arange(length)
        overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
        return overlap.clip(0) * target / length

    expected = np.einsum("ij,jkc,lk->ilc", weights(37, 16), image.astype(float), weights(53, 20))
    assert np.abs(found - expected).max() <= 0.51


def test_a_tile_of_stored_pixels_is_the_stored_pixels():
    image = noise(600, 600)
    tile = tile_pixels(ArraySlide(image), (256, 128), cut=cut_for(Grid(mpp=0.5), mpp=0.5, downsamples=[1.0, 4.0]))
    assert (tile == image[128:384, 256:512]).all()


@pytest.mark.parametrize("downsamples", [(1,), (1, 4), (1, 4, 16)])
def test_an_overview_is_the_slide_averaged_whatever_its_pyramid(downsamples):
    image = np.kron(noise(30, 41), np.ones((160, 160, 1), np.uint8))  # 4800 x 6560 px: several blocks
    view = overview(ArraySlide(image, downsamples=downsamples), mpp=0.5)
    assert view.rgb.shape == (300, 410, 3)
    assert view.size == (6560, 4800)
    assert not view.unread.any() and not view.outside.any()
    expected = image.reshape(300, 16, 410, 16, 3).mean(axis=(1, 3))
    assert np.abs(view.rgb - expected).max() <= 1


def test_an_overview_says_where_nothing_was_scanned():
    image = np.dstack([noise(640, 640), np.full((640, 640), 255, np.uint8)])
    image[:, 320:] = 0
    view = overview(ArraySlide(image), mpp=0.5)
    assert view.outside[:, 20:].all() and not view.outside[:, :20].any()
    assert (view.rgb[:, 20:] == 255).all()


def test_damage_in_a_small_level_is_read_from_a_finer_one():
    image = np.kron(noise(20, 20), np.ones((160, 160, 1), np.uint8))
    whole = overview(ArraySlide(image), mpp=0.5)
    damaged = overview(ArraySlide(image, bad=[(1, 300, 400)]), mpp=0.5)
    assert not damaged.unread.any()
    np.testing.assert_allclose(damaged.rgb.astype(int), whole.rgb, atol=1)


def test_damage_in_every_level_costs_only_its_surroundings():
    slide = ArraySlide(np.full((3200, 3200, 3), 100, np.uint8), bad=[(1, 300, 400), (0, 1200, 1600)])
    view = overview(slide, mpp=0.5)
    assert view.unread[100, 75]
    assert 0 < view.unread.mean() < 0.05
    assert (view.rgb[view.unread] == 255).all() and (view.rgb[~view.unread] == 100).all()
    with pytest.raises(BadTile):
        tile_pixels(slide, (1024, 1536), cut=cut_for(Grid(mpp=0.5), mpp=0.5, downsamples=[1.0, 4.0]))


def test_a_zeroed_tile_of_a_real_file_is_where_it_was_and_nowhere_else(tmp_path):
    image = drawn_textures()["dense"]
    path = write_svs(tmp_path / "a.svs", np.tile(image, (4, 4, 1)), downsamples=())
    before = overview(open_slide(str(path)), mpp=0.5)
    zero_tile(path, (600, 600))
    after = overview(open_slide(str(path)), mpp=0.5)
    assert after.unread[600 // 16, 600 // 16]
    assert after.unread.sum() <= (256 / 16 + 2 * 16) ** 2  # the stored tile, and the rest of the blocks that touch it
    assert (after.rgb[~after.unread] == before.rgb[~after.unread]).all()


def test_a_slide_coarser_than_the_overview_is_shown_as_it_is():
    image = noise(50, 60)
    view = overview(ArraySlide(image, downsamples=(1,)), mpp=10.0)
    assert view.um_per_px == 10.0
    assert (view.rgb == image).all()


def test_an_mpp_that_cannot_be_true_is_refused_before_memory_is_taken():
    slide = ArraySlide(noise(64, 64), downsamples=(1,))
    object.__setattr__(slide.info, "width", 200_000)
    object.__setattr__(slide.info, "height", 100_000)
    with pytest.raises(WrongScale, match="4000 x 2000 mm, which no slide is; state its true mpp"):
        overview(slide, mpp=20.0)
