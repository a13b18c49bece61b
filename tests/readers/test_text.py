import tracemalloc

import pytest

from pipeline.config import ConfigError
from pipeline.readers import text as reading
from pipeline.readers.identity import position_ids
from pipeline.readers.text import TextFiles
from pipeline.testing import check_reader
from tests.readers.reading import read_all, rejects


def reference_passages(text, size, overlap):
    """Windows of words, the slow way: the next starts `overlap` words before the last ended, until the end is reached."""
    words = text.split()
    passages, first = [], 0
    while True:
        passages.append(words[first : first + size])
        if first + size >= len(words):
            return passages
        first += size - overlap


@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (5, 0), (5, 2), (5, 4), (7, 3), (100, 10)])
@pytest.mark.parametrize("count", [1, 4, 5, 6, 7, 8, 9, 10, 11, 100])
def test_passages_are_windows_of_words(tmp_path, size, overlap, count):
    text = "\n ".join(f"wörd{i} 𝄞" for i in range(count))
    (tmp_path / "a b#.txt").write_text(text)
    rows = read_all(TextFiles(str(tmp_path), chunk_tokens=size, overlap_tokens=overlap))
    assert [row["text"].split() for row in rows] == reference_passages(text, size, overlap)
    assert all(text[row["start"] : row["stop"]] == row["text"] for row in rows)


def test_files_of_all_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.MD").write_bytes(b"\xef\xbb\xbf# title\n\nwords")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.txt").touch()
    (tmp_path / "e.txt").write_text(" \n")
    (tmp_path / "f.pdf").write_text("no")
    reader = TextFiles(str(tmp_path), chunk_tokens=3, overlap_tokens=1)
    check_reader(reader)
    rows = read_all(reader)
    assert [row["text"] for row in rows if not row["reject_reason"]] == ["one two three", "three four five", "# title\n\nwords"]
    assert [reason for reason, _ in rejects(rows)] == ["bad_row", "empty", "empty"]
    assert [row["id"] for row in rows[:2]] == position_ids(f"{tmp_path}/a.txt", 0, 2).to_pylist()


def test_another_way_of_cutting_is_another_version(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    versions = {TextFiles(str(tmp_path), chunk_tokens=size, overlap_tokens=1).list()["version"][0].as_py() for size in (2, 3, 4)}
    assert len(versions) == 3


def test_tokens_of_the_encoder_bound_each_passage(tmp_path, assets):
    """The two tokens that the tokenizer adds were not counted: the encoder cut the ends of full passages off."""
    from transformers import AutoTokenizer

    text = " ".join(f"Unbelievable pathology number{i}, naïve—and 漢字!" for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    reader = TextFiles(str(tmp_path), tokenizer=str(assets / "encoder/sentence"), chunk_tokens=50, overlap_tokens=10)
    check_reader(reader)
    rows = read_all(reader)
    tokenizer = AutoTokenizer.from_pretrained(assets / "encoder/sentence")
    expected = reference_tokens(tokenizer, text, size=48, overlap=10)
    assert [(row["start"], row["stop"]) for row in rows] == expected and len(rows) > 10
    assert all(text[row["start"] : row["stop"]] == row["text"] for row in rows)
    covered = {place for row in rows for place in range(row["start"], row["stop"])}
    assert all(character.isspace() for place, character in enumerate(text) if place not in covered)
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in rows]
    assert max(lengths) <= 52  # a word that is cut apart can need a token more on either side
    with pytest.raises(ConfigError, match="must be more than these and overlap_tokens=10 together"):
        read_all(TextFiles(str(tmp_path), tokenizer=str(assets / "encoder/sentence"), chunk_tokens=12, overlap_tokens=10))


def reference_tokens(tokenizer, text, *, size, overlap):
    """Where windows of tokens start and end in the text, the slow way: as for words."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found, first = [], 0
    while True:
        window = spans[first : first + size]
        found.append((window[0][0], window[-1][1]))
        if first + size >= len(spans):
            return found
        first += size - overlap


def test_a_long_text_goes_to_the_tokenizer_in_pieces(tmp_path, assets, monkeypatch):
    """Whole, a file of 64 MiB took some 200 bytes for each of its tokens."""
    (tmp_path / "a.txt").write_text(" ".join(f"Unbelievable pathology\nnumber{i}, naïve 漢字!" for i in range(60)))
    whole = read_all(TextFiles(str(tmp_path), tokenizer=str(assets / "encoder/sentence"), chunk_tokens=50, overlap_tokens=10))
    monkeypatch.setattr(reading, "PIECE", 100)
    assert read_all(TextFiles(str(tmp_path), tokenizer=str(assets / "encoder/sentence"), chunk_tokens=50, overlap_tokens=10)) == whole
    (tmp_path / "a.txt").write_text("一" * 250)  # no white space anywhere
    rows = read_all(TextFiles(str(tmp_path), tokenizer=str(assets / "encoder/sentence"), chunk_tokens=52, overlap_tokens=0))
    assert [(row["start"], row["stop"]) for row in rows] == [(0, 50), (50, 100), (100, 150), (150, 200), (200, 250)]


def peak_of(work):
    """Most bytes that Python and NumPy held at once."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_large_files_are_planned_a_few_at_a_time(tmp_path, monkeypatch):
    """Planning held 64 of them at once, of up to 64 MiB each."""
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 2**20)
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * 600_000)
    reader = TextFiles(str(tmp_path))
    units = reader.list()
    assert 600_000 < peak_of(lambda: reader.split(units)) < 4 * 600_000
    assert reader.split(units)["unit"].to_pylist() == units["unit"].to_pylist()


def test_short_words_cost_a_few_bytes_each(tmp_path):
    """Where they are was kept in Python's numbers, 128 bytes a word: 4 GB for a file of 64 MiB."""
    words = 2**18
    (tmp_path / "a.txt").write_bytes(b"a " * words)
    reader = TextFiles(str(tmp_path), chunk_tokens=8000, overlap_tokens=0)
    units = reader.list()
    assert peak_of(lambda: reader.split(units)) < 40 * words


def test_many_passages_are_many_slices(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 20_000)
    reader = TextFiles(str(tmp_path), chunk_tokens=1, overlap_tokens=0)
    check_reader(reader)
    assert reader.split(reader.list())["stop"].to_pylist() == [8192, 16_384, 20_000]


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="less than chunk_tokens=10"):
        TextFiles(str(tmp_path), chunk_tokens=10, overlap_tokens=10)
    (tmp_path / "a.txt").write_text("one")
    reader = TextFiles(str(tmp_path), tokenizer=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        reader.split(reader.list())


def test_a_file_that_shrank_or_went_after_the_listing_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four")
    reader = TextFiles(str(tmp_path), chunk_tokens=1, overlap_tokens=0)
    work = reader.split(reader.list())
    (tmp_path / "a.txt").write_text("one")
    rows = [row for table in reader.read(work) for row in table.to_pylist()]
    assert [row.get("reject_reason") for row in rows] == [None, *["unreadable"] * 3]
    (tmp_path / "a.txt").unlink()
    assert [row["reject_reason"] for table in reader.read(work) for row in table.to_pylist()] == ["unreadable"] * 4
