"""Rows of the slides table, without the job: what a survey would have written about a picture of a slide."""

import datetime

import numpy as np

from pipeline.media import thumbnail
from pipeline.slides.contours import geojson
from pipeline.slides.tiling import mask_png
from pipeline.slides.tissue import Saturation, find_tissue
from schemas.slides import SLIDE
from tests.slides.arrays import overview_of


def slide_row(**values):
    """A row with nothing in it but what a row must have, and `values`."""
    must = {
        "id": "file:///slides/a.svs",
        "source": "s",
        "slide_id": "a.svs",
        "status": "ok",
        "version": "1",
        "survey": "0",
        "attempts": 1,
        "run": "r",
        "updated_at": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    }
    return dict.fromkeys(SLIDE.names) | must | values


def seen_row(rgb, *, mpp=0.5, **values):
    """The row of a slide whose overview at 8 um/px is `rgb`."""
    view = overview_of(rgb, mpp=mpp)
    tissue = find_tissue(view, Saturation(), mpp=mpp)
    width, height = view.size
    seen = {
        "width": width,
        "height": height,
        "levels": [{"width": width, "height": height, "downsample": 1.0}],
        "mpp": mpp,
        "mpp_source": "openslide",
        "mask": mask_png(tissue.mask),
        "thumbnail": thumbnail(rgb, 1024),
        "contour": geojson(tissue.polygons),
        "tissue_mm2": tissue.area_mm2,
    }
    return slide_row(**(seen | values))


def disc(colour=(225, 160, 190), *, shape=(240, 320), radius=80):
    """A round piece of tissue on glass, 8 um/px."""
    rows, cols = np.ogrid[: shape[0], : shape[1]]
    image = np.full((*shape, 3), (243, 243, 244), np.uint8)
    image[(rows - shape[0] // 2) ** 2 + (cols - shape[1] // 2) ** 2 < radius**2] = colour
    return image
