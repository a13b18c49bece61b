import base64
import gzip
import json
import pickle

import pyarrow as pa
import pytest

from pipeline.config import ConfigError
from pipeline.readers import lines
from pipeline.readers.jsonl import JsonLines
from pipeline.testing import check_reader
from tests.readers.reading import read_all, rejects


def write(path, rows, pack=False):
    body = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(body) if pack else body)


def captions(count, start=0):
    return [{"key": i, "text": f"caption {i}"} for i in range(start, start + count)]


@pytest.mark.parametrize("pack", [False, True])
def test_lines_become_items(tmp_path, pack):
    picture = base64.b64encode(b"jpeg").decode()
    rows = [
        {"key": "a", "text": "été", "year": 1999, "extra": {"x": [1]}},
        {"key": "b", "image": picture, "extra": "plain"},
        {"key": "c", "image": f"data:image/jpeg;base64,{picture}"},
        {"key": 7, "path": "sub/x.jpg"},
    ]
    write(tmp_path / ("x.jsonl.gz" if pack else "x.jsonl"), rows, pack)
    reader = JsonLines(str(tmp_path), id="key", text="text", image="image", image_uri="path", metadata={"year": "int64"})
    check_reader(reader)
    a, b, c, d = read_all(reader)
    assert (a["id"], a["text"], a["year"], a["image"]) == ("a", "été", 1999, None)
    assert b["image"] == c["image"] == b"jpeg"
    assert (d["id"], d["image_uri"]) == ("7", f"{tmp_path}/sub/x.jpg")
    extra = read_all(JsonLines(str(tmp_path), text="text", image="image", image_uri="path", metadata=["extra"]))
    assert [row["extra"] for row in extra] == ['{"x": [1]}', "plain", None, None]


def test_malformed_lines_are_rejects_that_name_their_line(tmp_path):
    rows = [
        b"\xef\xbb\xbf" + json.dumps({"text": "bom"}).encode(),
        b"",
        b'{"text": "cut',
        b"  ",
        b'["text"]',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": " "}',
        b"[" * 100_000,
        {"text": "last"},
    ]
    write(tmp_path / "x.jsonl", rows)
    reader = JsonLines(str(tmp_path), text="text")
    check_reader(reader)
    found = read_all(reader)
    assert [row["text"] for row in found if not row["reject_reason"]] == ["bom", "last"]
    expected = [
        "line 3: column 10: Unterminated",
        "line 5: a JSON object",
        "'text' is not string: 5",
        "line 7: 'utf-8'",
        "ud800",
        "white space",
        "line 10: ",
    ]
    for (_, detail), part in zip(rejects(found), expected, strict=True):
        assert part in detail
    assert [reason for reason, _ in rejects(found)].count("empty") == 1


def test_ids_are_stable_and_versions_follow_the_content(tmp_path):
    write(tmp_path / "a.jsonl", captions(5))
    reader = JsonLines(str(tmp_path), id="key", text="text")
    before = {row["id"]: row["version"] for row in read_all(reader)}
    write(tmp_path / "a.jsonl", captions(2))
    write(tmp_path / "b.jsonl", [{"text": "changed", "key": 2}, *captions(2, 3)])
    after = {row["id"]: row["version"] for row in read_all(reader)}
    assert set(after) == set(before)
    assert [id for id in before if before[id] != after[id]] == ["2"]


@pytest.mark.parametrize("pack", [False, True])
def test_slices_start_anywhere_with_or_without_the_offsets(tmp_path, pack):
    rows = captions(20_000)
    rows.insert(9000, b"")
    write(tmp_path / ("x.jsonl.gz" if pack else "x.jsonl"), rows, pack)
    reader = JsonLines(str(tmp_path), id="key", text="text")
    check_reader(reader)
    work = reader.split(reader.list())
    assert work["start"].to_pylist() == [0, 8192, 16384] and work["stop"].to_pylist() == [8192, 16384, 20_000]
    fresh = JsonLines(str(tmp_path), id="key", text="text")
    expected = [row["text"] for row in captions(20_000)]
    for one in (reader, pickle.loads(pickle.dumps(reader)), fresh):
        parts = [table for index in (2, 0, 1) for table in one.read(work.slice(index, 1))]
        texts = [text for table in parts for text in table["text"].to_pylist()]
        assert texts == expected[16384:] + expected[:16384]


def test_a_slice_is_read_from_where_it_starts(tmp_path, monkeypatch):
    write(tmp_path / "x.jsonl", captions(20_000))
    reader = JsonLines(str(tmp_path), id="key", text="text")
    work = reader.split(reader.list())
    seen = []
    plain = lines.lines
    monkeypatch.setattr(lines, "lines", lambda file, start: (seen.append(line) or line for line in plain(file, start)))
    list(reader.read(work.slice(2, 1)))
    assert seen[0].number == 16_385


def test_a_slice_holds_at_most_about_64_mib(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_SLICE_BYTES", 1000)
    write(tmp_path / "x.jsonl", captions(1000))
    reader = JsonLines(str(tmp_path), id="key", text="text")
    check_reader(reader)
    assert all(part["bytes"] < 1100 for part in reader.split(reader.list()).to_pylist())


def test_a_damaged_gzip_file_gives_what_can_be_read_and_one_reject(tmp_path):
    write(tmp_path / "a.jsonl.gz", captions(5000), pack=True)
    write(tmp_path / "b.jsonl.gz", captions(5, 5000), pack=True)
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip")
    reader = JsonLines(str(tmp_path), id="key", text="text")
    check_reader(reader)
    found = read_all(reader)
    good = [row for row in found if not row["reject_reason"]]
    assert 1000 < len(good) < 5000 and len(rejects(found)) in (2, 3)
    assert any("the rest of the file cannot be read" in detail for _, detail in rejects(found))


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    write(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b" * 5000}, {"text": "c" * 980}, {"text": "d"}])
    reader = JsonLines(str(tmp_path), text="text")
    check_reader(reader)
    found = read_all(reader)
    assert [row["reject_reason"] for row in found] == [None, "too_many_bytes", None, None]
    assert "line 2: longer than 1000 bytes" in found[1]["reject_detail"] and "whatever limits.max_item_bytes is" in found[1]["reject_detail"]


def test_half_a_character_in_an_id_costs_its_row_alone(tmp_path):
    """It failed the whole chunk, on every run."""
    write(tmp_path / "x.jsonl", [{"key": "a", "text": "x"}, b'{"key": "\\ud800", "text": "y"}', {"key": 7, "text": "z"}])
    for reader in (JsonLines(str(tmp_path), id="key", text="text"), JsonLines(str(tmp_path), version="key", text="text")):
        check_reader(reader)
        assert [reason for reason, _ in rejects(read_all(reader))] == ["bad_row"]
    assert [row["id"] for row in read_all(JsonLines(str(tmp_path), id="key", text="text"))][::2] == ["a", "7"]


def test_a_wrong_key_is_named_before_the_run(tmp_path):
    write(tmp_path / "x.jsonl", [b"broken", {"caption": "x"}, {"url": "y"}])
    with pytest.raises(ConfigError, match=r"no column 'captoin'; did you mean 'caption'\?; it has 'caption', 'url'"):
        JsonLines(str(tmp_path), text="captoin").list()
    reader = JsonLines(str(tmp_path), text="caption", image_uri="url", metadata={"n": "int64"})
    assert reader.metadata == pa.schema([("n", pa.int64())])


def test_empty_and_vanished_files(tmp_path):
    (tmp_path / "a.jsonl").touch()
    write(tmp_path / "b.jsonl", captions(3))
    reader = JsonLines(str(tmp_path), id="key", text="text")
    check_reader(reader)
    work = reader.split(reader.list())
    (tmp_path / "b.jsonl").unlink()
    found = [row for table in reader.read(work) for row in table.to_pylist()]
    assert [row["reject_reason"] for row in found] == ["unreadable"] * 3
