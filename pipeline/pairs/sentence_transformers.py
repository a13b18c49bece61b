"""Columns as sentence-transformers reads them: their order counts, not their names, but for `label`, `labels`, `score` and `scores`.

(anchor, positive), (anchor, positive, negative, ...); with a label (a, b, score), (text, class), (anchor, positive, negative, ..., scores).
There every further column is an input, also an id that was left over. Here a column that looks like an id must be named, in `columns` or `ignore`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.pairs import rows
from pipeline.pairs.chat import is_chat, of_chat
from pipeline.pairs.files import Files
from pipeline.pairs.rows import BadRow, Image, Message, Pair, image_of, marked, message, scores_of, short, text_of

LABELS = ("label", "labels", "score", "scores")
LEFTOVER = re.compile(r"(^|_)(id|ids|idx|index|uuid|hash)(_|$)|^[a-z]*id$|^__", re.IGNORECASE)


NAMED = (re.compile(r"anchor|query|question"), re.compile(r"positive|answer"), re.compile(r"negative(_\d+)?"))
"""Names that say what a column is: the first, the second, and any after these."""


class SentenceTransformers:
    """Pairs in the columns of a sentence-transformers data set: Parquet, JSON Lines, or what `save_to_disk` wrote."""

    def __init__(
        self,
        uri: str | Sequence[str],
        *,
        columns: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        images: Sequence[str] = (),
        min_score: float | None = None,
        classes: Sequence[str] | None = None,
        image_dir: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Say what the columns' order leaves open.

        `columns`: the inputs in order, anchor first; None: all but the label and `ignore`. `images`: columns whose texts are paths of
        images, relative to `image_dir` (None: the file's folder). `min_score`: of (a, b, score), which pairs are positives. `classes`: of
        (text, class), the names in the order of their numbers: the positive is the name of the row's class, the negatives the others.
        """
        self.files = Files(uri, storage_options)
        self.source = self.files.source
        self.columns, self.ignore, self.images = columns, ignore, images
        self.min_score, self.classes, self.image_dir = min_score, classes, image_dir
        self._inputs: Sequence[str] = ()
        self._label: str | None = None

    def list(self) -> pa.Table:
        """The files. Raises ConfigError for a column that must be accounted for, and for a shape that nothing can be learned from."""
        found = self.files.list()
        names = self.files.columns
        rows.require([*(self.columns or []), *self.ignore, *self.images], names, self.source)
        labels = [name for name in names if name in LABELS and name not in self.ignore]
        if len(labels) > 1:
            raise ConfigError(f"{self.source} has the labels {', '.join(labels)}; name all but one in `ignore`")
        self._label = labels[0] if labels else None
        self._inputs = self.columns or [name for name in names if name not in self.ignore and name != self._label]
        if self.columns is None:
            leftover = [name for name in self._inputs if LEFTOVER.search(name)]
            if leftover:
                raise ConfigError(
                    f"{self.source}: {', '.join(map(repr, leftover))} would be an input, as every column is; name it in `ignore` if it is none, "
                    f"or name the inputs in order: columns: [{', '.join(name for name in self._inputs if name not in leftover)}]"
                )
            self._check_order()
        self._check_shape()
        return found

    def _check_order(self) -> None:
        """Raises ConfigError where a column's name says another place than it has: keys of JSON come in any order."""
        said = {name: place for name in self._inputs for place, named in enumerate(NAMED) if named.fullmatch(name)}
        if any(place != min(self._inputs.index(name), 2) for name, place in said.items()):
            ordered = sorted(self._inputs, key=lambda name: said.get(name, 1.5))
            raise ConfigError(
                f"{self.source} has its columns in the order {', '.join(self._inputs)}, which counts, and their names say another; name the inputs "
                f"in their order, perhaps columns: [{', '.join(ordered)}]"
            )

    def _check_shape(self) -> None:
        num = len(self._inputs)
        if num == 1 and (self._label is None or self.classes is None):
            raise ConfigError(
                f"{self.source} has one input, {self._inputs[0]!r}: it needs a label and `classes`, the names of the classes, or a positive"
            )
        if num == 2 and self._label is not None and self.min_score is None:
            raise ConfigError(
                f"{self.source} has pairs with {self._label!r}: give min_score, from which on a pair is a positive, or `ignore` the column"
            )
        if num == 0:
            raise ConfigError(f"{self.source} has no input: `ignore` leaves nothing")

    def uses(self) -> dict[str, str | None]:
        """By place."""
        places = ["query", "positives"]
        uses = {name: places[at] if at < 2 else f"negatives, number {at - 1}" for at, name in enumerate(self._inputs)}
        if self._label is not None:
            uses[self._label] = {1: "label, positives, negatives", 2: "label"}.get(len(self._inputs), "pos_scores, neg_scores")
        return rows.used(self.files.columns, uses)

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows."""
        return self.files.split(units)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """One row a record."""
        return rows.read(work, self.files, self._pairs)

    def _pairs(self, value: Mapping[str, Any], folder: str) -> Sequence[Pair]:
        folder = self.image_dir or folder
        label = value.get(self._label) if self._label else None
        query, instruction = self._cell(value, self._inputs[0], folder)
        if len(self._inputs) == 1:
            return [self._of_class(query, label) | {"instruction_q": instruction}]
        positive, *negatives = [
            self._cell(value, name, folder)[0] for name in self._inputs[1:] if value.get(name) is not None or name == self._inputs[1]
        ]
        pair: Pair = {"instruction_q": instruction, "query": query, "positives": [positive], "negatives": negatives}
        if self._label is None:
            return [pair]
        return [pair | (self._of_score(label) if len(self._inputs) == 2 else _teacher(label, len(negatives)))]

    def _cell(self, value: Mapping[str, Any], name: str, folder: str) -> tuple[Message, str | None]:
        """A text, an image, a dict of both, or a chat message; and what the chat's system says."""
        cell = value.get(name)
        if is_chat(cell):
            said, seen, instruction = of_chat(cell, folder, name)
            return message(said, seen, what=name), instruction
        if name in self.images or isinstance(cell, bytes) or (isinstance(cell, Mapping) and "text" not in cell and "image" not in cell):
            return message(None, _given(image_of(cell, folder, name)), what=name), None
        if isinstance(cell, Mapping):
            text, images = marked(text_of(cell.get("text"), name), _given(image_of(cell.get("image"), folder, name)), None)
            return message(text, images, what=name), None
        return message(text_of(cell, name), what=name), None

    def _of_class(self, query: Message, label: Any) -> Pair:
        classes = self.classes or []
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(classes):
            raise BadRow("bad_row", f"{self._label!r} is {short(label)}; it must be the number of one of {len(classes)} classes, from 0")
        names = [message(name, what="class") for name in classes]
        return {
            "query": query,
            "positives": [names[label]],
            "negatives": names[:label] + names[label + 1 :],
            "label": str(label),
        }

    def _of_score(self, label: Any) -> Pair:
        score = (scores_of([label], str(self._label)) or [0.0])[0]
        if self.min_score is not None and score < self.min_score:
            raise BadRow("unwanted", f"{self._label} {score} is below min_score {self.min_score}")
        return {"label": str(score), "pos_scores": [score], "neg_scores": []}


def _teacher(label: Any, num_negatives: int) -> Pair:
    """Scores of the positive and the negatives; one number is the margin between the two (MarginMSE), or of several all margins."""
    found = scores_of(label if isinstance(label, list) else [label], "label") or []
    if len(found) == 1 + num_negatives:
        return {"pos_scores": found[:1], "neg_scores": found[1:]}
    if len(found) == num_negatives:
        return {"pos_scores": [0.0], "neg_scores": [-margin for margin in found]}
    raise BadRow("scores", f"the label has {len(found)} numbers for one positive and {num_negatives} negatives")


def _given(image: Image | None) -> list[Image]:
    return [] if image is None else [image]
