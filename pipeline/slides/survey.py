"""A look at one slide: what it is, what scale it has, where its tissue is. The result is its row of the slides table.

No slide raises: what is wrong with it is its status. No pixels but an overview's are read.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pydantic

from pipeline import media
from pipeline.config import Model, Ref
from pipeline.slides import BadSlide, Slide
from pipeline.slides.contours import geojson
from pipeline.slides.cutting import Overview, overview
from pipeline.slides.handles import Cache
from pipeline.slides.inventory import Listed
from pipeline.slides.opening import open_slide
from pipeline.slides.stain import Method, NoFit, fit_stain, to_json
from pipeline.slides.tiling import cut_of, digest, mask_of, mask_png, tiling_of
from pipeline.slides.tissue import BadMask, Masker, Tissue, find_tissue
from pipeline.table.at import TableAt
from pipeline.table.ledger import now
from pipeline.tiles import Grid, WrongScale, kept, lay
from schemas.slides import SLIDE


class Survey(Model):
    """How each slide is looked at, once."""

    mask: Ref = Ref(target="pipeline.slides.tissue:Saturation")
    """What finds tissue, e.g. `pipeline.slides.tissue:Saturation`, or a model of your own."""
    thumbnail_px: pydantic.PositiveInt = 1024
    """Longer side of the JPEG of the whole slide that its row keeps."""


@dataclass(frozen=True)
class Look:
    """All that a survey is told, the same for every slide."""

    survey: Survey
    grids: Sequence[Grid]
    columns: pa.Schema
    """What a tile's row carries beside ITEM."""
    source: str
    run: str
    at: TableAt
    """The vector table; the slides table lies beside it."""
    mpp: float | None
    """Of slides that do not say it."""
    stain: Method | None
    """How its tiles are normalised: the encoder says it."""
    cache: Cache
    storage_options: dict[str, Any] | None

    def key(self, listed: Listed) -> str:
        """Hash of the settings that the look at one slide depends on; not of the grids: they need no second look."""
        return digest([self._settings, listed.mpp])

    @functools.cached_property
    def _settings(self) -> str:
        masker = getattr(self.survey.mask.load(), "version", None)
        return digest([self.survey.model_dump(), masker, self.mpp, self.stain, 1])


def survey(listed: Listed, look: Look, *, before: Mapping[str, Any] | None, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The SLIDE row of a slide that is opened and looked at. `before`: its row so far, if it has one. `alive` is called while it is copied."""
    started = time.perf_counter()
    row = _blank(listed, look, before)
    try:
        slide = open_slide(listed.uri, storage_options=look.storage_options, cache=look.cache.build(alive), mpp=listed.mpp)
        try:
            _describe(row, slide, look)
            if row["mpp"] is None:
                _stop(row, "needs_mpp", "no_mpp", "state it: slides.mpp for all that do not say it, or a column of slides.metadata (mpp:)")
            else:
                _find_tissue(row, slide, look, before)
        finally:
            slide.close()
    except BadSlide as bad:
        _stop(row, "failed", bad.reason, bad.detail)
    except BadMask as bad:
        _stop(row, "failed", "mask_failed", str(bad))
    except WrongScale as wrong:
        _stop(row, "failed", "implausible_mpp", str(wrong))
    row["survey_seconds"] = round(time.perf_counter() - started, 3)
    return with_tiles(row, look, listed)


def _blank(listed: Listed, look: Look, before: Mapping[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(SLIDE.names)
    same = before is not None and before["version"] == listed.version
    return row | {
        "id": listed.uri,
        "source": look.source,
        "slide_id": listed.slide_id,
        "status": "surveyed",
        "version": listed.version,
        "bytes": listed.num_bytes,
        "survey": look.key(listed),
        "attempts": (before["attempts"] if same and before is not None else 0) + 1,
        "moved_from": before["moved_from"] if same and before is not None else None,
        "run": look.run,
        "updated_at": now(),
    }


def _stop(row: dict[str, Any], status: str, reason: str | None, detail: str | None) -> None:
    row["status"], row["reason"], row["detail"] = status, reason, (detail or "")[:1000] or None


def failed(listed: Listed, look: Look, *, before: Mapping[str, Any] | None, reason: str, detail: str) -> dict[str, Any]:
    """The row of a slide that could not be looked at."""
    row = _blank(listed, look, before)
    _stop(row, "failed", reason, detail)
    return row


def _describe(row: dict[str, Any], slide: Slide, look: Look) -> None:
    info = slide.info
    row |= {name: getattr(info, name) for name in SLIDE.names if hasattr(info, name)}
    row["mpp"] = info.mpp
    estimated = info.mpp_source == "objective"
    if look.mpp is not None and (info.mpp is None or estimated):
        row |= {"mpp": look.mpp, "mpp_x": look.mpp, "mpp_y": look.mpp, "mpp_source": "user"}
    row["levels"] = [{"width": level.width, "height": level.height, "downsample": level.downsample} for level in info.levels]
    row["mpp_flags"], row["notes"] = list(info.mpp_flags), list(info.notes)
    if estimated and row["mpp_source"] == "user":
        row["notes"].append(f"the {look.mpp:g} um/px that was given is used instead")
    row["bounds"] = list(info.bounds) if info.bounds else None


def _find_tissue(row: dict[str, Any], slide: Slide, look: Look, before: Mapping[str, Any] | None) -> None:
    view = overview(slide, mpp=row["mpp"])
    tissue = find_tissue(view, _masker(look.survey.mask.model_dump_json()), mpp=row["mpp"])
    white = _white(tissue, row, before)
    unread = float(view.unread.mean())
    row |= {
        "tissue_mm2": tissue.area_mm2,
        "mask": mask_png(tissue.mask),
        "mask_um": view.um_per_px,
        "mask_threshold": tissue.threshold,
        "contour": geojson(tissue.polygons),
        "stain": _stain(row, look.stain, view.rgb, tissue=tissue.mask & ~view.unread, white=white),
        "thumbnail": _thumbnail(slide, view, mpp=row["mpp"], px=look.survey.thumbnail_px),
        "white": white,
    }
    if unread:
        row["notes"].append(f"{unread:.1%} of the slide could be read at no level")
    if tissue.pen_mm2:
        row["notes"].append(f"{tissue.pen_mm2:.2f} mm2 of pen marks")
    if not tissue.mask.any():
        _stop(row, "no_tissue", "pen_only" if tissue.pen_mm2 else "blank", None)


@functools.lru_cache(maxsize=1)
def _masker(mask: str) -> Masker:
    """Built once a process: a model of the user's does not load its weights for every slide."""
    masker: Masker = Ref.model_validate_json(mask).build()
    return masker


def _thumbnail(slide: Slide, view: Overview, *, mpp: float, px: int) -> bytes:
    """The slide with a longer side of `px`. A small slide is shown finer than tissue is looked for, as far as it goes."""
    um_per_px = max(view.size) * mpp / px
    return media.thumbnail((overview(slide, mpp=mpp, um_per_px=um_per_px) if um_per_px < view.um_per_px else view).rgb, px)


def _white(tissue: Tissue, row: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[int]:
    """The glass. It does not change with the mask: another estimate of it must not make tiles look changed."""
    same = before is not None and all(before[name] == row[name] for name in ("content_fp", "reader"))
    known = before["white"] if same and before is not None else None
    return list(known or tissue.white)


def _stain(row: Mapping[str, Any], method: Method | None, rgb: np.ndarray, *, tissue: np.ndarray, white: Sequence[int]) -> str | None:
    """The stain fit as it is stored; None, with a note why, where the slide cannot be fitted: its tiles stay as they are."""
    if method is None:
        return None
    try:
        return to_json(fit_stain(method, rgb, tissue=tissue, white=(white[0], white[1], white[2])))
    except NoFit as why:
        row["notes"].append(f"stain is not normalised: {why}")
        return None


def with_tiles(row: dict[str, Any], look: Look, listed: Listed) -> dict[str, Any]:
    """A row with what follows from the grids: how many tiles, and whether that is none. Opens nothing."""
    if row["mask"] is None:
        return row
    row = row | {"tiling": tiling_of(row, look.grids, listed.carried), "status": "surveyed", "reason": None, "detail": None}
    row |= {"embedded": None, "rejected": None, "bad_tiles": None, "duplicate_of": None}
    fits, refused = 0, list[str]()
    row["tiles"] = 0
    mask = mask_of(row)
    for grid in look.grids:
        try:
            row["tiles"] += _count(row, grid, mask)
            fits += 1
        except WrongScale as wrong:
            refused.append(str(wrong))
    if not fits:
        _stop(row, "failed", "too_coarse", refused[0])
    elif not row["tiles"]:
        inked = any(note.endswith("of pen marks") for note in row["notes"])
        _stop(row, "no_tissue", "little_tissue" if mask.any() else "pen_only" if inked else "blank", refused[0] if refused else None)
    elif refused:
        row["detail"] = refused[0][:1000]
    return row


def _count(row: Mapping[str, Any], grid: Grid, mask: np.ndarray) -> int:
    bounds = tuple(row["bounds"]) if row["bounds"] else None
    tiles = lay(cut_of(row, grid), size=(row["width"], row["height"]), mask=mask, bounds=bounds)
    return int(kept(grid, tiles).sum())
