"""Tables in order, however many bytes of strings they hold: Arrow's own sort refuses a column of more than 2 GiB.

Memory: one copy of the table, and of its largest column.
"""

import pyarrow as pa
import pyarrow.compute as pc

ROWS_AT_ONCE = 2**16
"""Rows of a chunk of what is returned: far below 2 GiB, whatever a path or an URI is."""


def sort_rows(table: pa.Table, by: str) -> pa.Table:
    """The rows in ascending order of a column of strings; the table itself if it is in order."""
    column = table[by]
    if table.num_rows < 2 or pc.all(pc.less_equal(column.slice(0, table.num_rows - 1), column.slice(1))).as_py():
        return table
    order = pc.sort_indices(table, [(by, "ascending")])
    return pa.table({field.name: _take(table[field.name], order) for field in table.schema}, schema=table.schema)


def _take(column: pa.ChunkedArray, order: pa.Array) -> pa.ChunkedArray:
    kind = column.type
    # `take` joins the chunks of a column first, so they must fit into one.
    whole = column.cast(pa.large_string()).combine_chunks() if pa.types.is_string(kind) else column.combine_chunks()
    parts = [whole.take(order.slice(start, ROWS_AT_ONCE)).cast(kind) for start in range(0, len(order), ROWS_AT_ONCE)]
    return pa.chunked_array(parts, type=kind)
