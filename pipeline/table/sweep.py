"""What killed runs leave beside a table that no later run can use: journals, receipts that do not read, scratch tables of the self-test.

Lance's session does not tell a file's age. So the names are written down, in `strays`, when a run or a repair first meets them, and what is
still there after `KEEP_S` goes.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterable

import lance
from lance.file import LanceFileSession

from pipeline.table.at import TableAt
from pipeline.table.stage import Receipt, Staging

log = logging.getLogger(__name__)

KEEP_S = 7 * 24 * 3600
"""Receipts that fit nothing are forgotten after a week, and so is all else; Lance's cleanup takes data files at the same age."""
STRAYS = "strays"


def sweep(staging: Staging, receipts: Iterable[Receipt], *, adopted: set[str]) -> None:
    """Delete what is old and of no use. `receipts`: all that can be read; `adopted`: chunks of those that are in use."""
    receipts = list(receipts)
    for receipt in receipts:
        if receipt.chunk not in adopted and time.time() - receipt.staged_at > KEEP_S:
            staging.delete_receipt(receipt.chunk)
    sweep_strays(staging, receipts, keep_s=KEEP_S)


def sweep_strays(staging: Staging, receipts: Iterable[Receipt], *, keep_s: float) -> int:
    """Delete the strays that were first met more than `keep_s` ago, and write down the others; returns how many went."""
    met, now = _met(staging), time.time()
    since = {name: met.get(name, now) for name in strays(staging, receipts)}
    old = [name for name, first in since.items() if now - first > keep_s]
    for name in old:
        _remove(staging, name)
        del since[name]
    if since != met:
        staging.put(STRAYS, json.dumps(since).encode())
    return len(old)


def strays(staging: Staging, receipts: Iterable[Receipt]) -> list[str]:
    """Names of journals, of receipts that are not among the readable ones, and of scratch tables. A run that is at work has some, too."""
    readable = {f"receipts/{receipt.chunk}" for receipt in receipts}
    damaged = [name for name in staging.names("receipts") if name not in readable]
    return [*staging.names("attempts"), *damaged, *_self_tests(staging.at)]


def _met(staging: Staging) -> dict[str, float]:
    """When each stray was first met, in Unix time."""
    with contextlib.suppress(ValueError, TypeError):
        return {str(name): float(first) for name, first in dict(json.loads(staging.get(STRAYS) or b"{}")).items()}
    return {}


def _self_tests(at: TableAt) -> list[str]:
    folders = LanceFileSession(at.uri, storage_options=at.options).list_with_delimiter("").common_prefixes
    names = [folder.rstrip("/").rpartition("/")[2] for folder in folders]
    return [name for name in names if re.fullmatch(r"selftest-[0-9a-f]{12}\.lance", name)]


def _remove(staging: Staging, name: str) -> None:
    log.info("removing %s, which a killed run left", name)
    if not name.endswith(".lance"):
        staging.delete(name)
        return
    try:
        lance.LanceDataset.drop(f"{staging.at.uri}/{name}", storage_options=staging.at.options)
    except (OSError, ValueError) as error:  # another run may be removing it
        log.warning("%s/%s could not be removed: %s", staging.at.uri, name, error)
