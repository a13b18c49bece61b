"""Contact sheets: the hits of queries as one self-contained HTML page, or as one PNG grid.

Pictures come from the hits' `thumbnail` column, else they are fetched from `uri` and made small. The page loads nothing
from anywhere: pictures are inside it, and its content security policy forbids the rest. PNG captions are Latin only.
"""

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from pipeline.fetch import fetch
from pipeline.media import BadItem, Limits, decode, thumbnail
from pipeline.page import page, safe
from pipeline.search import SIMILARITY, Query
from pipeline.stores import reaching

THUMBNAIL_PX = 320
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".ppm")
SHOWN_APART = ("id", SIMILARITY, "uri", "text", "thumbnail", "source", "vector")
MAX_VALUE = 80
MAX_TEXT = 600


@dataclass(frozen=True)
class Card:
    """One hit, ready to be drawn."""

    id: str
    similarity: float
    uri: str
    text: str
    picture: bytes | None
    """An encoded image, small."""
    missing: str
    """Why there is no picture; empty if there is one, or if a text stands in its place."""
    fields: dict[str, str]


@dataclass(frozen=True)
class Section:
    """One query and its hits."""

    kind: str
    """text, image, id or vector."""
    words: str
    picture: bytes | None
    condition: str
    cards: list[Card]


def section(query: Query, hits: pa.Table, *, row: dict[str, Any] | None = None, storage_options: dict[str, Any] | None = None) -> Section:
    """The hits of one query with their pictures. Fetches those that have no thumbnail.

    `row`: for a query by id, `uri` and `thumbnail` of that row, so that its picture stands above the hits. `storage_options`:
    fsspec's, for pictures that are fetched. Raises ConfigError if their store cannot be reached.
    """
    kind = next(kind for kind in ("text", "image", "id", "vector") if getattr(query, kind) is not None)
    words = f"{len(query.vector)} numbers" if query.vector is not None else str(getattr(query, kind))
    known = row or {}
    picture = known.get("thumbnail") or _pictures([query.image or _picture_uri(known)], storage_options)[0]
    return Section(kind, words, picture if isinstance(picture, bytes) else None, query.where or "", cards(hits, storage_options))


def cards(hits: pa.Table, storage_options: dict[str, Any] | None = None) -> list[Card]:
    """One card a hit, in their order. Columns that the hits lack are left out."""
    rows = hits.to_pylist()
    wanted = [None if row.get("thumbnail") else _picture_uri(row) for row in rows]
    return [_card(row, fetched) for row, fetched in zip(rows, _pictures(wanted, storage_options), strict=True)]


def _picture_uri(row: dict[str, Any]) -> str | None:
    uri = row.get("uri")
    return uri if uri and uri.lower().endswith(PICTURES) else None


def _card(row: dict[str, Any], fetched: bytes | BadItem | None) -> Card:
    picture = row.get("thumbnail") or (fetched if isinstance(fetched, bytes) else None)
    text = row.get("text") or ""
    missing = ""
    if isinstance(fetched, BadItem):
        missing = f"no picture: {fetched.reason.replace('_', ' ')}"
    elif picture is None and not text:
        missing = "no picture"
    fields = {name: _shown(value) for name, value in row.items() if name not in SHOWN_APART and value is not None and not isinstance(value, bytes)}
    return Card(str(row["id"]), float(row[SIMILARITY]), row.get("uri") or "", _cut(text, MAX_TEXT), picture, missing, fields)


def _pictures(uris: Sequence[str | None], storage_options: dict[str, Any] | None) -> list[bytes | BadItem | None]:
    limits = Limits()
    with reaching(next((uri for uri in uris if uri and "://" in uri), "the hits' pictures")):
        found = fetch(uris, max_bytes=limits.max_item_bytes, storage_options=storage_options)
    return [_small(data, limits) for data in found]


def _small(data: bytes | BadItem | None, limits: Limits) -> bytes | BadItem | None:
    if data is None or isinstance(data, BadItem):
        return data
    try:
        return thumbnail(decode(data, limits), THUMBNAIL_PX)
    except BadItem as error:
        return error


def _shown(value: Any) -> str:
    return _cut(f"{value:.4g}" if isinstance(value, float) else str(value), MAX_VALUE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


# ---- HTML ----

STYLE = """
section + section { margin-top: 3rem; padding-top: 2rem; border-top: 1px solid var(--line) }
.query { display: flex; align-items: center; gap: 1.1rem; margin-bottom: 1.2rem }
.query img { width: 7rem; height: 7rem; object-fit: cover; border-radius: 8px; flex: none }
.query h2 { margin: 0; font-size: 1.6rem; line-height: 1.25; font-weight: 600; letter-spacing: -.01em; overflow-wrap: anywhere }
.query .name { font-size: 1rem; font-weight: 500 }
.query p { margin: .25rem 0 0; color: var(--soft); font-size: .85rem }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13.5rem), 1fr)); gap: 1rem; list-style: none; margin: 0; padding: 0 }
.hits > li { display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
.well { aspect-ratio: 4 / 3; background: var(--well); display: flex; align-items: center; justify-content: center; overflow: hidden }
.well img { width: 100%; height: 100%; object-fit: contain; display: block }
.missing { color: var(--soft); font-size: .85rem; padding: 1rem; text-align: center }
.words { align-items: flex-start; justify-content: flex-start; padding: .9rem 1rem; font-size: .95rem; line-height: 1.45 }
.words span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6; overflow: hidden; overflow-wrap: anywhere }
.bar { height: 3px; background: var(--well) }
.bar i { display: block; height: 100%; background: var(--mark) }
.body { padding: .65rem .85rem .8rem; min-width: 0 }
.top { display: flex; justify-content: space-between; gap: .6rem; align-items: baseline }
.top b { font-weight: 600; font-size: .9rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.top span { color: var(--mark); font-weight: 600; font-variant-numeric: tabular-nums }
.caption { margin: .25rem 0 0; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; overflow-wrap: anywhere }
dl { margin: .45rem 0 0; display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; font-size: .8rem }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere; text-align: right }
.uri { margin: .45rem 0 0; color: var(--soft); font-size: .75rem; overflow-wrap: anywhere }
.none { color: var(--soft) }
"""


def html(sections: Sequence[Section], *, title: str, subtitle: str = "") -> str:
    """One page with a section a query. Everything that comes from the table is escaped."""
    return page(title, subtitle, "\n".join(_html_section(entry) for entry in sections), style=STYLE)


def _html_section(entry: Section) -> str:
    picture = f'<img src="{_data_uri(entry.picture)}" alt="the query">' if entry.picture else ""
    said = f"<h2>{safe(entry.words)}</h2>" if entry.kind == "text" else f'<h2 class="name"><code>{safe(entry.words)}</code></h2>'
    where = f" where <code>{safe(entry.condition)}</code>" if entry.condition else ""
    count = f"{len(entry.cards)} {'hit' if len(entry.cards) == 1 else 'hits'} for this {entry.kind}{where}"
    hits = "\n".join(_html_card(card, rank) for rank, card in enumerate(entry.cards, 1))
    shown = f'<ol class="hits">\n{hits}\n</ol>' if hits else '<p class="none">Nothing was found.</p>'
    return f'<section><div class="query">{picture}<div>{said}<p>{count}</p></div></div>\n{shown}</section>'


def _html_card(card: Card, rank: int) -> str:
    if card.picture:
        well = f'<div class="well"><img src="{_data_uri(card.picture)}" alt="{safe(card.text or card.id)}" loading="lazy"></div>'
    elif card.missing:
        well = f'<div class="well"><span class="missing">{safe(card.missing)}</span></div>'
    else:
        well = f'<div class="well words"><span>{safe(card.text)}</span></div>'
    width = 100 * min(1.0, max(0.0, card.similarity))
    caption = f'<p class="caption" title="{safe(card.text)}">{safe(card.text)}</p>' if card.text and (card.picture or card.missing) else ""
    fields = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in card.fields.items())
    about = f"<dl>{fields}</dl>" if fields else ""
    uri = f'<p class="uri">{safe(card.uri)}</p>' if card.uri else ""
    top = f'<div class="top"><b title="{safe(card.id)}">{rank}. {safe(card.id)}</b><span>{card.similarity:.3f}</span></div>'
    return f'<li>{well}<div class="bar"><i style="width:{width:.1f}%"></i></div><div class="body">{top}{caption}{about}{uri}</div></li>'


def _data_uri(picture: bytes) -> str:
    kind = Image.open(io.BytesIO(picture)).get_format_mimetype() or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


# ---- PNG ----

CELL_PX, WELL_PX, GAP_PX, LINE_PX = 240, 180, 16, 19
PAGE, CARD, INK, SOFT, WELL, MARK = "#f6f6f4", "#ffffff", "#1b1c1e", "#6b6f76", "#eeeeeb", "#2f6f5e"
CAPTION_CHARS = 34
CAPTION_LINES = 2


def png(sections: Sequence[Section], *, title: str, columns: int = 5) -> bytes:
    """One picture: a grid of hits under each query, nearest first, `columns` beside each other."""
    bands = [_band(entry, columns) for entry in sections]
    head = 3 * GAP_PX + LINE_PX
    sheet = Image.new("RGB", (_width(columns), head + sum(band.height for band in bands)), PAGE)
    ImageDraw.Draw(sheet).text((GAP_PX, GAP_PX), _latin(title), SOFT, font=_font(14))
    top = head
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    target = io.BytesIO()
    sheet.save(target, "PNG", optimize=True)
    return target.getvalue()


def _width(columns: int) -> int:
    return GAP_PX + columns * (CELL_PX + GAP_PX)


def _band(entry: Section, columns: int) -> Image.Image:
    """One query above the grid of its hits."""
    cell_height = WELL_PX + (CAPTION_LINES + 1) * LINE_PX + 2 * GAP_PX
    rows = -(-len(entry.cards) // columns)
    head = (96 if entry.picture else 2 * LINE_PX) + 2 * GAP_PX
    band = Image.new("RGB", (_width(columns), head + rows * (cell_height + GAP_PX) + GAP_PX), PAGE)
    draw = ImageDraw.Draw(band)
    left = GAP_PX
    if entry.picture:
        _fit(band, entry.picture, (left, 0, left + 96, 96))
        left += 96 + GAP_PX
    draw.text((left, 0), _latin(_cut(entry.words, 90)), INK, font=_font(22))
    where = f" where {entry.condition}" if entry.condition else ""
    draw.text((left, 30), _latin(_cut(f"{len(entry.cards)} hits for this {entry.kind}{where}", 120)), SOFT, font=_font(14))
    for number, card in enumerate(entry.cards):
        row, column = divmod(number, columns)
        _draw_card(band, card, (GAP_PX + column * (CELL_PX + GAP_PX), head + row * (cell_height + GAP_PX), cell_height))
    return band


def _draw_card(band: Image.Image, card: Card, place: tuple[int, int, int]) -> None:
    left, top, height = place
    draw = ImageDraw.Draw(band)
    draw.rounded_rectangle((left, top, left + CELL_PX, top + height), 8, fill=CARD)
    draw.rectangle((left, top, left + CELL_PX, top + WELL_PX), fill=WELL)
    if card.picture:
        _fit(band, card.picture, (left, top, left + CELL_PX, top + WELL_PX))
    else:
        said = textwrap.wrap(_latin(card.missing or card.text), CAPTION_CHARS - 4)[:7]
        draw.multiline_text((left + 14, top + 14), "\n".join(said), SOFT if card.missing else INK, font=_font(14), spacing=5)
    below = top + WELL_PX
    draw.rectangle((left, below, left + int(CELL_PX * min(1.0, max(0.0, card.similarity))), below + 3), fill=MARK)
    below += 12
    draw.text((left + 12, below), _latin(_cut(card.id, 18)), INK, font=_font(14))
    draw.text((left + CELL_PX - 12, below), f"{card.similarity:.3f}", MARK, font=_font(14), anchor="ra")
    caption = textwrap.wrap(_latin(card.text if card.picture or card.missing else card.uri), CAPTION_CHARS)
    for number, line in enumerate(caption[:CAPTION_LINES], 1):
        draw.text((left + 12, below + number * LINE_PX), line, SOFT, font=_font(13))


def _fit(band: Image.Image, picture: bytes, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((right - left, bottom - top))
    band.paste(image, (left + (right - left - image.width) // 2, top + (bottom - top - image.height) // 2))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _latin(text: str) -> str:
    # Pillow's own font has no other letters; a question mark is better than an empty box.
    return text.replace("…", "...").encode("latin-1", "replace").decode("latin-1")
