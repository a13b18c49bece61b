"""What is seen of the data before weights are loaded: rows that the model cannot take, and held-out rows that are trained on."""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.pairs.prepared import Prepared
from pipeline.training.batches import Choice, Told
from pipeline.training.trainable import Trainable
from pipeline.vlm.message import Message

log = logging.getLogger(__name__)

TOLD, TEXT = "an instruction", "a text"
PIXEL = np.zeros((1, 1, 3), np.uint8)


def check_kinds(model: Trainable, data: Sequence[Prepared]) -> None:
    """Raises ConfigError, naming the first row, if there are messages of a kind that the model says it cannot take. Reads no message."""
    check = getattr(model, "check", None)
    if check is None:
        return
    for each in data:
        for kind, uri in each.kinds().items():
            _, *words = kind.split()
            images = (PIXEL,) * (2 if "images" in words else "image" in words)
            check(Told(Message(TEXT if "text" in words else "", images), TOLD if "told" in words else "", uri))


def check_negatives(choice: Choice, data: Sequence[Prepared]) -> None:
    """Raises ConfigError if rows that are compared with their own negatives alone may have none."""
    for each in data if choice.max_negatives == 0 else ():
        num = each.open().count_rows(filter="in_batch_negatives = false")
        if num:
            raise ConfigError(
                f"choice.max_negatives=0 leaves {num} rows of {each.name!r} nothing to be compared with, as in-batch negatives are off there; "
                "raise it, or turn in_batch_negatives on"
            )


def overlaps(data: Sequence[Prepared], held_out: Sequence[Prepared]) -> dict[str, dict[str, int]]:
    """Of each held-out data set how many of its rows have a query, and how many of its documents stand, in the data that is trained on.

    On either side there, since a data set may be swapped. By content and instruction; documents with ids are told apart by data set, and not found.
    Data sets without any are left out. A shared corpus is nothing bad, a shared query is: it is logged.
    """
    sides = [_keys(each) for each in data]
    trained = np.unique(np.concatenate([key for side in sides for key in side]))
    found = {}
    for each in held_out:
        queries, documents = _keys(each)
        counts = {"queries": int(np.isin(queries, trained).sum()), "documents": int(np.isin(np.unique(documents), trained).sum())}
        if counts["queries"]:
            log.warning(
                "%d of %d held-out queries of %s are trained on too: what is measured is partly learnt", counts["queries"], len(queries), each.name
            )
        if any(counts.values()):
            found[each.name] = counts
    return found


def _keys(data: Prepared) -> tuple[np.ndarray, np.ndarray]:
    table = data.keys()
    positives: pa.ListArray = table["positive_keys"].combine_chunks()
    return table["query_key"].to_numpy(), positives.flatten().to_numpy()
