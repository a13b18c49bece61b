"""The Encoder protocol: what makes vectors of items. No base class; `pipeline.testing.check_encoder` checks the contract.

An encoder is a class whose constructor is cheap: `dim` and `fingerprint` are known, and weights load at the first
`encode` (or at `load`). So a driver can plan with it, and decode workers can prepare images for it, without weights.

Two methods are optional, and looked for by name:

* `prepare(image) -> image`: one decoded image, uint8 (H, W, 3), to what `encode` wants, uint8 (h, w, 3). It runs in
  many threads, before and away from the model. Without it, `encode` is given the image at full size.
* `for_queries() -> Encoder`: the encoder of the query side, where a model treats queries and documents differently.
  Same dim, same fingerprint: both sides are one space.

An attribute `training`, JSON types, says what run made it; the table of models keeps it beside the lineage.
"""

from typing import Protocol

import numpy as np
import pyarrow as pa


class Encoder(Protocol):
    """Turns items into vectors."""

    @property
    def dim(self) -> int:
        """Length of a vector. Known before weights load."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same item would get another vector. Known before weights load."""

    @property
    def lineage(self) -> dict[str, object]:
        """What the fingerprint is a hash of: weights, preprocessing, pooling, instruction, dtype. JSON types only."""

    def encode(self, items: pa.Table) -> np.ndarray:
        """Vectors of `items` (schema `schemas.items.encoder_schema`): (N, dim) float32, norm 1, in their order.

        A row's vector does not depend on the other rows, within the encoder's `tolerance` (default 1e-4).
        Called from several threads at once.
        """
