"""Writes small sources of pairs, and reads them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.pairs import PairReader
from pipeline.pairs.contract import check_pair_reader


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, rows: list[dict], **options) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def picture(colour: int = 128, size: tuple[int, int] = (6, 4)) -> bytes:
    """A PNG of one grey: width, height."""
    target = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), colour, np.uint8)).save(target, "PNG")
    return target.getvalue()


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(10 * number))


def rows(reader: PairReader) -> list[dict]:
    """Every row that a reader yields, the reader held to the protocol."""
    return check_pair_reader(reader).to_pylist()


def faults(reader: PairReader) -> list[tuple[str, str]]:
    """File#row without the folder, and reason, of what was rejected."""
    return [(row["uri"].rpartition("/")[2], row["reject_reason"]) for row in rows(reader) if row["reject_reason"]]


def text(words: str, id: str | None = None) -> dict:
    return {"text": words, "images": [], "id": id}


def shown(uri: object, words: str | None = None) -> dict:
    return {"text": words, "images": [{"bytes": None, "uri": str(uri)}], "id": None}
