"""One run of the slides job: inventory, survey, tiles through the embedding of `pipeline.fill`, each slide's status. `jobs/slides.py` is its command.

Whatever interrupts it, the table holds whole slides only, and the next run goes on from what is surveyed, committed and staged.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.compute import Sizes
from pipeline.config import ConfigError, JobFailed
from pipeline.fill import Filling, describe, embed_chunks, unchanged_report, workers
from pipeline.plan import Plan
from pipeline.prepare import Prepared, prepare_of
from pipeline.progress import Meter
from pipeline.readers.slides import Tiles
from pipeline.report import cause_of, explains_itself
from pipeline.slides.current import WITH_TILES, Row, identify
from pipeline.slides.job import SlidesJob, Work
from pipeline.slides.ledger import SMALL, forget_slides, record_slides, slide_rows
from pipeline.slides.report import SlidesReport, count
from pipeline.slides.tiling import cuts_of
from pipeline.slides.whole import BAD_TILES, Group, WholeSlides, bad_tiles, groups_of, settled_already
from pipeline.table.contents import quoted, units_by
from pipeline.table.ledger import now
from pipeline.table.rejects import forget_rejects

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 100
"""Rows of slides, with their masks and thumbnails, that are held in memory."""
RECORD_EVERY_S = 20.0
"""Longest time for which a surveyed slide is not written down."""


# ---- survey ----


def survey_slides(work: Work, report: SlidesReport) -> None:
    """Look at the slides that need it, and write down what was found."""
    started = time.monotonic()
    jobs = work.comparison.jobs
    report.opened = sum(opens for _, _, opens in jobs)
    surveyed = _survey(work) if jobs else []
    report.survey_seconds = round(time.monotonic() - started, 2)
    found = identify(surveyed, work.comparison)
    _record(work, found.rows)
    _forgive(work)
    forget_slides(work.job.table, found.moved)
    report.moved, report.deleted = len(found.moved), len(found.deleted)
    work.touched |= {row["id"] for row in [*surveyed, *found.rows]}


def _survey(work: Work) -> list[Row]:
    from pipeline.slides.surveying import survey_all

    surveyed, waiting, recorded_at = list[Row](), list[Row](), time.monotonic()
    try:
        with Meter(len(work.comparison.jobs), what="surveying") as meter:
            for row in survey_all(work.comparison.jobs, work.look, timeout_s=work.job.limits.slide_timeout_s):
                # What is kept until the end is without its pictures: they are in the table by then.
                surveyed.append({name: row[name] for name in SMALL})
                waiting.append(row)
                meter.add(1, rejected=int(row["status"] in ("failed", "needs_mpp")))
                if len(waiting) >= ROWS_AT_ONCE or time.monotonic() - recorded_at > RECORD_EVERY_S:
                    _record(work, waiting)
                    waiting, recorded_at = [], time.monotonic()
    finally:
        _record(work, waiting)
    return surveyed


def _record(work: Work, rows: Sequence[Row]) -> None:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        record_slides(work.job.table, rows[start : start + ROWS_AT_ONCE])


def _forgive(work: Work) -> None:
    """Forget the rejected tiles of slides whose file is another one than when they were rejected: it may have been mended."""
    mended = [slide.uri for slide, before, _ in work.comparison.jobs if before and before["rejected"] and before["version"] != slide.version]
    rejects = work.job.table.open(".rejects")
    if mended and rejects is not None:
        where = f"source = {quoted(work.look.source)} AND _unit IN ({', '.join(map(quoted, mended))})"
        forget_rejects(work.job.table, rejects.to_table(columns=["id"], filter=where)["id"].to_pylist())


# ---- tiles ----


@dataclass
class Tiling:
    """The tiles of a run, planned."""

    work: Work
    prepared: Prepared
    rows: dict[str, Row]
    """The source's slides as they are now, by URI."""
    groups: list[Group] = field(default_factory=list)


def plan_tiles(work: Work) -> Tiling:
    """Subtract what the table holds from the tiles that the surveyed slides should have."""
    job, look = work.job, work.look
    carried = {slide.uri: dict(slide.carried) for slide in work.inventory.slides}
    reader = Tiles(
        job.table,
        look.source,
        grids=job.grids,
        columns=look.columns,
        carried=carried,
        cache=job.cache,
        slice_tiles=job.compute.chunk_rows,
        storage_options=job.slides.storage_options,
    )
    prepared = prepare_of(reader, work.encoder, job.table, sync=job.sync, chunk_rows=None)
    prepared.run = look.run
    rows = {row["id"]: row for row in slide_rows(job.table, source=look.source, columns=SMALL)}
    work.touched |= set(prepared.plan.units)
    tiling = Tiling(work, prepared, rows)
    tiling.groups = _groups(tiling)
    return tiling


def nothing_to_do(tiling: Tiling) -> bool:
    """Whether the table of tiles is what it should be: then no version of it is added."""
    return not tiling.groups and not (tiling.work.job.sync.vanished == "delete" and _rows_of_deleted(tiling))


def fill_tiles(tiling: Tiling, report: SlidesReport, fit: Sizes | None) -> str | None:
    """Embed and commit; returns why the run is not complete, or None. `fit`: None if no tile is to be embedded."""
    job, prepared, groups = tiling.work.job, tiling.prepared, tiling.groups
    contents = prepared.contents
    assert isinstance(prepared.reader, Tiles)
    gate = WholeSlides(groups, prepared.reader, prepared.plan, contents, parts=not job.sync.whole)
    filling = Filling(prepared, job.encoder, job.limits, job.sync, report.tiles, gate=gate, excused=frozenset({"corrupt_tile"}))
    with filling.reporting():
        filling.open()
        filling.adopt(filling.take_over(None))
        known = {unit for group in groups for unit in group.units if any(place in contents.units for place in group.places)}
        filling.settle(settled_already(prepared.plan, prepared.reader, contents, sorted(known & _left(prepared.plan))))
        embed_chunks(filling, fit)
        for unit in filling.changed_units:
            gate.forget(filling.committer, unit)
        filling.changed_units |= gate.changed
        report.tiles.failed += sum(prepared.plan.unit_items[unit] for unit in gate.changed)
        report.tiles.errors += list(filling.changed_units.values())[:20]
        filling.end(vanished=None if report.tiles.failed else pa.chunked_array([_rows_of_deleted(tiling)], pa.string()))
        _refuse_emptying(tiling)
        for group in groups:
            if not group.units:
                gate.exchange(filling.committer, group, [])
    report.tiles = filling.close()
    report.removed, report.revised = gate.removed, gate.revised
    if filling.opened:
        _settle(tiling, list(prepared.plan.units), lambda row: _outcome(row, tiling, filling, gate))
    return filling.problem


def _refuse_emptying(tiling: Tiling) -> None:
    """Raise JobFailed if more tiles than `sync.max_vanished` allows would go because their slides have no tissue any more."""
    contents, sync = tiling.prepared.contents, tiling.work.job.sync
    gone = [uri for group in tiling.groups if not group.units for uri in group.places if tiling.rows[uri]["status"] == "no_tissue"]
    tiles, rows = sum(contents.units[uri][0] for uri in gone), len(contents.own)
    if not sync.allows(tiles, rows=rows):
        raise JobFailed(
            f"{tiles} of the source's {rows} tiles would be removed, more than sync.max_vanished={sync.max_vanished:g}, because no tissue is found "
            f"on their {len(gone)} slides any more, e.g. {gone[0]}; they stay. If survey.mask and grids are right, raise sync.max_vanished"
        )


def settle_complete(tiling: Tiling) -> None:
    """Write the status of slides that were looked at again, by this run or one that was cut short, and whose tiles are all in the table already."""
    contents, complete = tiling.prepared.contents, tiling.prepared.plan.complete_units

    def settled(row: Row) -> Row | None:
        if row["tiling"] != tiling.rows[row["id"]]["tiling"] or row["status"] != "surveyed":
            return None  # another run has surveyed it anew meanwhile
        embedded = contents.units.get(row["id"], (0, ""))[0]
        return _settled(row, tiling, listed=row["tiles"], rejected=row["tiles"] - embedded, bad=None)

    _settle(tiling, [uri for uri, row in tiling.rows.items() if row["status"] == "surveyed" and uri in complete], settled)


def _left(planned: Plan) -> set[str]:
    return {chunk.work["unit"][0].as_py() for chunk in planned.chunks}


def _groups(tiling: Tiling) -> list[Group]:
    """What is committed together; slides that should have no tiles any more and have some are groups of their own."""
    planned, contents = tiling.prepared.plan, tiling.prepared.contents
    groups = groups_of({unit: planned.unit_items[unit] for unit in planned.units}, _lies_at(tiling))
    placed = {place for group in groups for place in group.places}
    empty = [uri for uri, row in tiling.rows.items() if row["status"] in ("no_tissue", "duplicate") and uri in contents.units and uri not in placed]
    return [*groups, *(Group([], [uri], 0) for uri in empty)]


def _lies_at(tiling: Tiling) -> dict[str, set[str]]:
    """Under which URIs the table has rows of the content of each slide that is to be dealt with: from the rows themselves, so that a
    run that died between writing down where a slide is and moving its rows does no harm."""
    units, dataset = tiling.prepared.plan.units, tiling.prepared.table.open()
    if not units or dataset is None:
        return {}
    found = units_by(dataset, "content_fp", source=tiling.work.look.source)
    return {unit: found.get(tiling.rows[unit]["content_fp"], set()) for unit in units}


def _rows_of_deleted(tiling: Tiling) -> list[str]:
    """Ids of tiles whose slide is gone."""
    gone = [uri for uri, row in tiling.rows.items() if row["status"] == "deleted"]
    if not gone:
        return []
    where = f"source = {quoted(tiling.work.look.source)} AND _unit IN ({', '.join(map(quoted, gone))})"
    dataset = tiling.prepared.table.open()
    ids: list[str] = dataset.to_table(columns=["id"], filter=where)["id"].to_pylist() if dataset is not None else []
    return ids


def _settle(tiling: Tiling, units: Sequence[str], outcome: Callable[[Row], Row | None]) -> None:
    """Write each slide's status."""
    for start in range(0, len(units), ROWS_AT_ONCE):
        rows = slide_rows(tiling.prepared.table, source=tiling.work.look.source, columns=SMALL, units=units[start : start + ROWS_AT_ONCE])
        changes = [changed for row in rows if (changed := outcome(row)) is not None]
        record_slides(tiling.prepared.table, changes)
        tiling.rows |= {row["id"]: row for row in changes}


def _outcome(row: Row, tiling: Tiling, filling: Filling, gate: WholeSlides) -> Row | None:
    """A slide's row as it is after this run; None if nothing is known of it yet."""
    uri, planned = row["id"], tiling.prepared.plan
    if row["tiling"] != planned.units[uri] or row["status"] not in WITH_TILES:
        return None  # another run has surveyed it anew meanwhile
    if uri in filling.changed_units:
        return row | {"status": "failed", "reason": "changed", "detail": filling.changed_units[uri][:1000]}
    listed, rejected = filling.committer.units.get(uri, (0, 0))
    if listed < planned.unit_items[uri]:
        return None
    if gate.seconds.get(uri):
        row = row | {"embed_seconds": round(gate.seconds[uri], 3)}
    return _settled(row, tiling, listed=listed, rejected=rejected, bad=gate.bad.get(uri))


def _settled(row: Row, tiling: Tiling, *, listed: int, rejected: int, bad: list[str] | None) -> Row:
    """The row of a slide whose tiles are all dealt with. `bad`: the first rejected ones, where this run has met them."""
    grids = tiling.work.job.grids
    made = {"embedded": listed - rejected, "rejected": rejected, "run": tiling.work.look.run, "updated_at": now()}
    if rejected:
        status = "partial" if rejected < listed else "failed"
        bad = bad or row["bad_tiles"] or _bad_tiles(row["id"], tiling)
        return row | made | {"status": status, "reason": "bad_tiles", "detail": f"{rejected} of {listed} tiles", "bad_tiles": bad}
    if len(cuts_of(row, grids)) < len(grids):
        return row | made | {"status": "partial", "reason": "too_coarse", "bad_tiles": None}
    return row | made | {"status": "ok", "reason": None, "detail": None, "bad_tiles": None}


def _bad_tiles(uri: str, tiling: Tiling) -> list[str]:
    """What the rejects say of a slide's tiles."""
    rejects = tiling.prepared.table.open(".rejects")
    where = f"source = {quoted(tiling.work.look.source)} AND _unit = {quoted(uri)}"
    return [] if rejects is None else bad_tiles(rejects.to_table(filter=where, limit=BAD_TILES))


def finish(work: Work, report: SlidesReport) -> None:
    """The counts of slides."""
    report.run, report.table = work.look.run, work.job.table.path()
    report.unmatched = list(work.inventory.unmatched[:10])
    rows = slide_rows(work.job.table, source=work.look.source, columns=SMALL)
    count(report, rows, touched=frozenset(work.touched | {row["id"] for row in rows if row["run"] == work.look.run}))


def run_slides(job: SlidesJob, work: Work, started: float, *, begin: Callable[[], None]) -> tuple[SlidesReport, str | None]:
    """Survey, embed, settle. Returns the report, and why the run is not complete. `begin` is called before anything is written."""
    report, problem = SlidesReport(), None
    try:
        problem = _carry_out(work, report, begin)
    except Exception as error:
        if isinstance(error, ConfigError) and not work.begun:
            raise
        if not explains_itself(error):
            log.exception("the run ends early")
        problem = cause_of(error)
    try:
        finish(work, report)
    except (ConfigError, OSError, ValueError) as error:  # the store is away: what is known must come out all the same
        problem = problem or cause_of(error)
    report.seconds = round(time.perf_counter() - started, 2)
    return report, problem


def _carry_out(work: Work, report: SlidesReport, begin: Callable[[], None]) -> str | None:
    compute, jobs = work.job.compute, work.comparison.jobs
    # Ray from the survey to the last tile, if there is a survey.
    with workers(compute, wanted=bool(jobs)):
        if jobs:
            _begin(work, begin)
        survey_slides(work, report)
        tiling = plan_tiles(work)
        idle = nothing_to_do(tiling)
        with workers(compute, wanted=bool(tiling.prepared.plan.chunks)) as fit:
            if not idle or any(row["status"] == "surveyed" for row in tiling.rows.values()):
                _begin(work, begin)
            settle_complete(tiling)
            if not idle:
                return fill_tiles(tiling, report, fit)
        report.tiles = describe(unchanged_report(tiling.prepared), tiling.prepared)
    return None


def _begin(work: Work, begin: Callable[[], None]) -> None:
    if not work.begun:
        begin()
        work.begun = True
