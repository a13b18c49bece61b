"""Which part of an item is embedded: its image or its text."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.media import from_pixels

Of = Literal["auto", "image", "text"]


@dataclass(frozen=True)
class Inputs:
    """The items of one table, apart: rows with an image to embed, and rows with a text to embed."""

    image_rows: list[int]
    images: list[np.ndarray]
    text_rows: list[int]
    texts: list[str]

    def merge(self, image_vectors: np.ndarray, text_vectors: np.ndarray) -> np.ndarray:
        """The vectors of both kinds, in the order of the items."""
        vectors = np.empty((len(self.image_rows) + len(self.text_rows), image_vectors.shape[1]), np.float32)
        vectors[self.image_rows] = image_vectors
        vectors[self.text_rows] = text_vectors
        return vectors


def check_of(of: str) -> None:
    """Raises ConfigError unless `of` is auto, image or text."""
    if of not in ("auto", "image", "text"):
        raise ConfigError(f"of={of!r} must be 'auto' (the image of an item, else its text), 'image' or 'text'")


def inputs_of(items: pa.Table, of: Of = "auto") -> Inputs:
    """`items` (schema `schemas.items.encoder_schema`) by what is embedded of each: with "auto" the image, else the text.

    Raises ValueError naming the first item that has nothing of the kind.
    """
    images = from_pixels(items["image"]) if of != "text" else [None] * items.num_rows
    texts: list[str | None] = items["text"].to_pylist() if of != "image" else [None] * items.num_rows
    with_image = [row for row, image in enumerate(images) if image is not None]
    with_text = [row for row, image in enumerate(images) if image is None]
    for row in with_text:
        if texts[row] is None:
            wanted = {"auto": "neither an image nor a text", "image": "no image", "text": "no text"}[of]
            raise ValueError(f"item {items['id'][row].as_py()!r} has {wanted} to embed")
    return Inputs(
        image_rows=with_image,
        images=[image for image in images if image is not None],
        text_rows=with_text,
        texts=[text for row in with_text if (text := texts[row]) is not None],
    )
