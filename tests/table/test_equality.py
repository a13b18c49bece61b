"""Rows that were staged are compared with what was read back, bit for bit."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.table.at import TableAt, create_dataset
from pipeline.table.equality import same_rows
from pipeline.table.stage import read_staged, stage_rows

nan, inf = float("nan"), float("inf")

COLUMNS = {
    "float16": ([1.5, nan, None], [1.5, 2.0, None], pa.float16()),
    "float32": ([1.5, nan, None], [1.5, None, nan], pa.float32()),
    "float64": ([-inf, nan, None], [inf, nan, None], pa.float64()),
    "list": ([[1.0, nan], None, []], [[1.0], [nan], []], pa.list_(pa.float32())),
    "large_list": ([[nan], None, [None]], [[nan], None, [nan]], pa.large_list(pa.float64())),
    "fixed_size_list": ([[1.0, nan], None, [None, 2.0]], [[1.0, nan], None, [0.0, 2.0]], pa.list_(pa.float32(), 2)),
    "struct": ([{"a": nan, "b": "x"}, None, {"a": None, "b": None}], [{"a": nan, "b": "x"}, None, None], None),
    "struct in list": ([[{"a": nan}], [], None], [[{"a": 1.0}], [], None], None),
    "text": (["nan", None, ""], ["nan", "", None], pa.string()),
    "dictionary": (["a", None, "b"], ["a", None, "a"], pa.string()),
}


def arrays(name):
    values, others, kind = COLUMNS[name]
    one, other = pa.array(values, kind), pa.array(others, kind or pa.array(values).type)
    return (one.dictionary_encode(), other.dictionary_encode()) if name == "dictionary" else (one, other)


@pytest.mark.parametrize("name", COLUMNS)
def test_nan_equals_nan_at_any_depth_and_nothing_else_is_overlooked(name):
    one, other = arrays(name)
    copy = pa.table({"c": pa.concat_arrays([other, one]).slice(len(other))})  # an offset, and other buffers
    assert same_rows(pa.table({"c": one}), copy)
    assert same_rows(pa.table({"c": pa.chunked_array([one.slice(0, 1), one.slice(1)])}), copy)
    assert not same_rows(pa.table({"c": one}), pa.table({"c": other}))
    assert not same_rows(pa.table({"c": one}), pa.table({"d": one}))
    assert not same_rows(pa.table({"c": one}), pa.table({"c": one.slice(1)}))


def test_what_lies_under_a_null_does_not_count():
    masked = [pa.array(np.array([value, 1.0], np.float32), mask=np.array([True, False])) for value in (nan, 7.0)]
    assert [same_rows(pa.table({"c": masked[0]}), pa.table({"c": array})) for array in masked] == [True, True]


def test_rows_with_nan_in_a_metadata_column_can_be_staged(tmp_path):
    """A NaN in a Parquet file made its whole chunk fail: NaN is not equal to itself."""
    nested = pa.struct([("x", pa.float64())])
    schema = pa.schema([("id", pa.string()), ("score", pa.float64()), ("box", pa.list_(pa.float32())), ("at", nested)])
    rows = pa.table([["a", "b", "c"], [nan, 1.0, None], [[nan, 1.0], [], None], [{"x": nan}, None, {"x": None}]], schema=schema)
    at = TableAt(uri=str(tmp_path), name="t")
    dataset = create_dataset(at.path(), schema, {})
    read = read_staged(stage_rows(rows, at, dataset), at.path(), None)
    assert same_rows(read, rows)
