"""Records to PAIR rows: what the formats share. A record becomes rows, or a BadRow that says why not."""

import ast
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.config import ConfigError, nearest
from pipeline.pairs.files import Batch, Files
from pipeline.readers.identity import salted
from pipeline.vlm.message import MARKER, check_markers, words
from schemas.pairs import PAIR, REASONS

REJECTED = pa.schema([*PAIR, pa.field("reject_reason", pa.string()), pa.field("reject_detail", pa.string())])
"""What `PairReader.read` yields."""

NUMBERED = re.compile(r"<\|image_(\d+)\|>")
"""VLM2Vec's markers, Phi-3-V's words: the number says which image."""

Message = dict[str, Any]
"""A value of schemas.pairs.MESSAGE."""
Pair = dict[str, Any]
"""A row of PAIR without row_id and uri; what is left out is null."""
Image = dict[str, Any]
"""A value of schemas.pairs.IMAGE."""


class BadRow(Exception):
    """A row that cannot be trained on: `reason` is a key of schemas.pairs.REASONS, `detail` says what exactly was wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def read(work: pa.Table, files: Files, pairs: Callable[[Mapping[str, Any], str], Sequence[Pair]]) -> Iterator[pa.Table]:
    """The rows of slices. `pairs`: of a record and its file's folder, the rows that it is; raises BadRow."""
    for batch in files.batches(work):
        yield table(batch, files.name(batch.unit), partial(_within, pairs, storage.parent(batch.unit)))


def _within(pairs: Callable[[Mapping[str, Any], str], Sequence[Pair]], folder: str, value: Mapping[str, Any]) -> Sequence[Pair]:
    return pairs(value, folder)


def table(batch: Batch, name: str, pairs: Callable[[Mapping[str, Any]], Sequence[Pair]]) -> pa.Table:
    """The rows of a batch of records, those that are wrong rejected. `name`: of the container within its source."""
    rows: list[Pair] = []
    labels: list[str] = []
    for raw in batch.records:
        found = _attempt(raw.value, raw.fault, pairs)
        labels += [str(raw.row) if len(found) == 1 else f"{raw.row}.{part}" for part in range(len(found))]
        rows += found
    ids = salted(labels, name)
    return tabled([{**row, "row_id": id, "uri": f"{batch.unit}#{label}"} for row, id, label in zip(rows, ids, labels, strict=True)])


def tabled(rows: list[Pair]) -> pa.Table:
    """Rows with `row_id` and `uri` as a table REJECTED. A value of the wrong type rejects its row alone."""
    try:
        return pa.Table.from_pylist(rows, schema=REJECTED)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.concat_tables([_single(row) for row in rows])


def _single(row: Pair) -> pa.Table:
    try:
        return pa.Table.from_pylist([row], schema=REJECTED)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        bad = {"row_id": row["row_id"], "uri": row["uri"], **rejection("bad_row", str(error))}
        return pa.Table.from_pylist([bad], schema=REJECTED)


def _attempt(value: Mapping[str, Any], fault: str | None, pairs: Callable[[Mapping[str, Any]], Sequence[Pair]]) -> Sequence[Pair]:
    if fault:
        return [rejection("bad_row", fault)]
    try:
        return pairs(value)
    except BadRow as bad:
        return [rejection(bad.reason, bad.detail)]


def rejection(reason: str, detail: str) -> Pair:
    """A row that is none."""
    nothing = {"text": None, "images": None, "id": None}
    return {"query": nothing, "positives": [], "negatives": [], "reject_reason": reason, "reject_detail": detail}


def message(text: str | None, images: Sequence[Image] = (), *, id: str | None = None, what: str = "query") -> Message:
    """A message that was checked. Raises BadRow if it is empty, or markers and images do not agree. `what`: for the error."""
    if text is not None and not words(text):
        if text.strip() == "" and not images:
            raise BadRow("empty", f"the {what} is a text of only white space and has no image")
        text = text if MARKER in text else None
    if text is None and not images:
        raise BadRow("empty", f"the {what} has neither text nor image")
    try:
        check_markers(text or "", len(images))
    except ValueError as error:
        raise BadRow("markers", f"{what}: {error}") from error
    return {"text": text, "images": list(images), "id": id}


def marked(text: str | None, images: Sequence[Image], marker: str | None) -> tuple[str | None, list[Image]]:
    """The text with MARKER for each of its own markers, and the images in the order of these.

    `marker`: the source's own; None: numbered ones as MMEB has them, `<|image_1|>`, whose number says which image.
    """
    if text is None:
        return None, list(images)
    if marker is not None:
        return text.replace(marker, MARKER), list(images)
    numbers = [int(number) for number in NUMBERED.findall(text)]
    if sorted(numbers) == list(range(1, len(images) + 1)):
        images = [images[number - 1] for number in numbers]
    return NUMBERED.sub(MARKER, text), list(images)


def text_of(value: Any, what: str) -> str | None:
    """A text or null. Raises BadRow for anything else: a number where text is wanted is the wrong column."""
    if value is None or isinstance(value, str):
        return value
    raise BadRow("bad_row", f"{what} is not text: {short(value)}")


def id_of(value: Any, what: str) -> str | None:
    """An id, as text: text or a whole number."""
    if value is None or value == "":
        return None
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise BadRow("bad_row", f"{what} is neither text nor a whole number: {short(value)}")


def list_of(value: Any, what: str) -> list[Any]:
    """A list; of null an empty one. Raises BadRow for anything else, a text included."""
    if value is None:
        return []
    if isinstance(value, list):
        return value
    raise BadRow("bad_row", f"{what} is not a list: {short(value)}")


def parsed_list(value: Any, what: str) -> list[Any]:
    """A list, or a text that spells one as Python does: "['a', 'b']". Literals only, nothing is evaluated. Raises BadRow."""
    if not isinstance(value, str):
        return list_of(value, what)
    if not value.strip():
        return []
    try:
        found = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRow("bad_row", f"{what} does not spell a list of texts: {short(value)}") from error
    return list_of(found, what)


def scores_of(value: Any, what: str) -> list[float] | None:
    """Finite numbers, or null. Raises BadRow."""
    if value is None:
        return None
    found = list_of(value, what)
    good = (isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score) for score in found)
    if not all(good):
        raise BadRow("scores", f"{what} are not finite numbers: {short(value)}")
    return [float(score) for score in found]


def image_of(value: Any, folder: str, what: str) -> Image | None:
    """An image: a path (a relative one is taken from `folder`) or URI, bytes, or Hugging Face's struct of bytes and path. None where empty."""
    if value is None or value in ("", b""):
        return None
    if isinstance(value, str):
        return {"bytes": None, "uri": resolved(value, folder)}
    if isinstance(value, bytes):
        return {"bytes": value, "uri": None}
    if isinstance(value, Mapping) and {"bytes", "path", "uri"} & set(value):
        return image_of(value.get("bytes") or value.get("path") or value.get("uri"), folder, what)
    raise BadRow("bad_row", f"{what} is no image: neither a path nor bytes, but {short(value)}")


def resolved(path: str, folder: str) -> str:
    """An absolute path or a URI; a relative path is taken from `folder`, and may not be blank."""
    path = path.strip()
    if path.startswith("/") or "://" in path:
        return path
    scheme, separator, rest = folder.rpartition("://")
    return scheme + separator + posixpath.normpath(f"{rest}/{path}")


def require(wanted: Iterable[str], found: Sequence[str], source: str) -> None:
    """Raise ConfigError naming the nearest existing column unless `found` has all that are wanted."""
    for name in wanted:
        if name not in found:
            raise ConfigError(f"{source} has no column {name!r}{nearest(name, found)}; it has {', '.join(map(repr, found))}")


def used(columns: Iterable[str], uses: Mapping[str, str]) -> dict[str, str | None]:
    """What each column is used as; None where not."""
    return {name: uses.get(name) for name in columns}


def short(value: Any) -> str:
    """A value for an error message, at most 80 characters."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
