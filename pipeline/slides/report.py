"""The report of a slides run: slides that add up, tiles that add up, and whether it is good enough."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic

from pipeline.media import Limits
from pipeline.report import EmbedReport, too_many_rejects


class SlideLimits(Limits):
    """What one slide or tile may cost, and how many bad ones are too many. Everything is tried before a run fails for them."""

    slide_timeout_s: float = pydantic.Field(default=600.0, gt=0)
    """Longest time that one slide's survey may take, in seconds; while it is copied from a store, without a byte arriving."""
    max_bad_slides: float = pydantic.Field(default=0.05, ge=0, le=1)
    """Share of the slides, 0 to 1, that may be failed or needs_mpp before the job fails. The good ones stay committed."""
    max_rejects: float = pydantic.Field(default=0.05, ge=0, le=1)
    """Share of the tiles, 0 to 1, that may be rejected before the job fails. The good ones stay committed."""


@dataclass
class SlidesReport:
    """What a run did. listed = unchanged + surveyed + ok + partial + failed + needs_mpp + no_tissue + duplicate."""

    job: str = "slides"
    status: str = "done"
    run: str = ""
    table: str = ""
    listed: int = 0
    """Slides that are there."""
    unchanged: int = 0
    """Slides that were not touched."""
    surveyed: int = 0
    """Slides that were looked at and whose tiles are not in the table: the run was ended."""
    ok: int = 0
    partial: int = 0
    failed: int = 0
    needs_mpp: int = 0
    no_tissue: int = 0
    duplicate: int = 0
    opened: int = 0
    """Slides that were opened to be looked at."""
    moved: int = 0
    """Slides that lie elsewhere now and keep their vectors."""
    deleted: int = 0
    """Slides that are gone since the last run."""
    unmatched: list[str] = field(default_factory=list)
    """Keys of slides.metadata that no slide has, the first ten."""
    statuses: dict[str, int] = field(default_factory=dict)
    """All slides of the source by status, also those not touched."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why slides are not ok, by reason."""
    bad: list[str] = field(default_factory=list)
    """The first twenty slides that failed or need an mpp, and why."""
    removed: int = 0
    """Tiles' rows that went: their slide was replaced, or its mask or a threshold leaves them out."""
    revised: int = 0
    """Tiles' rows that kept their vector and got other metadata."""
    tiles: EmbedReport = field(default_factory=EmbedReport)
    """The tiles: see the report of the embed job."""
    page: str | None = None
    """The index of the slides, if one was asked for."""
    survey_seconds: float = 0.0
    seconds: float = 0.0


def count(report: SlidesReport, rows: Iterable[Mapping[str, Any]], *, touched: frozenset[str]) -> None:
    """Fill in the slides' counts from the source's rows. `touched`: URIs of those that this run dealt with."""
    here = [row for row in rows if row["status"] != "deleted"]
    report.listed = len(here)
    report.unchanged = sum(row["id"] not in touched for row in here)
    for status, number in Counter(row["status"] for row in here if row["id"] in touched).items():
        setattr(report, status, number)
    report.statuses = dict(sorted(Counter(row["status"] for row in rows).items()))
    report.reasons = dict(Counter(row["reason"] for row in here if row["reason"]).most_common())
    bad = [row for row in here if row["status"] in ("failed", "needs_mpp")]
    report.bad = [f"{row['slide_id']}: {row['status']}, {row['reason']}: {row['detail']}" for row in bad[:20]]


def problem_of(report: SlidesReport, limits: SlideLimits) -> str | None:
    """Why a finished run is not good enough; None if it is."""
    tiles = report.tiles
    if tiles.failed:
        why = tiles.errors[0] if tiles.errors else (report.bad[0] if report.bad else "the run stopped early")
        return f"{tiles.failed} tiles failed: {why}; run again to go on"
    bad = report.statuses.get("failed", 0) + report.statuses.get("needs_mpp", 0)
    if bad > limits.max_bad_slides * report.listed:
        return (
            f"{bad} of {report.listed} slides cannot be used, more than limits.max_bad_slides={limits.max_bad_slides:g}: {report.bad[0]}; "
            "the reasons are in the slides table; what was embedded is committed. Mend them, or raise limits.max_bad_slides"
        )
    if tiles.rejected > limits.max_rejects * tiles.listed:
        return too_many_rejects(tiles.rejected, tiles.listed, limits)
    return None
