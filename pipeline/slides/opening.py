"""Open a slide: find the reader that suits it, what it says of its scale, and a fingerprint of its content.

A TIFF of JPEG tiles (Aperio SVS, generic, OME) gets the fast reader, after a comparison with OpenSlide on a few tiles; all else
gets OpenSlide. In an object store the fast reader takes tiles by ranges; a slide that needs OpenSlide is copied into a bounded
cache first.
"""

import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.fetch import ITEMS_FAULT
from pipeline.slides import BadSlide, Slide
from pipeline.slides.cache import Entry, SlideCache
from pipeline.slides.comparison import compare, refusal
from pipeline.slides.describe import FAST, describe
from pipeline.slides.dicom import series_of
from pipeline.slides.native import Native, open_native
from pipeline.slides.ranges import LocalFile, Ranges, StoredObject, window
from pipeline.slides.tiff import Layout, Stored, as_levels, fits, read_layout
from pipeline.slides.tiled import TiledJpeg
from pipeline.storage import canonical
from pipeline.stores import check_forbidden, filesystem

SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".czi")
"""What a folder of slides is searched for. DICOM: the files of a folder are one slide."""


def open_slide(
    uri: str, *, storage_options: dict[str, Any] | None = None, cache: SlideCache | None = None, mpp: float | None = None, fast: bool = True
) -> Slide:
    """The slide at a path or URI: a file, or for DICOM also the folder of its files.

    `cache`: where a slide in an object store is copied to if ranges do not serve. `mpp`: um/px of level 0 that the user knows
    better than the file. `fast=False`: OpenSlide only. Raises BadSlide; a disk or store that cannot be read raises what it raises,
    CredentialsRefused where that is why.
    """
    place = canonical(uri)
    if "://" in place:
        return _open_remote(place, storage_options or {}, cache, mpp, fast)
    return _open_local(place, mpp, fast)


# ---- on a disk ----


def _open_local(path: str, mpp: float | None, fast: bool) -> Slide:
    path = _checked(path)
    size = os.path.getsize(path)  # noqa: PTH202
    layout = read_layout(path, size=size)
    try:
        handle, damage = open_native(path), None
    except BadSlide as bad:
        handle, damage = None, bad
    if handle is None and (layout is None or not layout.levels or layout.kind not in FAST or not fast):
        raise damage or BadSlide("unsupported", _no_slide(path, layout))
    notes = [] if layout is None else _losses(layout, size, None if handle is not None else damage.detail if damage else "OpenSlide does not open it")
    if layout is not None and fast:
        slide, why_not = _fast_local(path, layout, handle, mpp, notes)
        if slide is not None:
            if handle is not None:
                handle.close()
            return slide
        notes.append(f"read by OpenSlide: {why_not}")
    if handle is not None and any(downsample % 1 for downsample in handle.level_downsamples):
        notes.append("OpenSlide interpolates where a level's downsample is not whole")
    if handle is None:
        raise damage or BadSlide("unsupported", f"{path}: {notes[-1]}, and OpenSlide does not open it")
    return Native(path, handle, describe(path, handle, layout, mpp, notes))


def _losses(layout: Layout, size: int, damage: str | None) -> list[str]:
    """What is wrong with a slide that is read nevertheless."""
    notes = [] if damage is None else [f"the file may be damaged ({damage}): what is left of it is read, smaller levels may be missing"]
    for number, level in enumerate(layout.levels):
        lost = int(np.count_nonzero(level.offsets + level.lengths > size))
        if lost:
            notes.append(f"the file ends early: {lost} of {len(level.offsets)} stored tiles of level {number} are not in it")
    return notes


def _checked(path: str) -> str:
    """The file to open for `path`. Raises BadSlide if there is none, or something that belongs to it is missing."""
    file = Path(path)
    try:
        if file.is_dir():
            return str(_first_dicom(file))
        with file.open("rb") as opened:
            if not opened.read(1):
                raise BadSlide("empty", f"{path} has no bytes")
    except FileNotFoundError as error:
        raise BadSlide("missing", f"{path} does not exist") from error
    except OSError as error:
        if error.errno not in ITEMS_FAULT:  # a disk that fails is no slide's fault
            raise
        raise BadSlide("missing", f"{path} cannot be read: {error.strerror or error}") from error
    if file.suffix.lower() == ".mrxs" and not (file.with_suffix("") / "Slidedat.ini").is_file():
        raise BadSlide("missing", f"{path} needs the folder {file.stem}/ with Slidedat.ini in it, beside the file")
    return path


def _first_dicom(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".dcm" and file.is_file())
    if not files:
        raise BadSlide("unsupported", f"{folder} is a folder without DICOM files (.dcm); name a slide's file")
    slides: dict[str, Path] = {}
    for file in files:
        series = series_of(file)
        if series is not None:
            slides.setdefault(series, file)
    if len(slides) > 1:
        names = " and ".join(file.name for file in list(slides.values())[:2])
        detail = f"{folder} holds the files of {len(slides)} slides (DICOM series), e.g. {names}; put those of each into a folder of its own"
        raise BadSlide("unsupported", detail)
    return next(iter(slides.values()), files[0])


def _no_slide(path: str, layout: Layout | None) -> str:
    if layout is not None and not layout.levels:
        return f"{path} is a TIFF that is not stored in tiles; make it one with: vips tiffsave IN OUT --tile --pyramid --compression jpeg"
    if layout is not None:
        return f"{path} is a TIFF that OpenSlide does not open ({layout.kind}, {layout.compression})"
    with Path(path).open("rb") as file:
        start = file.read(8)
    return f"{path} is no slide that OpenSlide knows; it begins with {start!r}"


def _fast_local(path: str, layout: Layout, handle: Any, mpp: float | None, notes: list[str]) -> tuple[Slide | None, str]:
    levels, why_not = _stored_levels(layout, handle)
    if why_not is not None:
        return None, why_not
    info = replace(describe(path, handle, layout, mpp, notes), levels=as_levels(levels), reader=_fast_name())
    slide = TiledJpeg(LocalFile(path), levels, info)
    if handle is None:
        return slide, ""
    compared, difference = compare(slide, Native(path, handle, info), levels, len(handle.level_dimensions))
    if difference is not None:
        slide.close()
        return None, difference
    if not compared:
        slide.info = replace(info, notes=(*info.notes, "all stored tiles that were to be compared with OpenSlide's are damaged"))
    return slide, ""


def _stored_levels(layout: Layout, handle: Any) -> tuple[tuple[Stored, ...], str | None]:
    """The stored levels that the fast reader is to show, those of OpenSlide where it opens the file; and why it cannot, if so."""
    if layout.kind not in FAST:
        return (), f"the fast reader does not know how this vendor ({layout.kind}) lays tiles out"
    levels = layout.levels
    if handle is not None:
        if handle.properties.get("openslide.vendor") != FAST[layout.kind]:
            return (), f"OpenSlide says the vendor is {handle.properties.get('openslide.vendor')}"
        by_size = {(level.width, level.height): level for level in levels}
        # OpenSlide sees level 0 only of an OME pyramid.
        if layout.kind != "ome" or len(handle.level_dimensions) > 1:
            if not set(handle.level_dimensions) <= set(by_size):
                return (), "a level has another size than what is stored"
            levels = tuple(by_size[size] for size in handle.level_dimensions)
        elif handle.level_dimensions[0] != (levels[0].width, levels[0].height):
            return (), "level 0 has another size than what is stored"
    return levels, fits(levels)


# ---- in a store ----


def _open_remote(uri: str, storage_options: dict[str, Any], cache: SlideCache | None, mpp: float | None, fast: bool) -> Slide:
    store, path = filesystem(uri, storage_options)
    store.invalidate_cache()
    why_not = "it is a folder"
    try:
        found = store.info(path)
    except (FileNotFoundError, PermissionError) as error:
        if isinstance(error, PermissionError):
            check_forbidden(store, path, uri)
        raise BadSlide("missing", f"{uri}: {error}") from error
    if found["type"] == "file":
        if not found["size"]:
            raise BadSlide("empty", f"{uri} has no bytes")
        slide, why_not = _fast_remote(uri, StoredObject(store, path, size=found["size"]), mpp) if fast else (None, "fast=False")
        if slide is not None:
            return slide
    if cache is None:
        raise BadSlide("unsupported", f"{uri} cannot be read by ranges ({why_not}); give a cache folder, or copy it to a disk")
    entry = cache.hold(uri, storage_options)
    try:
        return _Cached(_open_local(str(entry.path if found["type"] == "file" else entry.path.parent), mpp, fast), entry)
    except BaseException:
        entry.release()
        raise


class _Cached:
    """A Slide whose file may leave the cache when it is closed."""

    def __init__(self, slide: Slide, entry: Entry) -> None:
        self.info = slide.info
        self.read = slide.read
        self.read_rgb = slide.read_rgb
        self._slide = slide
        self._entry = entry

    def close(self) -> None:
        self._slide.close()
        self._entry.release()


def _fast_remote(uri: str, ranges: Ranges, mpp: float | None) -> tuple[Slide | None, str]:
    layout = read_layout(window(ranges), size=ranges.size)
    if layout is None:
        return None, "it is no TIFF"
    levels, why_not = _stored_levels(layout, None)
    if why_not is not None:
        return None, why_not
    info = describe(uri, None, layout, mpp, ["read by ranges from its store, where OpenSlide cannot be asked for comparison"])
    slide = TiledJpeg(ranges, levels, replace(info, levels=as_levels(levels), reader=_fast_name()))
    refused = refusal(slide, levels[0])
    return (slide, "") if refused is None else (None, refused)


def _fast_name() -> str:
    return f"tiled-jpeg, simplejpeg {version('simplejpeg')}"
