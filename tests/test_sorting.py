import numpy as np
import pyarrow as pa

from pipeline import sorting
from pipeline.sorting import sort_rows


def test_rows_are_sorted_as_arrow_and_python_sort_them(monkeypatch):
    monkeypatch.setattr(sorting, "ROWS_AT_ONCE", 16)
    rng = np.random.default_rng(0)
    names = [f"{'äz€'[n % 3]}/{n}" for n in rng.permutation(100).tolist()]
    size = [None if n % 7 == 0 else n for n in range(100)]
    table = pa.table({"unit": pa.chunked_array([names[:30], names[30:]]), "bytes": pa.array(size, pa.int64())})
    table = table.replace_schema_metadata({"made": "here"})
    result = sort_rows(table, "unit")
    assert result.equals(table.sort_by("unit"), check_metadata=True)
    assert result["unit"].to_pylist() == sorted(names)
    assert max(len(chunk) for chunk in result["unit"].chunks) == 16


def test_what_is_in_order_is_left_as_it_is():
    table = pa.table({"unit": ["a", "b", "b", "c"]})
    assert sort_rows(table, "unit") is table
    assert sort_rows(table.slice(0, 0), "unit").num_rows == 0
