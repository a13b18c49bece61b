"""The index of a run: every slide is there, the ones that need a look first, and nothing from a file name runs as code."""

import json
import re

import numpy as np
import pytest

from pipeline.slides.page import html, suspicions, write_page
from pipeline.tiles import Grid
from schemas.slides import STATUSES
from tests.slides.rows import disc, seen_row, slide_row
from tests.test_sheet import EVIL, Page

GRIDS = [Grid(mpp=1.0)]


class Slides(Page):
    """A page with inputs, which have no end."""

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == "input":
            self.open.pop()


def page(*rows):
    return Slides(html([{"picture": None, "outline": None, **row} for row in rows], title="slides"))


def test_a_slide_says_what_it_is_and_what_became_of_it():
    row = slide_row(
        status="partial", reason="bad_tiles", rejected=2, embedded=47, tiles=49, mpp=0.499, mpp_source="aperio", bad_tiles=["(512, 0): corrupt"]
    )
    row |= {
        "width": 2220,
        "height": 2967,
        "tissue_mm2": 0.6314,
        "reader": "tessera 1",
        "notes": ["0.20 mm2 of pen marks"],
        "mpp_flags": ["anisotropic"],
    }
    words = page(row).words
    for said in [
        "a.svs",
        "partial",
        "tiles were rejected",
        "47 of 49 in the table",
        "0.499 um/px (aperio)",
        "2,220 x 2,967 px, 1.1 x 1.5 mm",
        "0.63 mm2",
    ]:
        assert said in words
    for said in [
        "2 tiles rejected",
        "0.20 mm2 of pen marks",
        "scale anisotropic",
        "(512, 0): corrupt",
        "little tissue",
        "file:///slides/a.svs",
        "tessera 1",
    ]:
        assert said in words


def test_those_that_need_a_look_come_first():
    rows = [slide_row(slide_id=f"{status}.svs", status=status) for status in ["ok", "failed", "no_tissue", "deleted", "needs_mpp", "surveyed"]]
    rows.append(slide_row(slide_id="odd.svs", mpp_flags=["disagrees"]))
    found = re.findall(r"no picture(\w+)\.svs", page(*rows).words)
    assert found == ["failed", "needs_mpp", "no_tissue", "surveyed", "odd", "ok", "deleted"]


def test_every_status_is_counted_and_can_be_chosen_alone():
    rows = [slide_row(slide_id=f"{status}{i}.svs", status=status) for i, status in enumerate([*STATUSES, "ok", "ok"])]
    text = html([row | {"picture": None, "outline": None} for row in rows], title="slides")
    found = dict(re.findall(r'<label for="f-(\w+)"[^>]*>[^<]*<b>(\d+)</b>', text))
    assert found == {"all": str(len(rows))} | {status: "3" if status == "ok" else "1" for status in STATUSES}
    for status in STATUSES:
        assert f"#f-{status}:checked ~ .slides > li:not(.{status}) {{ display: none }}" in text
        assert text.count(f'<li class="{status}">') == int(found[status])


def test_names_and_errors_are_text_and_the_page_loads_only_its_pictures():
    found = page(slide_row(slide_id=EVIL, id=EVIL, status="failed", reason="error", detail=EVIL, notes=[EVIL], bad_tiles=[EVIL]))
    assert "script" not in found.tags and found.words.count(EVIL) == 5
    policy = next(value for name, value in found.attributes if name == "content" and "default-src" in value)
    assert policy == "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'"


def test_a_page_without_slides_says_so():
    found = page()
    assert "no slides" in found.words and not found.open


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mpp_source": "objective"}, ["scale estimated from the objective"]),
        ({"tissue_mm2": 0.0}, []),
        ({"tissue_mm2": 0.4}, ["little tissue"]),
        ({"tissue_mm2": 23.9}, ["tissue on 96% of the slide: is it?"]),
        ({"tissue_mm2": 12.0}, []),
    ],
)
def test_what_is_odd_about_a_slide_is_named(values, said):
    assert suspicions(slide_row(width=10_000, height=10_000, mpp=0.5) | values) == said


def test_pictures_lie_beside_the_page_and_are_drawn_once(tmp_path):
    rows = [seen_row(disc(radius=radius), slide_id=f"{radius}.svs") for radius in (40, 60, 80)]
    rows.append(slide_row(slide_id="bad.svs", status="failed", reason="unreadable"))
    target = write_page(iter(rows), tmp_path / "new", grids=GRIDS, title="slides")
    assert target == tmp_path / "new" / "index.html"
    pictures = sorted((tmp_path / "new" / "pictures").glob("*.jpg"))
    assert len(pictures) == 3
    text = target.read_text()
    assert all(text.count(f'src="pictures/{picture.name}"') == 1 for picture in pictures)
    assert text.count('loading="lazy"') == 3 and "no picture" in text and len(text) < 20_000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new" / "pictures").iterdir()}
    rows[0] |= {"embedded": 5}
    write_page(iter(rows), tmp_path / "new", grids=GRIDS, title="slides")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "new" / "pictures").iterdir()} == before
    write_page(iter(rows), tmp_path / "new", grids=[Grid(mpp=2.0)], title="slides")
    assert len(set((tmp_path / "new" / "pictures").glob("*.jpg")) - set(before)) == 3


def test_the_outline_of_each_slide_can_be_taken_to_qupath(tmp_path):
    row = seen_row(disc(), slide_id="a/one.svs") | {"bounds": [800, 600, 4000, 3000]}
    text = write_page([row], tmp_path, grids=GRIDS, title="slides").read_text()
    [outline] = (tmp_path / "pictures").glob("*.geojson")
    assert f'href="pictures/{outline.name}" download="one.geojson"' in text
    ring, here = (np.array(json.loads(found)["features"][0]["geometry"]["coordinates"][0]) for found in (outline.read_text(), row["contour"]))
    np.testing.assert_allclose(here - ring, np.broadcast_to([800, 600], ring.shape), atol=0.11)


def test_pictures_that_no_slide_shows_any_more_go_and_somebody_elses_stay(tmp_path):
    rows = [seen_row(disc(), slide_id="a/x y.svs"), seen_row(disc(radius=60), slide_id="b/x y.svs")]
    write_page(rows, tmp_path, grids=GRIDS, title="slides")
    first = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert len(first) == 4, "two slides of one name have pictures of their own"
    (tmp_path / "pictures" / "mine.jpg").write_bytes(b"")
    write_page(rows[:1], tmp_path, grids=[Grid(mpp=2.0)], title="slides")
    left = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert len(left) == 3 and "mine.jpg" in left and not left & first
