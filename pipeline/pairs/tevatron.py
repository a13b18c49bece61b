"""Tevatron: v1 (MS MARCO: passages in the row) and v2 (ids of documents, which are in a corpus beside)."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.pairs import rows
from pipeline.pairs.files import Files
from pipeline.pairs.keys import hash64
from pipeline.pairs.rows import BadRow, Message, Pair, id_of, image_of, list_of, message, text_of
from schemas.pairs import MESSAGE

V1 = {"query": "query.text", "query_id": "query.id", "positive_passages": "positives", "negative_passages": "negatives"}
V2 = {
    "query_text": "query.text",
    "query_image": "query.images",
    "query_id": "query.id",
    "positive_document_ids": "positives",
    "negative_document_ids": "negatives",
}
CORPUS = pa.schema([pa.field("document", MESSAGE)])


class Tevatron:
    """Pairs in the rows of Tevatron's files. A document's id keeps it from being a negative of a row that it answers."""

    def __init__(
        self,
        uri: str | Sequence[str],
        *,
        corpus: str | Sequence[str] | None = None,
        image_dir: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """`corpus`: files of documents (`docid`, `text`, `image`), for v2. `image_dir`: what image paths are relative to; None: the file's folder."""
        self.files = Files(uri, storage_options)
        self.source = self.files.source
        self.image_dir = image_dir
        self.corpus = None if corpus is None else Files(corpus, storage_options)

    def list(self) -> pa.Table:
        """The files. Raises ConfigError if they are of neither version, or the corpus is not given or lacks a column."""
        found = self.files.list()
        if not self._with_corpus():
            rows.require(["query", "positive_passages"], self.files.columns, self.source)
            return found
        if self.corpus is None:
            raise ConfigError(f"{self.source} names its documents by id: give `corpus`, the files with docid, text and image")
        units = self.corpus.list()
        rows.require(["docid"], self.corpus.columns, self.corpus.source)
        # The corpus belongs to what was read: another corpus is another version of the rows.
        marks = [f"{name}@{version}" for name, version in zip(units["unit"].to_pylist(), units["version"].to_pylist(), strict=True)]
        versions = [f"{version} {' '.join(marks)}" for version in found["version"].to_pylist()]
        return found.set_column(1, found.schema.field("version"), pa.array(versions, pa.string()))

    def _with_corpus(self) -> bool:
        return "positive_document_ids" in self.files.columns

    def uses(self) -> dict[str, str | None]:
        """v2 where there is `positive_document_ids`; columns of its corpus as `corpus.text`."""
        if not self._with_corpus() or self.corpus is None:
            return rows.used(self.files.columns, V1)
        corpus = {"docid": "document id", "text": "document text", "title": "document text", "image": "document image"}
        found = {f"corpus.{name}": use for name, use in rows.used(self.corpus.columns, corpus).items()}
        return rows.used(self.files.columns, V2) | found

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows."""
        return self.files.split(units)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """One row a record. The corpus of v2 is copied to a temporary Lance file and looked up there: 16 bytes of memory a document."""
        if not self._with_corpus() or self.corpus is None:
            yield from rows.read(work, self.files, lambda value, folder: [passages(value)])
            return
        with tempfile.TemporaryDirectory() as folder:
            documents = Documents(self.corpus, self.image_dir, folder)
            for batch in self.files.batches(work):
                ids = {id for raw in batch.records for id in _ids(raw.value)}
                pairs = partial(self._pairs, documents.find(ids), self.image_dir or storage.parent(batch.unit))
                yield rows.table(batch, self.files.name(batch.unit), pairs)

    def _pairs(self, documents: Mapping[str, Message], folder: str, value: Mapping[str, Any]) -> Sequence[Pair]:
        image = image_of(value.get("query_image"), folder, "query_image")
        query = message(text_of(value.get("query_text"), "query_text"), [] if image is None else [image], id=id_of(value.get("query_id"), "query_id"))
        sides = {}
        for side, name in (("positives", "positive_document_ids"), ("negatives", "negative_document_ids")):
            ids = [str(id_of(id, name)) for id in list_of(value.get(name), name)]
            missing = [id for id in ids if id not in documents]
            if missing:
                raise BadRow("missing", f"{name}: the corpus has no document {missing[0]!r}, or an empty one")
            sides[side] = [documents[id] for id in ids]
        if not sides["positives"]:
            raise BadRow("no_positive", "positive_document_ids is empty")
        return [{"query": query, **sides}]


def passages(value: Mapping[str, Any]) -> Pair:
    """The row that a record of v1 is. A title goes before the text, as Tevatron has it."""
    found = {}
    for side, name in (("positives", "positive_passages"), ("negatives", "negative_passages")):
        found[side] = [_document(passage, None, name) for passage in list_of(value.get(name), name)]
    if not found["positives"]:
        raise BadRow("no_positive", "positive_passages is empty")
    return {"query": message(text_of(value.get("query"), "query"), id=id_of(value.get("query_id"), "query_id")), **found}


def _document(value: Any, folder: str | None, what: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow("bad_row", f"{what} holds {rows.short(value)}; a document is an object with docid and text")
    title, text = text_of(value.get("title"), "title"), text_of(value.get("text"), "text")
    image = image_of(value.get("image"), folder, "image") if folder is not None else None
    joined = f"{title} {text or ''}".strip() if title else text
    return message(joined, [] if image is None else [image], id=id_of(value.get("docid"), "docid"), what=what)


def _ids(value: Mapping[str, Any]) -> Iterator[str]:
    for name in ("positive_document_ids", "negative_document_ids"):
        found = value.get(name)
        yield from map(str, found if isinstance(found, list) else [])


class Documents:
    """A corpus that documents are looked up in by id."""

    def __init__(self, files: Files, image_dir: str | None, folder: str) -> None:
        """Copies the corpus to `folder`. Raises ConfigError if two documents have one id."""
        self._hashes = np.zeros(0, np.uint64)
        hashes: list[np.ndarray] = []
        batches = self._read(files, image_dir, hashes)
        self._documents = lance.write_dataset(batches, f"{folder}/corpus.lance", schema=CORPUS, data_storage_version="2.2")
        found = np.concatenate(hashes) if hashes else self._hashes
        self._order = np.argsort(found, kind="stable")
        self._hashes = found[self._order]
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if len(twice):
            row = self._documents.take([int(self._order[twice[0]])])["document"][0].as_py()
            raise ConfigError(f"{files.source} has the docid {row['id']!r} more than once; make ids unique, or remove the repeats")

    def find(self, ids: set[str]) -> dict[str, Message]:
        """The documents of those ids that there are."""
        wanted = sorted(ids)
        if not wanted or not len(self._hashes):
            return {}
        keys = _hashed(wanted)
        at = np.searchsorted(self._hashes, keys).clip(max=len(self._hashes) - 1)
        places = self._order[at][self._hashes[at] == keys]
        found = self._documents.take(np.sort(places).tolist())["document"].to_pylist() if len(places) else []
        return {document["id"]: document for document in found}

    def _read(self, files: Files, image_dir: str | None, hashes: list[np.ndarray]) -> Iterator[pa.RecordBatch]:
        for batch in files.batches(files.split(files.list())):
            folder = image_dir or storage.parent(batch.unit)
            found = [document for raw in batch.records if (document := _readable(raw.value, folder)) is not None]
            hashes.append(_hashed([document["id"] for document in found]))
            yield pa.RecordBatch.from_pylist([{"document": document} for document in found], schema=CORPUS)


def _readable(value: Mapping[str, Any], folder: str) -> Message | None:
    """A document; None for one that is empty or damaged: a row that names it is rejected, and the others need not care."""
    try:
        found = _document(value, folder, "document")
    except BadRow:
        return None
    return found if found["id"] is not None else None


def _hashed(ids: Sequence[str]) -> np.ndarray:
    return np.array([hash64(id) for id in ids], np.int64).view(np.uint64)
