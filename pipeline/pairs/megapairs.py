"""MegaPairs: an image and several texts that lead from it to another image. `q_img`, `q_text` (a list), `t_img`, `hns` (a list of images)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.pairs import rows
from pipeline.pairs.files import Files
from pipeline.pairs.rows import BadRow, Image, Pair, image_of, message, parsed_list, text_of

COLUMNS = {"q_img": "query.images", "q_text": "query.text", "t_img": "positives.images", "hns": "negatives.images"}


class MegaPairs:
    """Pairs in the rows of MegaPairs files: one for each text of a row, `file#row.text`."""

    def __init__(self, uri: str | Sequence[str], *, image_dir: str | None = None, storage_options: dict[str, Any] | None = None) -> None:
        """`image_dir`: what image paths are relative to; None: the file's folder."""
        self.files = Files(uri, storage_options)
        self.source = self.files.source
        self.image_dir = image_dir

    def list(self) -> pa.Table:
        """The files. Raises ConfigError if they lack a column."""
        found = self.files.list()
        rows.require(["q_img", "q_text", "t_img"], self.files.columns, self.source)
        return found

    def uses(self) -> dict[str, str | None]:
        """As the format says."""
        return rows.used(self.files.columns, COLUMNS)

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 records."""
        return self.files.split(units)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """A row for each text of a record.."""
        return rows.read(work, self.files, self._pairs)

    def _pairs(self, value: Mapping[str, Any], folder: str) -> Sequence[Pair]:
        folder = self.image_dir or folder
        query, target = (_required(value.get(name), folder, name) for name in ("q_img", "t_img"))
        texts = value.get("q_text")
        found = parsed_list(texts, "q_text") if not isinstance(texts, str) or texts.startswith("[") else [texts]
        if not found:
            raise BadRow("empty", "q_text has no text")
        negatives = [_required(path, folder, "hns") for path in parsed_list(value.get("hns"), "hns")]
        documents = {"positives": [message(None, [target])], "negatives": [message(None, [image]) for image in negatives]}
        return [{"query": message(_text(text), [query], what="q_text"), **documents} for text in found]


def _text(value: Any) -> str:
    text = text_of(value, "q_text")
    if text is None or not text.strip():
        raise BadRow("empty", "a q_text is empty")
    return text


def _required(value: Any, folder: str, what: str) -> Image:
    image = image_of(value, folder, what)
    if image is None:
        raise BadRow("empty", f"{what} names no image")
    return image
