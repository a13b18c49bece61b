"""What is to be done: the source's listing minus what the table already holds, cut into chunks. Pure: nothing is written.

Items are subtracted by (id, version); containers first as a whole, by the note that their last complete run left, so
that a billion unchanged rows are not read again. New, changed and vanished items fall out of the same subtraction.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ConfigError
from pipeline.known import CHANGED, DUPLICATE, UNCHANGED, WHOLE, Contents, added_up, hash64, repeated, without
from pipeline.readers import Reader
from pipeline.sorting import sort_rows
from schemas.items import LISTING, SLICE

MAX_CHUNK_ROWS = 8192
MIN_CHUNK_ROWS = 128


@dataclass
class Note:
    """A container that an earlier run completed: the UNIT row, as far as planning needs it."""

    version: str
    rows: int
    rejected: int
    digest: str


@dataclass
class Chunk:
    """Work that is computed, staged and committed as one."""

    id: str
    work: pa.Table
    """Rows of the listing (with columns `changed` and `duplicate`), or one slice of a container."""
    items: int


@dataclass
class Plan:
    """What a run will do. Counts of items; for containers `listed` is what their slices say before they are read."""

    chunks: list[Chunk] = field(default_factory=list)
    listed: int = 0
    unchanged: int = 0
    rejected: int = 0
    """Items rejected by an earlier run in the same version: not tried again."""
    changed: int = 0
    new: int = 0
    vanished_ids: np.ndarray | None = None
    """Id hashes, sorted, of rows whose item is no longer listed; None for containers, where only reading tells."""
    complete_units: frozenset[str] = frozenset()
    """Containers that need no reading."""
    units: dict[str, str] = field(default_factory=dict)
    """Containers to be read, and their versions."""
    unit_items: Counter[str] = field(default_factory=Counter)
    """Items of each container to be read."""
    listing: pa.Table | None = None


def plan(reader: Reader, contents: Contents, *, fingerprint: str, notes: dict[str, Note], chunk_rows: int | None, retry_rejects: bool) -> Plan:
    """Subtract `contents` from what `reader` lists.

    `chunk_rows`: items a chunk, or None to fit the amount of work. Raises ConfigError if the listing breaks the reader's contract.
    """
    listing = reader.list()
    if listing.num_rows == 0 and getattr(reader, "may_be_empty", False):
        return Plan(listing=listing)
    check_listing(listing)
    contents.retries = retry_rejects
    if listing["id"].null_count == 0:
        return _plan_files(listing, contents, fingerprint, chunk_rows)
    return _plan_containers(reader, listing, contents, fingerprint, notes)


def check_listing(listing: pa.Table) -> None:
    """Raise ConfigError unless a listing is what `Reader.list` promises."""
    missing = [name for name in LISTING.names if name not in listing.column_names]
    if missing:
        raise ConfigError(f"the reader's list() lacks the columns {', '.join(missing)}; see schemas.items.LISTING")
    if listing.num_rows == 0:
        raise ConfigError("the source is empty: there is nothing to embed")
    if 0 < listing["id"].null_count < listing.num_rows:
        raise ConfigError("the reader lists items and containers together; a listing is of one kind (all ids given, or none)")
    key = "unit" if listing["id"].null_count else "id"
    if twice := repeated(listing[key]):
        raise ConfigError(f"the reader lists the {key} {min(twice)!r} twice; it must be unique")


def _plan_files(listing: pa.Table, contents: Contents, fingerprint: str, chunk_rows: int | None) -> Plan:
    listing = sort_rows(listing, "unit")
    ids, versions = hash64(listing["id"]), hash64(listing["version"])
    codes = contents.classify(ids, versions)
    duplicate = codes == DUPLICATE
    known_rejects = (contents.is_rejected(ids, versions) & (codes != UNCHANGED)) | (contents.is_known_duplicate(ids, versions) & duplicate)
    pending = (codes != UNCHANGED) & ~known_rejects
    listing_with = listing.append_column("changed", pa.array(codes == CHANGED)).append_column("duplicate", pa.array(duplicate))
    work = listing_with.filter(pa.array(pending))
    known_ids = np.concatenate([np.empty(0, np.uint64), *(segment for segment, _ in contents.own.segments)])
    return Plan(
        chunks=cut(work, fingerprint, chunk_rows),
        listed=listing.num_rows,
        unchanged=int((codes == UNCHANGED).sum()),
        rejected=int(known_rejects.sum()),
        changed=int((pending & (codes == CHANGED)).sum()),
        new=int((pending & (codes != CHANGED)).sum()),
        vanished_ids=without(known_ids, ids),
        listing=listing,
    )


def cut(work: pa.Table, fingerprint: str, chunk_rows: int | None) -> list[Chunk]:
    """Rows of a listing into chunks of about `chunk_rows`, or of a size that gives progress early and few files late."""
    rows = chunk_rows or min(MAX_CHUNK_ROWS, max(MIN_CHUNK_ROWS, math.ceil(work.num_rows / 32)))
    parts = [work.slice(start, rows) for start in range(0, work.num_rows, rows)]
    return [Chunk(_chunk_id(part, fingerprint), part, part.num_rows) for part in parts]


def _chunk_id(work: pa.Table, fingerprint: str) -> str:
    """32 hex digits that name exactly this work under this encoder."""
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    for name in work.column_names:
        digest.update(name.encode())
        digest.update(hash64(pc.cast(work[name], pa.string()).fill_null("")).tobytes())
    return digest.hexdigest()


def _plan_containers(reader: Reader, listing: pa.Table, contents: Contents, fingerprint: str, notes: dict[str, Note]) -> Plan:
    whole = notes.get(WHOLE)
    version = noted_version(listing_version(listing), added_up(contents.doubles.values()))
    if whole and not contents.bereft and _note_holds(whole, version, contents, WHOLE) and not (contents.retries and whole.rejected):
        complete_units = frozenset([*listing["unit"].to_pylist(), *contents.units])
        listed = whole.rows + whole.rejected
        return Plan(listed=listed, unchanged=whole.rows, rejected=whole.rejected, complete_units=complete_units, listing=listing)
    complete = {
        unit: notes[unit]
        for unit, version in zip(listing["unit"].to_pylist(), listing["version"].to_pylist(), strict=True)
        if unit in notes
        and unit not in contents.bereft
        and _note_holds(notes[unit], noted_version(version, contents.doubles.get(unit, 0)), contents, unit)
        and not (contents.retries and notes[unit].rejected)
    }
    while waiting := {unit for unit in complete if not contents.holders.get(unit, set()) <= complete.keys()}:
        complete = {unit: note for unit, note in complete.items() if unit not in waiting}
    pending = listing.filter(pc.invert(pc.is_in(listing["unit"], pa.array(list(complete), pa.string()))))
    slices = reader.split(pending) if pending.num_rows else SLICE.empty_table()
    _check_slices(slices, pending)
    chunks = []
    for index in range(slices.num_rows):
        work = slices.slice(index, 1)
        chunks.append(Chunk(_chunk_id(work, fingerprint), work, work["stop"][0].as_py() - work["start"][0].as_py()))
    unchanged = sum(note.rows for note in complete.values())
    rejected = sum(note.rejected for note in complete.values())
    items = sum(chunk.items for chunk in chunks)
    unit_items: Counter[str] = Counter()
    for chunk in chunks:
        unit_items[chunk.work["unit"][0].as_py()] += chunk.items
    return Plan(
        chunks=chunks,
        listed=unchanged + rejected + items,
        unchanged=unchanged,
        rejected=rejected,
        new=items,
        complete_units=frozenset(complete),
        units=dict(zip(pending["unit"].to_pylist(), pending["version"].to_pylist(), strict=True)),
        unit_items=unit_items,
        listing=listing,
    )


def listing_version(listing: pa.Table) -> str:
    """32 hex digits of all that is listed, in its versions."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("unit", "version"):
        digest.update(hash64(sort_rows(listing, "unit")[name]).tobytes())
    return digest.hexdigest()


def noted_version(version: str, doubles: int) -> str:
    """What a note says of a container's version: with its duplicates on record (`Contents.doubles`), which another container's may have replaced."""
    return f"{version}|{doubles:016x}" if doubles else version


def _note_holds(note: Note, version: str, contents: Contents, unit: str) -> bool:
    """A note counts only while the container and the table's rows of it are what they were: a restored table voids it."""
    if note.version != version or (note.rejected and not (contents.rejected.segments or contents.duplicates.segments)):
        return False
    return contents.units.get(unit, (0, "")) == (note.rows, note.digest)


def _check_slices(slices: pa.Table, pending: pa.Table) -> None:
    left_out = set(pending["unit"].to_pylist()) - set(slices["unit"].to_pylist())
    if left_out:
        raise ConfigError(f"the reader's split() leaves out {len(left_out)} of {pending.num_rows} containers, e.g. {min(left_out)!r}")
