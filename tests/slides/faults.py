"""Maskers and encoders with faults, named by slides tests in their jobs."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.encoders.hashing import Hashing
from pipeline.slides.ledger import forget_slides
from pipeline.slides.tissue import Saturation
from pipeline.table.at import TableAt


class Deadly(Saturation):
    """Saturation with faults that are ordered by the width of the overview, px."""

    def __init__(self, kills: int, hangs: int, raises: int):
        super().__init__()
        self.kills, self.hangs, self.raises = kills, hangs, raises

    def __call__(self, rgb: np.ndarray, *, um_per_px: float) -> np.ndarray:
        width = rgb.shape[1]
        if width == self.raises:
            raise ValueError("told to raise")
        if width == self.hangs:
            time.sleep(3600)
        if width == self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rgb, um_per_px=um_per_px)


class Short(Saturation):
    """Saturation for which memory is too short while the file `order` is there, which it then removes."""

    def __init__(self, order: str):
        super().__init__()
        self.order = Path(order)

    def __call__(self, rgb: np.ndarray, *, um_per_px: float) -> np.ndarray:
        if self.order.exists():
            self.order.unlink()
            raise MemoryError("for a moment")
        return super().__call__(rgb, um_per_px=um_per_px)


class Replaces(Hashing):
    """Hashing that puts the file `by` in the place of `file` when it encodes for the first time."""

    def __init__(self, dim: int = 16, file: str = "", by: str = ""):
        super().__init__(dim=dim)
        self.file, self.by = file, by

    def encode(self, items: pa.Table) -> np.ndarray:
        if Path(self.by).exists():
            os.replace(self.by, self.file)
        return super().encode(items)


class Forgets(Hashing):
    """Hashing that removes the row of the slide `uri` from the slides table beside `table` when it encodes and the file `order` is there."""

    def __init__(self, dim: int = 16, order: str = "", uri: str = "", table: str = ""):
        super().__init__(dim=dim)
        self.order, self.uri, self.table = Path(order), uri, table

    def encode(self, items: pa.Table) -> np.ndarray:
        if self.order.exists():
            self.order.unlink()
            forget_slides(TableAt(uri=self.table, name="t"), [self.uri])
        return super().encode(items)
