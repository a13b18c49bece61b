import pytest

from pipeline.config import ConfigError
from pipeline.readers.text import TextFiles
from pipeline.testing import check_reader


def read(reader):
    return [row for table in reader.read(reader.split(reader.list())) for row in table.to_pylist()]


def test_the_contract_is_kept(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten " * 5)
    (tmp_path / "b.md").write_text("a short one")
    check_reader(TextFiles(str(tmp_path), chunk_tokens=8, overlap_tokens=2))


def test_passages_overlap_and_say_where_they_are(tmp_path):
    text = " ".join(f"w{i}" for i in range(20))
    (tmp_path / "a.txt").write_text(text)
    rows = read(TextFiles(str(tmp_path), chunk_tokens=8, overlap_tokens=2))
    assert [row["text"].split()[0] for row in rows] == ["w0", "w6", "w12"]
    assert rows[-1]["text"].split()[-1] == "w19"
    assert all(text[row["start"] : row["stop"]] == row["text"] for row in rows)


def test_a_file_that_is_no_text_or_empty_is_one_reject(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00\x01" * 9)
    (tmp_path / "empty.txt").write_text("")
    rows = read(TextFiles(str(tmp_path)))
    assert sorted(bool(row.get("reject_reason")) for row in rows) == [False, True, True]


def test_an_overlap_as_long_as_the_passage_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="overlap_tokens"):
        TextFiles(str(tmp_path), chunk_tokens=8, overlap_tokens=8)
