"""A data set's own rules, row by row: negatives, scores, images that must be there. A row is completed with what it leaves open, or rejected."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipeline import media
from pipeline.fetch import fetch
from pipeline.media import BadItem
from pipeline.pairs.keys import content_key, cost_of, document_key, hash64, told_key
from pipeline.pairs.rows import BadRow
from pipeline.vlm.message import words

if TYPE_CHECKING:
    from pipeline.pairs.prepare import Dataset

Row = dict[str, Any]
DECODERS = 4
REJECT = ("reject_reason", "reject_detail")


class Checker:
    """Checks rows of one data set. Holds threads that decode: use it with `with`."""

    def __init__(self, dataset: "Dataset") -> None:
        self.dataset = dataset

    def __enter__(self) -> "Checker":
        self._threads = ThreadPoolExecutor(DECODERS)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def check(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """Rows of PREPARED, and rows of PAIR_REJECT, of what a reader yielded."""
        good: list[Row] = []
        bad: list[Row] = []
        ruled = [(row, self._ruled(row)) for row in rows]
        faults = self._images([row for row, fault in ruled if fault is None])
        for row, fault in ruled:
            found = fault or faults.get(row["row_id"])
            if found is not None:
                bad.append({"uri": row["uri"], "reason": found.reason, "detail": found.detail})
            else:
                good.append(self._completed(row))
        return good, bad

    def _ruled(self, row: Row) -> BadRow | None:
        """What the rules that need no image say. Negatives that are not wanted leave the row here."""
        if row["reject_reason"] is not None:
            return BadRow(row["reject_reason"], row["reject_detail"])
        if self.dataset.negatives == "dropped":
            row["negatives"], row["neg_scores"] = [], None
        if self.dataset.swap:
            if len(row["positives"]) != 1 or row["negatives"]:
                counts = f"{len(row['positives'])} positives and {len(row['negatives'])} negatives"
                return BadRow("bad_row", f"it has {counts}, and swap needs one positive and no negatives (negatives: dropped leaves them out)")
            row["query"], row["positives"] = row["positives"][0], [row["query"]]
            row["instruction_q"] = row["instruction_d"] = None
        row["in_batch_negatives"] = self.dataset.in_batch_negatives if row["in_batch_negatives"] is None else row["in_batch_negatives"]
        if not row["negatives"] and self.dataset.negatives == "required":
            return BadRow("no_negative", f"no negative; data set {self.dataset.name!r} has negatives: required")
        if not row["negatives"] and not row["in_batch_negatives"]:
            return BadRow("no_negative", "no negative of its own, and in-batch negatives are off: nothing to learn from")
        for side, name in (("positives", "pos_scores"), ("negatives", "neg_scores")):
            scores = row[name]
            if scores is not None and len(scores) != len(row[side]):
                return BadRow("scores", f"{name} has {len(scores)} numbers for {len(row[side])} {side}")
        return None

    def _completed(self, row: Row) -> Row:
        task = row["task"] or self.dataset.name
        query_told = self.dataset.instruction_q if row["instruction_q"] is None else row["instruction_q"]
        told = self.dataset.instruction_d if row["instruction_d"] is None else row["instruction_d"]
        filled = {
            "task": task,
            "instruction_q": query_told,
            "instruction_d": told,
            "row_key": hash64(row["row_id"]),
            "query_key": told_key(content_key(row["query"]), query_told),
            "group_key": None if row["group"] is None else hash64("group", task, row["group"]),
            "positive_keys": [told_key(document_key(document, self.dataset.name), told) for document in row["positives"]],
            "negative_keys": [told_key(document_key(document, self.dataset.name), told) for document in row["negatives"]],
            "kinds": kinds_of(row, query_told=query_told, told=told),
            "cost": cost_of([row["query"], *row["positives"], *row["negatives"]], self.dataset.tokens_per_image),
        }
        return {name: value for name, value in row.items() if name not in REJECT} | filled

    def _images(self, rows: list[Row]) -> dict[str, BadRow]:
        """By row_id, what is wrong with the first bad image of a row. With `images: store` their bytes are put into the rows."""
        images = [(row, image) for row in rows for image in images_of(row)]
        only_exist = self.dataset.images == "exist"
        uris = list(dict.fromkeys(image["uri"] for _, image in images if image["uri"] is not None))
        # Of a file that only must exist nothing is read: one larger than nothing is there.
        most = 0 if only_exist else self.dataset.limits.max_item_bytes
        found = dict(zip(uris, fetch(uris, max_bytes=most, storage_options=dict(self.dataset.storage_options)), strict=True))
        problems: dict[Any, BadRow | None]
        if only_exist:
            problems = {uri: _missing(uri, data) for uri, data in found.items()}
            return _first((row, problems.get(image["uri"])) for row, image in images)
        contents = [found[image["uri"]] if image["uri"] is not None else image["bytes"] for _, image in images]
        names = [image["uri"] or "an image within the row" for _, image in images]
        faults = _first(zip((row for row, _ in images), self._threads.map(self._decodes, names, contents), strict=True))
        if self.dataset.images == "store":
            for (_, image), data in zip(images, contents, strict=True):
                if isinstance(data, bytes):
                    image.update(bytes=data, uri=None)
        return faults

    def _decodes(self, name: str, data: bytes | BadItem | None) -> BadRow | None:
        try:
            if isinstance(data, BadItem):
                raise data
            media.decode(data or b"", self.dataset.limits)
        except BadItem as bad:
            return BadRow("missing" if bad.reason == "missing" else "bad_image", f"{name}: {bad.reason}: {bad.detail}")
        return None


def images_of(row: Mapping[str, Any]) -> Iterator[Row]:
    """Every image of a row."""
    for message in (row["query"], *row["positives"], *row["negatives"]):
        yield from message["images"] or []


def kinds_of(row: Mapping[str, Any], *, query_told: str, told: str) -> list[str]:
    """Kinds of a row's messages (schemas.pairs.KINDS)."""
    sides = [("query", query_told, row["query"]), *(("document", told, document) for document in (*row["positives"], *row["negatives"]))]
    return list(dict.fromkeys(_kind(*side) for side in sides))


def _kind(side: str, told: str, message: Mapping[str, Any]) -> str:
    num = len(message["images"] or [])
    text = words(message["text"] or "")
    parts = [side, "told" if told else "", "text" if text else "", "images" if num > 1 else "image" if num else ""]
    return " ".join(part for part in parts if part)


def _missing(uri: str, data: bytes | BadItem | None) -> BadRow | None:
    if data == b"":
        return BadRow("bad_image", f"{uri}: the file is empty")
    if isinstance(data, BadItem) and data.reason == "missing":
        return BadRow("missing", f"{uri}: {data.detail}")
    return None


def _first(found: Iterable[tuple[Row, BadRow | None]]) -> dict[str, BadRow]:
    faults: dict[str, BadRow] = {}
    for row, problem in found:
        if problem is not None:
            faults.setdefault(row["row_id"], problem)
    return faults
