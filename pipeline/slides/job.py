"""What one run over slides is told, and what is there before anything is opened or written: the slides, the tables, and how they compare."""

import logging
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pydantic

from pipeline.compute import Compute
from pipeline.config import ConfigError, Model, Ref
from pipeline.encoders import Encoder
from pipeline.prepare import Sync, VectorTable, encoder_for
from pipeline.slides.current import Comparison, compare
from pipeline.slides.handles import Cache
from pipeline.slides.inventory import Inventory, Slides, take_inventory
from pipeline.slides.ledger import SMALL, kept_elsewhere, slide_rows
from pipeline.slides.report import SlideLimits
from pipeline.slides.survey import Look, Survey
from pipeline.slides.tiling import check_grids
from pipeline.tiles import Grid

log = logging.getLogger(__name__)


class SlideSync(Sync):
    """What happens beside new slides."""

    whole: bool = True
    """Commit a new slide when all its tiles are there; false: its chunks as they come, so that a reader sees half of it."""


class SlidesJob(Model):
    """Everything that one run over slides needs."""

    slides: Slides
    survey: Survey = Survey()
    grids: list[Grid] = [Grid(mpp=0.5)]
    """Which tiles are cut: at several magnifications, or of several sizes."""
    encoder: Ref
    """The encoder, e.g. `pipeline.encoders.tile:TileEncoder`, or any other that takes images."""
    table: VectorTable
    cache: Cache = Cache()
    compute: Compute = Compute()
    limits: SlideLimits = SlideLimits()
    sync: SlideSync = SlideSync()
    page: str | None = None
    """A local folder for an index of all slides with their pictures, made anew by every run: open its index.html."""

    @pydantic.field_validator("grids")
    @classmethod
    def _other_grids(cls, grids: list[Grid]) -> list[Grid]:
        try:
            check_grids(grids)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return grids

    @pydantic.field_validator("page")
    @classmethod
    def _a_folder(cls, page: str | None) -> str | None:
        if page is not None and ("://" in page or Path(page).is_file()):
            raise ValueError(f"page={page!r} must be a local folder, new or from an earlier run; the page and its pictures go into it")
        return page


@dataclass
class Work:
    """What is there and what is known, before anything is opened or written."""

    job: SlidesJob
    encoder: Encoder
    inventory: Inventory
    look: Look
    comparison: Comparison
    touched: set[str] = field(default_factory=set)
    """Slides that this run deals with."""
    begun: bool = False
    """Whether the run is in the ledger, and may have written something."""


def list_slides(job: SlidesJob) -> Work:
    """Build the encoder, look at the tables, list the slides. Raises ConfigError for whatever the job file can fix."""
    encoder = encoder_for(job.encoder, job.table)
    if "image" not in getattr(encoder, "inputs", frozenset({"image"})):
        raise ConfigError(f"encoder {job.encoder.target} takes no images, and tiles are images; name another one")
    job.survey.mask.build("__call__")
    inventory = take_inventory(job.slides)
    look = Look(
        survey=job.survey,
        grids=tuple(job.grids),
        columns=inventory.columns,
        source=job.slides.source,
        run=uuid.uuid4().hex[:16],
        at=job.table,
        mpp=job.slides.mpp,
        stain=getattr(encoder, "stain", None),
        cache=job.cache,
        storage_options=job.slides.storage_options,
    )
    _refuse_shared(inventory, job)
    known = slide_rows(job.table, source=look.source, columns=SMALL)
    comparison = compare(inventory, known, look, retry=job.sync.retry_rejects)
    log.info("%d slides, %d to look at, %d gone", len(inventory.slides), len(comparison.jobs), len(comparison.vanished))
    return Work(job, encoder, inventory, look, comparison)


def _refuse_shared(inventory: Inventory, job: SlidesJob) -> None:
    """Raise ConfigError if another source of the same table has one of the slides: two would write its row in turn."""
    elsewhere = kept_elsewhere(job.table, source=job.slides.source)
    shared = [slide.uri for slide in inventory.slides if slide.uri in elsewhere] if elsewhere else []
    if shared:
        raise ConfigError(
            f"table {job.table.name!r} has {len(shared)} of these {len(inventory.slides)} slides, e.g. {shared[0]}, under the source "
            f"{elsewhere[shared[0]]!r}; to go on with that one, set slides.name to it, else list other slides or fill another table"
        )
