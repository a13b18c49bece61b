"""The Reader protocol: where items come from. No base class; `pipeline.testing.check_reader` checks the contract.

A reader is built on the driver, lists there, and reads on workers (it is pickled on the way, so it holds settings and
no open files). Two kinds, told apart by what `list` returns: files that are one item each (`id` is given), and
containers of many items (`id` is null), which also need `split`.
"""

from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa


class Reader(Protocol):
    """Lists units, and reads items from them."""

    @property
    def source(self) -> str:
        """Name of the source, the same on every run: vanished items are looked for among the rows of this source."""

    @property
    def metadata(self) -> pa.Schema:
        """The columns carried along beside ITEM's; empty if none. Known after `list`."""

    def list(self) -> pa.Table:
        """Every unit there is (schema LISTING). Raises ConfigError if there is nothing, or it cannot be reached."""

    def split(self, units: pa.Table) -> pa.Table:
        """Slices (schema SLICE) that cover `units` once. Only for containers; the same for the same unit and version."""

    def read(self, work: pa.Table) -> Iterator[pa.Table]:
        """The items (ITEM + metadata) of some rows of `list` (files) or of `split` (containers), in order.

        An item that cannot be read is yielded with `reject_reason` and `reject_detail` set: two more string columns,
        which may be absent when there is nothing to reject.
        """
