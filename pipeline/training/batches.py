"""From the plan to what a training step takes: rows of prepared data sets, their images decoded, and the notes that losses mask with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
import torch

from pipeline import media
from pipeline.config import ConfigError, Model
from pipeline.fetch import fetch
from pipeline.media import BadItem, Limits
from pipeline.pairs.keys import hash64
from pipeline.pairs.prepared import Prepared
from pipeline.training import Notes
from pipeline.training.order import Source
from pipeline.training.plan import Draw
from pipeline.vlm.message import Message
from schemas.pairs import PAIR_REJECT


class Choice(Model):
    """What is taken of a row that has more than a step needs, and what becomes of a row that cannot be used."""

    seed: int = 0
    max_negatives: int | None = pydantic.Field(default=None, ge=0)
    """Negatives of a row, drawn anew each epoch; null: all."""
    teacher_scores: bool = False
    """Whether the loss wants a teacher's scores: then every row must have them."""
    bad_image: Literal["error", "drop"] = "error"
    """A row with an image that is gone or damaged by the time it is used, or that the model cannot take (an image of more tokens than it reads):
    error names the row and stops; drop leaves it out and tells."""
    limits: Limits = Limits()
    """What one image may cost."""
    storage_options: dict[str, str] = {}
    """fsspec's, for images; a data set's own come before them."""


@dataclass(frozen=True)
class Told:
    """A message and the instruction it is read under: what `Preparer.read` takes."""

    message: Message
    instruction: str
    uri: str = ""
    """Of its row, for errors."""


@dataclass(frozen=True)
class Batch:
    """What `GradCache.step` takes, and the rows that were left out (PAIR_REJECT)."""

    queries: list[Told]
    positives: list[Told]
    negatives: list[list[Told]]
    """Of each row as many as it has; empty if no row has any."""
    notes: Notes
    rejects: pa.Table


def source_of(prepared: Prepared, weight: float | None) -> Source:
    """What the plan needs of a data set. Rows clash that share a group, a query or a positive: those are kept out of one block."""
    keys = prepared.keys()
    rows = np.arange(keys.num_rows)
    grouped = np.flatnonzero(keys["group_key"].is_valid().to_numpy())
    positives = keys["positive_keys"].combine_chunks()
    parts = [
        (rows, keys["query_key"].to_numpy()),
        (grouped, keys["group_key"].drop_null().to_numpy()),
        (np.repeat(rows, pc.list_value_length(positives).to_numpy()), positives.flatten().to_numpy()),
    ]
    clash_rows, clash_keys = (np.concatenate(column) for column in zip(*parts, strict=True))
    costs = keys["cost"].to_numpy()
    return Source(prepared.name, keys["row_key"].to_numpy(), weight=weight, costs=costs, clash_rows=clash_rows, clash_keys=clash_keys)


def read(datasets: Mapping[str, Prepared], names: Sequence[str], draw: Draw) -> pa.Table:
    """The rows of a draw, in its order (schema PREPARED). `names`: `Plan.names`, which the draw's numbers stand for."""
    tables, places = [], []
    for number in np.unique(draw.dataset).tolist():
        where = np.flatnonzero(draw.dataset == number)
        tables.append(datasets[names[number]].take(draw.row[where]))
        places.append(where)
    return pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(places))))


def collate(rows: pa.Table, epochs: np.ndarray, choice: Choice, *, step: int, image_options: Sequence[Mapping[str, str]] | None = None) -> Batch:
    """The rows (schema PREPARED) with their images decoded. `epochs`: of each row, `Draw.epoch`: one positive and the negatives are drawn for it.
    `image_options`: of each row, those of its data set.

    Raises ConfigError naming file and row if one cannot be used and may not be dropped.
    """
    chosen = [_chosen(row, epoch, choice) for row, epoch in zip(rows.to_pylist(), epochs.tolist(), strict=True)]
    stores = [json.dumps({**choice.storage_options, **own}, sort_keys=True) for own in image_options or [{}] * len(chosen)]
    pixels = {store: _pixels([row for row, of in zip(chosen, stores, strict=True) if of == store], store, choice.limits) for store in set(stores)}
    good: list[tuple[dict[str, Any], list[Message]]] = []
    rejects: list[dict[str, Any]] = []
    for row, store in zip(chosen, stores, strict=True):
        try:
            good.append((row, [_message(message, pixels[store], choice.limits) for message in _messages(row)]))
        except BadItem as bad:
            rejects.append(_rejected(row, bad, choice))
    queries = [Told(messages[0], row["instruction_q"], row["uri"]) for row, messages in good]
    documents = [[Told(message, row["instruction_d"], row["uri"]) for message in messages[1:]] for row, messages in good]
    negatives = [own[1:] for own in documents]
    return Batch(
        queries=queries,
        positives=[own[0] for own in documents],
        negatives=negatives if any(negatives) else [],
        notes=_notes([row for row, _ in good], choice, step),
        rejects=pa.Table.from_pylist(rejects, schema=PAIR_REJECT),
    )


def without(batch: Batch, bad: Mapping[int, str]) -> Batch:
    """The batch without rows that the model cannot take: `bad` is of their places, and says why."""
    kept = [place for place in range(len(batch.queries)) if place not in bad]
    rejects = [{"uri": batch.queries[place].uri, "reason": "unfit", "detail": detail} for place, detail in sorted(bad.items())]
    negatives = [batch.negatives[place] for place in kept] if batch.negatives else []
    return Batch(
        queries=[batch.queries[place] for place in kept],
        positives=[batch.positives[place] for place in kept],
        negatives=negatives if any(negatives) else [],
        notes=_narrowed(batch.notes.rows(torch.tensor(kept, dtype=torch.int64)), max(map(len, negatives), default=0)),
        rejects=pa.concat_tables([batch.rejects, pa.Table.from_pylist(rejects, schema=PAIR_REJECT)]),
    )


def _narrowed(notes: Notes, num: int) -> Notes:
    """Padded to `num` negatives, the most that a row still has."""
    keys, scores = notes.negative_keys, notes.teacher_scores
    return replace(
        notes,
        negative_keys=None if keys is None or not num else keys[:, :num],
        teacher_scores=None if scores is None else scores[:, : 1 + num],
    )


def _chosen(row: dict[str, Any], epoch: int, choice: Choice) -> dict[str, Any]:
    """The row with one positive, and at most `max_negatives` negatives: another draw each epoch, the same on every machine."""

    def drawn(side: str, num: int | None) -> list[int]:
        order = sorted(range(len(row[side])), key=lambda at: hash64(str(choice.seed), side, str(epoch), str(row["row_key"]), str(at)))
        return sorted(order[:num])

    kept = {"positives": drawn("positives", 1), "negatives": drawn("negatives", choice.max_negatives)}
    taken = {side: [row[side][at] for at in places] for side, places in kept.items()}
    keys = {f"{side}_keys": [row[f"{side[:-1]}_keys"][at] for at in places] for side, places in kept.items()}
    return row | taken | keys | {"teacher": _scores(row, kept) if choice.teacher_scores else None}


def _scores(row: Mapping[str, Any], kept: Mapping[str, list[int]]) -> list[float]:
    found = [(row[name], kept[side]) for side, name in (("positives", "pos_scores"), ("negatives", "neg_scores"))]
    if any(places and scores is None for scores, places in found):
        raise ConfigError(f"{row['uri']} has no teacher's scores, and teacher_scores is on; leave its data set out, or turn it off, in a new run")
    return [scores[at] for scores, places in found for at in places]


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row["query"], *row["positives"], *row["negatives"]]


def _pixels(rows: Sequence[Mapping[str, Any]], store: str, limits: Limits) -> dict[str, np.ndarray | BadItem]:
    """By URI, the images that are not within the rows; each is fetched and decoded once. `store`: fsspec's options as JSON."""
    uris = list(
        dict.fromkeys(image["uri"] for row in rows for message in _messages(row) for image in message["images"] or [] if image["bytes"] is None)
    )
    found = fetch(uris, max_bytes=limits.max_item_bytes, storage_options=json.loads(store))
    return {uri: _decoded(data, limits) for uri, data in zip(uris, found, strict=True)}


def _decoded(data: bytes | BadItem | None, limits: Limits) -> np.ndarray | BadItem:
    if isinstance(data, BadItem):
        return data
    try:
        return media.decode(data or b"", limits)
    except BadItem as bad:
        return bad


def _message(value: Mapping[str, Any], pixels: Mapping[str, np.ndarray | BadItem], limits: Limits) -> Message:
    """Raises BadItem for an image that is gone or damaged."""
    images = []
    for image in value["images"] or []:
        found = _decoded(image["bytes"], limits) if image["bytes"] is not None else pixels[image["uri"]]
        if isinstance(found, BadItem):
            raise BadItem(found.reason, f"{image['uri'] or 'an image within the row'}: {found.detail}")
        images.append(found)
    return Message(value["text"] or "", tuple(images))


def _rejected(row: Mapping[str, Any], bad: BadItem, choice: Choice) -> dict[str, Any]:
    detail = f"{bad.reason}: {bad.detail}"
    if choice.bad_image == "error":
        raise ConfigError(f"{row['uri']}: {detail}; mend it and prepare with `images: decode`, or set bad_image: drop") from bad
    return {"uri": row["uri"], "reason": "missing" if bad.reason == "missing" else "bad_image", "detail": detail}


def _notes(rows: Sequence[Mapping[str, Any]], choice: Choice, step: int) -> Notes:
    """Keys are hashes of what they stand for, so that they are the same on all ranks. A row of no group is of one with its own query's other rows."""
    num = max((len(row["negatives"]) for row in rows), default=0)
    most = max((len(row["positive_keys"]) for row in rows), default=1)
    scores = [row["teacher"] + [0.0] * (1 + num - len(row["teacher"])) for row in rows] if choice.teacher_scores else None
    return Notes(
        positive_keys=_keys([row["positives_keys"][0] for row in rows]),
        negative_keys=_keys([row["negatives_keys"] + [0] * (num - len(row["negatives_keys"])) for row in rows]) if num else None,
        answer_keys=_keys([row["positive_keys"] + row["positive_keys"][:1] * (most - len(row["positive_keys"])) for row in rows]).reshape(-1, most),
        groups=_keys([row["query_key"] if row["group_key"] is None else row["group_key"] for row in rows]),
        in_batch_negatives=torch.tensor([row["in_batch_negatives"] for row in rows], dtype=torch.bool),
        teacher_scores=None if scores is None else torch.tensor(scores).reshape(len(rows), 1 + num),
        step=step,
    )


def _keys(keys: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
    # The type said, as there may be no row.
    return torch.tensor(keys, dtype=torch.int64)
