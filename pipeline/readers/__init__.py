"""The Reader protocol: where items come from. No base class; `pipeline.testing.check_reader` checks the contract.

A reader is built on the driver, lists there, and reads on workers (it is pickled on the way, so it holds settings and
no open files). Two kinds, told apart by what `list` returns: files that are one item each (`id` is given), and
containers of many items (`id` is null), which also need `split`.

Optional, and looked for by name, for containers whose images are not encoded files of their own (a slide's tiles):

* `pixels(row) -> (image, columns)`: the image of one row that `read` gave (as a dict): uint8 (H, W, 3), and values for some of the
  metadata columns that are known only now. Called from many threads, under the watchdog, so `read` must not read pixels.
  Raises BadItem for the row, UnitChanged for the container.
* `hold(work, alive) -> context`: called before a chunk is read; while the context is open, what its items lie in is at hand on this machine.
  Bringing it there may take as long as it likes, if it calls `alive()` whenever it gets on. Raises UnitChanged.
* `may_be_empty`: whether it is no mistake if there is nothing to list.
* `confirm(work)`: called when all of a chunk has been embedded. Raises UnitChanged if its container was replaced meanwhile.
"""

from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa


class UnitChanged(Exception):
    """A container is not any more what was listed, or cannot be read any more: no part of it may be committed. The others go on."""


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
