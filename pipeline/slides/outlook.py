"""What a run over slides would do, said before it does anything: no slide is opened, and nothing is written."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.slides.job import Work
from pipeline.slides.tiling import grid_name
from pipeline.table.contents import quoted


def summary(work: Work) -> dict[str, Any]:
    """What `--plan` prints. Tiles are estimated: of slides to be opened by their bytes, of those whose grids have changed by their tissue."""
    opened = [slide for slide, _, opens in work.comparison.jobs if opens]
    recounted = [row for _, row, opens in work.comparison.jobs if row is not None and not opens]
    return {
        "job": "slides",
        "table": work.job.table.path(),
        "fingerprint": work.encoder.fingerprint,
        "dim": work.encoder.dim,
        "grids": [grid_name(grid) for grid in work.job.grids],
        "listed": len(work.inventory.slides),
        "to_survey": len(opened),
        "tiles_estimated": _by_bytes(work, sum(slide.num_bytes or 0 for slide in opened)),
        "to_count_anew": len(recounted),
        "tiles_counted_anew": _by_tissue(work, recounted),
        "tiles_to_remove": _of_other_grids(work) if recounted else 0,
        "unchanged": sum(row["status"] != "surveyed" for row in work.comparison.current),
        "to_finish": sum(row["status"] == "surveyed" for row in work.comparison.current),
        "tiles_to_finish": sum(row["tiles"] or 0 for row in work.comparison.current if row["status"] == "surveyed"),
        "gone": len([row for row in work.comparison.vanished if row["status"] != "deleted"]),
        "slides_to_survey": [slide.slide_id for slide in opened[:20]],
        "metadata_unmatched": len(work.inventory.unmatched),
    }


def _by_bytes(work: Work, num_bytes: int) -> int | None:
    """Tiles of slides of so many bytes, if they are as the slides that are known; None if none is."""
    known = [row for row in work.comparison.current if row["tiles"] and row["bytes"]]
    return round(num_bytes * sum(row["tiles"] for row in known) / sum(row["bytes"] for row in known)) if known else None


def _by_tissue(work: Work, rows: Sequence[Mapping[str, Any]]) -> int:
    """Tiles of all grids that slides of so much tissue have, whether or not the table has them already."""
    mm2 = sum(row["tissue_mm2"] or 0.0 for row in rows)
    return round(sum(mm2 * 1e6 / ((grid.tile_px - grid.overlap_px) * grid.mpp) ** 2 for grid in work.job.grids))


def _of_other_grids(work: Work) -> int:
    """Tiles in the table that are of none of the grids: a run takes them away."""
    dataset = work.job.table.open()
    if dataset is None:
        return 0
    grids = ", ".join(quoted(grid_name(grid)) for grid in work.job.grids)
    return int(dataset.count_rows(f"source = {quoted(work.look.source)} AND grid NOT IN ({grids})"))
