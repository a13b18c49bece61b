"""An index of all slides of a table as one HTML page: what became of each, with its picture, those that need a look first.

The page is text alone; pictures are files beside it, loaded as one scrolls, so that 10,000 slides are no more than a long page.
A picture that is there already is not drawn again.
"""

import hashlib
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.page import page, safe
from pipeline.slides.contours import for_qupath
from pipeline.slides.ledger import slide_rows
from pipeline.slides.pictures import picture
from pipeline.table.at import TableAt
from pipeline.tiles import Grid
from schemas.slides import REASONS, STATUSES

PICTURES = "pictures"
OWN = re.compile(r"[0-9a-f]{32}\.(jpg|geojson)")
"""Names of pictures and outlines; what else lies there is somebody's own."""
ORDER = ("failed", "needs_mpp", "partial", "no_tissue", "surveyed", "ok", "duplicate", "deleted")
"""Statuses, those that need somebody first."""
DRAWN_AT_ONCE, READ_AT_ONCE = 8, 100
LITTLE_MM2 = 1.0
MOST_COVERED = 0.9
BLOBS = ("thumbnail", "mask", "contour")

Row = Mapping[str, Any]


def write_page_of(at: TableAt, *, source: str, folder: Path, grids: Sequence[Grid], run: str = "") -> Path:
    """Write the page of the slides table beside the vector table `at`. Returns the page's path."""
    ids = [row["id"] for row in slide_rows(at, source=source, columns=["id"])]
    # A slide's row holds up to a MB of pictures: some at a time.
    parts = (slide_rows(at, source=source, units=ids[start : start + READ_AT_ONCE]) for start in range(0, len(ids), READ_AT_ONCE))
    return write_page(chain.from_iterable(parts), folder, grids=grids, title=at.path(), subtitle=f"run {run}" if run else "")


def write_page(slides: Iterable[Row], folder: Path, *, grids: Sequence[Grid], title: str, subtitle: str = "") -> Path:
    """Write index.html and the pictures into `folder`, made if missing. Returns the page's path.

    `slides`: rows of `schemas.slides.SLIDE`, which are let go of as soon as they are drawn.
    """
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    rows = list(_drawn(slides, folder, grids))
    target = folder / "index.html"
    partial = folder / ".index.html.partial"
    partial.write_text(html(rows, title=title, subtitle=subtitle), encoding="utf-8")
    partial.replace(target)  # at once: who has the page open never reloads half of it
    _sweep(folder, rows)
    return target


def _sweep(folder: Path, rows: Sequence[Row]) -> None:
    """Remove pictures of earlier runs that no slide shows any more: of other grids or masks, and of slides that are gone."""
    shown = {row[name] for row in rows for name in ("picture", "outline")}
    for file in (folder / PICTURES).iterdir():
        if OWN.fullmatch(file.name) and f"{PICTURES}/{file.name}" not in shown:
            file.unlink(missing_ok=True)


def _drawn(slides: Iterable[Row], folder: Path, grids: Sequence[Grid]) -> Iterator[Row]:
    """The rows without their blobs, each with `picture` and `outline`: the paths from the page to them, or None."""
    rows = iter(slides)
    with ThreadPoolExecutor(DRAWN_AT_ONCE) as threads:
        while batch := list(islice(rows, 4 * DRAWN_AT_ONCE)):
            yield from threads.map(lambda row: _with_picture(row, folder, grids), batch)


def _with_picture(row: Row, folder: Path, grids: Sequence[Grid]) -> Row:
    told = {name: value for name, value in row.items() if name not in BLOBS} | {"picture": None, "outline": None}
    if row["thumbnail"] is None:
        return told
    stem = f"{PICTURES}/{_digest(row, grids)}"
    told["picture"] = _once(folder, f"{stem}.jpg", lambda: picture(row, grids) or b"")
    if row["contour"]:
        told["outline"] = _once(folder, f"{stem}.geojson", lambda: for_qupath(row["contour"], row["bounds"]).encode())
    return told


def _once(folder: Path, name: str, make: Callable[[], bytes]) -> str:
    """`name`, made unless it is there."""
    if not (folder / name).exists():
        partial = folder / f"{name}.{uuid.uuid4().hex}"  # two slides may have one picture, drawn by two threads
        partial.write_bytes(make())
        partial.replace(folder / name)
    return name


def _digest(row: Row, grids: Sequence[Grid]) -> str:
    """Of all that is on a picture."""
    digest = hashlib.blake2b(digest_size=16)
    shown = [row[name] for name in ("width", "height", "levels", "mpp", "bounds", "tissue_mm2", "contour")]
    digest.update(json.dumps([shown, [grid.model_dump() for grid in grids], 1], default=str).encode())
    digest.update(row["thumbnail"])
    digest.update(row["mask"] or b"")
    return digest.hexdigest()


def suspicions(row: Row) -> list[str]:
    """What a person should look at in a slide, whatever its status."""
    found = [f"scale {flag}" for flag in row["mpp_flags"] or []]
    if row["mpp_source"] == "objective":
        found.append("scale estimated from the objective")
    if row["rejected"]:
        found.append(f"{row['rejected']:,} tiles rejected")
    area = row["width"] * row["height"] * row["mpp"] ** 2 * 1e-6 if row["width"] and row["mpp"] else None
    if area and row["tissue_mm2"] is not None:
        if row["tissue_mm2"] > MOST_COVERED * area:
            found.append(f"tissue on {row['tissue_mm2'] / area:.0%} of the slide: is it?")
        elif 0 < row["tissue_mm2"] < LITTLE_MM2:
            found.append("little tissue")
    return found + list(row["notes"] or [])


# ---- HTML ----

STYLE = """
input[name=status] { position: absolute; opacity: 0 }
label { display: inline-block; margin: 0 .5rem 1.6rem 0; padding: .3rem .8rem; border: 1px solid var(--line); border-radius: 99px;
  background: var(--card); cursor: pointer; font-size: .9rem }
label b { font-variant-numeric: tabular-nums; margin-left: .35rem }
input:checked + label { border-color: var(--mark); box-shadow: inset 0 0 0 1px var(--mark) }
input:focus-visible + label { outline: 2px solid var(--mark); outline-offset: 2px }
.slides { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; list-style: none; margin: 0; padding: 0 }
.slides > li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 30rem }
.well { display: flex; aspect-ratio: 4 / 3; background: #fff; align-items: center; justify-content: center }
.well img { width: 100%; height: 100%; object-fit: contain; display: block }
.nothing { background: var(--well); color: var(--soft); font-size: .85rem }
.body { padding: .7rem .9rem .9rem }
.top { display: flex; justify-content: space-between; gap: .6rem; align-items: baseline }
.top b { font-weight: 600; font-size: .9rem; overflow-wrap: anywhere }
.status { flex: none; font-size: .8rem; font-weight: 600; color: var(--mark) }
.failed .status, .needs_mpp .status { color: #c0392b } .partial .status, .no_tissue .status { color: #b9770e }
.deleted .status, .duplicate .status, .surveyed .status { color: var(--soft) }
.reason { margin: .3rem 0 0; font-size: .85rem; overflow-wrap: anywhere }
dl { margin: .5rem 0 0; display: grid; grid-template-columns: auto 1fr; gap: 0 .8rem; font-size: .8rem }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere; text-align: right }
.look { margin: .5rem 0 0; padding-left: 1.1rem; font-size: .8rem; color: #b9770e; overflow-wrap: anywhere }
.uri { margin: .5rem 0 0; color: var(--soft); font-size: .75rem; overflow-wrap: anywhere } a { color: var(--mark) }
"""


def html(rows: Sequence[Row], *, title: str, subtitle: str = "") -> str:
    """The page of rows that have `picture` and `outline`. Everything that comes from the table is escaped."""
    counts = Counter(row["status"] for row in rows)
    present = [status for status in ORDER if counts[status]]
    filters = [_filter("all", len(rows), checked=True), *(_filter(status, counts[status]) for status in present)]
    rules = "\n".join(f"#f-{status}:checked ~ .slides > li:not(.{status}) {{ display: none }}" for status in present)
    cards = "\n".join(_card(row) for row in sorted(rows, key=_urgency))
    shown = f'<ol class="slides">\n{cards}\n</ol>' if rows else "<p>The table has no slides.</p>"
    below = " · ".join(part for part in (subtitle, _totals(rows)) if part)
    return page(title, below, "\n".join([*filters, shown]), style=STYLE + rules, images="'self' file:")


def _urgency(row: Row) -> tuple[int, int, str]:
    return ORDER.index(row["status"]), -len(suspicions(row)), row["slide_id"]


def _totals(rows: Sequence[Row]) -> str:
    tiles, tissue = (sum(row[name] or 0 for row in rows if row["status"] not in ("duplicate", "deleted")) for name in ("embedded", "tissue_mm2"))
    return f"{len(rows):,} {'slide' if len(rows) == 1 else 'slides'}, {tiles:,} tiles in the table, {tissue:,.1f} mm2 of tissue"


def _filter(status: str, count: int, *, checked: bool = False) -> str:
    means = f' title="{safe(STATUSES[status])}"' if status in STATUSES else ""
    chosen = " checked" if checked else ""
    return f'<input type="radio" name="status" id="f-{status}"{chosen}><label for="f-{status}"{means}>{safe(_plain(status))}<b>{count:,}</b></label>'


def _card(row: Row) -> str:
    if row["picture"]:
        well = f'<a class="well" href="{safe(row["picture"])}"><img src="{safe(row["picture"])}" alt="" loading="lazy"></a>'
    else:
        well = '<div class="well nothing">no picture</div>'
    top = f'<div class="top"><b>{safe(row["slide_id"])}</b><span class="status">{safe(_plain(row["status"]))}</span></div>'
    reason = ": ".join(part for part in (REASONS.get(row["reason"] or "", row["reason"]), row["detail"]) if part)
    facts = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in _facts(row).items())
    look = "".join(f"<li>{safe(said)}</li>" for said in [*suspicions(row), *(row["bad_tiles"] or [])])
    parts = [
        f'<p class="reason">{safe(reason)}</p>' if reason else "",
        f"<dl>{facts}</dl>" if facts else "",
        f'<ul class="look">{look}</ul>' if look else "",
        f'<p class="uri">{safe(row["id"])}{_outline(row)}</p>',
    ]
    return f'<li class="{safe(row["status"])}">{well}<div class="body">{top}{"".join(parts)}</div></li>'


def _outline(row: Row) -> str:
    if not row["outline"]:
        return ""
    name = f"{Path(row['slide_id']).stem}.geojson"
    return f' <a href="{safe(row["outline"])}" download="{safe(name)}">outline for QuPath</a>'


def _facts(row: Row) -> dict[str, str]:
    facts = {}
    if row["mpp"]:
        facts["scale"] = f"{row['mpp']:.4g} um/px ({row['mpp_source']})"
    if row["width"]:
        mm = [f"{row[side] * row['mpp'] / 1000:.1f}" for side in ("width", "height")] if row["mpp"] else []
        facts["size"] = f"{row['width']:,} x {row['height']:,} px" + (f", {' x '.join(mm)} mm" if mm else "")
    if row["tissue_mm2"] is not None:
        facts["tissue"] = f"{row['tissue_mm2']:.2f} mm2"
    if row["tiles"] is not None:
        facts["tiles"] = f"{row['embedded'] or 0:,} of {row['tiles']:,} in the table"
    if row["duplicate_of"]:
        facts["same as"] = row["duplicate_of"]
    if row["moved_from"]:
        facts["moved from"] = row["moved_from"]
    if row["reader"]:
        facts["read by"] = row["reader"]
    return facts


def _plain(status: str) -> str:
    return status.replace("_", " ")
