"""FlagEmbedding: `query`, `pos`, `neg` (lists of texts), `pos_scores`, `neg_scores`, `prompt`; and LLM-Embedder's `task`, `teacher_scores`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.pairs import rows
from pipeline.pairs.files import Files
from pipeline.pairs.rows import BadRow, Pair, list_of, message, scores_of, text_of

COLUMNS = {
    "query": "query.text",
    "pos": "positives.text",
    "neg": "negatives.text",
    "pos_scores": "pos_scores",
    "neg_scores": "neg_scores",
    "prompt": "instruction_q",
    "task": "task",
    "teacher_scores": "pos_scores, neg_scores",
}


class Flag:
    """Pairs in the rows of FlagEmbedding's JSON Lines."""

    def __init__(self, uri: str | Sequence[str], *, storage_options: dict[str, Any] | None = None) -> None:
        self.files = Files(uri, storage_options)
        self.source = self.files.source

    def list(self) -> pa.Table:
        """The files. Raises ConfigError if they lack `query` or `pos`."""
        found = self.files.list()
        rows.require(["query", "pos"], self.files.columns, self.source)
        return found

    def uses(self) -> dict[str, str | None]:
        """`type` is not used: whether other rows' documents are negatives is said in the job file."""
        return rows.used(self.files.columns, COLUMNS)

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows."""
        return self.files.split(units)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """One row a record."""
        return rows.read(work, self.files, lambda value, folder: [pair(value)])


def pair(value: Mapping[str, Any]) -> Pair:
    """The row that a record is."""
    positives, negatives = _texts(value.get("pos"), "pos"), _texts(value.get("neg"), "neg")
    if not positives:
        raise BadRow("no_positive", "pos is empty")
    pos_scores, neg_scores = (scores_of(value.get(name), name) for name in ("pos_scores", "neg_scores"))
    teacher = scores_of(value.get("teacher_scores"), "teacher_scores")
    if teacher is not None and pos_scores is None:
        # LLM-Embedder: of all documents, positives first.
        if len(teacher) != len(positives) + len(negatives):
            raise BadRow("scores", f"teacher_scores has {len(teacher)} numbers for {len(positives)} positives and {len(negatives)} negatives")
        pos_scores, neg_scores = teacher[: len(positives)], teacher[len(positives) :]
    return {
        "task": text_of(value.get("task"), "task") or None,
        "instruction_q": text_of(value.get("prompt"), "prompt") or None,
        "query": message(text_of(value.get("query"), "query")),
        "positives": positives,
        "negatives": negatives,
        "pos_scores": pos_scores,
        "neg_scores": neg_scores,
    }


def _texts(value: Any, what: str) -> list[dict[str, Any]]:
    return [message(text_of(text, what), what=what) for text in list_of(value, what)]
