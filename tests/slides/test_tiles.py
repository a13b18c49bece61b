"""Slide arithmetic: the physical size of a tile, exact tissue shares, and a grid that is the same on every run."""

import numpy as np
import pytest

from pipeline.config import ConfigError, load
from pipeline.tiles import Grid, WrongScale, cut_for, kept, lay, level_for, mean_mpp, origins, parents, tissue_fraction

PYRAMID = (1.0, 4.0, 16.0)
CEILED = (1.0, (16381 / 4096 + 12285 / 3072) / 2, (16381 / 1024 + 12285 / 768) / 2)
"""A pyramid whose level sizes were rounded up: OpenSlide says 3.99915, and 3 would read a third too much."""


@pytest.mark.parametrize(
    ("mpp", "footprint", "read_px"),
    [(0.25, 512.0, 512), (0.2204, 580.76, 581), (0.4603, 278.08, 278), (0.5, 256.0, 256), (0.2999, 426.81, 427), (0.3001, 426.52, 427)],
)
def test_a_tile_of_half_a_micron_covers_the_known_px_of_each_scanner(mpp, footprint, read_px):
    cut = cut_for(Grid(mpp=0.5), mpp=mpp, downsamples=[1.0])
    assert cut.footprint == pytest.approx(footprint, abs=0.005)
    assert (cut.read_px, cut.level, cut.upsampled) == (read_px, 0, False)
    assert cut.mpp_effective == pytest.approx(mpp * read_px / 256)


@pytest.mark.parametrize("mpp", [0.2204, 0.2275, 0.25, 0.2999, 0.3001, 0.325, 0.46, 0.4603, 0.499])
@pytest.mark.parametrize("pyramid", [PYRAMID, CEILED, (1.0,), (1.0, 2.0, 4.0, 8.0)])
@pytest.mark.parametrize("wanted", [0.5, 1.0, 2.0])
def test_a_tile_covers_the_same_microns_on_every_scanner(mpp, pyramid, wanted):
    """By magnification, 0.2999 and 0.3001 differ by a factor of two."""
    cut = cut_for(Grid(mpp=wanted), mpp=mpp, downsamples=pyramid)
    microns = 256 * wanted
    assert abs(cut.footprint * mpp - microns) < 1e-9
    assert abs(cut.footprint_l0 * mpp / microns - 1) <= 0.002
    assert abs(cut.read_px * cut.downsample * mpp / microns - 1) <= 0.002
    assert cut.read_px >= 256 / 1.01 - 1


def test_a_level_rounded_up_is_read_by_its_true_downsample():
    cut = cut_for(Grid(mpp=0.5, tile_px=256), mpp=0.125, downsamples=CEILED)
    assert (cut.level, cut.read_px, cut.footprint_l0) == (1, 256, 1024)


def test_the_coarsest_level_that_is_fine_enough_is_read():
    assert level_for(PYRAMID, 1.0) == 0
    assert level_for(PYRAMID, 3.9) == 0
    assert level_for(PYRAMID, 3.97) == 1  # within one per cent: enlarged by 0.8 %, still the right footprint
    assert level_for(PYRAMID, 15.0) == 1
    assert level_for(PYRAMID, 100.0) == 2
    assert level_for(PYRAMID, 0.98) is None


def test_enlarging_is_refused_unless_allowed_and_then_recorded():
    with pytest.raises(WrongScale, match=r"1 microns per px at its finest.*asks for 0\.5.*mpp=1.*allow_upsample: true"):
        cut_for(Grid(mpp=0.5), mpp=1.0, downsamples=PYRAMID)
    cut = cut_for(Grid(mpp=0.5, allow_upsample=True), mpp=1.0, downsamples=PYRAMID)
    assert (cut.level, cut.read_px, cut.upsampled, cut.mpp_effective) == (0, 128, True, 0.5)


def test_pixels_are_left_as_they_are_within_the_stated_error_or_the_slide_is_refused():
    cut = cut_for(Grid(mpp=0.5, resample="never"), mpp=0.499, downsamples=PYRAMID)
    assert (cut.read_px, cut.footprint_l0, cut.mpp_effective) == (256, 256, 0.499)
    assert cut_for(Grid(mpp=2.0, resample="never"), mpp=0.499, downsamples=CEILED).read_px == 256
    with pytest.raises(WrongScale, match=r"nearest level has 0\.46 .*-8\.0%.*at most 5\.0%.*resample: exact"):
        cut_for(Grid(mpp=0.5, resample="never"), mpp=0.46, downsamples=PYRAMID)
    assert cut_for(Grid(mpp=0.5, resample="never", max_mpp_error=0.1), mpp=0.46, downsamples=PYRAMID).mpp_effective == 0.46


def test_a_grid_that_cannot_be_is_a_configuration_error():
    with pytest.raises(ConfigError, match="overlap_px=256 must be smaller than tile_px=256"):
        load(Grid, None, ["mpp=0.5", "overlap_px=256"])
    with pytest.raises(ConfigError, match="mpp"):
        load(Grid, None, ["mpp=0"])


def test_px_that_are_not_square_get_the_mpp_that_keeps_areas():
    assert mean_mpp(0.25, 0.25) == 0.25
    assert mean_mpp(0.2, 0.45) == pytest.approx(0.3)


def test_origins_do_not_drift_over_a_whole_slide():
    stride = 256 * 0.5 / 0.2204
    starts = origins(100_000, stride)
    assert starts[-1] == round((len(starts) - 1) * stride)
    assert starts[-1] != (len(starts) - 1) * round(stride)  # what a rounded step gives: 40 px off
    assert starts[-1] < 100_000 <= starts[-1] + stride
    assert origins(512, 256.0).tolist() == [0, 256]
    assert origins(513, 256.0).tolist() == [0, 256, 512]
    assert origins(1, 256.0).tolist() == [0]


def test_tiles_lie_row_by_row_and_overlap_as_asked():
    cut = cut_for(Grid(mpp=0.5, tile_px=100, overlap_px=20), mpp=0.25, downsamples=[1.0])
    tiles = lay(cut, size=(500, 330), mask=np.ones((33, 50), bool))
    assert tiles.x.tolist() == [0, 160, 320, 480] * 3
    assert tiles.y.tolist() == [0] * 4 + [160] * 4 + [320] * 4
    assert tiles.row.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert tiles.col.tolist() == [0, 1, 2, 3] * 3


def test_the_scanned_part_moves_the_grid_and_bounds_it():
    cut = cut_for(Grid(mpp=0.5), mpp=0.5, downsamples=[1.0])
    tiles = lay(cut, size=(4000, 3000), mask=np.ones((30, 40), bool), bounds=(1001, 502, 600, 256))
    assert tiles.x.tolist() == [1001, 1257, 1513]
    assert tiles.y.tolist() == [502] * 3
    np.testing.assert_allclose(tiles.valid_fraction, [1, 1, 88 / 256])
    assert tiles.tissue_fraction.tolist() == [1, 1, 1]  # the mask spans the image, the bounds do not clip it


def test_a_tile_at_the_edge_is_kept_from_half_inside():
    grid = Grid(mpp=0.5, min_tissue_fraction=0)
    tiles = lay(cut_for(grid, mpp=0.5, downsamples=[1.0]), size=(256 + 128, 256 + 127), mask=np.ones((10, 10), bool))
    np.testing.assert_allclose(tiles.valid_fraction, [1, 0.5, 127 / 256, 127 / 512])
    assert kept(grid, tiles).tolist() == [True, True, False, False]
    assert len(tiles.where(kept(grid, tiles))) == 2


def slow_tissue_fraction(mask, x, y, side, size):
    """Area of each mask pixel inside the tile, one by one."""
    height, width = mask.shape
    px, py = size[0] / width, size[1] / height
    area = 0.0
    for row in range(height):
        for col in range(width):
            if mask[row, col]:
                across = min(x + side, (col + 1) * px) - max(x, col * px)
                down = min(y + side, (row + 1) * py) - max(y, row * py)
                area += max(0.0, across) * max(0.0, down)
    return area / side**2


def test_tissue_fraction_is_the_exact_area_where_edges_cut_mask_pixels():
    rng = np.random.default_rng(0)
    mask = rng.random((13, 17)) < 0.5
    size = (431, 333)  # 25.35 x 25.6 px a mask pixel: hardly an edge falls between two
    xs, ys = np.array([0, 37, 150, 301, 420]), np.array([0, 11, 128, 300])
    for side in (7, 40, 111):
        found = tissue_fraction(mask, (xs, ys), side=side, size=size)
        expected = [[slow_tissue_fraction(mask, x, y, side, size) for x in xs] for y in ys]
        np.testing.assert_allclose(found, expected, atol=1e-8)


def test_whole_tissue_is_one_and_a_quarter_is_enough():
    xs = origins(1000, 581 / 3)
    full = tissue_fraction(np.ones((7, 9), bool), (xs[:3], xs[:3]), side=190, size=(1000, 1000))
    assert (full == 1).all()
    mask = np.zeros((30, 30), bool)
    mask[:15, :15] = True
    grid = Grid(mpp=1.0, tile_px=300)
    tiles = lay(cut_for(grid, mpp=1.0, downsamples=[1.0]), size=(300, 300), mask=mask)
    assert tiles.tissue_fraction.tolist() == [0.25]
    assert kept(grid, tiles).tolist() == [True]


@pytest.mark.parametrize("overlap", [0, 100])
@pytest.mark.parametrize("bounds", [None, (300, 200, 6000, 5000)])
def test_the_parent_of_a_tile_is_the_coarser_tile_around_its_centre(overlap, bounds):
    size, mask, pyramid = (7001, 5903), np.ones((59, 70), bool), PYRAMID
    fine = cut_for(Grid(mpp=0.5), mpp=0.2204, downsamples=pyramid)
    coarse = cut_for(Grid(mpp=2.0, overlap_px=overlap), mpp=0.2204, downsamples=pyramid)
    tiles, above = (lay(cut, size=size, mask=mask, bounds=bounds) for cut in (fine, coarse))
    places = {(row, col): (x, y) for row, col, x, y in zip(above.row, above.col, above.x, above.y, strict=True)}
    found = parents(tiles, fine=fine, coarse=coarse, size=size, bounds=bounds)
    for x, y, parent in zip(tiles.x, tiles.y, found, strict=True):
        centre = np.array([x, y]) + fine.footprint / 2
        left_top = np.array(places[tuple(parent)])
        assert (left_top <= centre + 1).all() and (centre <= left_top + coarse.footprint + 1).all()
        distances = {place: np.abs(np.array(corner) + coarse.footprint / 2 - centre).max() for place, corner in places.items()}
        assert distances[tuple(parent)] <= min(distances.values()) + 1
