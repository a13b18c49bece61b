"""What decides the vector of a message beside the weights: sections of a job file, and of a saved encoder."""

from typing import Literal

import pydantic

from pipeline.config import Model

Pooling = Literal["last", "mean", "cls", "weightedmean"]


class Prompt(Model):
    """What is put around a message."""

    template: str = "plain"
    """Name of a template in `pipeline.vlm.templates`, or a text of your own with {instruction} and {input}."""
    instruction: str | None = None
    """For documents; null for the template's own."""
    query_instruction: str | None = None
    """For queries; null for the same as documents get."""


class Sizes(Model):
    """How much of an image, and of a text, is read."""

    min_pixels: pydantic.PositiveInt | None = None
    """Smaller images are enlarged to it (width times height; the Qwen family); null for the model's own."""
    max_pixels: pydantic.PositiveInt | None = None
    """Larger images are reduced to it (width times height; the Qwen family); null for the model's own."""
    tiles: bool | None = None
    """Cut large images into tiles (Idefics3, SmolVLM): more tokens, finer detail; null for the model's own."""
    max_tokens: pydantic.PositiveInt = 8192
    """Longest row, images included. Text beyond it is cut; an image never is."""


class Reading(Model):
    """How a vector is read from the hidden states."""

    pooling: Pooling = "last"
    """Which tokens' states: the last one, the first (cls), all by their mean, or by a mean that grows along the row."""
    layer: pydantic.PositiveInt | None = None
    """The layer that is read, counted from 1; deeper ones are not computed. Null for the last."""
    width: pydantic.PositiveInt | None = None
    """So many numbers of the vector are kept, scaled to norm 1 again (Matryoshka). Null for all."""
    bidirectional: bool = False
    """Let every token see every other one, where the model was trained causally."""
    prepending: tuple[int, int] | None = None
    """Token Prepending (arXiv 2412.11556) before the layers from the first to below the second number, counted from 0."""
