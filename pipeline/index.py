"""Indices of a vector table: which kind fits its size, built once and kept up to date. Nothing to do: no new version.

Built through lancedb: a BTREE built by pylance 14 is invisible to lancedb 0.40, which carries the Lance 13 core; one built
by lancedb is seen by both, also after pylance has extended it. Data files are never rewritten here: that is maintenance.
"""

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lance
import lancedb
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.index import FTS, Bitmap, BTree, HnswSq, IvfPq, IvfRq, LabelList

from pipeline.config import ConfigError, JobFailed, Model, nearest
from pipeline.table.at import TableAt, dim_of, fingerprint_of

log = logging.getLogger(__name__)

MIN_TRAINING_ROWS = 256
"""Quantisers and partitions are trained on at least this many rows; with fewer an index could not be faster anyway."""
MAX_SEGMENTS = 8
"""Every extension adds a segment to the vector index, and every query asks them all; at this many they are merged."""
MAX_BITMAP_VALUES = 256
"""A column with at most this many different values is indexed as bitmaps, one a value; else as a B-tree."""
BITMAP_SAMPLE_ROWS = 10_000
COMMIT_TRIES = 5

Kind = Literal["exact", "ivf_hnsw_sq", "ivf_rq", "ivf_pq"]
TYPES = {"ivf_hnsw_sq": "IvfHnswSq", "ivf_rq": "IvfRq", "ivf_pq": "IvfPq"}


class IndexSettings(Model):
    """Which indices a table has."""

    kind: Literal["auto", Kind] = "auto"
    """Of the vectors. auto: exact or ivf_rq, by the number of rows. exact: none, every query reads every vector.

    ivf_hnsw_sq answers a long-lived reader somewhat faster, and costs far longer to build, ten times the bytes, and a
    slow first query, which reads the whole graph.
    """
    exact_below: int = 50_000
    """auto: fewer rows than this need no index; reading them all takes some 50 ms."""
    scalar: list[str] = []
    """Columns that filters name. Columns of few different values are indexed as bitmaps, others as B-trees."""
    text: list[str] = []
    """Columns with a full-text index."""
    tokenizer: Literal["simple", "whitespace", "raw", "ngram", "icu"] = "simple"
    """How full text is cut into words: simple for languages with spaces, icu for those without."""
    with_position: bool = False
    """Keep the words' positions in the full-text index: needed for phrase queries, and larger."""


class IndexState(Model):
    """One index as it is now."""

    name: str
    column: str
    kind: str
    indexed_rows: int
    unindexed_rows: int
    segments: int
    bytes: int | None


class IndexReport(Model):
    """What was done, and what there is now."""

    job: str = "index"
    table: str
    kind: Kind
    """Of the vectors."""
    reason: str
    rows: int
    indexed_rows: int
    unindexed_rows: int
    """Rows that are searched one by one: all of them without a vector index, else those that came since it was extended."""
    bytes: int
    """Of all indices."""
    done: list[str]
    """What was changed, in words; empty if nothing was to do."""
    indices: list[IndexState]
    version: int
    seconds: float


@dataclass(frozen=True)
class Step:
    """One change: `config` is lancedb's description of an index to build; None to extend, merge or drop `name`."""

    action: Literal["build", "replace", "extend", "merge", "drop"]
    name: str
    why: str
    column: str = ""
    config: Any = None

    def __str__(self) -> str:
        kind = f" ({type(self.config).__name__})" if self.config else ""
        return f"{self.action} {self.name}{kind}: {self.why}"


@dataclass(frozen=True)
class IndexPlan:
    """What is to be done so that a table has the indices it should have."""

    kind: Kind
    reason: str
    steps: list[Step]


def choose_kind(rows: int, dim: int, settings: IndexSettings) -> tuple[Kind, str]:
    """The kind of vector index that a table of this size gets, and why."""
    if settings.kind == "auto":
        return _kind_by_size(rows, dim, settings)
    if settings.kind == "ivf_rq" and dim % 8:
        raise ConfigError(f"kind=ivf_rq needs vectors whose length divides by 8, and these have {dim}; use ivf_hnsw_sq")
    if settings.kind != "exact" and rows < MIN_TRAINING_ROWS:
        return "exact", f"{rows} rows are too few to train {settings.kind}; it needs {MIN_TRAINING_ROWS}"
    return settings.kind, "the job asks for it"


def _kind_by_size(rows: int, dim: int, settings: IndexSettings) -> tuple[Kind, str]:
    if rows < max(settings.exact_below, MIN_TRAINING_ROWS):
        return "exact", f"{rows} rows, fewer than exact_below={settings.exact_below}: reading them all is fast"
    if dim % 8:
        return "ivf_hnsw_sq", f"{rows} rows, and vectors of length {dim}, which ivf_rq cannot take"
    return "ivf_rq", f"{rows} rows, exact_below={settings.exact_below} or more"


def plan(at: TableAt, settings: IndexSettings) -> IndexPlan:
    """The changes that bring the table's indices to `settings`. Reads only. Raises ConfigError for an unknown column."""
    dataset = at.require()
    fingerprint_of(dataset)
    _check_columns(dataset.schema, settings)
    kind, reason = choose_kind(dataset.count_rows(), dim_of(dataset), settings)
    existing = list(_open(at).list_indices())
    steps = _vector_steps(dataset, existing, kind, reason)
    for column in settings.scalar:
        if not _find(existing, column, ("BTree", "Bitmap", "LabelList")):
            steps.append(Step("build", f"{column}_idx", "filters name it", column, _scalar_config(dataset, column)))
    for column in settings.text:
        steps += _text_steps(existing, column, settings)
    changed = {step.name for step in steps}
    extended = [_extension(index) for index in existing if index.num_unindexed_rows and index.name not in changed]
    return IndexPlan(kind=kind, reason=reason, steps=[*steps, *extended])


def build(at: TableAt, settings: IndexSettings) -> IndexReport:
    """Bring the table's indices to `settings`: build what is missing, extend by new rows what is there.

    Safe beside jobs that write to the table. Raises JobFailed if they change the indexed rows again and again.
    """
    started = time.perf_counter()
    todo = plan(at, settings)
    _carry_out(at, todo.steps)
    return _report(at, todo, started)


def extend(at: TableAt) -> list[str]:
    """Take new rows into the indices that the table has, building and dropping none; what was done, in words."""
    steps = [_extension(index) for index in _open(at).list_indices() if index.num_unindexed_rows]
    _carry_out(at, steps)
    return [str(step) for step in steps]


def _carry_out(at: TableAt, steps: list[Step]) -> None:
    for step in steps:
        log.info("%s", step)
        _commit(step, functools.partial(_execute, at, step))


def _execute(at: TableAt, step: Step) -> None:
    if step.action in ("build", "replace"):
        # replace: the old index of this name serves until the new one is committed.
        _open(at).create_index(step.column, config=step.config, name=step.name, replace=True)
    elif step.action == "drop":
        _open(at).drop_index(step.name)
    elif step.action == "merge":
        at.require().optimize.optimize_indices(index_names=[step.name], num_indices_to_merge=MAX_SEGMENTS * 2)
    else:
        at.require().optimize.optimize_indices(index_names=[step.name])


def _commit(step: Step, change: Callable[[], None]) -> None:
    for attempt in range(COMMIT_TRIES):
        try:
            change()
            return
        except (OSError, RuntimeError, ValueError) as error:  # lancedb and pylance name conflicts in words only
            if "commit conflict" not in str(error):
                raise
            log.info("another job changed the table during %r, trying again: %s", step.name, error)
            time.sleep(0.1 * 2**attempt)
    raise JobFailed(f"{step}: other jobs rewrote the table {COMMIT_TRIES} times while it was indexed; run this again when maintenance has ended")


def _vector_steps(dataset: lance.LanceDataset, existing: list[Any], kind: Kind, reason: str) -> list[Step]:
    present = [index for index in existing if index.columns == ["vector"]]
    right = next((index for index in present if kind != "exact" and _is(index, TYPES[kind])), None)
    drops = [Step("drop", index.name, reason) for index in present if index is not right]
    if kind == "exact":
        return drops
    config = _vector_config(kind, dim_of(dataset))
    if right is None:
        others = [step for step in drops if step.name != "vector_idx"]
        return [Step("replace" if present else "build", "vector_idx", reason, "vector", config), *others]
    return drops


def _is(index: Any, kind: str) -> bool:
    return bool(index.index_type == kind and (index.index_details or {}).get("metric_type") == "COSINE")


def _vector_config(kind: Kind, dim: int) -> HnswSq | IvfRq | IvfPq:
    # cosine, not dot: the order is the same for vectors of norm 1, but float16 rounds norms, and 1 - distance is the similarity for both.
    # num_partitions is the engine's choice: it splits and joins partitions towards its own size whenever an index is extended.
    if kind == "ivf_hnsw_sq":
        return HnswSq(distance_type="cosine")
    if kind == "ivf_rq":
        return IvfRq(distance_type="cosine", num_bits=1)
    return IvfPq(distance_type="cosine", num_sub_vectors=dim // 8 if dim % 8 == 0 else None)


def _scalar_config(dataset: lance.LanceDataset, column: str) -> BTree | Bitmap | LabelList:
    kind = dataset.schema.field(column).type
    if pa.types.is_list(kind):
        return LabelList()
    if not (pa.types.is_string(kind) or pa.types.is_boolean(kind)):
        return BTree()
    # A random sample: the first rows of a sorted column would show one value.
    sample = dataset.sample(min(BITMAP_SAMPLE_ROWS, dataset.count_rows()), columns=[column])
    return Bitmap() if pc.count_distinct(sample[column]).as_py() <= min(MAX_BITMAP_VALUES, len(sample) // 4) else BTree()


def _text_steps(existing: list[Any], column: str, settings: IndexSettings) -> list[Step]:
    index = _find(existing, column, ("FTS",))
    config = FTS(base_tokenizer=settings.tokenizer, with_position=settings.with_position)
    if index is None:
        return [Step("build", f"{column}_text_idx", "full text is wanted", column, config)]
    has = index.index_details or {}
    if (has.get("base_tokenizer"), has.get("with_position")) == (settings.tokenizer, settings.with_position):
        return []
    return [Step("replace", index.name, "the tokenizer or with_position is another now", column, config)]


def _extension(index: Any) -> Step:
    why = f"{index.num_unindexed_rows} rows are not in it"
    if index.columns == ["vector"] and (index.num_segments or 1) >= MAX_SEGMENTS:
        return Step("merge", index.name, f"{why}, and it is in {index.num_segments} segments")
    return Step("extend", index.name, why)


def _find(existing: list[Any], column: str, kinds: tuple[str, ...]) -> Any | None:
    return next((index for index in existing if index.columns == [column] and index.index_type in kinds), None)


def _check_columns(schema: pa.Schema, settings: IndexSettings) -> None:
    for key, columns in (("scalar", settings.scalar), ("text", settings.text)):
        for column in columns:
            if column not in schema.names:
                raise ConfigError(
                    f"{key}: the table has no column {column!r}{nearest(column, schema.names)}; its columns are {', '.join(schema.names)}"
                )
            kind = schema.field(column).type
            if key == "text" and not pa.types.is_string(kind):
                raise ConfigError(f"text: column {column!r} holds {kind}; a full-text index needs strings")
            if key == "scalar" and (column == "vector" or pa.types.is_binary(kind)):
                raise ConfigError(f"scalar: column {column!r} holds {kind}, which filters cannot compare")


def _open(at: TableAt) -> Any:
    return lancedb.connect(at.uri, storage_options=at.options).open_table(at.name)


def _report(at: TableAt, plan: IndexPlan, started: float) -> IndexReport:
    dataset = at.require()
    rows = dataset.count_rows()
    states = [_state(index) for index in _open(at).list_indices()]
    unindexed = next((state.unindexed_rows for state in states if state.column == "vector"), rows)
    return IndexReport(
        table=at.path(),
        kind=plan.kind,
        reason=plan.reason,
        rows=rows,
        indexed_rows=rows - unindexed,
        unindexed_rows=unindexed,
        bytes=sum(state.bytes or 0 for state in states),
        done=[str(step) for step in plan.steps],
        indices=states,
        version=dataset.version,
        seconds=round(time.perf_counter() - started, 3),
    )


def _state(index: Any) -> IndexState:
    return IndexState(
        name=index.name,
        column=index.columns[0],
        kind=index.index_type,
        indexed_rows=index.num_indexed_rows or 0,
        unindexed_rows=index.num_unindexed_rows or 0,
        segments=index.num_segments or 1,
        bytes=index.size_bytes,
    )
