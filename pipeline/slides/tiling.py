"""Which tiles a surveyed slide has: from its row of the slides table, the same on every machine and in every run.

A tile's id is a hash of what is on the glass and where it is (content, grid, place), not of where the file lies: a slide that is
moved keeps its tiles. A tile's version is a hash of what its pixels depend on. What may change without another look at the
pixels (the tissue share, the slide's name) is in neither: such rows are rewritten with the vector that they have.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.config import ConfigError
from pipeline.readers.identity import digests
from pipeline.tiles import Cut, Grid, Tiles, WrongScale, cut_for, kept, lay, parents
from schemas.items import item_schema
from schemas.slides import QUALITY, TILE


def grid_name(grid: Grid) -> str:
    """What a grid is called on its tiles' rows: all that decides where its tiles lie."""
    overlap = f"/overlap{grid.overlap_px}" if grid.overlap_px else ""
    return f"{grid.mpp:.6g}um/{grid.tile_px}px{overlap}{'/stored' if grid.resample == 'never' else ''}"


def check_grids(grids: Sequence[Grid]) -> None:
    """Raise ConfigError unless there are grids, each another one."""
    names = [grid_name(grid) for grid in grids]
    if not names:
        raise ConfigError("grids is empty; give at least one, such as grids: [{mpp: 0.5, tile_px: 256}]")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"grids has {repeated[0]} twice: their tiles would lie in the same places; leave one out")


def digest(value: Any) -> str:
    """32 hex digits of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


DEPENDS = ("id", "source", "slide_id", "version", "survey", "content_fp", "reader", "width", "height", "levels", "mpp", "bounds", "white", "stain")
"""Columns of a slide's row that its tiles' rows depend on. The mask follows from content and survey. The file's version: of a file that was written
anew with the same fingerprint, tiles that could not be read before are tried again; the others are found to be there."""


def tiling_of(slide: Mapping[str, Any], grids: Sequence[Grid], carried: Mapping[str, Any]) -> str:
    """Hash of all that the rows of a slide's tiles depend on. `carried`: the metadata of the slide that each of its rows repeats."""
    given = {name: slide[name] for name in DEPENDS}
    return digest([given, [grid.model_dump() for grid in grids], dict(carried), 1])


def cuts_of(slide: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, Cut]:
    """How a slide gives the tiles of each grid, by the grid's name; a grid that it is too coarse for is left out."""
    cuts = {}
    for grid in grids:
        try:
            cuts[grid_name(grid)] = cut_of(slide, grid)
        except WrongScale:
            continue
    return cuts


def cut_of(slide: Mapping[str, Any], grid: Grid) -> Cut:
    """How a slide gives the tiles of a grid. Raises WrongScale."""
    return cut_for(grid, mpp=slide["mpp"], downsamples=[level["downsample"] for level in slide["levels"]])


def tiles_of(slide: Mapping[str, Any], grids: Sequence[Grid], carried: Mapping[str, Any], metadata: pa.Schema) -> pa.Table:
    """The tiles that a slide should have: ITEM and `metadata` rows, grid after grid, each row by row from the top.

    `metadata`: TILE with the columns of `carried` after it. Null: quality, which is measured on the pixels.
    """
    mask = mask_of(slide)
    bounds = tuple(slide["bounds"]) if slide["bounds"] else None
    size = (slide["width"], slide["height"])
    layers = []
    for grid in sorted(grids, key=lambda grid: (-grid.mpp, grid.tile_px)):
        try:
            cut = cut_of(slide, grid)
        except WrongScale:
            continue
        laid = lay(cut, size=size, mask=mask, bounds=bounds)
        tiles = laid.where(kept(grid, laid))
        layers.append(_Layer(slide, grid, cut, tiles))
    schema = item_schema(metadata)
    tables = []
    for index, layer in enumerate(layers):
        # The next coarser one: with two of one mpp, the last of those that are coarser.
        coarser = [other for other in layers[:index] if other.grid.mpp > layer.grid.mpp]
        parent_ids = layer.parents(coarser[-1], size, bounds) if coarser else pa.nulls(len(layer.tiles), pa.string())
        tables.append(layer.table(parent_ids, carried, schema))
    return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()


def mask_of(slide: Mapping[str, Any]) -> np.ndarray:
    """The tissue mask of a slide's row: bool (h, w)."""
    with Image.open(io.BytesIO(slide["mask"])) as image:
        return np.asarray(image.convert("1"))


def mask_png(mask: np.ndarray) -> bytes:
    """A mask, bool (h, w), as a PNG of one bit a px."""
    target = io.BytesIO()
    Image.fromarray(mask).save(target, "PNG", optimize=False)
    return target.getvalue()


class _Layer:
    """The tiles of one grid on one slide."""

    def __init__(self, slide: Mapping[str, Any], grid: Grid, cut: Cut, tiles: Tiles) -> None:
        self.slide, self.grid, self.cut, self.tiles = slide, grid, cut, tiles
        self.name = grid_name(grid)
        # What a fill or a normalisation of this slide does to pixels is part of a tile's version, not of its id.
        pixels = [cut.level, cut.read_px, cut.footprint_l0, cut.tile_px]
        self.version = digest([slide["content_fp"], slide["reader"], slide["white"], slide["stain"], pixels, 1])
        self.ids = self._ids(tiles.x, tiles.y)

    def _ids(self, xs: np.ndarray, ys: np.ndarray) -> pa.Array:
        places = pa.array([f"{x},{y}" for x, y in zip(xs.tolist(), ys.tolist(), strict=True)], pa.string())
        return digests(places, hashlib.blake2b(f"{self.slide['content_fp']}\n{self.name}".encode(), digest_size=16).digest())

    def parents(self, coarse: "_Layer", size: tuple[int, int], bounds: tuple[int, ...] | None) -> pa.Array:
        """Ids of the coarser tiles that hold each tile's centre; null where those are not kept."""
        places = parents(self.tiles, fine=self.cut, coarse=coarse.cut, size=size, bounds=bounds)  # type: ignore[arg-type]
        rows, cols = coarse.tiles.row.tolist(), coarse.tiles.col.tolist()
        ids = dict(zip(zip(rows, cols, strict=True), coarse.ids.to_pylist(), strict=True))
        return pa.array([ids.get((row, col)) for row, col in places.tolist()], pa.string())

    def table(self, parent_ids: pa.Array, carried: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
        """ITEM and metadata rows."""
        tiles, cut, n = self.tiles, self.cut, len(self.tiles)
        side, uri = cut.footprint_l0, self.slide["id"]
        made: dict[str, Any] = {
            "id": self.ids,
            "version": [self.version] * n,
            "uri": [f"{uri}#xywh={x},{y},{side},{side}" for x, y in zip(tiles.x.tolist(), tiles.y.tolist(), strict=True)],
            "x": tiles.x,
            "y": tiles.y,
            "row": tiles.row,
            "col": tiles.col,
            "x_um": tiles.x * cut.mpp,
            "y_um": tiles.y * cut.mpp,
            "tissue_fraction": tiles.tissue_fraction,
            "valid_fraction": tiles.valid_fraction,
            "parent_id": parent_ids,
        }
        each = {
            "slide_id": self.slide["slide_id"],
            "content_fp": self.slide["content_fp"],
            "grid": self.name,
            "footprint_l0": side,
            "mpp": self.grid.mpp,
            "mpp_effective": cut.mpp_effective,
            "tile_px": cut.tile_px,
            "read_level": cut.level,
            "read_px": cut.read_px,
            "upsampled": cut.upsampled,
            **carried,
        }
        made |= {name: [value] * n for name, value in each.items()}
        columns = [_column(made[entry.name], entry.type) if entry.name in made else pa.nulls(n, entry.type) for entry in schema]
        return pa.table(columns, schema=schema)


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    array = pa.array(values) if isinstance(values, np.ndarray) else values
    return array.cast(kind) if isinstance(array, pa.Array) else pa.array(array, kind)


SETTLED = [name for name in TILE.names if name not in QUALITY.names]
"""Columns of a tile that are known without its pixels."""
