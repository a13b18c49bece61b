"""A source of pairs to a Lance data set of checked rows (PREPARED), once: any row is then read at random, and no GPU waits for parsing.

What is prepared is named after a fingerprint of the source's files and of all settings that its rows depend on, so that it is found again, and
made again when one of them changes. Rejected rows lie beside it (PAIR_REJECT). Its Lance commit is its proof: it is there whole, or not at all.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import lance
import pyarrow as pa
import pydantic

from pipeline.config import ConfigError, Model, Ref
from pipeline.media import Limits
from pipeline.pairs import PairReader
from pipeline.pairs.check import Checker
from pipeline.pairs.prepared import USES, Prepared
from pipeline.table.at import open_dataset
from schemas.pairs import PAIR_REJECT, PREPARED

FORM = 4
"""Changes when rows are prepared in another way."""

ROWS_WITH_IMAGES = 32
"""Rows whose images are fetched and decoded together."""

log = logging.getLogger(__name__)


class Dataset(Model):
    """One data set of a training job."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Of letters, digits, `_`, `.` and `-`. The order of rows is drawn from it: another name is another order."""
    reader: Ref
    """A pair reader such as pipeline.pairs.mmeb:Mmeb, with its arguments."""
    weight: float | None = pydantic.Field(default=None, gt=0)
    """Share of the batches, against the other data sets' weights; null: as many as it has rows."""
    in_batch_negatives: bool = True
    """Whether other rows' documents are wrong answers. Off for classification, where many rows have the same right one."""
    negatives: Literal["allowed", "required", "dropped"] = "allowed"
    """required: a row without one is rejected. dropped: those of the source are left out."""
    swap: bool = False
    """Query and positive change places: retrieval the other way. A row needs one positive and no negatives; instructions are then those below."""
    instruction_q: str = ""
    """What queries are told, where the row does not say."""
    instruction_d: str = ""
    """What documents are told, where the row does not say."""
    images: Literal["exist", "decode", "store"] = "exist"
    """What is made sure of: that files exist; that each image decodes; that, and the bytes are kept with the rows, so that training fetches none."""
    tokens_per_image: int = pydantic.Field(default=256, ge=0)
    """For the estimated length of a row."""
    max_rejects: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Share of the source's rows that may be rejected; 0: the first bad row ends the job, and is named."""
    limits: Limits = Limits()
    """What one image may cost."""
    storage_options: dict[str, str] = {}
    """fsspec's, for images."""


def prepare(dataset: Dataset, folder: str, storage_options: dict[str, str] | None = None) -> Prepared:
    """The data set's rows under `folder`, prepared before or now.

    Raises ConfigError if the source cannot be read, more than `max_rejects` of its rows are bad (the first are named), or none is good.
    """
    reader: PairReader = dataset.reader.build("list", "split", "read", "uses")
    units = reader.list()
    mark = fingerprint(dataset, units)
    options = storage_options or {}
    place = f"{folder.rstrip('/')}/{dataset.name}-{mark[:16]}"
    found = Prepared(dataset.name, f"{place}.lance", f"{place}.rejects.lance", options, dict(dataset.storage_options))
    if open_dataset(found.path, options) is None:
        _Preparation(dataset, reader, units, place, options).run()
    else:
        _check_again(dataset, found)
    return found


def _check_again(dataset: Dataset, found: Prepared) -> None:
    """Rows that were prepared under a looser `max_rejects` than today's are refused."""
    rejects = [reject for reject in found.rejects().to_pylist() if reject["reason"] != "unwanted"]
    total = found.num_rows() + found.rejects().num_rows
    if len(rejects) > dataset.max_rejects * total:
        raise _refusal(dataset, _too_many(dataset, len(rejects), total), rejects, found.rejects_path)


def _too_many(dataset: Dataset, bad: int, total: int) -> str:
    return f"{bad} of {total} rows are bad, more than max_rejects={dataset.max_rejects} allows"


def _refusal(dataset: Dataset, what: str, rejects: list[dict[str, Any]], path: str) -> ConfigError:
    worst = [reject for reject in rejects if reject["reason"] != "unwanted"] or rejects
    first = "; ".join(f"{reject['uri']}: {reject['reason']}: {reject['detail']}" for reject in worst[:3])
    return ConfigError(f"data set {dataset.name!r}: {what}. {first or 'It has no rows'}. Mend them, raise max_rejects, or see {path}")


def fingerprint(dataset: Dataset, units: pa.Table) -> str:
    """32 hex digits of what the rows depend on: the files and their versions, the reader, and the data set's settings but its weight."""
    settings = dataset.model_dump(mode="json", exclude={"weight", "max_rejects", "storage_options"})
    settings["reader"]["args"].pop("storage_options", None)  # credentials may change
    files = list(zip(units["unit"].to_pylist(), units["version"].to_pylist(), strict=True))
    return hashlib.blake2b(json.dumps([FORM, settings, files], sort_keys=True).encode(), digest_size=16).hexdigest()


class _Preparation:
    """One source while it is read, checked and written."""

    def __init__(self, dataset: Dataset, reader: PairReader, units: pa.Table, place: str, options: dict[str, str]) -> None:
        self.dataset, self.reader, self.place, self.options = dataset, reader, place, options
        self.slices = reader.split(units)
        self.total = sum(stop - start for start, stop in zip(self.slices["start"].to_pylist(), self.slices["stop"].to_pylist(), strict=True))
        self.rejects: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.failure: Exception | None = None

    def run(self) -> None:
        log.info("%s: preparing %d rows of %s", self.dataset.name, self.total, self.reader.source)
        schema = PREPARED.with_metadata({**(PREPARED.metadata or {}), USES: json.dumps(self.reader.uses()).encode()})
        path = f"{self.place}.lance"
        try:
            lance.write_dataset(self._noted(schema), path, schema=schema, mode="create", data_storage_version="2.2", storage_options=self._options)
        except Exception:
            # Lance wraps what its source raises in an error of its own.
            if self.failure is not None:
                raise self.failure from None
            # Another job may have prepared the same rows meanwhile.
            if open_dataset(path, self.options) is None:
                raise
        log.info("%s: %d rows are prepared, %d are rejected", self.dataset.name, self.counts["good"], len(self.rejects))

    def _noted(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._rows(schema)
        except Exception as error:
            self.failure = error
            raise

    def _rows(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        with Checker(self.dataset) as checker:
            for rows in self._parts():
                good, bad = checker.check(rows)
                self.rejects += bad
                self.counts["good"] += len(good)
                self.counts["bad"] += sum(reject["reason"] != "unwanted" for reject in bad)
                if self.counts["bad"] > self.dataset.max_rejects * self.total:
                    self._fail(_too_many(self.dataset, self.counts["bad"], self.total))
                yield from pa.Table.from_pylist(good, schema=schema).to_batches()
        if not self.counts["good"]:
            self._fail(f"none of {self.total} rows can be trained on")
        # The rejects go first: once the rows are there, nothing is prepared again.
        self._write_rejects()

    def _parts(self) -> Iterator[list[dict[str, Any]]]:
        """The reader's rows, few at a time where their images are fetched: these are held together."""
        most = ROWS_WITH_IMAGES if self.dataset.images != "exist" else 2**31
        for table in self.reader.read(self.slices):
            for start in range(0, table.num_rows, most):
                yield table.slice(start, most).to_pylist()

    def _fail(self, what: str) -> None:
        self._write_rejects()
        raise _refusal(self.dataset, what, self.rejects, f"{self.place}.rejects.lance")

    def _write_rejects(self) -> None:
        found, path = pa.Table.from_pylist(self.rejects, schema=PAIR_REJECT), f"{self.place}.rejects.lance"
        # Those of an earlier try that failed are written anew.
        mode = "create" if open_dataset(path, self.options) is None else "overwrite"
        lance.write_dataset(found, path, mode=mode, data_storage_version="2.2", storage_options=self._options)

    @property
    def _options(self) -> dict[str, str] | None:
        return self.options or None
