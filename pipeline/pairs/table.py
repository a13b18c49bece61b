"""A Lance table as pairs: one with columns of its own (`Table`), or one that holds PAIR rows, such as mined negatives (`Pairs`)."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import lance
import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.pairs import rows
from pipeline.pairs.files import BATCH_ROWS, Batch, Raw
from pipeline.pairs.rows import BadRow, Message, Pair, id_of, image_of, list_of, marked, message, scores_of, text_of
from pipeline.readers import slices
from pipeline.readers.rows import listing
from pipeline.readers.slices import MAX_SLICE_ROWS
from pipeline.readers.table import version_of
from pipeline.table.at import TableAt
from schemas.pairs import PAIR

PARTS = ("text", "image", "id")
PLAIN = ("instruction_q", "instruction_d", "task", "group", "label")


class Fragments(NamedTuple):
    """A Lance table's fragments as containers, at the version that was listed."""

    at: TableAt

    def list(self) -> pa.Table:
        """The fragments (LISTING)."""
        dataset = self.at.require()
        units = [f"{self.at.path()}@{dataset.version}#{fragment.fragment_id:08}" for fragment in dataset.get_fragments()]
        versions = [version_of(fragment) for fragment in dataset.get_fragments()]
        return listing(pa.table([units, versions, pa.nulls(len(units), pa.int64())], names=["unit", "version", "bytes"]))

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows."""
        parts = []
        for unit, version in zip(units["unit"].to_pylist(), units["version"].to_pylist(), strict=True):
            count = self.fragment(unit).count_rows()
            steps = range(0, max(count, 1), MAX_SLICE_ROWS)
            parts += [(unit, version, (start, min(count, start + MAX_SLICE_ROWS), None)) for start in steps]
        return slices.table(parts)

    def fragment(self, unit: str) -> lance.LanceFragment:
        """The fragment that a unit is."""
        version, _, number = unit.rpartition("@")[2].partition("#")
        dataset = lance.dataset(self.at.path(), version=int(version), storage_options=self.at.options)
        found = dataset.get_fragment(int(number))
        if found is None:
            raise ConfigError(f"fragment {number} is not in version {version} of {self.at.path()}; the version was cleaned up: list again")
        return found

    def batches(self, work: pa.Table, columns: Sequence[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """Unit, first row and rows of slices, in order."""
        for part in work.to_pylist():
            at, num = part["start"], part["stop"] - part["start"]
            if num:
                for batch in self.fragment(part["unit"]).scanner(columns=columns, offset=at, limit=num, batch_size=BATCH_ROWS).to_batches():
                    yield part["unit"], at, batch
                    at += batch.num_rows


class Table:
    """Pairs in the columns of a Lance table."""

    def __init__(
        self,
        uri: str,
        name: str,
        *,
        query: Mapping[str, str],
        positives: Mapping[str, str],
        negatives: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
        marker: str | None = None,
        storage_options: dict[str, str] | None = None,
    ) -> None:
        """Name the columns. `query`, `positives`, `negatives`: those of their text, image and id; of documents a value, or a list of them.

        An image is bytes or a URI. `columns`: of instruction_q, instruction_d, task, group, label, pos_scores, neg_scores, in_batch_negatives.
        """
        self.fragments = Fragments(TableAt(uri=uri, name=name, storage_options=storage_options or {}))
        self.source = self.fragments.at.path()
        self.marker = marker
        self.sides = {"query": dict(query), "positives": dict(positives), "negatives": dict(negatives or {})}
        self.columns = dict(columns or {})
        for side, parts in self.sides.items():
            _known(parts, PARTS, f"{self.source}: {side}")
        _known(self.columns, (*PLAIN, "pos_scores", "neg_scores", "in_batch_negatives"), f"{self.source}: columns")
        self._found: Sequence[str] = ()

    def list(self) -> pa.Table:
        """The fragments of the newest version. Raises ConfigError if there is no table, or it lacks a column."""
        self._found = self.fragments.at.require().schema.names
        rows.require(self._wanted(), self._found, self.source)
        return self.fragments.list()

    def _wanted(self) -> Sequence[str]:
        return [*dict.fromkeys(name for parts in (*self.sides.values(), self.columns) for name in parts.values())]

    def uses(self) -> dict[str, str | None]:
        """As the job file says; a column that two things are read from has both."""
        uses: dict[str, str] = {}
        named = [(f"{side}.{part}", name) for side, parts in self.sides.items() for part, name in parts.items()] + [*self.columns.items()]
        for use, name in named:
            uses[name] = f"{uses[name]}, {use}" if name in uses else use
        return rows.used(self._found, uses)

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows."""
        return self.fragments.split(units)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """One row a row."""
        for unit, start, batch in self.fragments.batches(work, self._wanted()):
            raws = [Raw(start + row, value, None) for row, value in enumerate(batch.to_pylist())]
            yield rows.table(Batch(unit, raws), _moved(unit), self._pairs)

    def _pairs(self, value: Mapping[str, Any]) -> Sequence[Pair]:
        found = {side: self._documents(value, side) for side in ("positives", "negatives")}
        if not found["positives"]:
            raise BadRow("no_positive", f"{', '.join(self.sides['positives'].values())} is null or empty")
        query = self._message({part: value[name] for part, name in self.sides["query"].items()}, "query")
        own = {name: value[column] for name, column in self.columns.items()}
        plain = {name: text_of(own[name], name) or None for name in PLAIN if name in own and name != "label"}
        label = {"label": None if own["label"] is None else str(own["label"])} if "label" in own else {}
        scores: Pair = {name: scores_of(own[name], name) for name in ("pos_scores", "neg_scores") if name in own}
        return [{"query": query, **found, **plain, **label, **scores, "in_batch_negatives": own.get("in_batch_negatives")}]

    def _documents(self, value: Mapping[str, Any], side: str) -> Sequence[Message]:
        parts = {part: value[name] for part, name in self.sides[side].items()}
        lists = {part: content for part, content in parts.items() if isinstance(content, list)}
        if not lists:
            return [self._message(parts, side)] if any(content is not None for content in parts.values()) else []
        num = max(map(len, lists.values()))
        if {len(content) for content in lists.values()} != {num} or any(content is not None for part, content in parts.items() if part not in lists):
            raise BadRow("bad_row", f"{side}: text, image and id must be lists of one length")
        return [self._message({part: list_of(content, part)[row] for part, content in lists.items()}, side) for row in range(num)]

    def _message(self, parts: Mapping[str, Any], what: str) -> Message:
        image = image_of(parts.get("image"), "", what)
        text, images = marked(text_of(parts.get("text"), what), [] if image is None else [image], self.marker)
        return message(text, images, id=id_of(parts.get("id"), what), what=what)


class Pairs:
    """A Lance table whose rows are PAIR rows already."""

    def __init__(self, uri: str, name: str, *, storage_options: dict[str, str] | None = None) -> None:
        self.fragments = Fragments(TableAt(uri=uri, name=name, storage_options=storage_options or {}))
        self.source = self.fragments.at.path()
        self._found: Sequence[str] = ()

    def list(self) -> pa.Table:
        """The fragments. Raises ConfigError if the columns are not those of PAIR."""
        schema = self.fragments.at.require().schema
        self._found = schema.names
        rows.require(PAIR.names, self._found, self.source)
        wrong = [entry.name for entry in PAIR if not schema.field(entry.name).type.equals(entry.type)]
        if wrong:
            raise ConfigError(f"{self.source}: {wrong[0]!r} is {schema.field(wrong[0]).type}; PAIR has {PAIR.field(wrong[0]).type}")
        return self.fragments.list()

    def uses(self) -> dict[str, str | None]:
        """PAIR's columns as what they are."""
        return rows.used(self._found, {name: name for name in PAIR.names})

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of at most 8,192 rows."""
        return self.fragments.split(units)

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """Each row as it is, its id and URI kept, if its messages are sound."""
        for _, _, batch in self.fragments.batches(work, PAIR.names):
            yield rows.tabled([_sound(row) for row in batch.to_pylist()])


def _sound(row: Pair) -> Pair:
    try:
        if not row["positives"]:
            raise BadRow("no_positive", "positives is empty")
        checked = partial(_again, row)
        return (
            row | {"query": checked("query", row["query"])} | {side: [checked(side, one) for one in row[side]] for side in ("positives", "negatives")}
        )
    except BadRow as bad:
        return {"row_id": row["row_id"], "uri": row["uri"], **rows.rejection(bad.reason, bad.detail)}


def _again(row: Pair, what: str, value: Message) -> Message:
    return message(value["text"], value["images"] or [], id=value["id"], what=what)


def _moved(unit: str) -> str:
    """A fragment's name within its table: rows keep their ids while the fragment is there, whatever version it is read at."""
    return unit.rpartition("#")[2]


def _known(given: Mapping[str, str], allowed: Sequence[str], where: str) -> None:
    wrong = [name for name in given if name not in allowed]
    if wrong:
        raise ConfigError(f"{where}: {wrong[0]!r} is none of {', '.join(allowed)}")
