"""Which slides there are: files, folders of DICOM files, MIRAX files with their folders; and what a table says of each, joined by path.

A slide's id within its source is its path below the place that was listed, never its file's stem: a/x.svs and b/x.svs are two.
"""

import glob
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pydantic

from pipeline import storage
from pipeline.config import ConfigError, Model, nearest
from pipeline.fetch import fetch
from pipeline.readers.kinds import convert, declared, plain
from pipeline.slides.opening import SUFFIXES
from schemas.slides import TILE

MIRAX_PARTS = (".dat", ".ini")
File = tuple[str, int | None]
"""Version and bytes of a file, or of a slide of several."""
MAX_MPP, MIN_MPP = 20.0, 0.05
"""What a stated mpp of level 0 may be: the range in which a file's own is believed."""


class Metadata(Model):
    """A CSV or Parquet file with one row a slide, joined to the slides by path."""

    uri: str
    """The file, .csv, .tsv or .parquet."""
    key: str = "slide"
    """Column with the slide's path below slides.uri; a file's name alone is enough where only one slide has it."""
    columns: list[str] | dict[str, str] = []
    """Columns that every tile's row carries, such as patient_id; names, or names and types. From CSV all are text if no type is given."""
    mpp: str | None = None
    """Column with microns per px of level 0: stronger than what the file says. Empty where nobody knows better."""


class Slides(Model):
    """Where the slides are."""

    uri: str | list[str]
    """A folder (at any depth), a glob, a file, or a list of these; a path or an object store's URI."""
    suffixes: list[str] = list(SUFFIXES)
    """Which files of a folder are slides, in any case. The .dcm files of one folder are one slide."""
    name: str | None = None
    """Name of the source; without it, `uri`."""
    mpp: float | None = pydantic.Field(default=None, ge=MIN_MPP, le=MAX_MPP)
    """Microns per px of level 0 of slides that do not say it themselves. One that says something else keeps that;
    an estimate from its objective is no saying."""
    metadata: Metadata | None = None
    storage_options: dict[str, Any] | None = None
    """Settings of the object store, in fsspec's words."""

    @property
    def source(self) -> str:
        """Name of the source."""
        return self.name or storage.source_name(self.uri)


@dataclass(frozen=True)
class Listed:
    """A slide that is there."""

    uri: str
    slide_id: str
    version: str
    num_bytes: int | None
    mpp: float | None = None
    """Of the metadata: authoritative."""
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Of the metadata: what its tiles' rows repeat."""


@dataclass(frozen=True)
class Inventory:
    """All slides of a source."""

    slides: tuple[Listed, ...]
    carried: pa.Schema
    """Names and types of the metadata's columns."""
    unmatched: tuple[str, ...] = ()
    """Keys of the metadata that no slide has."""

    @property
    def columns(self) -> pa.Schema:
        """What a tile's row carries beside ITEM."""
        return pa.schema([*TILE, *self.carried])


def take_inventory(slides: Slides) -> Inventory:
    """List the slides, and join the metadata. Raises ConfigError for what the job file can fix."""
    places = [slides.uri] if isinstance(slides.uri, str) else slides.uri
    listing = storage.find(places, suffixes=[*slides.suffixes, *MIRAX_PARTS], storage_options=slides.storage_options)
    files = {row["unit"]: (row["version"], row["bytes"]) for row in listing.to_pylist()}
    found = _slides_of(files | _not_listed(files, places, slides.storage_options))
    if not found:
        raise ConfigError(f"{slides.source} has no files ending in {', '.join(slides.suffixes)}; correct slides.uri or slides.suffixes")
    ids = {uri: _slide_id(uri, places) for uri in found}
    _refuse_twins(ids)
    listed = [Listed(uri, ids[uri], version, size) for uri, (version, size) in sorted(found.items())]
    if slides.metadata is None:
        return Inventory(tuple(listed), pa.schema([]))
    return _join(listed, slides.metadata, slides.storage_options)


def _not_listed(files: Mapping[str, File], places: Sequence[str], storage_options: dict[str, Any] | None) -> dict[str, File]:
    """The other files of slides that a glob or a file's own name has found by one file."""
    whole = [storage.canonical(place) for place in places]
    if not any(place in files or glob.has_magic(place) for place in whole):
        return {}
    folders = {storage.parent(uri) for uri in files if uri.lower().endswith(".dcm")} | {uri[:-5] for uri in files if uri.lower().endswith(".mrxs")}
    below = [storage.look(folder, storage_options) for folder in sorted(folders)]
    return {uri: file for found in below for uri, file in found.items() if uri.lower().endswith((".dcm", *MIRAX_PARTS))}


def _slides_of(files: Mapping[str, File]) -> dict[str, File]:
    """Version and size of each slide: files of several parts put together."""
    parts: dict[str, list[str]] = defaultdict(list)
    mirax = {uri[:-5]: uri for uri in files if uri.lower().endswith(".mrxs")}
    for uri in files:
        lower = uri.lower()
        if lower.endswith(".dcm"):
            parts[storage.parent(uri)].append(uri)
        elif lower.endswith(MIRAX_PARTS):
            if storage.parent(uri) in mirax:
                parts[mirax[storage.parent(uri)]].append(uri)
        else:
            parts[uri].append(uri)
    return {slide: _together([files[uri] for uri in sorted(uris)]) for slide, uris in parts.items()}


def _together(files: Sequence[File]) -> File:
    if len(files) == 1:
        return files[0]
    sizes = [size for _, size in files if size is not None]
    version = hashlib.blake2b("\n".join(version for version, _ in files).encode(), digest_size=16).hexdigest()
    return version, sum(sizes) if len(sizes) == len(files) else None


def version_now(uri: str, storage_options: dict[str, Any] | None) -> str | None:
    """The version that an inventory taken now would give a slide; None if it is gone. A disk or store that cannot say raises."""
    files = storage.look(uri, storage_options)
    if uri.lower().endswith(".mrxs"):
        files |= storage.look(uri[:-5], storage_options)
    return _slides_of(files).get(uri, (None, None))[0]


def _slide_id(uri: str, places: Sequence[str]) -> str:
    roots = [storage.canonical(place) for place in places]
    # A folder's own name may look like a glob.
    globs = [glob.has_magic(root) and not uri.startswith(f"{root}/") for root in roots]
    roots = [root[: _magic_at(root)].rpartition("/")[0] if a_glob else root for root, a_glob in zip(roots, globs, strict=True)]
    inside = [uri[len(root) + 1 :] for root in roots if uri.startswith(f"{root.rstrip('/')}/")]
    return min(inside, key=len) if inside else uri.rpartition("/")[2]


def _magic_at(path: str) -> int:
    return min(path.find(sign) for sign in "*?[" if sign in path)


def _refuse_twins(ids: Mapping[str, str]) -> None:
    by_id: dict[str, list[str]] = defaultdict(list)
    for uri, slide_id in ids.items():
        by_id[slide_id].append(uri)
    for slide_id, uris in by_id.items():
        if len(uris) > 1:
            raise ConfigError(
                f"{uris[0]} and {uris[1]} would both be the slide {slide_id!r}; name the folder above both in slides.uri, or run them as two sources"
            )


# ---- metadata ----


def _join(listed: Sequence[Listed], metadata: Metadata, storage_options: dict[str, Any] | None) -> Inventory:
    table = _read(metadata.uri, storage_options)
    for name in [metadata.key, *metadata.columns, *([metadata.mpp] if metadata.mpp else [])]:
        if name not in table.column_names:
            raise ConfigError(f"{metadata.uri} has no column {name!r}{nearest(name, table.column_names)}; it has {', '.join(table.column_names)}")
    types = {name: kind or plain(table.schema.field(name).type) for name, kind in declared(metadata.columns).items()}
    taken = set(types) & set(TILE.names)
    if taken:
        raise ConfigError(f"slides.metadata.columns names {min(taken)!r}, which a tile's row has itself; rename it in {metadata.uri}")
    values = {name: _converted(table[name].combine_chunks(), name, kind, metadata) for name, kind in types.items()}
    mpps = _mpps(table[metadata.mpp].to_pylist(), metadata) if metadata.mpp else [None] * table.num_rows
    rows = _by_slide(table[metadata.key].to_pylist(), listed, metadata)
    none = dict.fromkeys(types)
    slides = []
    for slide in listed:
        row = rows.get(slide.slide_id)
        carried = none if row is None else {name: column[row] for name, column in values.items()}
        slides.append(Listed(slide.uri, slide.slide_id, slide.version, slide.num_bytes, None if row is None else mpps[row], carried))
    matched = set(rows.values())
    unmatched = tuple(str(key) for row, key in enumerate(table[metadata.key].to_pylist()) if row not in matched)
    return Inventory(tuple(slides), pa.schema(list(types.items())), unmatched)


def _read(uri: str, storage_options: dict[str, Any] | None) -> pa.Table:
    """The whole file: one row a slide is small."""
    data = fetch([uri], max_bytes=2**30, storage_options=storage_options)[0]
    if not isinstance(data, bytes):
        raise ConfigError(f"slides.metadata.uri={uri!r} cannot be read: {data.detail if data else 'it has no bytes'}")
    try:
        if uri.lower().endswith(".parquet"):
            return pyarrow.parquet.read_table(pa.BufferReader(data))
        parse = pyarrow.csv.ParseOptions(delimiter="\t" if uri.lower().endswith(".tsv") else ",")
        names = pyarrow.csv.read_csv(pa.BufferReader(data), parse_options=parse).column_names
        # As text: a patient 00123 is no number.
        kept = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""])
        return pyarrow.csv.read_csv(pa.BufferReader(data), parse_options=parse, convert_options=kept)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"slides.metadata.uri={uri!r} is no table: {error}") from error


def _converted(values: pa.Array, name: str, kind: pa.DataType, metadata: Metadata) -> list[Any]:
    column, bad = convert(values.to_pylist() if pa.types.is_string(values.type) else values.cast(plain(values.type)), kind)
    if bad.any():
        row = int(bad.argmax())
        raise ConfigError(f"{metadata.uri}, row {row + 1}: {name} is not {kind}: {values[row].as_py()!r}; mend it, or give it another type")
    found: list[Any] = column.to_pylist()
    return found


def _mpps(values: Sequence[Any], metadata: Metadata) -> list[float | None]:
    mpps: list[float | None] = []
    for row, value in enumerate(values):
        try:
            mpps.append(None if value is None else float(value))
        except (TypeError, ValueError):
            mpps.append(-1.0)
        if mpps[-1] is not None and not MIN_MPP <= mpps[-1] <= MAX_MPP:
            raise ConfigError(f"{metadata.uri}, row {row + 1}: {metadata.mpp}={value!r} must be microns per px, {MIN_MPP} to {MAX_MPP:g}, or empty")
    return mpps


def _by_slide(keys: Sequence[Any], listed: Sequence[Listed], metadata: Metadata) -> dict[str, int]:
    """The row of each slide that has one, by slide id."""
    names: dict[str, list[str]] = defaultdict(list)
    for slide in listed:
        names[slide.slide_id.rpartition("/")[2]].append(slide.slide_id)
    ids = {slide.slide_id for slide in listed}
    rows: dict[str, int] = {}
    for row, key in enumerate(keys):
        slide_id = key if key in ids else None
        if slide_id is None and len(names.get(str(key), [])) == 1:
            [slide_id] = names[str(key)]
        if slide_id is None:
            continue
        if slide_id in rows:
            raise ConfigError(f"{metadata.uri} has two rows for the slide {slide_id!r}: {rows[slide_id] + 1} and {row + 1}; keep one")
        rows[slide_id] = row
    return rows
