"""Slides come into the table whole: their chunks' receipts wait for each other, and what an older state of a slide left goes with them.

Receipts that wait are on the store, as all staged work is; a run that dies leaves them to the next one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.known import UNCHANGED, Contents, hash64
from pipeline.plan import Plan
from pipeline.readers import UnitChanged
from pipeline.readers.slides import Tiles
from pipeline.slides.tiling import SETTLED, digest
from pipeline.table.commit import Committer
from pipeline.table.stage import Receipt
from schemas.items import item_schema
from schemas.slides import TILE

BAD_TILES = 20
"""Rejected tiles that a slide's row names."""


@dataclass
class Group:
    """Slides that are committed together: one, or several that have changed places."""

    units: list[str]
    places: list[str]
    """Their URIs, and those that they have moved from."""
    items: int
    """Tiles of all of them that a run has to deal with."""
    received: int = 0
    receipts: list[Receipt] = field(default_factory=list)


def groups_of(units: Mapping[str, int], lies_at: Mapping[str, Iterable[str]]) -> list[Group]:
    """`units`: tiles of each slide. `lies_at`: under which URIs the table has rows of a slide's content. Who shares a place is of one group."""
    leader = {place: place for unit in units for place in [unit, *lies_at.get(unit, [])]}

    def lead(place: str) -> str:
        while leader[place] != place:
            place = leader[place]
        return place

    for unit in units:
        for place in lies_at.get(unit, []):
            leader[lead(unit)] = lead(place)
    found: dict[str, Group] = {}
    for place in leader:
        group = found.setdefault(lead(place), Group([], [], 0))
        group.places.append(place)
        if place in units:
            group.units.append(place)
            group.items += units[place]
    return list(found.values())


class WholeSlides:
    """The gate of a slides run: see `pipeline.fill.Gate`."""

    def __init__(self, groups: Iterable[Group], reader: Tiles, plan: Plan, contents: Contents, *, parts: bool = False) -> None:
        """`parts`: commit the chunks of a slide that has no rows yet as they come, so that a reader sees half of it."""
        self._groups = {unit: group for group in groups for unit in group.units}
        self._reader, self._plan, self._contents, self._parts = reader, plan, contents, parts
        self.removed = self.revised = 0
        self.changed: dict[str, str] = {}
        """Slides that were surveyed anew when their tiles were to be committed, and what was found."""
        self.bad: dict[str, list[str]] = {}
        """Of each slide: its first rejected tiles, and why."""
        self.seconds: dict[str, float] = {}
        """Of each slide: thread time that its tiles took."""

    def admit(self, receipt: Receipt) -> list[Receipt]:
        """All of a group's receipts when the last has come."""
        unit = str(receipt.unit)
        bad = self.bad.setdefault(unit, [])
        bad += bad_tiles(receipt.rejects.slice(0, BAD_TILES - len(bad)))
        self.seconds[unit] = self.seconds.get(unit, 0.0) + sum(receipt.seconds.values())
        group = self._groups[unit]
        if self._parts and self._fresh(group):
            return [receipt]
        group.received += receipt.listed
        group.receipts.append(receipt)
        if group.received < group.items:
            return []
        ready, group.receipts = group.receipts, []
        return ready

    def _fresh(self, group: Group) -> bool:
        return not any(place in self._contents.units for place in group.places)

    def commit(self, committer: Committer, receipts: list[Receipt]) -> None:
        """New slides together in one commit, each of the others in one of its own."""
        fresh, known = list[Receipt](), dict[int, list[Receipt]]()
        for receipt in receipts:
            group = self._groups[str(receipt.unit)]
            # A chunk that met rows of its own has rows that another run, or an earlier life of the slide, left under another name.
            if self._fresh(group) and not receipt.unchanged and not len(receipt.changed.ids):
                fresh.append(receipt)
            else:
                known.setdefault(id(group), []).append(receipt)
        if fresh:
            committer.commit(fresh)
        for of_group in known.values():
            self.exchange(committer, self._groups[str(of_group[0].unit)], of_group)

    def exchange(self, committer: Committer, group: Group, receipts: list[Receipt]) -> None:
        """Make the table's rows of a group what its slides should have; they stay if that is not known any more."""
        try:
            wanted = self._wanted(group.units)
        except UnitChanged as changed:
            self.changed |= dict.fromkeys(group.units, str(changed))
            for receipt in receipts:
                committer.staging.delete_receipt(receipt.chunk)
            return
        done = committer.exchange(receipts, units=group.places, wanted=wanted)
        self.removed += done.removed
        self.revised += done.revised

    def forget(self, committer: Committer, unit: str) -> None:
        """Drop what was staged of a slide that was replaced meanwhile: no run will want it."""
        group = self._groups[unit]
        for receipt in group.receipts:
            if receipt.unit == unit:
                committer.staging.delete_receipt(receipt.chunk)
        group.receipts = [receipt for receipt in group.receipts if receipt.unit != unit]

    def _wanted(self, units: Iterable[str]) -> pa.Table:
        carried = [name for name in self._reader.metadata.names if name in SETTLED or name not in TILE.names]
        tables = [item_schema(self._reader.metadata).empty_table().append_column("_unit", pa.array([], pa.string()))]
        for unit in units:
            tiles = self._reader.tiles(unit, self._plan.units[unit])
            tables.append(tiles.append_column("_unit", pa.array([unit] * tiles.num_rows, pa.string())))
        wanted = pa.concat_tables(tables).select(["id", "version", "uri", "_unit", *carried])
        return wanted.rename_columns(["id", "_version", "uri", "_unit", *carried])


def bad_tiles(rejects: pa.Table) -> list[str]:
    """How a slide's row names rejected tiles: where they are, and why."""
    return [f"{row['uri'].rpartition('#')[2]}: {row['reason']}: {row['detail']}" for row in rejects.to_pylist()]


def settled_already(plan: Plan, reader: Tiles, contents: Contents, units: Iterable[str]) -> list[Receipt]:
    """Receipts for those of `units` of which every tile is in the table, or was rejected: they need no worker. Their chunks leave the plan."""
    receipts = []
    for unit in units:
        try:
            tiles = reader.tiles(unit, plan.units[unit])
        except UnitChanged:
            continue  # the worker that gets it will say so
        ids, versions = hash64(tiles["id"]), hash64(tiles["version"])
        there = contents.classify(ids, versions) == UNCHANGED
        before = contents.is_rejected(ids, versions) & ~there
        if not (there | before).all():
            continue
        receipts.append(
            Receipt(
                chunk=f"settled-{digest([unit, plan.units[unit]])}",
                listed=len(ids),
                unchanged=int(there.sum()),
                rejected_before=int(before.sum()),
                seen=np.ascontiguousarray(ids[there]),
                unit=unit,
            )
        )
    done = {receipt.unit for receipt in receipts}
    plan.chunks = [chunk for chunk in plan.chunks if chunk.work["unit"][0].as_py() not in done]
    return receipts
