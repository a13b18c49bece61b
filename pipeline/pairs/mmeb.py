"""MMEB's training records, and what took their form: VLM2Vec's own (v1), VLM2Vec-V2's internal one, mmE5's hard negatives.

v1: `qry`, `qry_image_path`, `pos_text`, `pos_image_path`, `neg_text`, `neg_image_path`, where "" is none. mmE5: the same, but each negative
column is a text that spells a Python list. V2: `query_text`, `query_image` (a struct of lists `paths`, `bytes`), and the same for pos and neg.
The instruction stands in the text of the query in v1; it is left there. White space after leading image markers and at the ends is not: real rows
read `<|image_1|>\nRepresent ...\n`, and a template puts its own there.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.pairs import rows
from pipeline.pairs.files import Files
from pipeline.pairs.rows import BadRow, Image, Message, Pair, image_of, marked, message, parsed_list, short, text_of
from pipeline.vlm.message import MARKER

V1 = {
    "qry": "query.text",
    "qry_text": "query.text",
    "qry_inst": "instruction_q",
    "qry_image_path": "query.images",
    "pos_text": "positives.text",
    "pos_image_path": "positives.images",
    "neg_text": "negatives.text",
    "neg_image_path": "negatives.images",
}
V2 = {
    "query_text": "query.text",
    "query_image": "query.images",
    "pos_text": "positives.text",
    "pos_image": "positives.images",
    "neg_text": "negatives.text",
    "neg_image": "negatives.images",
    "global_dataset_name": "task",
}


class Mmeb:
    """Pairs in the rows of MMEB training files."""

    def __init__(
        self,
        uri: str | Sequence[str],
        *,
        image_dir: str | None = None,
        string_lists: bool = False,
        marker: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """`image_dir`: what image paths are relative to; None: the file's folder. `string_lists`: negatives are lists spelled as text (mmE5).

        `marker`: what stands for an image in a text; None: `<|image_1|>`, `<|image_2|>`, ...
        """
        self.files = Files(uri, storage_options)
        self.source = self.files.source
        self.image_dir, self.string_lists, self.marker = image_dir, string_lists, marker

    def list(self) -> pa.Table:
        """The files. Raises ConfigError if they are neither of v1 nor of V2."""
        found = self.files.list()
        columns = set(self.files.columns)
        if not {"qry", "qry_text", "query_text"} & columns or not {"pos_text", "pos_image_path", "pos_image"} & columns:
            raise ConfigError(
                f"{self.source} is not of MMEB: it needs qry and pos_text (v1) or query_text and pos_text (V2); it has {sorted(columns)}"
            )
        return found

    def uses(self) -> dict[str, str | None]:
        """V2 where there is `query_text`."""
        return rows.used(self.files.columns, V2 if "query_text" in self.files.columns else V1)

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows."""
        return self.files.split(units)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """One row a record."""
        return rows.read(work, self.files, self._pairs)

    def _pairs(self, value: Mapping[str, Any], folder: str) -> Sequence[Pair]:
        folder = self.image_dir or folder
        return [self._v2(value, folder) if "query_text" in value else self._v1(value, folder)]

    def _v1(self, value: Mapping[str, Any], folder: str) -> Pair:
        query = value.get("qry") if "qry" in value else value.get("qry_text")
        positive = self._one(value.get("pos_text"), value.get("pos_image_path"), folder, "positive")
        if positive is None:
            raise BadRow("no_positive", "pos_text and pos_image_path are both empty")
        return {
            "instruction_q": text_of(value.get("qry_inst"), "qry_inst") or None,
            "query": self._message(query, [image_of(value.get("qry_image_path"), folder, "qry_image_path")], "query"),
            "positives": [positive],
            "negatives": self._negatives(value.get("neg_text"), value.get("neg_image_path"), folder),
        }

    def _negatives(self, texts: Any, paths: Any, folder: str) -> Sequence[Message]:
        if self.string_lists:
            texts, paths = parsed_list(texts, "neg_text"), parsed_list(paths, "neg_image_path")
        elif spells_list(texts) or spells_list(paths):
            raise BadRow(
                "bad_row", f"the negative spells a list: {short(texts if spells_list(texts) else paths)}; set string_lists: true, as for mmE5"
            )
        texts, paths = (side if isinstance(side, list) else [side] for side in (texts, paths))
        if texts and paths and len(texts) != len(paths):
            raise BadRow("bad_row", f"neg_text has {len(texts)} entries and neg_image_path {len(paths)}; each negative is one entry of both")
        found = [self._one(text, path, folder, "negative") for text, path in zip_longest(texts, paths)]
        return [negative for negative in found if negative is not None]

    def _v2(self, value: Mapping[str, Any], folder: str) -> Pair:
        positives = self._sides(value.get("pos_text"), value.get("pos_image"), folder, "positive")
        if not positives:
            raise BadRow("no_positive", "pos_text and pos_image are both empty")
        return {
            "task": text_of(value.get("global_dataset_name"), "global_dataset_name") or None,
            "query": self._message(value.get("query_text"), images_of(value.get("query_image"), folder, "query_image"), "query"),
            "positives": positives,
            "negatives": self._sides(value.get("neg_text"), value.get("neg_image"), folder, "negative"),
        }

    def _sides(self, text: Any, images: Any, folder: str, what: str) -> Sequence[Message]:
        """Documents of V2: a text with a struct of its images, or lists of both."""
        texts, structs = text if isinstance(text, list) else [text], images if isinstance(images, list) else [images]
        if texts and structs and len(texts) != len(structs) and structs != [None]:
            raise BadRow("bad_row", f"the {what} has {len(texts)} texts and {len(structs)} structs of images; each document is one of both")
        pairs = [(one, images_of(struct, folder, what)) for one, struct in zip_longest(texts, structs)]
        return [self._message(one, found, what) for one, found in pairs if one or any(found)]

    def _one(self, text: Any, path: Any, folder: str, what: str) -> Message | None:
        """A document of v1; None where both are empty, which is how v1 says that there is none."""
        image = image_of(path, folder, f"{what} image path")
        return self._message(text, [image], what) if text or image else None

    def _message(self, text: Any, images: Sequence[Image | None], what: str) -> Message:
        there = [image for image in images if image is not None]
        found, there = marked(text_of(text, what), there, self.marker)
        return message(None if found is None else _trimmed(found), there, what=what)


def _trimmed(text: str) -> str:
    markers = MARKER * text.count(MARKER)
    return markers + text.removeprefix(markers).strip() if text.startswith(markers) else text.strip()


def spells_list(value: Any) -> bool:
    """Whether a text is a list written down; a caption may begin with a bracket too."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return False
    try:
        return isinstance(parsed_list(value, ""), list)
    except BadRow:
        return False


def images_of(value: Any, folder: str, what: str) -> list[Image | None]:
    """The images of VLM2Vec-V2's struct: `bytes` where given, else `paths`. Raises BadRow if the lists do not fit."""
    if value is None or value == "":
        return []
    if not isinstance(value, Mapping):
        return [image_of(value, folder, what)]
    data, paths = value.get("bytes") or [], value.get("paths") or []
    if data and paths and len(data) != len(paths):
        raise BadRow("bad_row", f"{what} has {len(data)} bytes and {len(paths)} paths; each image is one of both")
    return [image_of(one or path, folder, what) for one, path in zip_longest(data, paths)]
