"""Quality columns against definitions written out pixel by pixel, and what they are for: blur and ink stand out at every scale."""

import math

import cv2
import numpy as np
import pytest

from pipeline.slides.quality import quality
from pipeline.slides.stain import REFERENCE
from schemas.slides import QUALITY
from tests.slides.build import drawn_textures

WHITE = (244, 243, 242)


def tiles(textures):
    """One 192 px tile of each texture at 0.5 um/px."""
    return {name: np.ascontiguousarray(image[:192, :192]) for name, image in textures.items() if name != "ihc"}


def slow_quality(rgb):
    pixels = [[int(v) for v in pixel] for pixel in rgb.reshape(-1, 3)]
    count = len(pixels)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(int)
    padded = np.pad(grey, 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * grey
    saturation = [0 if max(p) == 0 else (max(p) - min(p)) / max(p) for p in pixels]
    density = [[-math.log((v + 1) / w) for v, w in zip(p, WHITE, strict=True)] for p in pixels]
    stains = [np.linalg.lstsq(REFERENCE, np.array(d), rcond=None)[0] for d in density]
    shares = [n / count for n in np.bincount(grey.ravel()) if n]
    return {
        "lapvar": laplacian.var(),
        "lapvar_norm": laplacian.var() / (grey.var() + 1),
        "white_frac": sum(min(p) > 220 for p in pixels) / count,
        "black_frac": sum(max(p) < 25 for p in pixels) / count,
        "grey_frac": sum(s < 0.05 for s in saturation) / count,
        "sat_mean": sum(saturation) / count,
        "od_mean": np.mean(density),
        "h_mean": np.mean([s[0] for s in stains]),
        "e_mean": np.mean([s[1] for s in stains]),
        "entropy": -sum(s * math.log2(s) for s in shares),
    }


def test_every_column_is_its_definition():
    rgb = np.ascontiguousarray(drawn_textures()["dense"][:64, :64])
    rgb[:20, :20] = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    rgb[20:25], rgb[25:30] = 244, 10
    found = quality(rgb, mpp=0.5, white=WHITE)
    assert list(found) == QUALITY.names
    for name, expected in slow_quality(rgb).items():
        tolerance = 0.003 if name in ("sat_mean", "grey_frac") else 1e-5  # saturation is a whole number of 255
        assert found[name] == pytest.approx(expected, rel=1e-5, abs=tolerance), name


def test_a_blurred_tile_falls_below_40_and_a_sharp_one_does_not(textures):
    for name, rgb in tiles(textures).items():
        assert quality(rgb, mpp=0.5)["lapvar"] > 79, name
        assert quality(cv2.GaussianBlur(rgb, (0, 0), 2), mpp=0.5)["lapvar"] < 40, name


def test_sharpness_means_the_same_at_a_finer_scale(textures):
    """Measured at the tile's own mpp, the same tissue looks ten times as blurred at 0.25 um/px."""
    for name, rgb in tiles(textures).items():
        finer = cv2.resize(rgb, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        assert quality(finer, mpp=0.25)["lapvar"] == pytest.approx(quality(rgb, mpp=0.5)["lapvar"], rel=0.01), name
        other = cv2.resize(rgb, None, fx=1.67, fy=1.67, interpolation=cv2.INTER_CUBIC)
        assert 0.4 < quality(other, mpp=0.3)["lapvar"] / quality(rgb, mpp=0.5)["lapvar"] < 1.6, name


def test_sharpness_is_null_where_the_tile_is_too_coarse_to_know():
    rgb = np.ascontiguousarray(drawn_textures()["dense"][:64, :64])
    found = quality(rgb, mpp=1.0)
    assert found["lapvar"] is None and found["lapvar_norm"] is None and found["sat_mean"] > 0
    assert quality(rgb, mpp=0.504)["lapvar"] is not None


def test_ink_is_seen_and_neither_nuclei_nor_a_counterstain_are(slide_assets, textures):
    rgb = tiles(textures)["dermis"].copy()
    assert quality(rgb, mpp=0.5)["pen_frac"] == 0
    rgb[:, :64] = (rgb[:, :64] / 255 * (40, 60, 170)).astype(np.uint8)
    assert quality(rgb, mpp=0.5)["pen_frac"] == pytest.approx(1 / 3, abs=0.05)
    ihc = cv2.cvtColor(cv2.imread(str(slide_assets / "ihc.png")), cv2.COLOR_BGR2RGB)
    assert quality(ihc, mpp=0.5)["pen_frac"] < 0.01
    for name, tile in tiles(textures).items():
        assert quality(tile, mpp=0.5)["pen_frac"] < 0.01, name


def test_glass_and_the_scanners_black_are_told_apart_from_tissue():
    glass = quality(np.full((64, 64, 3), WHITE, np.uint8), mpp=0.5, white=WHITE)
    assert glass["white_frac"] == glass["grey_frac"] == 1
    assert glass["entropy"] == 0 and abs(glass["od_mean"]) < 0.01 and abs(glass["h_mean"]) < 0.01
    black = quality(np.zeros((64, 64, 3), np.uint8), mpp=0.5)
    assert black["black_frac"] == 1 and black["white_frac"] == 0


@pytest.mark.parametrize("side", [1, 2, 5, 1024])
def test_a_tile_of_any_size_has_numbers(side):
    found = quality(np.full((side, side, 3), 200, np.uint8), mpp=0.25)
    assert all(value is not None and math.isfinite(value) for value in found.values())
