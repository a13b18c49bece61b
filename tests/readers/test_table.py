import lance
import pyarrow as pa
import pytest

from pipeline.config import ConfigError
from pipeline.readers.table import Table
from pipeline.testing import check_reader
from tests.readers.reading import read_all


def write(folder, rows, mode="create"):
    return lance.write_dataset(pa.Table.from_pylist(rows), str(folder / "photos.lance"), mode=mode, max_rows_per_file=10)


def items(start, stop):
    return [{"id": f"i{n}", "uri": f"/photos/{n}.jpg", "text": f"text {n}", "year": n, "thumbnail": b"jpeg %d" % n} for n in range(start, stop)]


def test_a_tables_items_keep_their_ids(tmp_path):
    write(tmp_path, items(0, 25))
    reader = Table(str(tmp_path), "photos", metadata=["year"])
    check_reader(reader)
    rows = read_all(reader)
    assert [(row["id"], row["text"], row["image_uri"], row["image"], row["year"]) for row in rows] == [
        (f"i{n}", f"text {n}", f"/photos/{n}.jpg", None, n) for n in range(25)
    ]
    small = read_all(Table(str(tmp_path), "photos", image="thumbnail", image_uri=None))
    assert [row["image"] for row in small] == [b"jpeg %d" % n for n in range(25)]


def test_items_that_came_out_of_containers_have_no_image_to_fetch(tmp_path):
    rows = items(0, 2)
    rows[0] |= {"uri": "/data/x.parquet#0", "_unit": "/data/x.parquet"}
    rows[1] |= {"_unit": None}
    write(tmp_path, rows)
    assert [row["image_uri"] for row in read_all(Table(str(tmp_path), "photos"))] == [None, "/photos/1.jpg"]


def test_what_is_appended_is_a_new_unit_and_what_is_deleted_another_version(tmp_path):
    write(tmp_path, items(0, 20))
    reader = Table(str(tmp_path), "photos")
    before = dict(zip(*(reader.list()[name].to_pylist() for name in ("unit", "version")), strict=True))
    dataset = write(tmp_path, items(20, 25), mode="append")
    dataset.delete("id in ('i3', 'i4')")
    check_reader(reader)
    after = dict(zip(*(reader.list()[name].to_pylist() for name in ("unit", "version")), strict=True))
    first, second = before
    assert list(after)[:2] == [first, second] and len(after) == 3
    assert after[first] != before[first] and after[second] == before[second]
    assert [row["id"] for row in read_all(reader)] == [f"i{n}" for n in range(25) if n not in (3, 4)]


def test_the_table_is_read_as_it_was_listed(tmp_path):
    dataset = write(tmp_path, items(0, 20))
    reader = Table(str(tmp_path), "photos")
    work = reader.split(reader.list())
    dataset.delete("id = 'i3'")
    lance.dataset(str(tmp_path / "photos.lance")).optimize.compact_files()
    assert [id for table in reader.read(work) for id in table["id"].to_pylist()] == [f"i{n}" for n in range(20)]


def test_versions_do_not_change_when_the_table_is_compacted(tmp_path):
    dataset = write(tmp_path, items(0, 30))
    before = {row["id"]: row["version"] for row in read_all(Table(str(tmp_path), "photos"))}
    dataset.optimize.compact_files()
    assert {row["id"]: row["version"] for row in read_all(Table(str(tmp_path), "photos"))} == before


def test_slices_are_small(tmp_path):
    table = pa.table({"id": [str(n) for n in range(20_000)], "uri": [None] * 20_000, "text": ["t"] * 20_000})
    lance.write_dataset(table.cast(pa.schema([("id", pa.string()), ("uri", pa.string()), ("text", pa.string())])), str(tmp_path / "photos.lance"))
    reader = Table(str(tmp_path), "photos")
    check_reader(reader)
    assert reader.split(reader.list())["stop"].to_pylist() == [8192, 16_384, 20_000]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="photos"):
        Table(str(tmp_path), "photos").list()
    write(tmp_path, items(0, 2))
    with pytest.raises(ConfigError, match=r"has no column 'txt'; did you mean 'text'"):
        Table(str(tmp_path), "photos", text="txt").list()


def test_a_picture_that_was_replaced_under_its_uri_is_another_item(tmp_path):
    """A row's version was a hash of its text and URI: in a second table the old picture's vector stayed for ever."""
    versions = []
    for version in ("1", "2", "2"):
        rows = [row | {"_version": version} for row in items(0, 2)]
        write(tmp_path, rows, mode="overwrite")
        reader = Table(str(tmp_path), "photos", metadata=["year"])
        check_reader(reader)
        versions.append([row["version"] for row in read_all(reader)])
    first, second, third = versions
    assert set(first).isdisjoint(second) and second == third
    rows[0]["year"] = 1999
    write(tmp_path, rows, mode="overwrite")
    changed = [row["version"] for row in read_all(reader)]
    assert changed[0] != third[0] and changed[1] == third[1]
