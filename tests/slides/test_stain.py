"""Stain normalisation: the maths against a slow reference, stains that are known, and slides that cannot be fitted."""

import math

import cv2
import numpy as np
import pytest

from pipeline.slides.cutting import overview
from pipeline.slides.stain import REFERENCE, REFERENCE_C99, REFERENCE_LAB, Macenko, NoFit, Reinhard, fit_stain, from_json, to_json
from pipeline.slides.tissue import Saturation, find_tissue
from tests.slides.arrays import ArraySlide, overview_of
from tests.slides.build import STAINS, drawn_textures, render, some_scene

WHITE = (243, 244, 242)


def stained(stains, *, amounts=(1.0, 0.8), side=120, seed=0):
    """Pixels of two stains in all proportions, without noise: each row's density is a mix of the two vectors."""
    rng = np.random.default_rng(seed)
    concentrations = rng.gamma(2.0, 0.5, (side, side, 2)) * amounts
    concentrations[: side // 3, :, 0] *= 0.02
    concentrations[side // 3 : side // 2, :, 1] *= 0.02
    return np.clip(np.rint(np.array(WHITE) * np.exp(-concentrations @ stains) - 1), 0, 255).astype(np.uint8)


def fitted(rgb, method="macenko"):
    return fit_stain(method, rgb, tissue=np.ones(rgb.shape[:2], bool), white=WHITE)


def degrees(first, second):
    return math.degrees(math.acos(min(1.0, np.dot(first, second) / np.linalg.norm(first) / np.linalg.norm(second))))


def test_known_stains_are_found():
    turned = np.add(STAINS, [[0.05, -0.04, 0.06], [-0.03, 0.02, 0.05]])
    for stains in (STAINS, turned / np.linalg.norm(turned, axis=1, keepdims=True)):
        found = fitted(stained(stains))
        assert degrees(found.haematoxylin, stains[0]) < 3
        assert degrees(found.eosin, stains[1]) < 3
        assert np.linalg.norm(found.haematoxylin) == pytest.approx(1, abs=1e-5)


def slow_macenko(rgb, stain):
    """Macenko's formulas for one pixel after the other."""
    result = np.empty_like(rgb)
    vectors = np.array([stain.haematoxylin, stain.eosin]).T
    for place in np.ndindex(rgb.shape[:2]):
        density = np.array([-math.log((int(v) + 1) / w) for v, w in zip(rgb[place], stain.white, strict=True)])
        concentration = np.linalg.lstsq(vectors, density, rcond=None)[0]
        changed = 240 * np.exp(-REFERENCE @ (concentration * np.array(REFERENCE_C99) / stain.c99))
        result[place] = np.clip(np.rint(changed), 0, 255)
    return result


def test_a_tile_is_changed_by_macenkos_formulas():
    rgb = stained(STAINS, side=24, seed=1)
    rgb[0, :4] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], WHITE]
    stain = fitted(stained(STAINS))
    assert np.abs(stain(rgb).astype(int) - slow_macenko(rgb, stain)).max() <= 1
    assert stain(rgb).dtype == np.uint8 and stain(rgb).shape == rgb.shape


def test_two_laboratories_look_alike_afterwards():
    other = np.add(STAINS, [[0.06, -0.05, 0.05], [-0.04, 0.03, 0.06]])
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    first, second = stained(STAINS), stained(other, amounts=(1.4, 0.6))
    before = np.abs(first.astype(float) - second).mean()
    after = np.abs(fitted(first)(first).astype(float) - fitted(second)(second)).mean()
    assert after < before / 3


def test_a_slide_is_fitted_from_its_overview_and_its_glass_stays_light(textures):
    names = ["collagen", "dermis", "epidermis"]
    canvas = render(some_scene(names, width_um=1800, height_um=800), {name: textures[name] for name in names}, mpp=0.5, stain=5)
    view = overview(ArraySlide(canvas.image), mpp=0.5)
    tissue = find_tissue(view, Saturation(), mpp=0.5)
    stain = fit_stain("macenko", view.rgb, tissue=tissue.mask, white=tissue.white)
    assert degrees(stain.haematoxylin, stain.eosin) > 10
    glass = stain(np.full((8, 8, 3), tissue.white, np.uint8))
    assert glass.min() >= 236 and np.ptp(glass) <= 2


def test_glass_around_the_tissue_changes_nothing_in_the_fit():
    rgb = stained(STAINS)
    framed = np.pad(rgb, ((50, 50), (50, 50), (0, 0)), constant_values=243)
    tissue = np.zeros(framed.shape[:2], bool)
    tissue[50:-50, 50:-50] = True
    assert fit_stain("macenko", framed, tissue=tissue, white=WHITE) == fitted(rgb)


def test_reinhard_gives_the_tissue_the_references_mean_and_deviation():
    rgb = stained(STAINS, amounts=(0.6, 0.5))
    changed = fitted(rgb, "reinhard")(rgb)
    lab = cv2.cvtColor(changed, cv2.COLOR_RGB2LAB).reshape(-1, 3).astype(float)
    assert np.abs(lab.mean(axis=0) - REFERENCE_LAB[0]).max() < 6  # what leaves the colours a screen has is cut off
    assert np.abs(lab.std(axis=0) / REFERENCE_LAB[1] - 1).max() < 0.2


def test_reinhard_is_its_formula_within_the_rounding_of_8_bit_lab():
    rgb = stained(STAINS, side=40, amounts=(0.7, 0.6))
    stain = fitted(rgb, "reinhard")
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB).astype(float)
    moved = (lab - stain.mean) / stain.deviation * REFERENCE_LAB[1] + REFERENCE_LAB[0]
    expected = cv2.cvtColor(np.clip(np.rint(moved), 0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB)
    assert np.abs(stain(rgb).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_stain_is_the_same_after_it_was_stored(method):
    stain = fitted(stained(STAINS), method)
    assert from_json(to_json(stain)) == stain
    rgb = stained(STAINS, seed=3)
    assert (from_json(to_json(stain))(rgb) == stain(rgb)).all()


def one_stain():
    amount = np.random.default_rng(0).gamma(2.0, 0.5, (60, 60, 1))
    return np.clip(np.rint(np.array(WHITE) * np.exp(-amount * STAINS[0]) - 1), 0, 255).astype(np.uint8)


def noise():
    return np.random.default_rng(0).integers(0, 200, (60, 60, 3), np.uint8)


@pytest.mark.parametrize(
    ("rgb", "said"),
    [
        (np.full((9, 11, 3), 120, np.uint8), "99 px of tissue in the overview, fewer than 100"),
        (np.full((60, 60, 3), 240, np.uint8), "0 px are stained in every channel, fewer than 100"),
        (one_stain(), "one stain only"),
        (noise(), "no two stains can be told apart"),
    ],
    ids=["little tissue", "glass", "one stain", "noise"],
)
def test_a_slide_that_cannot_be_fitted_says_why(rgb, said):
    with pytest.raises(NoFit, match=said):
        fitted(rgb)


def test_a_flat_slide_has_no_deviation_to_match():
    with pytest.raises(NoFit, match="hardly any contrast"):
        fitted(np.full((60, 60, 3), 120, np.uint8), "reinhard")


def test_brown_is_not_taken_for_eosin(slide_assets):
    ihc = cv2.cvtColor(cv2.imread(str(slide_assets / "ihc.png")), cv2.COLOR_BGR2RGB)
    with pytest.raises(NoFit, match="it is brown, such as DAB, not eosin"):
        fit_stain("macenko", ihc, tissue=np.ones(ihc.shape[:2], bool), white=(243, 243, 243))


def test_drawn_tissue_without_real_pixels_can_be_fitted_too():
    rgb = drawn_textures()["dense"]
    tissue = find_tissue(overview_of(rgb), Saturation(), mpp=0.5)
    assert isinstance(fit_stain("macenko", rgb, tissue=tissue.mask, white=tissue.white), Macenko)
    assert isinstance(fit_stain("reinhard", rgb, tissue=tissue.mask, white=tissue.white), Reinhard)
