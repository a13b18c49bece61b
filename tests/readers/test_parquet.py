import datetime
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.readers.parquet import Parquet
from pipeline.readers.slices import cut
from pipeline.testing import check_reader
from tests.readers.reading import read_all, rejects


def write(path, table, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)


def captions(count, start=0):
    return {"key": [f"k{i}" for i in range(start, start + count)], "text": [f"caption {i}" for i in range(start, start + count)]}


def test_rows_become_items(tmp_path):
    day = datetime.datetime(2024, 5, 1, 12)
    table = {"key": [1, 2], "text": ["a", None], "image": [None, b"jpeg"], "path": ["sub/a.jpg", None], "year": [1999, None], "at": [day, day]}
    write(tmp_path / "x.parquet", table)
    reader = Parquet(str(tmp_path), id="key", text="text", image="image", image_uri="path", metadata={"year": "int32", "at": "timestamp"})
    check_reader(reader)
    one, two = read_all(reader)
    assert (one["id"], one["text"], one["image"], one["image_uri"], one["year"], one["at"]) == ("1", "a", None, f"{tmp_path}/sub/a.jpg", 1999, day)
    assert (two["id"], two["text"], two["image"], two["image_uri"], two["year"]) == ("2", None, b"jpeg", None, None)
    assert one["uri"] == f"{tmp_path}/x.parquet#0"
    assert one["version"] != two["version"]


def test_metadata_types_come_from_the_file_where_none_is_given(tmp_path):
    table = pa.table(
        {"text": ["a"], "n": pa.array([1], pa.int16()), "d": pa.array(["x"]).dictionary_encode(), "l": pa.array(["y"], pa.large_string())}
    )
    write(tmp_path / "x.parquet", table)
    reader = Parquet(str(tmp_path), text="text", metadata=["n", "d", "l"])
    check_reader(reader)
    assert [field.type for field in reader.metadata] == [pa.int16(), pa.string(), pa.string()]
    assert [read_all(reader)[0][name] for name in ("n", "d", "l")] == [1, "x", "y"]


def test_hugging_faces_images_are_bytes_or_paths(tmp_path):
    images = pa.array([{"bytes": b"jpeg", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None])
    write(tmp_path / "x.parquet", {"image": images, "text": ["x", "y", "z"]})
    reader = Parquet(str(tmp_path), image="image", text="text")
    check_reader(reader)
    assert [(row["image"], row["image_uri"]) for row in read_all(reader)] == [(b"jpeg", None), (None, f"{tmp_path}/b.jpg"), (None, None)]


def test_an_id_column_keeps_ids_when_rows_move_and_without_one_they_change(tmp_path):
    write(tmp_path / "a.parquet", captions(10))
    write(tmp_path / "b.parquet", captions(10, 10))
    keyed, plain = Parquet(str(tmp_path), id="key", text="text"), Parquet(str(tmp_path), text="text")
    before = {row["text"]: (row["id"], row["version"]) for row in read_all(keyed)}
    positions = {row["text"]: row["id"] for row in read_all(plain)}
    assert positions == {row["text"]: row["id"] for row in read_all(plain)}
    write(tmp_path / "a.parquet", captions(5))
    write(tmp_path / "b.parquet", captions(15, 5))
    assert {row["text"]: (row["id"], row["version"]) for row in read_all(keyed)} == before
    assert {row["text"]: row["id"] for row in read_all(plain)} != positions


def test_a_version_column_decides_alone(tmp_path):
    write(tmp_path / "x.parquet", {"text": ["a", "b"], "v": [1, None]})
    reader = Parquet(str(tmp_path), text="text", version="v")
    check_reader(reader)
    one, two = read_all(reader)
    assert one["version"].startswith("1|")
    assert two["reject_reason"] == "bad_row" and "'v' is null" in two["reject_detail"]


@pytest.mark.parametrize(("rows", "group_rows"), [(0, 10), (1, 10), (20_000, 1000), (20_000, 7), (20_000, 20_000), (8193, 8192)])
def test_slices_cover_a_file_once_and_stay_small(tmp_path, rows, group_rows):
    write(tmp_path / "x.parquet", captions(rows), row_group_size=group_rows)
    reader = Parquet(str(tmp_path), id="key", text="text")
    check_reader(reader)
    slices = reader.split(reader.list()).to_pylist()
    assert all(part["stop"] - part["start"] <= 8192 for part in slices)
    if group_rows <= 8192:
        assert all(part["start"] % group_rows == 0 for part in slices)
    assert [row["text"] for row in read_all(reader)] == captions(rows)["text"]


def test_slices_of_heavy_rows_stay_under_64_mib():
    mib = 2**20
    assert cut([(100, 200 * mib)]) == [(0, 25, 50 * mib), (25, 50, 50 * mib), (50, 75, 50 * mib), (75, 100, 50 * mib)]
    assert cut([(10, 40 * mib), (10, 40 * mib)]) == [(0, 10, 40 * mib), (10, 20, 40 * mib)]
    assert cut([(10, 20 * mib), (10, 20 * mib), (10, 40 * mib)]) == [(0, 20, 40 * mib), (20, 30, 40 * mib)]
    assert cut([(1, 500 * mib)]) == [(0, 1, 500 * mib)]
    assert cut([]) == cut([(0, 0)]) == [(0, 0, 0)]
    rng = np.random.default_rng(0)
    for _ in range(200):
        groups = [(int(rng.integers(0, 30_000)), int(rng.integers(0, 300 * mib))) for _ in range(rng.integers(1, 8))]
        parts = cut(groups)
        assert [part[0] for part in parts[1:]] == [part[1] for part in parts[:-1]]
        assert parts[0][0] == 0 and parts[-1][1] == sum(count for count, _ in groups)
        assert all(stop - start <= 8192 for start, stop, _ in parts)


def test_a_wrong_column_is_named_before_the_run(tmp_path):
    write(tmp_path / "x.parquet", {"caption": ["a"], "url": ["b"]})
    with pytest.raises(ConfigError, match=r"has no column 'captoin'; did you mean 'caption'\?; it has 'caption', 'url'"):
        Parquet(str(tmp_path), text="captoin").list()
    with pytest.raises(ConfigError, match="uses itself"):
        Parquet(str(tmp_path), text="caption", metadata=["uri"])
    with pytest.raises(ConfigError, match="nothing to embed"):
        Parquet(str(tmp_path))


def test_columns_of_another_type_reject_their_rows(tmp_path):
    write(tmp_path / "a.parquet", {"text": ["x"], "year": [1]})
    write(tmp_path / "b.parquet", {"text": [5], "year": [2]})
    write(tmp_path / "c.parquet", {"text": ["y", "z"], "year": ["3", "soon"]})
    write(tmp_path / "d.parquet", {"other": ["y"]})
    reader = Parquet(str(tmp_path), text="text", metadata=["year"])
    check_reader(reader)
    rows = read_all(reader)
    assert [row["year"] for row in rows if not row["reject_reason"]] == [1, 3]
    assert [detail for _, detail in rejects(rows)] == ["'text' is not string: 5", "'year' is not int64: 'soon'", "there is no column 'text'"]


def test_a_truncated_file_is_one_reject_and_the_others_go_on(tmp_path):
    write(tmp_path / "a.parquet", captions(10))
    write(tmp_path / "b.parquet", captions(10, 10))
    os.truncate(tmp_path / "a.parquet", 200)
    (tmp_path / "c.parquet").touch()
    reader = Parquet(str(tmp_path), id="key", text="text")
    check_reader(reader)
    rows = read_all(reader)
    assert len(rows) == 12 and len(rejects(rows)) == 2
    assert {reason for reason, _ in rejects(rows)} == {"unreadable"}
    assert all(row["version"] for row in rows)


def test_a_page_damaged_in_the_middle_rejects_the_rest_of_its_slice(tmp_path):
    write(tmp_path / "a.parquet", captions(100), row_group_size=50, compression="snappy", use_dictionary=False)
    place = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(1).data_page_offset
    with open(tmp_path / "a.parquet", "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 60)
    reader = Parquet(str(tmp_path), id="key", text="text")
    rows = read_all(reader)
    assert len(rows) == 100
    assert 0 < len(rejects(rows)) <= 100
    assert {reason for reason, _ in rejects(rows)} == {"unreadable"}


def test_a_file_that_is_replaced_or_gone_after_the_listing_is_no_crash(tmp_path):
    write(tmp_path / "a.parquet", captions(10))
    reader = Parquet(str(tmp_path), id="key", text="text")
    work = reader.split(reader.list())
    write(tmp_path / "a.parquet", captions(4))
    rows = [row for table in reader.read(work) for row in table.to_pylist()]
    assert [row.get("reject_reason") for row in rows] == [None] * 4 + ["unreadable"] * 6
    (tmp_path / "a.parquet").unlink()
    rows = [row for table in reader.read(work) for row in table.to_pylist()]
    assert [row["reject_reason"] for row in rows] == ["unreadable"] * 10


def test_a_large_file_is_streamed(tmp_path):
    heavy = [bytes([i % 251]) * 100_000 for i in range(2000)]
    write(tmp_path / "x.parquet", {"image": heavy}, row_group_size=100, compression="none", use_dictionary=False)
    reader = Parquet(str(tmp_path), image="image")
    work = reader.split(reader.list())
    assert all(part["bytes"] <= 64 * 2**20 for part in work.to_pylist())
    before = pa.total_allocated_bytes()
    peak = 0
    for index in range(work.num_rows):
        for table in reader.read(work.slice(index, 1)):
            peak = max(peak, pa.total_allocated_bytes() - before)
            assert table.num_rows
    assert peak < 150 * 2**20
