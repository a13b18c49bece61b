import hashlib
import json

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.readers.images import Images
from pipeline.testing import check_reader
from tests.readers.reading import read_all, rejects


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path, {"a.jpg": "1", "deep/ü b#?.PNG": "2", "c.jpeg": "3", "notes.txt": "x", "a.txt": " a cat\n", "c.txt": b"\xef\xbb\xbfein Hund"})
    return tmp_path


def test_every_image_is_an_item_whose_id_is_a_hash_of_its_place(folder):
    reader = Images(str(folder))
    check_reader(reader)
    rows = read_all(reader)
    assert [row["uri"].removeprefix(f"{folder}/") for row in rows] == ["a.jpg", "c.jpeg", "deep/ü b#?.PNG"]
    assert all(row["uri"] == row["image_uri"] and row["image"] is None and row["text"] is None for row in rows)
    assert [row["id"] for row in rows] == [hashlib.blake2b(row["uri"].encode(), digest_size=16).hexdigest() for row in rows]
    assert reader.source == str(folder) and Images(str(folder), name="cats").source == "cats"


def test_more_uris_than_one_array_of_strings_may_hold_are_listed(folder, monkeypatch):
    """The bug: 2 GiB of URIs, of 21 million images, were joined to one array: ArrowInvalid. Here they are fewer and longer."""
    uris = pa.array([f"/{n:065535}" for n in range(64)])
    table = pa.table({"unit": pa.chunked_array([uris] * 520), "version": ["1"] * 33_280, "bytes": [1] * 33_280}, schema=storage.FOUND)
    assert table["unit"].nbytes > 2**31
    monkeypatch.setattr(storage, "find", lambda *arguments, **settings: table)
    listed = Images(str(folder)).list()
    assert listed["id"][:64].equals(listed["id"][64 * 519 :])
    assert listed["id"][1].as_py() == hashlib.blake2b(uris[1].as_py().encode(), digest_size=16).hexdigest()


def test_captions_come_from_text_files_beside_the_images(folder):
    reader = Images(str(folder), captions="txt")
    check_reader(reader)
    assert [row["text"] for row in read_all(reader)] == ["a cat", "ein Hund", None]
    for place in (f"{folder}/*.jpg", f"{folder}/a.jpg"):
        assert [row["text"] for row in read_all(Images(place, captions="txt"))] == ["a cat"]


def test_an_image_changes_when_its_caption_does(folder):
    reader = Images(str(folder), captions="txt")
    before = reader.list()["version"].to_pylist()
    fill(folder, {"c.txt": "another dog", "notes.txt": "changed as well"})
    after = reader.list()["version"].to_pylist()
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]
    (folder / "c.txt").unlink()
    assert reader.list()["version"][1].as_py() not in (before[1], after[1])


def test_json_beside_the_images_gives_captions_and_metadata(tmp_path):
    good = {"caption": "a cat", "year": 1999, "tags": ["x", "y"], "score": 0.5}
    files = {
        "a.jpg": "", "a.json": json.dumps(good),
        "b.jpg": "", "b.json": '{"caption": null}',
        "c.jpg": "", "c.json": '{"caption": "cut off',
        "d.jpg": "", "d.json": '{"captoin": "x"}',
        "e.jpg": "", "e.json": '{"caption": "x", "year": "soon"}',
        "f.jpg": "", "f.json": '{"caption": 5}',
        "g.jpg": "", "g.json": '{"caption": "\\ud800"}',
        "h.jpg": "", "h.json": b'{"caption": "\xff"}',
        "i.jpg": "", "i.json": "[]",
        "j.jpg": "",
    }  # fmt: skip
    fill(tmp_path, files)
    reader = Images(str(tmp_path), captions="json", metadata={"year": "int64", "tags": "list<string>", "score": "float32"})
    check_reader(reader)
    assert reader.metadata == pa.schema([("year", pa.int64()), ("tags", pa.list_(pa.string())), ("score", pa.float32())])
    rows = read_all(reader)
    assert [(row["text"], row["year"], row["tags"], row["score"]) for row in rows[:2]] == [("a cat", 1999, ["x", "y"], 0.5), (None,) * 4]
    assert [bool(row["reject_reason"]) for row in rows] == [False, False, *[True] * 7, False]
    details = [detail for _, detail in rejects(rows)]
    for detail, part in zip(
        details, ["Unterminated", "did you mean 'captoin'", "'year' is not int64", "no text: 5", "no text", "decode", "no key"], strict=True
    ):
        assert part in detail
    assert {reason for reason, _ in rejects(rows)} == {"bad_row"}


def test_a_caption_that_vanishes_after_the_listing_rejects_its_image_alone(folder):
    reader = Images(str(folder), captions="txt")
    work = reader.list()
    (folder / "a.txt").unlink()
    rows = next(iter(reader.read(work))).to_pylist()
    assert [row["reject_reason"] for row in rows] == ["bad_row", None, None]


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path):
    fill(tmp_path, {"a.txt": "x"})
    with pytest.raises(ConfigError, match=r"'text'; did you mean 'txt'\?"):
        Images(str(tmp_path), captions="text")
    with pytest.raises(ConfigError, match="set captions: json"):
        Images(str(tmp_path), metadata={"year": "int64"})
    with pytest.raises(ConfigError, match="'source' has a name that the vector table uses itself"):
        Images(str(tmp_path), captions="json", metadata={"source": "string"})
    with pytest.raises(ConfigError, match=r"'int46' is no type of a metadata column; did you mean 'int64'\?"):
        Images(str(tmp_path), captions="json", metadata={"year": "int46"})
    with pytest.raises(ConfigError, match="and no image"):
        Images(str(tmp_path), captions="txt").list()
    fill(tmp_path, {"a.jpg": "x"})
    with pytest.raises(ConfigError, match="no file ending in"):
        Images(str(tmp_path), captions="json").list()


def test_a_captions_ending_counts_in_any_case(tmp_path):
    """IMG.TXT was an image of its own, and IMG.JPG had no text."""
    fill(tmp_path, {"IMG.JPG": "1", "IMG.TXT": "loud", "a.jpg": "2", "a.txt": "quiet", "b.jpg": "3", "b.txt": "this", "b.TXT": "not this"})
    for place in (str(tmp_path), [f"{tmp_path}/*.JPG", f"{tmp_path}/*.jpg"], [f"{tmp_path}/{name}" for name in ("IMG.JPG", "a.jpg", "b.jpg")]):
        reader = Images(place, captions="txt")
        check_reader(reader)
        assert [row["text"] for row in read_all(reader)] == ["loud", "quiet", "this"]


def test_images_that_are_named_need_no_caption_each(folder):
    """The missing file beside one of them was an error, against what the docstring says."""
    places = [f"{folder}/a.jpg", f"{folder}/deep/ü b#?.PNG"]
    reader = Images(places, captions="txt")
    check_reader(reader)
    assert [row["text"] for row in read_all(reader)] == ["a cat", None]
    with pytest.raises(ConfigError, match=r"no file ending in \.txt"):
        Images(places[1:], captions="txt").list()
