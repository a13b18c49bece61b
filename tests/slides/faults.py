"""Maskers and encoders with faults, named by slides tests in their jobs."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.encoders.hashing import Hashing
from pipeline.slides.tissue import Saturation

DEADLY_PX = 32
"""Height of the overview of a slide that a masker's fault waits for, px."""


class Deadly(Saturation):
    """Saturation, which kills or hangs its worker on a slide whose overview is `DEADLY_PX` high, or raises there."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def __call__(self, rgb: np.ndarray, *, um_per_px: float) -> np.ndarray:
        if len(rgb) == DEADLY_PX:
            if self.how == "raise":
                raise ValueError("told to raise")
            if self.how == "hang":
                time.sleep(3600)
            os.kill(os.getpid(), signal.SIGKILL)
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
