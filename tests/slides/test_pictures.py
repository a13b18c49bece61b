"""A slide's picture shows what was decided about it, where it was decided."""

import io

import cv2
import numpy as np
from PIL import Image

from pipeline.slides.pictures import INK, LEFT_OUT, LEGEND_PX, TISSUE, picture
from pipeline.tiles import Grid
from tests.slides.rows import disc, seen_row, slide_row


def drawn(row, *grids, px=960):
    return np.asarray(Image.open(io.BytesIO(picture(row, grids, px=px)))).astype(int)


def near(image, colour, tolerance=40):
    """Where a picture has about a colour; it is a JPEG."""
    return np.abs(image - colour).max(axis=-1) < tolerance


def test_what_is_not_kept_is_faded_and_what_is_keeps_its_colour():
    image = drawn(seen_row(disc((150, 90, 130))), Grid(mpp=0.5, tile_px=256))
    assert image.shape == (720 + LEGEND_PX, 960, 3)
    assert near(image[400:440, 440:450], (150, 90, 130), 60).mean() > 0.8
    corner = image[10:60, 10:60].mean(axis=(0, 1))
    assert np.abs(corner - (np.array([243, 243, 244]) + 255) / 2).max() < 2


def test_the_outline_runs_round_the_tissue():
    image = drawn(seen_row(disc()))[:720]
    rows, cols = np.nonzero(near(image, TISSUE, 60))
    radii = np.hypot(rows - 360, cols - 480)
    assert len(radii) > 1000
    assert np.percentile(radii, 1) > 225 and np.percentile(radii, 99) < 256  # 80 px of the mask are 240 here


def test_tiles_left_out_for_little_tissue_are_marked():
    row = seen_row(disc())
    few, none = (drawn(row, Grid(mpp=2.0, tile_px=256, min_tissue_fraction=least)) for least in (0.5, 0.0))
    assert near(few[:720], LEFT_OUT, 70).sum() > 200
    assert near(none[:720], LEFT_OUT, 70).sum() < 20


def test_tiles_too_small_for_borders_are_tinted_not_blackened():
    row = seen_row(disc())
    fine = drawn(row, Grid(mpp=0.5, tile_px=16, min_tissue_fraction=1.0), px=480)
    assert fine[:360].mean() > 150


def test_ink_has_a_colour_of_its_own():
    image = disc()
    cv2.line(image, (20, 20), (20, 220), (40, 60, 160), 14)
    assert near(drawn(seen_row(image), Grid(mpp=0.5)), INK, 90)[100:600, 45:75].mean() > 0.8


def test_a_slide_that_is_too_coarse_or_has_no_mask_is_still_shown():
    row = seen_row(disc(), mpp=4.0)
    assert drawn(row, Grid(mpp=0.5)).shape[1] == 960
    assert drawn(row | {"mask": None, "contour": None, "tissue_mm2": None}, Grid(mpp=4.0)).shape[1] == 960


def test_a_slide_without_scale_is_its_thumbnail_and_one_without_thumbnail_is_none():
    row = seen_row(disc())
    assert picture(row | {"mpp": None}, []) == row["thumbnail"]
    assert picture(slide_row(status="failed", reason="unreadable"), []) is None


def test_the_grid_begins_at_the_scanned_part():
    row = seen_row(disc()) | {"bounds": [1600, 1280, 2000, 1600]}
    image = drawn(row, Grid(mpp=1.0, tile_px=256))
    assert near(image[350:370, 310:320], (225, 160, 190), 12).all()
    assert near(image[350:370, 280:290], (240, 207, 222), 12).all()  # tissue too, but left of the first tile: faded
