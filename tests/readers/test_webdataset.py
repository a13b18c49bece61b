import functools
import io
import json
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import webdataset

from pipeline.config import ConfigError
from pipeline.readers import lines
from pipeline.readers.webdataset import WebDataset, expand
from pipeline.testing import check_reader
from tests.readers.reading import read_all, rejects


def shard(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def samples(count, start=0):
    for i in range(start, start + count):
        yield from [(f"{i:06}.jpg", b"jpeg %d" % i), (f"{i:06}.txt", b"caption %d" % i), (f"{i:06}.json", json.dumps({"n": i}).encode())]


def test_members_of_one_key_are_one_item(tmp_path):
    files = [
        ("./deep/a b#.jpg", b"A"), ("./deep/a b#.txt", "ü".encode()), ("./deep/a b#.json", b'{"n": 5, "caption": "from json"}'),
        ("b.cls", b"0"), ("b.webp", b"B"), ("b.png", b"P"),
        ("c.txt", b"only text"),
        ("d.JPEG", b"D"), ("d.seg.png", b"no"), ("x" * 150 + ".jpg", b"long name"),
    ]  # fmt: skip
    shard(tmp_path / "s.tar", files)
    reader = WebDataset(str(tmp_path / "s.tar"), metadata={"n": "int64"})
    check_reader(reader)
    rows = read_all(reader)
    assert [(row["image"], row["text"], row["n"]) for row in rows] == [
        (b"A", "ü", 5), (b"P", None, None), (None, "only text", None), (b"D", None, None), (b"long name", None, None)
    ]  # fmt: skip
    assert rows[0]["uri"] == f"{tmp_path}/s.tar#./deep/a b#"
    assert [row["text"] for row in read_all(WebDataset(str(tmp_path / "s.tar"), json_field="caption"))] == ["from json", None, None, None, None]
    assert [row["image"] for row in read_all(WebDataset(str(tmp_path / "s.tar"), image="webp;png"))][1] == b"B"


def test_an_ending_that_no_sample_has_is_named(tmp_path):
    """Every sample was embedded without its image, or without its text."""
    (tmp_path / "0.tar").write_bytes(b"damaged" * 200)
    shard(tmp_path / "1.tar", [("a.tif", b"A"), ("a.txt", b"one"), ("a.json", b'{"caption": "uno"}')])
    with pytest.raises(ConfigError, match=r"no sample has a member \.jgp; they have \.json, \.tif, \.txt; correct `image`, or set it to null"):
        WebDataset(str(tmp_path), image="jgp").list()
    with pytest.raises(ConfigError, match=r"no sample has a member \.jpg or .*; they have"):
        WebDataset(str(tmp_path)).list()
    with pytest.raises(ConfigError, match=r"no sample has a member \.cap; .* correct `text`"):
        WebDataset(str(tmp_path), image="tif", text="cap").list()
    with pytest.raises(ConfigError, match=r"no \.json has a key 'captoin'; did you mean 'caption'\?"):
        WebDataset(str(tmp_path), image=None, json_field="captoin").list()
    assert [row["text"] for row in read_all(WebDataset(str(tmp_path), image="tif;jpg"))][1:] == ["one"]
    shard(tmp_path / "1.tar", [("a.txt", b"one")])
    assert WebDataset(str(tmp_path)).list().num_rows == 2


def test_the_samples_are_those_of_the_webdataset_package(tmp_path):
    shard(tmp_path / "s.tar", samples(50))
    theirs = [(s["jpg"], s["txt"].decode(), json.loads(s["json"])["n"]) for s in webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)]
    ours = [(row["image"], row["text"], row["n"]) for row in read_all(WebDataset(str(tmp_path / "s.tar"), metadata={"n": "int64"}))]
    assert ours == theirs


def test_braces_and_double_colons(tmp_path):
    assert expand("s3://b/{008..011}.tar") == ["s3://b/008.tar", "s3://b/009.tar", "s3://b/010.tar", "s3://b/011.tar"]
    assert expand("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"] and expand("plain.tar") == ["plain.tar"]
    # As bash does: a range may fall, the longer end says how many zeros, letters and steps count.
    assert expand("{10..08}") == ["10", "09", "08"] and expand("{01..100}")[::99] == ["001", "100"]
    assert expand("{a..c}") == ["a", "b", "c"] and expand("{0..8..2}") == ["0", "2", "4", "6", "8"] and expand("a{b.tar") == ["a{b.tar"]
    for i in range(12):
        shard(tmp_path / f"train/{i:03}.tar", samples(2, 2 * i))
    shard(tmp_path / "val/000.tar", samples(2))
    reader = WebDataset(f"{tmp_path}/train/{{000..011}}.tar::{tmp_path}/val/000.tar")
    check_reader(reader)
    rows = read_all(reader)
    assert len(rows) == len({row["id"] for row in rows}) == 26
    with pytest.raises(ConfigError, match=rf"9 of 11 shards do not exist, the first is {tmp_path}/train/012.tar"):
        WebDataset(f"{tmp_path}/train/{{010..020}}.tar").list()
    with pytest.raises(ConfigError, match=r"014.tar does not exist"):
        WebDataset(f"{tmp_path}/train/{{014..015}}.tar").list()
    with pytest.raises(ConfigError, match="commands are not run"):
        WebDataset("pipe:aws s3 cp s3://b/x.tar -").list()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_slices_start_anywhere(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(lines, "MAX_SLICE_ROWS", 10)
    place = tmp_path / ("s.tar.gz" if mode == "w:gz" else "s.tar")
    shard(place, samples(35), mode)
    reader = WebDataset(str(place))
    check_reader(reader)
    work = reader.split(reader.list())
    assert work["stop"].to_pylist() == [10, 20, 30, 35]
    for one in (reader, WebDataset(str(place))):
        texts = [text for index in (3, 1) for table in one.read(work.slice(index, 1)) for text in table["text"].to_pylist()]
        assert texts == [f"caption {i}" for i in [*range(30, 35), *range(10, 20)]]


def test_ids_are_stable_when_samples_are_added_before(tmp_path):
    shard(tmp_path / "s.tar", samples(3, 1))
    before = {row["text"]: (row["id"], row["version"]) for row in read_all(WebDataset(str(tmp_path)))}
    shard(tmp_path / "s.tar", samples(4))
    after = {row["text"]: (row["id"], row["version"]) for row in read_all(WebDataset(str(tmp_path)))}
    assert {text: after[text] for text in before} == before


def test_a_shard_cut_anywhere_gives_what_is_whole_and_one_reject(tmp_path):
    shard(tmp_path / "whole.tar", samples(6))
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "whole.tar").unlink()
    sample = 6 * 512  # three members of one header and one block each
    for cut in [*range(1, 6 * sample, 500), sample - 1, sample + 1, sample + 512, sample + 700, 2 * sample - 500]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        reader = WebDataset(str(tmp_path), metadata={"n": "int64"})
        check_reader(reader)
        rows = read_all(reader)
        good = [row for row in rows if not row["reject_reason"]]
        assert [(row["text"], row["n"]) for row in good] == [(f"caption {i}", i) for i in range(len(good))]
        assert cut // sample - 1 <= len(good) <= cut // sample
        if cut % sample:
            assert len(rejects(rows)) == 1 and "the rest of the shard" in rejects(rows)[0][1]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    """tarfile ends there without a word."""
    shard(tmp_path / "s.tar", samples(6))
    with open(tmp_path / "s.tar", "r+b") as file:
        file.seek(3 * 6 * 512)
        file.write(b"\xaa" * 300)
    reader = WebDataset(str(tmp_path))
    check_reader(reader)
    rows = read_all(reader)
    assert [row["text"] for row in rows] == ["caption 0", "caption 1", None]
    assert "damaged header" in rows[2]["reject_detail"]


def test_malformed_samples_are_rejected_alone(tmp_path):
    shard(tmp_path / "s.tar", [("a.json", b"{"), ("b.txt", b"\xff"), ("c.cls", b"1"), ("d.txt", b"fine"), ("e.json", b"[]"), ("e.txt", b"x")])
    reader = WebDataset(str(tmp_path), metadata={"n": "int64"})
    check_reader(reader)
    assert [row["reject_reason"] for row in read_all(reader)] == ["bad_row", "bad_row", "bad_row", None, "bad_row"]
    (tmp_path / "s.tar").write_bytes(b"not a tar at all" * 100)
    check_reader(WebDataset(str(tmp_path)))
    assert [row["reject_reason"] for row in read_all(WebDataset(str(tmp_path)))] == ["unreadable"]


def test_shards_of_several_sources_are_mixed_by_weight(tmp_path):
    for source in ("a", "b"):
        (tmp_path / source).mkdir()
        for number in range(6):
            shard(tmp_path / source / f"{number}.tar", samples(2))
    uri = f"{tmp_path}/a/{{0..5}}.tar::{tmp_path}/b"
    reader = WebDataset(uri, weights=[1, 2])
    check_reader(reader)
    order = [unit.split("/")[-2] for unit in reader.list()["unit"].to_pylist()]
    assert order[:9] == ["b", "a", "b"] * 3 and sorted(order) == ["a"] * 6 + ["b"] * 6
    with pytest.raises(ConfigError, match="must be 2 numbers above 0"):
        WebDataset(uri, weights=[1]).list()


def test_a_source_that_is_a_pattern_can_have_a_weight(tmp_path):
    """It ended in a bare StopIteration."""
    for source in ("a", "b"):
        for number in range(12):
            shard(tmp_path / source / f"{number:02}.tar", samples(2))
    reader = WebDataset([f"{tmp_path}/a/*.tar", f"{tmp_path}/b/{{00..11}}.tar", f"{tmp_path}/b/0*.tar"], weights=[1, 2, 1])
    check_reader(reader)
    order = [unit.split("/")[-2] for unit in reader.list()["unit"].to_pylist()]
    assert order[:9] == ["b", "a", "b"] * 3 and sorted(order) == ["a"] * 12 + ["b"] * 12
    many = WebDataset(f"{tmp_path}/a/{{0,1}}{{0..9..2}}*.tar")
    with pytest.raises(ConfigError, match=r"no file.* matches .*a/12\*.tar"):
        many.list()


def test_endings_count_in_any_case_also_as_a_setting(tmp_path):
    """`image: JPG` matched nothing."""
    shard(tmp_path / "s.tar", [("a.JPG", b"A"), ("a.Txt", b"words"), ("b.jpg", b"B")])
    rows = read_all(WebDataset(str(tmp_path), image="PNG;JPG", text="TXT"))
    assert [(row["image"], row["text"]) for row in rows] == [(b"A", "words"), (b"B", None)]


def test_a_name_that_is_not_utf8_costs_its_sample_alone(tmp_path):
    """It failed the whole chunk, on every run."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.txt", "caf\udce9.txt", "z.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    reader = WebDataset(str(path))
    check_reader(reader)
    rows = read_all(reader)
    assert [row["reject_reason"] for row in rows] == [None, "bad_row", None]
    assert "is not UTF-8; rename it" in rows[1]["reject_detail"] and rows[1]["uri"] == f"{path}#1"


def test_a_member_that_is_too_large_says_what_bounds_it(tmp_path, monkeypatch):
    """The reason was bad_row, and raising limits.max_item_bytes, which it did not name, changed nothing."""
    monkeypatch.setattr("pipeline.readers.webdataset.MAX_MEMBER_BYTES", 10)
    shard(tmp_path / "s.tar", [("a.jpg", b"A" * 11), ("b.jpg", b"B")])
    [(reason, detail)] = rejects(read_all(WebDataset(str(tmp_path))))
    assert reason == "too_many_bytes" and "11 bytes; 10 are the most" in detail and "whatever limits.max_item_bytes is" in detail


def test_many_shards_on_a_web_server_are_found(tmp_path):
    """Its folder was listed instead, which a web server need not do: all were said to be missing."""

    class NoFolders(SimpleHTTPRequestHandler):
        def list_directory(self, path):
            self.send_error(403)

    for number in range(12):
        shard(tmp_path / f"{number:02}.tar", samples(1, number))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(NoFolders, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = f"http://127.0.0.1:{server.server_port}"
        rows = read_all(WebDataset(f"{place}/{{00..11}}.tar"))
        assert [row["text"] for row in rows] == [f"caption {i}" for i in range(12)]
        with pytest.raises(ConfigError, match=r"12\.tar"):
            WebDataset(f"{place}/{{00..12}}.tar").list()
    finally:
        server.shutdown()
        server.server_close()
