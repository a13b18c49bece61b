"""Containers in slices: how they are cut, and how a slice is read when its container is damaged, changed or gone."""

from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from pipeline.readers.identity import position_ids
from pipeline.readers.rows import Block, Columns, items
from pipeline.stores import check_credentials
from schemas.items import SLICE, item_schema

MAX_SLICE_ROWS = 8192
MAX_SLICE_BYTES = 64 * 2**20
BOUND = "the most that is read out of a container, whatever limits.max_item_bytes is; keep it as a file of its own"
UNREADABLE = (0, 1, 0)
"""The one slice of a container that cannot be opened: `read` rejects its row, also if it can be opened by then, as there may be more rows."""

Part = tuple[int, int, int | None]
"""Start, stop and bytes of a slice."""
Blocks = Callable[[str, int, int], Iterator[Block]]
"""Opens a container and yields its rows from start to stop."""


def table(parts: Iterable[tuple[str, str, Part]]) -> pa.Table:
    """A SLICE table of (unit, version, part)."""
    rows = [dict(zip(SLICE.names, (unit, version, *part), strict=True)) for unit, version, part in parts]
    return pa.Table.from_pylist(rows, schema=SLICE)


def cut(groups: list[tuple[int, int]]) -> list[Part]:
    """(start, stop, bytes) of slices over groups of (rows, bytes): small groups together, large ones in equal parts."""
    parts: list[Part] = []
    start = at = size = 0
    for count, group_bytes in groups:
        if at > start and (at + count - start > MAX_SLICE_ROWS or size + group_bytes > MAX_SLICE_BYTES):
            parts.append((start, at, size))
            start, size = at, 0
        pieces = min(max(count, 1), max(-(-count // MAX_SLICE_ROWS), -(-group_bytes // MAX_SLICE_BYTES), 1))
        for piece in range(1, pieces):
            parts.append((start, at + count * piece // pieces, group_bytes // pieces))
            start, size = at + count * piece // pieces, 0
        at, size = at + count, size + group_bytes // pieces
    if at > start or not parts:
        parts.append((start, at, size))
    return parts


def read(work: pa.Table, blocks: Blocks, wanted: Columns, metadata: pa.Schema) -> Iterator[pa.Table]:
    """The items of slices, by batches. What of a container cannot be read is rejected as `unreadable`, row by row.

    A disk or a network that fails raises: that is no container's fault.
    """
    for part in work.select(SLICE.names).to_pylist():
        unit, at, stop = part["unit"], part["start"], part["stop"]
        opened = (at, stop, part["bytes"]) != UNREADABLE
        detail = "the container has fewer rows than when it was listed" if opened else f"{unit}: it could not be read when the run was planned"
        try:
            for block in blocks(unit, at, stop):
                if not opened:
                    break
                yield items(block, wanted, metadata)
                at += len(block)
        except (FileNotFoundError, PermissionError) as error:
            check_credentials(error, unit)
            detail = f"{unit}: {error}"
        except (pa.ArrowInvalid, OSError) as error:
            if of_the_store(error):
                raise
            detail = f"{unit}: {error}"
        if at < stop:
            yield rejected(unit, part["version"], range(at, stop), metadata, reason="unreadable", detail=detail)


def of_the_store(error: Exception) -> bool:
    """Whether an error is a time-out or a lost connection: for damaged data Arrow raises a plain OSError without a number."""
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None)


def rejected(unit: str, version: str, rows: range, metadata: pa.Schema, *, reason: str, detail: str) -> pa.Table:
    """Reject rows for `rows` of a container that could not be read."""
    count = len(rows)
    uris = [f"{unit}#{row}" for row in rows]
    given = {"id": position_ids(unit, rows.start, rows.stop), "version": [version] * count, "uri": uris}
    schema = item_schema(metadata)
    table = pa.table([given.get(entry.name, pa.nulls(count, entry.type)) for entry in schema], schema=schema)
    return table.append_column("reject_reason", pa.array([reason] * count)).append_column("reject_detail", pa.array([detail] * count))
