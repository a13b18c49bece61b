"""Whether two Arrow tables hold the same bits: NaN equals NaN, also within lists and structs, where `pa.Table.equals` says it does not."""

import pyarrow as pa

_BITS = {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}


def same_rows(one: pa.Table, other: pa.Table) -> bool:
    """Whether two tables have the same columns with the same values, nulls included. The bytes under a null do not count."""
    if one.column_names != other.column_names or one.num_rows != other.num_rows:
        return False
    return all(_same(_array(mine), _array(theirs)) for mine, theirs in zip(one.columns, other.columns, strict=True))


def _array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _same(one: pa.Array, other: pa.Array) -> bool:
    if one.type != other.type or len(one) != len(other):
        return False
    kind = one.type
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (nested or pa.types.is_floating(kind) or pa.types.is_struct(kind)):
        return bool(one.equals(other))
    if not one.is_null().equals(other.is_null()):
        return False
    if pa.types.is_floating(kind):
        return bool(one.view(_BITS[kind.bit_width]).equals(other.view(_BITS[kind.bit_width])))
    if nested:  # flatten() leaves out what lies under a null
        return bool(one.value_lengths().equals(other.value_lengths())) and _same(one.flatten(), other.flatten())
    return all(map(_same, one.flatten(), other.flatten()))
