"""Slides jobs for tests: a folder of small slides, a job over it, and what its tables hold."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.slides import SlidesJob, run
from pipeline.config import JobFailed
from pipeline.slides.report import SlidesReport
from pipeline.table.at import TableAt
from tests.slides.build import Canvas, drawn_textures, render, some_scene, write_svs

TEXTURES = drawn_textures()


def canvas(seed: int = 0, *, mpp: float = 0.5, **scene) -> Canvas:
    """A slide of 512 x 384 um."""
    return render(some_scene(list(TEXTURES), width_um=512, height_um=384, seed=seed, **scene), TEXTURES, mpp=mpp)


def write(path: Path, seed: int = 0, *, mpp: float = 0.5, **how) -> Path:
    """A small Aperio slide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_svs(path, canvas(seed, mpp=mpp).image, mpp=how.pop("said", mpp), **how)


@dataclass
class Lab:
    """A folder of slides and a database."""

    folder: Path
    db: Path
    name: str = "t"

    def job(self, **changes) -> SlidesJob:
        """The job, with sections changed."""
        values = {
            "slides": {"uri": str(self.folder)},
            "grids": [{"mpp": 0.5, "tile_px": 128}],
            "encoder": {"target": "pipeline.encoders.hashing:Hashing", "args": {"dim": 16}},
            "table": {"uri": str(self.db), "name": self.name},
            "compute": {"cpus": 1},
            "limits": {"max_bad_slides": 1, "max_rejects": 1},
            "survey": {"thumbnail_px": 64},
        }
        for key, value in changes.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
        return SlidesJob.model_validate(values)

    def run(self, **changes) -> SlidesReport:
        """Run it; the report also of a run that failed."""
        try:
            report = run(self.job(**changes))
        except JobFailed as failure:
            report = failure.report
        adds_up(report)
        return report

    @property
    def at(self) -> TableAt:
        return TableAt(uri=str(self.db), name=self.name)

    def slides(self) -> dict[str, dict]:
        """Rows of the slides table by slide id."""
        dataset = self.at.open(".slides")
        rows = dataset.to_table().to_pylist() if dataset else []
        assert len({row["id"] for row in rows}) == len(rows), "a slide stands twice"
        return {row["slide_id"]: row for row in rows}

    def tiles(self, slide_id: str | None = None) -> dict[str, dict]:
        """Rows of the tile table by id, of one slide or of all."""
        dataset = self.at.open()
        rows = dataset.to_table().to_pylist() if dataset else []
        assert len({row["id"] for row in rows}) == len(rows), "a tile stands twice"
        return {row["id"]: row for row in rows if slide_id in (None, row["slide_id"])}

    def statuses(self) -> dict[str, tuple[str, str | None]]:
        """Status and reason by slide id."""
        return {slide_id: (row["status"], row["reason"]) for slide_id, row in self.slides().items()}


def adds_up(report: SlidesReport) -> None:
    """Slides and tiles are each accounted for once."""
    of_run = (report.surveyed, report.ok, report.partial, report.failed, report.needs_mpp, report.no_tissue, report.duplicate)
    assert report.listed == report.unchanged + sum(of_run), report
    tiles = report.tiles
    assert tiles.listed == tiles.unchanged + tiles.written + tiles.replaced + tiles.rejected + tiles.failed, tiles


def vectors(tiles: dict[str, dict]) -> np.ndarray:
    """(N, dim) in the order of ids."""
    return np.array([tiles[item]["vector"] for item in sorted(tiles)])
