"""Tiles of whole slides that have been surveyed: a slide is a container, a tile an item, pixels are read as they are wanted.

Nothing is listed but what the slides table says, so that a run over ten thousand slides opens none of them on the driver.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.media import BadItem
from pipeline.readers import UnitChanged, slices
from pipeline.slides import BadTile
from pipeline.slides.cutting import tile_pixels
from pipeline.slides.handles import Cache, Handles
from pipeline.slides.inventory import version_now
from pipeline.slides.ledger import slide_rows
from pipeline.slides.quality import quality
from pipeline.slides.stain import Stain, from_json
from pipeline.slides.tiling import cuts_of, tiles_of
from pipeline.table.at import TableAt
from pipeline.tiles import Cut, Grid
from schemas.items import LISTING

SLICE_TILES = 2048
"""Tiles that are read, embedded and staged as one: a minute of a GPU at most, and a hundred MB of vectors at worst."""
ROWS_KEPT = 8
"""Slides whose tiles a process keeps laid out."""
SURVEYED_ANEW = "it was surveyed anew by another run, or with other settings, while this one was under way; run again"


class Tiles:
    """The tiles of the slides of one source, of all grids."""

    may_be_empty = True

    def __init__(
        self,
        at: TableAt,
        source: str,
        *,
        grids: Sequence[Grid],
        columns: pa.Schema,
        carried: Mapping[str, Mapping[str, Any]],
        cache: Cache,
        slice_tiles: int | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """The slides are those of the table beside `at`. `columns`: TILE and what `carried` gives for each slide by its URI."""
        self.at, self.source, self.grids = at, source, list(grids)
        self.metadata = columns
        self.carried = carried
        self.storage_options = storage_options
        self._slice_tiles = slice_tiles or SLICE_TILES
        self._handles = Handles(cache, storage_options)
        self._laid: dict[str, _Laid] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is laid out: it is made again where it is wanted."""
        return {name: value for name, value in vars(self).items() if name not in ("_laid", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._laid, self._lock = {}, threading.Lock()

    def list(self) -> pa.Table:
        """The slides that have tiles; a slide's version is a hash of all that its tiles' rows depend on. Empty if there is none."""
        where = "status IN ('surveyed', 'ok', 'partial') AND tiles > 0"
        rows = slide_rows(self.at, source=self.source, columns=["id", "tiling"], where=where)
        here = [row for row in rows if row["id"] in self.carried]
        columns = [[row["id"] for row in here], [row["tiling"] for row in here], pa.nulls(len(here), pa.int64()), pa.nulls(len(here), pa.string())]
        return pa.table([pa.array(column, entry.type) for column, entry in zip(columns, LISTING, strict=True)], schema=LISTING)

    def split(self, units: pa.Table) -> pa.Table:
        """Slices of about equal size, row by row of the grid."""
        counts = {row["id"]: row["tiles"] for row in slide_rows(self.at, source=self.source, columns=["id", "tiles"])}
        parts: list[tuple[str, str, slices.Part]] = []
        for unit, version in zip(units["unit"].to_pylist(), units["version"].to_pylist(), strict=True):
            count = counts[unit]
            pieces = -(-count // self._slice_tiles)
            parts += [(unit, version, (count * i // pieces, count * (i + 1) // pieces, None)) for i in range(pieces)]
        return slices.table(parts)

    @contextlib.contextmanager
    def hold(self, work: pa.Table, alive: Callable[[], None]) -> Iterator[None]:
        """As `pipeline.readers` says: the slides of some slices stay open meanwhile."""
        with contextlib.ExitStack() as held:
            for unit, version in _units(work):
                held.enter_context(self._handles.hold(self._current(unit, version).row, alive))
            yield

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """The tiles' rows, without quality: that comes with the pixels. Raises UnitChanged if the slide was surveyed anew meanwhile."""
        for part in work.to_pylist():
            yield self.tiles(part["unit"], part["version"]).slice(part["start"], part["stop"] - part["start"])

    def tiles(self, unit: str, version: str) -> pa.Table:
        """All tiles that a slide of a listed version should have: ITEM and metadata rows. Raises UnitChanged as `read`."""
        return self._current(unit, version).tiles

    def pixels(self, row: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """A tile, uint8 (P, P, 3), and its quality. Raises BadItem `corrupt_tile`, or UnitChanged."""
        laid = self._lay(row["uri"].rpartition("#")[0])
        white = laid.white
        with self._handles.hold(laid.row) as slide:
            try:
                image = tile_pixels(slide, (row["x"], row["y"]), cut=laid.cuts[row["grid"]], white=white)
            except BadTile as bad:
                raise BadItem("corrupt_tile", bad.detail) from bad
        measured: dict[str, Any] = dict(quality(image, mpp=row["mpp_effective"], white=white))
        return (laid.stain(image) if laid.stain else image), measured

    def confirm(self, work: pa.Table) -> None:
        """Raises UnitChanged if a slide's file is not any more what was surveyed, or was surveyed anew."""
        for unit, version in _units(work):
            if version_now(unit, self.storage_options) != self._current(unit, version).row["version"]:
                self._handles.forget(unit)
                raise UnitChanged(f"{unit}: it was replaced while its tiles were read; run again, the new one will be surveyed")

    def _current(self, unit: str, version: str) -> "_Laid":
        laid = self._lay(unit)
        if laid.row["tiling"] != version:
            raise UnitChanged(f"{unit}: {SURVEYED_ANEW}")
        return laid

    def _lay(self, unit: str) -> "_Laid":
        with self._lock:
            laid = self._laid.pop(unit, None)
            if laid is None:
                rows = slide_rows(self.at, source=self.source, units=[unit])
                if not rows or rows[0]["tiling"] is None:
                    raise UnitChanged(f"{unit}: {SURVEYED_ANEW}, and has no tiles any more")
                laid = _Laid(rows[0], self.grids, self.carried[unit], self.metadata)
            self._laid[unit] = laid  # last: the first of the dict is what was used longest ago
            while len(self._laid) > ROWS_KEPT:
                del self._laid[next(iter(self._laid))]
            return laid


class _Laid:
    """A slide's row, and what follows from it."""

    def __init__(self, row: dict[str, Any], grids: Sequence[Grid], carried: Mapping[str, Any], columns: pa.Schema) -> None:
        self.row = row
        self.cuts: dict[str, Cut] = cuts_of(row, grids)
        self.white: tuple[int, int, int] = tuple(row["white"])
        self.stain: Stain | None = from_json(row["stain"]) if row["stain"] else None
        self._tiles = functools.partial(tiles_of, row, grids, carried, columns)

    @functools.cached_property
    def tiles(self) -> pa.Table:
        """ITEM and metadata rows."""
        return self._tiles()


def _units(work: pa.Table) -> set[tuple[str, str]]:
    """The slides of some slices, and their versions."""
    return set(zip(work["unit"].to_pylist(), work["version"].to_pylist(), strict=True))
