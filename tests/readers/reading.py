"""Reads a whole source into rows, as the reader tests look at it."""

from pipeline.readers import Reader


def read_all(reader: Reader) -> list[dict]:
    """Every row that a reader yields, through a listing and, for containers, slice by slice."""
    work = reader.list()
    if work["id"].null_count:
        work = reader.split(work)
    rows = []
    for index in range(work.num_rows):
        for table in reader.read(work.slice(index, 1)):
            rows += table.to_pylist()
    return [{"reject_reason": None, "reject_detail": None, **row} for row in rows]


def rejects(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["reject_reason"], row["reject_detail"]) for row in rows if row["reject_reason"]]
