"""What a slide says of itself, from OpenSlide and from the file's own directories; and the fingerprint of its content.

The fingerprint of a TIFF covers its size, its description and resolution, where every stored tile of every level lies, how long it is, and the
smallest level's bytes (1 MiB of them); of another format OpenSlide's quickhash-1 (its metadata and smallest level) and the sizes
of all its files. So a slide that is scanned, converted or cut anew has another one, at the cost of a few reads. What it cannot
see: bytes of a large level that are overwritten in place by as many others, as bit rot does, and a repair of it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.slides import Level, SlideInfo
from pipeline.slides.mpp import aperio_properties, number, said_by, settle
from pipeline.slides.native import openslide
from pipeline.slides.tiff import Layout, as_levels

FAST = {"aperio": "aperio", "generic": "generic-tiff", "ome": "generic-tiff"}
"""Kinds of TIFF whose tiles lie side by side, and OpenSlide's name for their vendor."""


def describe(path: str, handle: Any, layout: Layout | None, mpp: float | None, notes: list[str]) -> SlideInfo:
    """What OpenSlide's `handle` and the file's `layout`, whichever there are, say. `mpp`: the user's. `notes` go before its own."""
    properties: Mapping[str, str] = aperio_properties(layout.description) if layout is not None and layout.kind == "aperio" else {}
    if handle is not None:
        properties = handle.properties
    objective = number(properties.get("openslide.objective-power")) or number(properties.get("aperio.AppMag"))
    said = said_by(properties, description=layout.description if layout else "", resolution=layout.resolution if layout else None)
    scale = settle(said, user=mpp, objective=objective)
    levels = _levels(handle, layout)
    stored = layout.levels[0] if layout is not None and layout.levels else None
    return SlideInfo(
        vendor=_vendor(properties, layout),
        width=levels[0].width,
        height=levels[0].height,
        levels=levels,
        mpp_x=scale.x,
        mpp_y=scale.y,
        mpp_source=scale.source,
        mpp_flags=scale.flags,
        objective=objective,
        bounds=_bounds(properties),
        tile_width=stored.tile_width if stored else _whole(properties.get("openslide.level[0].tile-width")),
        tile_height=stored.tile_height if stored else _whole(properties.get("openslide.level[0].tile-height")),
        compression=layout.compression if layout is not None else None,
        icc=(layout is not None and layout.icc) or "openslide.icc-size" in properties,
        content_fp=layout.fingerprint if layout is not None else _content_fp(path, properties),
        reader=f"openslide {openslide().__library_version__}" if handle is not None else "",
        notes=(*notes, *scale.notes),
    )


def _levels(handle: Any, layout: Layout | None) -> tuple[Level, ...]:
    if handle is not None:
        sizes = zip(handle.level_dimensions, handle.level_downsamples, strict=True)
        return tuple(Level(width, height, float(downsample)) for (width, height), downsample in sizes)
    assert layout is not None
    return as_levels(layout.levels)


def _vendor(properties: Mapping[str, str], layout: Layout | None) -> str:
    if layout is not None and layout.kind == "ome":
        return "ome"
    return properties.get("openslide.vendor") or (FAST.get(layout.kind, layout.kind) if layout is not None else "unknown")


def _bounds(properties: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    x, y, width, height = (_whole(properties.get(f"openslide.bounds-{name}")) for name in ("x", "y", "width", "height"))
    return None if x is None or y is None or width is None or height is None else (x, y, width, height)


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None


def _content_fp(path: str, properties: Mapping[str, str]) -> str:
    """A slide that is no TIFF: OpenSlide's quickhash-1, and the sizes of all files that belong to it."""
    file = Path(path)
    files = [file]
    if file.suffix.lower() == ".mrxs":
        files += sorted(part for part in file.with_suffix("").rglob("*") if part.is_file())
    elif file.suffix.lower() == ".dcm":
        files = sorted(part for part in file.parent.iterdir() if part.suffix.lower() == ".dcm")
    sizes = sorted(part.stat().st_size for part in files)
    return hashlib.sha256(f"{properties.get('openslide.quickhash-1', '')} {sizes}".encode()).hexdigest()
