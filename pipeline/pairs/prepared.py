"""A data set that is ready for training: what its order needs to know, and its rows at random."""

import json
from dataclasses import dataclass, field
from functools import cached_property

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.pairs import KEYS, PREPARED

USES = b"tessera.uses"
"""Metadata: every column of the source and what it is used as, JSON."""


MOST_INSTRUCTIONS = 20


@dataclass(frozen=True)
class Prepared:
    """A Lance data set of PREPARED rows at `path`, and one of PAIR_REJECT rows. It pickles; a worker opens it itself."""

    name: str
    path: str
    rejects_path: str
    storage_options: dict[str, str] = field(default_factory=dict)
    image_options: dict[str, str] = field(default_factory=dict)
    """fsspec's, for the images that the rows name."""

    def open(self) -> lance.LanceDataset:
        """The rows."""
        return lance.dataset(self.path, storage_options=self.storage_options or None)

    def rejects(self) -> pa.Table:
        """Rows that are not trained on, and why (PAIR_REJECT)."""
        return lance.dataset(self.rejects_path, storage_options=self.storage_options or None).to_table()

    def rejected(self) -> dict[str, int]:
        """Rejected rows by reason."""
        counts = pc.value_counts(self.rejects()["reason"].combine_chunks())
        return {entry["values"]: entry["counts"] for entry in counts.to_pylist()}

    def uses(self) -> dict[str, str | None]:
        """Every column of the source, and what it is used as; None where it is not used."""
        found: dict[str, str | None] = json.loads((self.open().schema.metadata or {})[USES])
        return found

    def num_rows(self) -> int:
        """Rows to train on."""
        return int(self.open().count_rows())

    def keys(self) -> pa.Table:
        """What the order of rows depends on, in the rows' order: KEYS without the negatives', which only masks need."""
        return self.open().to_table(columns=[name for name in KEYS.names if name != "negative_keys"]).combine_chunks()

    def instructions(self) -> dict[str, tuple[str, ...]]:
        """Of the sides query and document, all that rows are told, "" where nothing, in their order; the first 20 where these are more."""
        found: dict[str, dict[str, None]] = {"query": {}, "document": {}}
        for batch in self.open().to_batches(columns=["instruction_q", "instruction_d"]):
            for told, column in zip(found.values(), batch.columns, strict=True):
                if len(told) < MOST_INSTRUCTIONS:
                    told.update(dict.fromkeys(column.unique().to_pylist()))
        return {side: tuple(told)[:MOST_INSTRUCTIONS] for side, told in found.items()}

    def kinds(self) -> dict[str, str]:
        """Kinds of the messages (schemas.pairs.KINDS), and of each the URI of the first row that has one."""
        found: dict[str, str] = {}
        for batch in self.open().to_batches(columns=["kinds", "uri"]):
            if set(pc.unique(batch["kinds"].flatten()).to_pylist()) - set(found):
                for kinds, uri in zip(batch["kinds"].to_pylist(), batch["uri"].to_pylist(), strict=True):
                    for kind in kinds:
                        found.setdefault(kind, uri)
        return found

    def take(self, rows: np.ndarray) -> pa.Table:
        """Rows by number, in the order given; a number may come twice (schema PREPARED)."""
        return self._opened.take(rows.tolist(), columns=PREPARED.names)

    @cached_property
    def _opened(self) -> lance.LanceDataset:
        return self.open()

    def __getstate__(self) -> dict[str, object]:
        # An open data set does not travel.
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}
