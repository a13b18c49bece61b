"""What has changed since the slides table was written: which slides must be looked at, which have moved, which are copies, which are gone.

A slide is its content. Where a content lies is looked up by fingerprint, so that a renamed slide keeps its vectors, and two copies of one
file are embedded once: the second has the status `duplicate` and names the first.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.slides.inventory import Inventory
from pipeline.slides.survey import Look
from pipeline.slides.surveying import Job
from pipeline.slides.tiling import tiling_of

Row = dict[str, Any]

WITH_TILES = ("surveyed", "ok", "partial")
"""Statuses of slides whose tiles are in the table, or are to be."""

MAX_ATTEMPTS = 3
"""Looks at one version of a slide that may end in an error nobody foresaw, such as a store that did not answer. Then only `retry` looks again."""


@dataclass
class Comparison:
    """An inventory against the slides table."""

    jobs: list[Job] = field(default_factory=list)
    current: list[Row] = field(default_factory=list)
    """Rows that say what a look would say again."""
    vanished: list[Row] = field(default_factory=list)
    """Rows of slides that are no longer there."""


def compare(inventory: Inventory, known: Iterable[Row], look: Look, *, retry: bool) -> Comparison:
    """Which slides must be looked at. `known`: the source's rows of the slides table, without the large columns.

    `retry`: look again at those that could not be used.
    """
    by_uri = {row["id"]: row for row in known}
    found = Comparison()
    for listed in inventory.slides:
        row = by_uri.pop(listed.uri, None)
        if row is None or row["version"] != listed.version or row["survey"] != look.key(listed) or _wants_another(row, retry):
            found.jobs.append((listed, row, True))
        elif row["tiling"] is not None and row["tiling"] != tiling_of(row | {"slide_id": listed.slide_id}, look.grids, listed.carried):
            found.jobs.append((listed, row, False))
        else:
            found.current.append(row)
    found.vanished = list(by_uri.values())
    return found


def _wants_another(row: Mapping[str, Any], retry: bool) -> bool:
    if row["status"] == "deleted" or row["reason"] == "changed":
        return True
    if row["reason"] == "missing" or (row["reason"] == "error" and row["attempts"] < MAX_ATTEMPTS):
        return True  # it may pass while the file stays as it is
    return retry and (row["status"] in ("failed", "needs_mpp") or row["reason"] == "bad_tiles")


@dataclass
class Identified:
    """What the looks at the slides come to."""

    rows: list[Row]
    """To be written."""
    moved: list[str] = field(default_factory=list)
    """URIs that slides have moved away from: their rows go."""
    deleted: list[str] = field(default_factory=list)
    """URIs of slides that are gone for good."""


def identify(surveyed: Sequence[Row], comparison: Comparison) -> Identified:
    """Find copies and moves among the looked-at and the current slides by their content."""
    written = {row["id"]: row for row in surveyed}
    here: dict[str, list[Row]] = defaultdict(list)
    for row in [*comparison.current, *surveyed]:
        if row["status"] in (*WITH_TILES, "duplicate"):
            here[row["content_fp"]].append(row)
    left: dict[str, list[str]] = defaultdict(list)
    for row in comparison.vanished:
        if row["content_fp"] in here:
            left[row["content_fp"]].append(row["id"])
    for content, rows in here.items():
        for row in _told_apart(rows, left[content]):
            written[row["id"]] = row
    moved = sorted(uri for uris in left.values() for uri in uris)
    deleted = [row for row in comparison.vanished if row["id"] not in moved and row["status"] != "deleted"]
    for row in deleted:
        written[row["id"]] = row | {"status": "deleted", "reason": None, "detail": None}
    return Identified(list(written.values()), moved, [row["id"] for row in deleted])


def _told_apart(rows: Sequence[Row], left: Sequence[str]) -> list[Row]:
    """Rows of one content that have to be written: the first keeps the tiles, the others are duplicates of it. `left`: where it lay."""
    # Who has the tiles already keeps them; among newcomers the first by name.
    first, *others = sorted(rows, key=lambda row: (row["embedded"] is None, row["status"] == "duplicate", row["id"]))
    changes = []
    if first["status"] == "duplicate" or (left and first["embedded"] is None):
        status = "surveyed" if first["status"] == "duplicate" else first["status"]
        changes.append(first | {"status": status, "duplicate_of": None, "moved_from": left[0] if left else first["moved_from"]})
    for row in others:
        if row["duplicate_of"] != first["id"] or row["status"] != "duplicate":
            changes.append(row | {"status": "duplicate", "reason": None, "detail": None, "duplicate_of": first["id"], "embedded": None})
    return changes
