"""Tiles of slides: any encoder, with what was done to its pixels before it got them as part of the fingerprint.

The slides job reads `stain`, fits each slide once and normalises every tile by its slide's fit before the encoder gets it, so a table
with normalised tiles and one without are of two encoders, and neither takes the other's vectors for its own.
"""

import numpy as np
import pyarrow as pa

from pipeline.config import ConfigError, nearest
from pipeline.encoders import Encoder
from pipeline.encoders.lineage import fingerprint_of
from pipeline.tiles import PIXELS

STAINS = ("macenko", "reinhard")


class TileEncoder:
    """`encoder` for tiles. Its vectors are those of the inner encoder for the same pixels."""

    def __init__(self, encoder: Encoder, *, stain: str | None = None) -> None:
        """`encoder`: in a job file its own `target` and `args`. `stain`: macenko, reinhard, or null for pixels as they are."""
        if not hasattr(encoder, "fingerprint"):
            raise ConfigError(f"encoder={encoder!r} must name one by target and args: {{target: pipeline.encoders.openclip:OpenClip, args: {{...}}}}")
        if stain is not None and stain not in STAINS:
            raise ConfigError(f"stain={stain!r}{nearest(stain, STAINS)}; it is {', '.join(STAINS)} or null")
        self._inner = encoder
        self.stain = stain
        self._complete()

    def _complete(self) -> None:
        """Take over what the inner encoder has."""
        inner = self._inner
        self.dim = inner.dim
        self.lineage: dict[str, object] = {"encoder": "tile", "of": inner.lineage, "pixels": PIXELS, "stain": _stain_lineage(self.stain)}
        self.fingerprint = fingerprint_of({**self.lineage, "of": inner.fingerprint})
        self.inputs: frozenset[str] = getattr(inner, "inputs", frozenset({"image", "text"}))
        self.tolerance: float = getattr(inner, "tolerance", 1e-4)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The inner encoder's, if it has one."""
        prepare = getattr(self._inner, "prepare", None)
        prepared: np.ndarray = prepare(image) if prepare else image
        return prepared

    def load(self) -> None:
        """Load the inner encoder's weights, if it has some."""
        if hasattr(self._inner, "load"):
            self._inner.load()

    def encode(self, items: pa.Table) -> np.ndarray:
        """Vectors of `items`: (N, dim) float32, norm 1."""
        return self._inner.encode(items)

    def for_queries(self) -> "TileEncoder":
        """With the inner encoder's query side. A picture that is searched with is taken as it is: it belongs to no slide that could be fitted."""
        if not hasattr(self._inner, "for_queries"):
            return self
        side = object.__new__(TileEncoder)
        side._inner, side.stain = self._inner.for_queries(), self.stain
        side._complete()
        side.fingerprint = self.fingerprint
        return side


def _stain_lineage(stain: str | None) -> str | None:
    if stain is None:
        return None
    from pipeline.slides.stain import VARIANTS

    return VARIANTS[stain]  # type: ignore[index]
