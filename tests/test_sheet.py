"""Contact sheets: complete, self-contained, escaped, and a picture that cannot be shown says why."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import sheet
from pipeline.search import Query

EVIL = "<script>alert('x')</script> & \"quoted\""


def jpeg(colour, size=(40, 30)):
    target = io.BytesIO()
    Image.new("RGB", size, colour).save(target, "JPEG")
    return target.getvalue()


def hits(*rows):
    schema = pa.schema(
        {"id": pa.string(), "similarity": pa.float32(), "uri": pa.string(), "text": pa.string(), "thumbnail": pa.binary(), "year": pa.int64()}
    )
    return pa.Table.from_pylist(list(rows), schema=schema)


def hit(**values):
    return {"id": "a", "similarity": 0.5, "uri": "", "text": None, "thumbnail": None, "year": 1999} | values


class Page(HTMLParser):
    """Tags that were opened and not closed, every attribute, all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def page(*sections, **settings):
    return Page(sheet.html(sections, title="photos", **settings))


def test_a_page_shows_query_similarity_text_uri_and_metadata():
    shown = page(
        sheet.section(
            Query(text="a red fox", where="year > 3"), hits(hit(id="fox", similarity=0.8125, text="one fox", uri="/x/fox.txt", thumbnail=jpeg("red")))
        )
    )
    for part in ("photos", "a red fox", "1 hit for this text", "year > 3", "1. fox", "0.812", "one fox", "/x/fox.txt", "year", "1999"):
        assert part in shown.words
    assert shown.open == []


def test_everything_from_the_table_is_escaped_and_nothing_is_loaded():
    evil = hit(id=EVIL, text=EVIL, uri=f"https://elsewhere/{EVIL}", thumbnail=jpeg("red"))
    section = sheet.section(Query(text=EVIL, where="id <> '<img src=x>'"), hits(evil))
    text = sheet.html([section], title=EVIL, subtitle=EVIL)
    shown = Page(text)
    assert "script" not in shown.tags
    assert shown.words.count(EVIL) >= 5
    assert [value for name, value in shown.attributes if name in ("src", "href") and not value.startswith("data:image/")] == []
    assert not re.search(r"url\(|@import|<link", text)
    assert "default-src 'none'" in text


def test_thumbnails_are_inside_the_page_unchanged():
    data = jpeg("blue")
    shown = page(sheet.section(Query(id="x"), hits(hit(thumbnail=data))))
    assert ("src", f"data:image/jpeg;base64,{base64.b64encode(data).decode()}") in shown.attributes


def test_a_picture_without_thumbnail_is_fetched_and_made_small(tmp_path):
    path = tmp_path / "Big.JPG"
    path.write_bytes(jpeg((10, 200, 30), size=(2000, 1000)))
    (card,) = sheet.cards(hits(hit(uri=str(path))))
    small = Image.open(io.BytesIO(card.picture))
    assert small.size == (320, 160)
    assert np.allclose(np.asarray(small)[80, 160], (10, 200, 30), atol=4)
    assert card.missing == ""


def test_a_picture_that_is_gone_or_broken_says_why(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    section = sheet.section(Query(text="x"), hits(hit(uri="/gone/away.jpg"), hit(uri=str(tmp_path / "broken.png")), hit(uri="table.parquet#7")))
    assert [card.missing for card in section.cards] == ["no picture: missing", "no picture: not an image", "no picture"]
    assert page(section).words.count("no picture") == 3


def test_a_text_stands_where_a_picture_would_be():
    section = sheet.section(Query(text="x"), hits(hit(text="words to read", uri="corpus.parquet#3")))
    assert section.cards[0].missing == ""
    assert page(section).words.count("words to read") == 1


def test_the_query_picture_stands_above(tmp_path):
    path = tmp_path / "query.png"
    Image.new("RGB", (50, 50), "purple").save(path)
    by_image = sheet.section(Query(image=str(path)), hits())
    by_id = sheet.section(Query(id="a"), hits(), row={"uri": str(path), "thumbnail": None})
    assert by_image.picture == by_id.picture
    assert "img" in page(by_image).tags
    assert sheet.section(Query(vector=[1.0, 0.0]), hits()).words == "2 numbers"


def test_several_queries_are_sections_and_one_without_hits_says_so():
    shown = page(sheet.section(Query(text="one"), hits(hit())), sheet.section(Query(text="two"), hits()))
    assert shown.tags.count("section") == 2
    assert "Nothing was found." in shown.words


def test_hits_without_optional_columns_are_shown():
    bare = pa.table({"id": ["a"], "similarity": pa.array([0.5], pa.float32())})
    assert "1. a" in page(sheet.section(Query(text="x"), bare)).words


def test_a_png_holds_the_pictures_at_their_places():
    colours = [(220, 20, 20), (20, 180, 20), (20, 20, 220)]
    section = sheet.section(Query(text="colours"), hits(*[hit(thumbnail=jpeg(colour, size=(240, 180))) for colour in colours]))
    image = np.asarray(Image.open(io.BytesIO(sheet.png([section], title="photos", columns=2))).convert("RGB")).astype(int)
    assert image.shape[1] == sheet.GAP_PX + 2 * (sheet.CELL_PX + sheet.GAP_PX)
    found = [np.argwhere((abs(image - colour) < 6).all(axis=2)) for colour in colours]
    assert all(len(places) >= 0.95 * 240 * 180 for places in found)
    (red, green, blue) = (places.mean(axis=0) for places in found)
    assert abs(red[0] - green[0]) < 3, "the first two are beside each other"
    assert red[1] < green[1]
    assert abs(red[1] - blue[1]) < 3, "the third is in the next row"
    assert red[0] < blue[0]


def test_a_png_of_texts_other_scripts_and_no_hits_is_made(tmp_path):
    sections = [sheet.section(Query(text="狐 and fox"), hits(hit(text="狐 " * 100, similarity=-0.2))), sheet.section(Query(text="two"), hits())]
    image = Image.open(io.BytesIO(sheet.png(sections, title="photos")))
    assert image.format == "PNG"
    assert image.height < 700
