"""The tissue mask, on slides with known truth: tissue found, ink left out, and a user's own mask held to its contract."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from pipeline.slides.contours import for_qupath, geojson, polygons
from pipeline.slides.cutting import overview
from pipeline.slides.tissue import BadMask, Saturation, find_tissue, pen
from tests.slides.arrays import ArraySlide, overview_of
from tests.slides.build import PEN_LABEL, drawn_textures, render, some_scene

GLASS, EOSIN = (243, 243, 244), (225, 160, 190)


def seen(textures, *, mpp=0.5, seed=0, with_pen=True, stain=None):
    """A rendered scene as an overview, the truth of its tissue, and of its ink."""
    scene = some_scene(sorted(textures), width_um=2800, height_um=960, seed=seed, pen=with_pen)
    canvas = render(scene, textures, mpp=mpp, stain=stain)
    view = overview(ArraySlide(canvas.image, mpp=mpp), mpp=mpp)
    return view, (canvas.labels > 0) & (canvas.labels < PEN_LABEL), canvas.labels == PEN_LABEL


def overlap(found, truth):
    return (found & truth).sum() / (found | truth).sum()


@pytest.mark.parametrize(("mpp", "seed", "stain"), [(0.5, 0, None), (0.4603, 1, 3), (0.2999, 2, 4)])
def test_real_tissue_is_found_and_ink_is_not(textures, mpp, seed, stain):
    chosen = sorted(textures)[seed : seed + 3]  # three pieces, so that they are large beside a px of the mask
    view, truth, ink = seen({name: textures[name] for name in chosen}, mpp=mpp, seed=seed, stain=stain)
    tissue = find_tissue(view, Saturation(), mpp=mpp)
    assert overlap(tissue.mask, truth) >= 0.9
    assert (tissue.mask & ink).sum() <= 0.01 * ink.sum()
    assert (tissue.pen & ink).sum() >= 0.95 * ink.sum()
    assert (tissue.pen & truth).sum() <= 0.01 * truth.sum()
    assert tissue.area_mm2 == pytest.approx(tissue.mask.sum() * 64e-6, rel=0.01)
    assert np.abs(np.array(tissue.white) - GLASS).max() <= 1


@pytest.mark.parametrize("tint", [(1, 0.975, 0.93), (0.95, 0.98, 1), (1, 0.96, 0.97)], ids=["yellow", "blue", "pink"])
def test_tinted_glass_is_not_tissue(textures, tint):
    """By saturation alone yellow glass is tissue from edge to edge: an overlap of 0.38."""
    view, truth, ink = seen({"dermis": textures["dermis"]})
    tinted = replace(view, rgb=(view.rgb * np.array(tint)).round().astype(np.uint8))
    tissue = find_tissue(tinted, Saturation(), mpp=0.5)
    assert overlap(tissue.mask, truth) >= 0.9
    assert (tissue.mask & ink).sum() <= 0.01 * ink.sum()
    assert np.abs(np.array(tissue.white) - np.array(GLASS) * tint).max() <= 2


def test_a_slide_without_glass_keeps_its_pale_tissue(textures):
    """What is bright and pale there is no glass to be made grey."""
    pale = np.clip(255 - (255 - textures["collagen"][:256, :256].astype(int)) * 0.4, 0, 255).astype(np.uint8)
    coloured = cv2.medianBlur(cv2.cvtColor(pale, cv2.COLOR_RGB2HSV)[..., 1], 7) > 10
    assert 0.5 < coloured.mean() <= find_tissue(overview_of(pale), Saturation(), mpp=0.5).mask.mean()


def test_the_same_slide_gets_the_same_mask():
    view, _, _ = seen(drawn_textures())
    first, second = (find_tissue(view, Saturation(), mpp=0.5) for _ in range(2))
    assert (first.mask == second.mask).all()
    assert geojson(first.polygons) == geojson(second.polygons)


def test_glass_alone_and_ink_alone_are_no_tissue():
    view, _, ink = seen(drawn_textures())
    glass = np.clip(np.random.default_rng(0).normal(243, 1.2, view.rgb.shape), 0, 255).astype(np.uint8)
    assert find_tissue(overview_of(glass), Saturation(), mpp=0.5).area_mm2 == 0
    glass[ink] = view.rgb[ink]
    tissue = find_tissue(overview_of(glass), Saturation(), mpp=0.5)
    assert tissue.area_mm2 == 0 and tissue.polygons == []
    assert tissue.pen_mm2 > 0.1


def stroke(colour, *, width=40, ground=GLASS):
    """600 x 400 px at 8 um/px with a line of `colour` and a disc of eosin."""
    image = np.full((400, 600, 3), ground, np.uint8)
    cv2.circle(image, (150, 200), 90, EOSIN, -1)
    cv2.line(image, (420, 60), (480, 340), colour, width)
    return cv2.GaussianBlur(image, (0, 0), 1.0)


@pytest.mark.parametrize(
    "colour", [(40, 60, 160), (20, 20, 90), (30, 130, 60), (200, 40, 50), (45, 45, 48)], ids=["blue", "navy", "green", "red", "black"]
)
def test_ink_of_each_colour_is_left_out_and_tissue_beside_it_stays(colour):
    image = stroke(colour)
    tissue = find_tissue(overview_of(image), Saturation(), mpp=0.5)
    assert 0.9 < tissue.mask.sum() / (np.pi * 90**2) < 1.1
    assert not tissue.mask[:, 380:].any()
    assert tissue.pen_mm2 > 0.5


def test_ink_can_be_left_to_the_filters():
    tissue = find_tissue(overview_of(stroke((40, 60, 160))), Saturation(pen=False), mpp=0.5)
    assert tissue.mask[:, 380:].any() and tissue.pen_mm2 > 0.5


def test_the_pale_rim_of_a_stroke_is_ink():
    image = stroke((40, 60, 160))
    soft = cv2.GaussianBlur(image, (0, 0), 12)
    tissue = find_tissue(overview_of(soft), Saturation(), mpp=0.5)
    assert not tissue.mask[:, 350:].any()


def test_a_blue_counterstain_is_tissue_not_ink(slide_assets):
    """Dense nuclei of an IHC slide have ink's hue: by hue and a saturation of 60 alone, a lymph node would be thrown away."""
    ihc = cv2.cvtColor(cv2.imread(str(slide_assets / "ihc.png")), cv2.COLOR_BGR2RGB)
    hue, saturation, _ = cv2.split(cv2.cvtColor(ihc, cv2.COLOR_RGB2HSV))
    nuclei = ihc[(hue >= 90) & (hue <= 125) & (saturation > 60)]
    assert len(nuclei) > 100
    node = np.random.default_rng(0).choice(nuclei, (200, 200))
    assert not pen(node, um_per_px=8.0).any()
    image = np.full((400, 400, 3), GLASS, np.uint8)
    image[100:300, 100:300] = node
    assert find_tissue(overview_of(image), Saturation(), mpp=0.5).area_mm2 == pytest.approx(200**2 * 64e-6, rel=0.05)


def test_the_scanners_black_and_what_was_not_scanned_are_no_tissue():
    image = stroke(GLASS)
    image[:, 500:] = (3, 0, 2)  # a hue and full saturation, by the numbers
    outside = np.zeros(image.shape[:2], bool)
    outside[:200] = True
    mask = find_tissue(overview_of(image, outside=outside), Saturation(), mpp=0.5).mask
    assert not mask[:, 490:].any() and not mask[:200].any() and mask[201:280, 100:200].any()


def test_specks_go_small_holes_close_and_lumina_stay():
    image = np.full((400, 600, 3), GLASS, np.uint8)
    cv2.circle(image, (200, 200), 150, EOSIN, -1)
    cv2.circle(image, (200, 200), 20, GLASS, -1)  # 0.08 mm2
    cv2.circle(image, (120, 160), 6, GLASS, -1)  # 0.007 mm2
    cv2.circle(image, (500, 200), 8, EOSIN, -1)  # 0.013 mm2
    mask = find_tissue(overview_of(image), Saturation(), mpp=0.5).mask
    assert not mask[200, 200] and mask[160, 120] and not mask[200, 500]
    assert find_tissue(overview_of(image), Saturation(min_hole_mm2=0.2), mpp=0.5).mask[200, 200]
    assert find_tissue(overview_of(image), Saturation(min_area_mm2=0.001), mpp=0.5).mask[200, 500]


def test_what_could_not_be_read_is_tried_and_not_taken_for_glass():
    image = np.full((400, 600, 3), GLASS, np.uint8)
    unread = np.zeros(image.shape[:2], bool)
    unread[50:60, 50:60] = True
    assert (find_tissue(overview_of(image, unread=unread), Saturation(), mpp=0.5).mask == unread).all()


def test_outlines_enclose_the_mask_in_px_of_level_0():
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.normal(size=(300, 400)).astype(np.float32), (0, 0), 12)
    mask = noise > 0.01
    size = (6403, 4799)
    scale = np.array([size[0] / 400, size[1] / 300])
    drawn = np.zeros((3000, 4000), np.uint8)
    for part in polygons(mask, size=size):
        for ring, value in [(part.exterior, 1), *((hole, 0) for hole in part.holes)]:
            cv2.fillPoly(drawn, [np.rint(ring / scale * 10 - 0.5).astype(np.int32)], value)
    assert overlap(drawn.astype(bool), np.kron(mask, np.ones((10, 10), bool))) > 0.985


def test_a_rectangles_outline_is_its_edges_and_its_hole():
    mask = np.zeros((30, 40), bool)
    mask[10:20, 5:25] = True
    mask[13:16, 10:20] = False
    [part] = polygons(mask, size=(640, 480))
    assert sorted(map(tuple, part.exterior)) == [(80, 160), (80, 320), (400, 160), (400, 320)]
    [hole] = part.holes
    assert hole.min(axis=0).tolist() == [160, 208] and hole.max(axis=0).tolist() == [320, 256]


def test_geojson_is_what_qupath_reads():
    mask = np.zeros((30, 40), bool)
    mask[10:20, 5:25] = True
    contour = geojson(polygons(mask, size=(640, 480)))
    assert for_qupath(contour, None) == contour
    found = json.loads(for_qupath(contour, [80, 100, 500, 300]))
    [feature] = found["features"]
    assert found["type"] == "FeatureCollection" and feature["properties"]["objectType"] == "annotation"
    [ring] = feature["geometry"]["coordinates"]
    assert ring[0] == ring[-1] and len(ring) == 5
    assert np.min(ring, axis=0).tolist() == [0, 60]


def wrong_shape(rgb, *, um_per_px):
    return np.ones((2, 2), bool)


def wrong_type(rgb, *, um_per_px):
    return np.ones(rgb.shape[:2], np.uint8)


def fails(rgb, *, um_per_px):
    raise ZeroDivisionError("no tissue to divide by")


@pytest.mark.parametrize(
    ("masker", "said"),
    [
        (wrong_shape, r"test_tissue:wrong_shape returned bool \(2, 2\); a mask must be a bool array of shape \(40, 50\)"),
        (wrong_type, r"test_tissue:wrong_type returned uint8 \(40, 50\)"),
        (fails, r"test_tissue:fails raised ZeroDivisionError: no tissue to divide by"),
    ],
)
def test_a_users_mask_that_breaks_its_contract_says_how(masker, said):
    with pytest.raises(BadMask, match=said):
        find_tissue(overview_of(np.full((40, 50, 3), 200, np.uint8)), masker, mpp=0.5)


class Everything:
    """A user's mask that also draws on what it is given."""

    def __call__(self, rgb, *, um_per_px):
        assert um_per_px == 8.0
        rgb[:] = 0
        return np.ones(rgb.shape[:2], bool)


def test_a_users_mask_is_taken_as_it_is():
    view = overview_of(stroke((40, 60, 160)))
    tissue = find_tissue(view, Everything(), mpp=0.5)
    assert tissue.mask.all() and tissue.threshold is None and tissue.pen_mm2 > 0.5
    assert view.rgb.any()


def test_a_threshold_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="threshold=300 must be a saturation from 0 to 254"):
        Saturation(threshold=300)
