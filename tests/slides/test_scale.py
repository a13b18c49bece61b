"""The same tissue from five scanners: tiles cover the same microns, and a real encoder sees the same in them."""

import numpy as np
import pyarrow as pa
import pytest

from demo.features import Features
from pipeline.media import to_pixels
from pipeline.slides.cutting import overview, tile_pixels
from pipeline.slides.opening import open_slide
from pipeline.slides.tissue import Saturation, find_tissue
from pipeline.testing import check_encoder
from pipeline.tiles import Grid, cut_for, kept, lay
from schemas.items import encoder_schema
from tests.slides.build import render, some_scene, write_svs

SCANNERS = (0.2204, 0.25, 0.2999, 0.3001, 0.4603)
GRID = Grid(mpp=0.5, tile_px=224, min_tissue_fraction=0.9)


@pytest.fixture(scope="module")
def scanned(textures, tmp_path_factory):
    """By scanner: how it is cut, and its tiles' pixels by (row, col). All read from files."""
    folder = tmp_path_factory.mktemp("scanners")
    names = ["collagen", "dermis", "epidermis"]
    scene = some_scene(names, width_um=1200, height_um=500, seed=3)
    found = {}
    for mpp in SCANNERS:
        path = write_svs(folder / f"{mpp}.svs", render(scene, {name: textures[name] for name in names}, mpp=mpp).image, mpp=mpp, quality=90)
        slide = open_slide(str(path))
        downsamples = [level.downsample for level in slide.info.levels]
        cut = cut_for(GRID, mpp=mpp, downsamples=downsamples)
        tissue = find_tissue(overview(slide, mpp=mpp), Saturation(), mpp=mpp)
        tiles = lay(cut, size=(slide.info.width, slide.info.height), mask=tissue.mask)
        tiles = tiles.where(kept(GRID, tiles))
        places = zip(tiles.row.tolist(), tiles.col.tolist(), tiles.x.tolist(), tiles.y.tolist(), strict=True)
        found[mpp] = cut, {(row, col): tile_pixels(slide, (x, y), cut=cut, white=tissue.white) for row, col, x, y in places}
        slide.close()
    return found


def test_five_scanners_give_the_same_microns(scanned):
    microns = [cut.footprint_l0 * cut.mpp for cut, _ in scanned.values()]
    assert max(microns) / min(microns) - 1 < 0.002


def test_five_scanners_give_the_same_tiles(scanned):
    """By magnification, 0.2999 and 0.3001 would give tiles of half and of twice the side."""
    kept_by = [set(tiles) for _, tiles in scanned.values()]
    assert len(set.intersection(*kept_by)) >= 0.9 * len(set.union(*kept_by)) >= 10


def test_a_real_encoder_sees_the_same_tile_from_five_scanners(scanned, assets):
    encoder = Features(str(assets / "encoder" / "classifier.pth"), device="cpu")
    places = sorted(set.intersection(*(set(tiles) for _, tiles in scanned.values())))
    vectors = np.stack([encoder.encode(_items([tiles[place] for place in places])) for _, tiles in scanned.values()])
    across = np.einsum("atd,btd->abt", vectors, vectors)  # every two scanners, the same tile
    between = np.einsum("atd,aud->atu", vectors, vectors)
    near = np.array([[0 < max(abs(a - c), abs(b - d)) <= 1 for c, d in places] for a, b in places])
    nearest = np.where(near, between, -1).max(axis=(0, 2))
    assert across.min(axis=(0, 1)).mean() > nearest.mean()
    assert (across.mean(axis=(0, 1)) > nearest).mean() >= 0.9


def _items(images):
    ids, texts = pa.array([str(i) for i in range(len(images))]), pa.nulls(len(images), pa.string())
    return pa.table([ids, texts, to_pixels(images)], schema=encoder_schema())


def test_the_demonstrations_encoder_keeps_the_contract(scanned, assets):
    _, tiles = scanned[0.25]
    weights = str(assets / "encoder" / "classifier.pth")
    check_encoder(Features(weights, device="cpu"), _items(list(tiles.values())[:4]), again=Features(weights))
