import csv
import gzip
import io

import pytest

from pipeline.config import ConfigError
from pipeline.readers.csv import Csv
from pipeline.testing import check_reader
from tests.readers.reading import read_all, rejects


def body(rows, **options):
    target = io.StringIO(newline="")
    csv.writer(target, **options).writerows(rows)
    return target.getvalue().encode()


def test_open_clips_convention(tmp_path):
    (tmp_path / "train.csv").write_text("filepath\ttitle\nimg/a.jpg\ta cat, asleep\n/abs/b.jpg\t\n")
    reader = Csv(str(tmp_path), delimiter="\t", image_uri="filepath", text="title")
    check_reader(reader)
    assert [(row["image_uri"], row["text"]) for row in read_all(reader)] == [(f"{tmp_path}/img/a.jpg", "a cat, asleep"), ("/abs/b.jpg", None)]


def test_quotes_line_ends_and_a_byte_order_mark(tmp_path):
    texts = ["plain", 'say "hi"', "two\nlines", "cr\r\nlf", "comma, here", "ünï", " padded ", "\n\n\n", "last"]
    rows = [["key", "text"], *([str(i), text] for i, text in enumerate(texts))]
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + body(rows))
    (tmp_path / "y.csv.gz").write_bytes(gzip.compress(body([["text", "key"], ["packed", "p"]], lineterminator="\n")))
    (tmp_path / "z.tsv").write_bytes(body([["key", "text"], ["t", "a\ttab"]], delimiter="\t"))
    reader = Csv(str(tmp_path), id="key", text="text")
    check_reader(reader)
    found = read_all(reader)
    assert [row["text"] for row in found] == [*texts, "packed", "a\ttab"]
    assert rejects(found) == [("empty", "a text of only white space")]


def test_spaces_around_the_header_and_after_the_commas(tmp_path):
    (tmp_path / "x.csv").write_text('key , text , n\n1, a cat , 5\n2, "a, b", 6\n')
    reader = Csv(str(tmp_path), id="key", text="text", metadata={"n": "int64"})
    check_reader(reader)
    assert [(row["id"], row["text"], row["n"]) for row in read_all(reader)] == [("1", "a cat ", 5), ("2", "a, b", 6)]


def test_malformed_rows_are_rejects_that_name_their_line_and_the_rest_goes_on(tmp_path):
    raw = (
        b'key,text,n\n1,good,1\n2,few\n3,too,many,fields\n4,"stray,1\n5,fine,2\n6,"a""b" c,3\n7,\xff,4\n8,x,soon\n9,"two\nlines",\n,no id,1\nend,ok,3'
    )
    (tmp_path / "x.csv").write_bytes(raw)
    reader = Csv(str(tmp_path), id="key", text="text", metadata={"n": "int64"})
    check_reader(reader)
    found = read_all(reader)
    assert [(row["id"], row["text"], row["n"]) for row in found if not row["reject_reason"]] == [
        ("1", "good", 1),
        ("5", "fine", 2),
        ("9", "two\nlines", None),
        ("end", "ok", 3),
    ]
    expected = [
        "line 3: 2 fields, and the header has 3",
        "line 4: 4 fields",
        "line 5: ",
        "line 7: ",
        "line 8: ",
        "'n' is not int64: 'soon'",
        "'key' is null",
    ]
    for (reason, detail), part in zip(rejects(found), expected, strict=True):
        assert reason == "bad_row" and part in detail


def test_a_quote_that_never_closes_costs_one_line(tmp_path):
    rows = [f"{i},text {i}" for i in range(3000)]
    rows[1500] = '1500,"never closed'
    (tmp_path / "x.csv").write_text("\n".join(["key,text", *rows]))
    found = read_all(Csv(str(tmp_path), id="key", text="text"))
    assert len(found) == 3000 and len(rejects(found)) == 1
    assert found[1500]["reject_detail"].startswith("line 1502: ")


def test_slices_of_quoted_records_cover_the_file(tmp_path):
    rows = [[str(i), f"text\n{i}, " + '"' * (i % 3)] for i in range(20_000)]
    (tmp_path / "x.csv").write_bytes(body([["key", "text"], *rows]))
    reader = Csv(str(tmp_path), id="key", text="text")
    check_reader(reader)
    work = reader.split(reader.list())
    assert work.num_rows == 3
    assert [[row["id"], row["text"]] for row in read_all(reader)] == rows
    fresh = list(Csv(str(tmp_path), id="key", text="text").read(work.slice(2, 1)))
    assert fresh[0]["id"][0].as_py() == "16384"


def test_a_document_longer_than_pythons_own_limit_is_read(tmp_path):
    (tmp_path / "x.csv").write_bytes(body([["key", "text"], ["1", "word " * 100_000]]))
    assert len(read_all(Csv(str(tmp_path), id="key", text="text"))[0]["text"]) == 500_000


def test_files_may_order_their_columns_differently_or_lack_some(tmp_path):
    (tmp_path / "a.csv").write_text("key,text\n1,one\n")
    (tmp_path / "b.csv").write_text("text,key,more\ntwo,2,x\n")
    (tmp_path / "c.csv").write_text("key\n3\n")
    (tmp_path / "d.csv").touch()
    (tmp_path / "e.csv").write_text("key,text\n")
    reader = Csv(str(tmp_path), id="key", text="text")
    check_reader(reader)
    found = read_all(reader)
    assert [(row["id"], row["text"]) for row in found] == [("1", "one"), ("2", "two"), ("3", None)]
    assert rejects(found) == [("bad_row", "there is no column 'text'")]


def test_wrong_settings_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("filepath,title\n1,one\n")
    with pytest.raises(ConfigError, match=r"no column 'tilte'; did you mean 'title'\?"):
        Csv(str(tmp_path), text="tilte").list()
    with pytest.raises(ConfigError, match="one character"):
        Csv(str(tmp_path), text="title", delimiter="\\t")
