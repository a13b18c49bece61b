import hashlib
import json

import pyarrow as pa
import pytest

from pipeline.config import ConfigError
from pipeline.readers import rows
from pipeline.readers.identity import content_versions, digests, position_ids
from pipeline.readers.kinds import convert, declared, kind
from pipeline.readers.rows import Block
from schemas.vectors import RESERVED


def salted(text, value):
    salt = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return hashlib.blake2b(value, digest_size=16, person=salt).hexdigest()


def test_digests_are_blake2b_of_each_value():
    values = pa.array(["a", None, "", "ü" * 1000, "b"])
    plain = lambda value: hashlib.blake2b(value.encode(), digest_size=16).hexdigest()  # noqa: E731
    assert digests(values).to_pylist() == [plain(v or "") for v in values.to_pylist()]
    assert digests(values.slice(3, 1)).to_pylist() == [plain("ü" * 1000)]
    assert digests(values.slice(0, 0)).to_pylist() == []


def test_ids_and_versions_are_the_same_for_ever():
    """Written down: if this fails, every table out there would be embedded again."""
    assert position_ids("s3://b/x.parquet", 7, 8).to_pylist() == [salted("s3://b/x.parquet", b"7")]
    columns = {"text": pa.array(["né"]), "n": pa.array([5], pa.int32()), "none": pa.nulls(1, pa.string())}
    header = json.dumps([["n", "int32"], ["none", "string"], ["text", "string"]])
    assert content_versions(columns).to_pylist() == [salted(header, "1:5-3:né".encode())]


def test_versions_tell_apart_what_differs():
    one = lambda **columns: content_versions(columns)[0].as_py()  # noqa: E731
    text = lambda *values: pa.array(values, pa.string())  # noqa: E731
    different = [
        one(a=text("x"), b=text("yz")),
        one(a=text("xy"), b=text("z")),
        one(a=text("xyz"), b=text(None)),
        one(a=text(None), b=text("xyz")),
        one(a=text("xyz"), b=text("")),
        one(a=text("xyz"), b=text("-")),
        one(a=text("xyz"), c=text("-")),
        one(a=text("1"), b=text("1")),
        one(a=pa.array([1]), b=text("1")),
        one(a=pa.array([1.0]), b=text("1")),
        one(a=pa.array([True]), b=text("1")),
        one(a=pa.array([b"1"]), b=text("1")),
        one(a=pa.array([b""]), b=text("1")),
        one(a=pa.array([None], pa.binary()), b=text("1")),
        one(a=pa.array([["1"]]), b=text("1")),
        one(a=pa.array([["1", "1"]]), b=text("1")),
        one(a=pa.array([0], pa.timestamp("us")), b=text("1")),
    ]
    assert len(set(different)) == len(different)
    assert one(a=text("x"), b=text("y")) == one(b=text("y"), a=text("x"))


def test_a_version_depends_on_its_row_alone():
    values = {"a": pa.array([f"text {i}" for i in range(50)]), "n": pa.array([i if i % 3 else None for i in range(50)])}
    together = content_versions(values).to_pylist()
    alone = [content_versions({name: column.slice(i, 1) for name, column in values.items()})[0].as_py() for i in range(50)]
    assert together == alone and len(set(together)) == 50


def test_converting_marks_what_cannot_be():
    for values, to, expected, bad in [
        (["1", 2, None, "x", 1.5], pa.int64(), [1, 2, None, None, None], [3, 4]),
        (["a", 5, None, "\ud800"], pa.string(), ["a", None, None, None], [1, 3]),
        ([["a"], "b", [1]], pa.list_(pa.string()), [["a"], None, None], [1, 2]),
        (pa.array(["1", "x"]), pa.float64(), [1.0, None], [1]),
        (pa.array([1, 2**40]), pa.int32(), [1, None], [1]),
        ([True, "true", "perhaps"], pa.bool_(), [True, True, None], [2]),
        ([2**70, 3.0, float("nan")], pa.int64(), [None, 3, None], [0, 2]),
    ]:
        array, wrong = convert(values, to)
        assert array.type == to and array.to_pylist() == expected
        assert wrong.nonzero()[0].tolist() == bad


def test_types_are_named_as_in_arrow_and_wrong_ones_are_helped():
    assert kind("list<list<int64>>") == pa.list_(pa.list_(pa.int64()))
    assert declared(["a", "b"]) == {"a": None, "b": None}
    with pytest.raises(ConfigError, match=r"'strng' is no type .* did you mean 'string'"):
        kind("list<strng>")
    for name in [*RESERVED, "_mine", "reject_reason"]:
        with pytest.raises(ConfigError, match="uses itself"):
            declared([name])


def columns(**given):
    names = {"id": None, "text": None, "image": None, "image_uri": None, "version": None, "metadata": None}
    return rows.columns(**{**names, **given})


def test_nothing_to_embed_is_refused():
    with pytest.raises(ConfigError, match="nothing to embed"):
        columns(id="id")


def test_rows_without_id_or_content_are_rejected_one_by_one():
    block = Block("/data/x", 10, {"id": ["a", None, "", 7, 1.5, "b", "c", True], "text": ["t", "t", "t", "t", "t", None, " \n", "t"]})
    table = rows.items(block, columns(id="id", text="text"), pa.schema([]))
    assert table["reject_reason"].to_pylist() == [None, "bad_row", "bad_row", None, "bad_row", "bad_row", "empty", "bad_row"]
    assert [table["id"][i].as_py() for i in (0, 3, 5)] == ["a", "7", "b"]
    assert table["id"][1].as_py() == position_ids("/data/x", 11, 12)[0].as_py()
    assert table["uri"].to_pylist()[:2] == ["/data/x#10", "/data/x#11"]


def test_relative_image_uris_start_at_their_files_folder():
    uris = pa.array(["a.jpg", "./b c.jpg", "../up/c.jpg", "/abs/../d.jpg", "http://h/e.jpg", " f.jpg ", "", None])
    expected = ["s3://b/dir/a.jpg", "s3://b/dir/b c.jpg", "s3://b/up/c.jpg", "/abs/../d.jpg", "http://h/e.jpg", "s3://b/dir/f.jpg", None, None]
    assert rows.resolve(uris, "s3://b/dir").to_pylist() == expected
    assert rows.resolve(pa.array(["../c.jpg"]), "/a/b").to_pylist() == ["/a/c.jpg"]
