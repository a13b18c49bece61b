"""Where training pairs come from: the PairReader protocol, one module a format. What a reader yields is prepared once (`pairs.prepare`).

A pair reader is to PAIR rows what `pipeline.readers.Reader` is to items, and is named in the job file the same way,
`target: package.module:Name`. It says what the source says and no more: what the source leaves open (task, instructions,
in-batch negatives) stays null, and what is wrong with a row is told in the row. No base class; it pickles.
"""

from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa


class PairReader(Protocol):
    """Lists containers of pairs, and reads PAIR rows from them."""

    @property
    def source(self) -> str:
        """Where the rows come from, for people: a folder, a file, a table."""

    def list(self) -> pa.Table:
        """The containers (schema LISTING, `id` null). Raises ConfigError if there is nothing, or a column is missing or not accounted for."""

    def uses(self) -> dict[str, str | None]:
        """Every column of the source, and what it is used as: a field of PAIR, or None where it is not used. Known after `list`."""

    def split(self, units: pa.Table) -> pa.Table:
        """Slices (schema SLICE) that cover `units` once; the same for the same unit and version."""

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """The rows (schema PAIR, then `reject_reason` and `reject_detail`) of some rows of `split`, in order.

        `reject_reason` is null, or a key of schemas.pairs.REASONS; of a rejected row only `row_id` and `uri` mean something.
        """
