"""Search in a vector table: by text, by image, by a row's id or by a vector, with the encoder that made the table.

Reads through pylance: it starts three times as fast as lancedb, and sees every index that lancedb builds. Rows that came after the
index was built are found too: they are compared one by one.
"""

import json
from collections.abc import Sequence
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pydantic

from pipeline.config import ConfigError, Model, Ref, nearest
from pipeline.encoders import Encoder
from pipeline.fetch import fetch
from pipeline.media import BadItem, Limits, decode, to_pixels
from pipeline.stores import reaching
from pipeline.table.at import TableAt, dim_of, fingerprint_of, model_of, told
from pipeline.table.ledger import TRAINING
from schemas.items import encoder_schema

PROBES = 20
"""Partitions of an IVF index that are searched at least; more are, while hits are missing."""
FILTERED_PROBES = 200
"""With a filter, the nearest of the rows it keeps may lie in partitions far from the query: with 20, a filter that keeps one row
in 2,000 found 0.63 of them."""
REFINE = 10
"""So many times k candidates are compared by their full vectors: recall 1.00 where a factor of 4 gave 0.99, for 0.6 ms (IVF_RQ)."""
EF_PER_CANDIDATE = 2
"""Length of the list that a graph search keeps, a candidate; the engine refuses less than 1."""

SIMILARITY = "similarity"


class Query(Model):
    """What is looked for: exactly one of `text`, `image`, `id` and `vector`."""

    text: str | None = None
    """Words, embedded by the table's encoder."""
    image: str | None = None
    """Path or URI of an image file, embedded by the table's encoder."""
    id: str | None = None
    """Id of a row of the table: what is like it."""
    vector: list[float] | None = None
    """A vector of the table's length."""
    k: pydantic.PositiveInt = 10
    """So many hits, or fewer if the table, or the filter, has no more."""
    where: str | None = None
    """SQL condition on the table's columns that every hit fulfils, such as `label = 'cat' and year > 2020`."""
    columns: list[str] | None = None
    """Columns of the hits; null for all but `vector` and those that begin with `_`. `id` and `similarity` are always there."""
    exact: bool = False
    """Compare with every row, past the index: slower, and the truth."""
    itself: bool = False
    """With `id`: count the row itself among its hits."""

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> "Query":
        given = [kind for kind in ("text", "image", "id", "vector") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a query has exactly one of text, image, id, vector; given: {', '.join(given) or 'none'}")
        if self.text is not None and not self.text.strip():
            raise ValueError("the query's text is empty")
        return self


class Searcher:
    """Searches one table again and again: the encoder is built once, at the first query that needs it.

    `encoder`: None rebuilds the encoder that made the table. Another one is refused with ConfigError. `storage_options`: fsspec's, for
    the images of queries.
    """

    def __init__(self, at: TableAt, *, encoder: Ref | None = None, storage_options: dict[str, Any] | None = None) -> None:
        self._at = at
        self._storage_options = storage_options
        self._ref = encoder
        self._dataset: lance.LanceDataset | None = None
        self._fingerprint = ""
        self._encoder: Encoder | None = None

    def search(self, queries: Sequence[Query]) -> list[pa.Table]:
        """The hits of each query, nearest first, in the table as it is now. `similarity` is the cosine: 1 is the same.

        Raises ConfigError for what the query can mend: an unknown column or id, a wrong filter, an unreadable image.
        """
        dataset = self._newest()
        fingerprint = fingerprint_of(dataset)
        for query in queries:
            _check(dataset, query)
        if self._ref is not None:
            self._encoder_of(fingerprint)
        vectors = self._vectors(dataset, fingerprint, queries)
        return [_nearest_rows(dataset, query, vector) for query, vector in zip(queries, vectors, strict=True)]

    def _newest(self) -> lance.LanceDataset:
        if self._dataset is None:
            self._dataset = self._at.require()
        else:
            # Not opened anew: the parts of the index that were read stay in this dataset's cache.
            self._dataset.checkout_latest()
        return self._dataset

    def _vectors(self, dataset: lance.LanceDataset, fingerprint: str, queries: Sequence[Query]) -> list[np.ndarray]:
        asked = [query for query in queries if query.text is not None or query.image is not None]
        encoded = iter(_encode(self._encoder_of(fingerprint), asked, self._storage_options)) if asked else iter(())
        return [_stored(dataset, query) if query.text is None and query.image is None else next(encoded) for query in queries]

    def _encoder_of(self, fingerprint: str) -> Encoder:
        if self._encoder is None or self._fingerprint != fingerprint:
            self._encoder = query_encoder(self._at, fingerprint, ref=self._ref)
            self._fingerprint = fingerprint
        return self._encoder


def search(at: TableAt, query: Query, *, encoder: Ref | None = None) -> pa.Table:
    """The hits of one query: see `Searcher.search`."""
    return Searcher(at, encoder=encoder).search([query])[0]


def row(dataset: lance.LanceDataset, id: str, *, columns: list[str]) -> dict[str, Any]:
    """Some columns of one row. Raises ConfigError if there is no such row."""
    quoted = id.replace("'", "''")
    rows: list[dict[str, Any]] = dataset.to_table(columns=columns, filter=f"id = '{quoted}'", limit=1).to_pylist()
    if not rows:
        raise ConfigError(f"query id {id!r}: the table has no such row")
    return rows[0]


def query_encoder(at: TableAt, fingerprint: str, *, ref: Ref | None = None) -> Encoder:
    """The query side of the encoder with this fingerprint: built from `ref`, or from its row in the table of models.

    Raises ConfigError if what is built has another fingerprint: its vectors would mean nothing in this table.
    """
    model = model_of(at, fingerprint)
    if ref is None and model is None:
        raise ConfigError(
            f"{at.models_path} has no row for the fingerprint {fingerprint} of table {at.name!r}; name the encoder that made it: encoder.target=..."
        )
    made = ref or Ref(target=model["target"], args=json.loads(model["args"]))  # type: ignore[index]
    built = made.build("dim", "fingerprint", "encode")
    if built.fingerprint != fingerprint:
        raise ConfigError(_foreign(at, fingerprint, model, made, built, given=ref is not None))
    encoder: Encoder = built.for_queries() if hasattr(built, "for_queries") else built
    return encoder


def _foreign(at: TableAt, fingerprint: str, model: dict[str, Any] | None, ref: Ref, built: Encoder, *, given: bool) -> str:
    said = f"table {at.name!r} holds vectors of the encoder {fingerprint}"
    if model is not None:
        said += (
            f" ({model['target']} with {model['args']}), and {ref.target} is {built.fingerprint} now{_difference(model['lineage'], built.lineage)}"
        )
    else:
        said += f", and the given {ref.target} is {built.fingerprint}"
    if given:
        return f"{said}; leave `encoder` out to query with the encoder that made the table, or choose the table of the given one"
    return f"{said}: its weights or settings were changed; bring back the old ones, or embed into a new table with the new ones"


def _difference(lineage: str, now: dict[str, object]) -> str:
    then = json.loads(lineage or "{}") or {}
    then.pop(TRAINING, None)
    changed = [f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    return f" ({'; '.join(changed)})" if changed else ""


def _check(dataset: lance.LanceDataset, query: Query) -> None:
    names = dataset.schema.names
    for column in query.columns or []:
        if column not in [*names, SIMILARITY]:
            raise ConfigError(f"columns: the table has no column {column!r}{nearest(column, names)}; its columns are {', '.join(names)}")
    if query.where is not None:
        try:
            dataset.scanner(columns=["id"], filter=query.where).explain_plan()
        except (ValueError, OSError) as error:
            columns = ", ".join(f"{entry.name} {entry.type}" for entry in dataset.schema if entry.name != "vector")
            raise ConfigError(f"where: {query.where!r} is not a condition on this table: {told(error)}; its columns are {columns}") from error


def _encode(encoder: Encoder, queries: Sequence[Query], storage_options: dict[str, Any] | None) -> list[np.ndarray]:
    images = [None if query.image is None else _image(encoder, query.image, storage_options) for query in queries]
    ids = [query.image or query.text for query in queries]
    columns = [pa.array(ids, pa.string()), pa.array([query.text for query in queries], pa.string()), to_pixels(images)]
    try:
        return list(encoder.encode(pa.Table.from_arrays(columns, schema=encoder_schema())))
    except ValueError as error:
        raise ConfigError(f"the table's encoder cannot embed this query: {error}") from error


def _image(encoder: Encoder, uri: str, storage_options: dict[str, Any] | None) -> np.ndarray:
    limits = Limits()
    with reaching(uri):
        data = fetch([uri], max_bytes=limits.max_item_bytes, storage_options=storage_options)[0]
    try:
        if data is None or isinstance(data, BadItem):
            raise data or BadItem("missing")
        image = decode(data, limits)
    except BadItem as error:
        raise ConfigError(f"query image {uri!r}: {error.reason}: {error.detail}") from error
    prepared: np.ndarray = encoder.prepare(image) if hasattr(encoder, "prepare") else image
    return prepared


def _stored(dataset: lance.LanceDataset, query: Query) -> np.ndarray:
    if query.id is not None:
        return np.asarray(row(dataset, query.id, columns=["vector"])["vector"], np.float32)
    vector = np.asarray(query.vector, np.float32)
    if len(vector) != dim_of(dataset):
        raise ConfigError(f"the query vector has {len(vector)} numbers, and the table's vectors have {dim_of(dataset)}")
    if not np.isfinite(vector).all() or not vector.any():
        raise ConfigError("the query vector is zero, or has numbers that are not finite: it points nowhere")
    return vector / np.linalg.norm(vector)


def _nearest_rows(dataset: lance.LanceDataset, query: Query, vector: np.ndarray) -> pa.Table:
    without_itself = query.id is not None and not query.itself
    k = min(query.k + without_itself, max(1, dataset.count_rows()))
    hits = dataset.scanner(
        columns=[*_columns(dataset, query), "_distance"], filter=query.where, prefilter=True, nearest=_settings(query, vector, k)
    ).to_table()
    if without_itself:
        hits = hits.filter(pa.array([hit != query.id for hit in hits["id"].to_pylist()], pa.bool_()))
    similarity = pa.array(1 - hits["_distance"].to_numpy(), pa.float32())
    hits = hits.drop_columns(["_distance"]).add_column(1, SIMILARITY, similarity)
    return hits.sort_by([(SIMILARITY, "descending")]).slice(0, query.k)


def _columns(dataset: lance.LanceDataset, query: Query) -> list[str]:
    chosen = query.columns if query.columns is not None else [name for name in dataset.schema.names if name != "vector" and not name.startswith("_")]
    return list(dict.fromkeys(["id", *(name for name in chosen if name != SIMILARITY)]))


def _settings(query: Query, vector: np.ndarray, k: int) -> dict[str, Any]:
    candidates = k * REFINE
    probes = max(PROBES if query.where is None else FILTERED_PROBES, k // 5)
    return {
        "column": "vector",
        "q": vector,
        "k": k,
        "metric": "cosine",
        "use_index": not query.exact,
        "minimum_nprobes": probes,
        "refine_factor": REFINE,
        "ef": candidates * EF_PER_CANDIDATE,
    }
