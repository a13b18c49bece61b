"""Whether the fast reader may be trusted with a slide: a few stored tiles, beside OpenSlide's where it can be asked."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from pipeline.slides import BadTile, Slide
from pipeline.slides.native import Native
from pipeline.slides.tiff import Stored

COMPARED = 3
"""Stored tiles of level 0 that are compared with OpenSlide's at opening, and one of each other level."""


def compare(slide: Slide, reference: Native, levels: tuple[Stored, ...], comparable: int) -> tuple[int, str | None]:
    """How many stored tiles were compared, and why the fast reader must not be used.

    That is a tile whose pixels are not OpenSlide's, or that only OpenSlide reads; what OpenSlide cannot read either is damaged, and
    says nothing. `comparable`: levels that OpenSlide sees.
    """
    total = 0
    for number, stored in enumerate(levels[:comparable]):
        compared, wanted = 0, COMPARED if number == 0 else 1
        # The corner of a small level only: elsewhere its tiles may begin between whole px of level 0.
        for index in _telling(stored) if number == 0 else [0]:
            same = _same(slide, reference, stored, level=number, index=index)
            if isinstance(same, str):
                return total, same
            compared += same
            total += same
            if compared == wanted:
                break
    return total, None


def _same(slide: Slide, reference: Native, stored: Stored, *, level: int, index: int) -> bool | str:
    """Whether both readers read a stored tile, and the same; if not the same, what the difference is."""
    try:
        theirs = _stored_tile(reference, stored, level=level, index=index)
    except BadTile:
        return False
    try:
        ours = _stored_tile(slide, stored, level=level, index=index)
    except BadTile as bad:
        return f"{bad.detail}, and OpenSlide reads it"
    return (
        np.array_equal(ours, theirs)
        or f"tile {index % stored.across}, {index // stored.across} of level {level} does not decode to OpenSlide's pixels"
    )


def _stored_tile(slide: Slide, stored: Stored, *, level: int, index: int) -> np.ndarray:
    place = (index % stored.across * stored.tile_width, index // stored.across * stored.tile_height)
    return slide.read(place, level=level, size=(stored.tile_width, stored.tile_height))


def refusal(slide: Slide, stored: Stored) -> str | None:
    """What the fast reader cannot read of the tiles of level 0 by which it is judged, so that OpenSlide must be asked; None if it reads them."""
    try:
        for index in islice(_telling(stored), COMPARED):
            _stored_tile(slide, stored, level=0, index=index)
    except BadTile as bad:
        return bad.detail
    return None


def _telling(stored: Stored) -> Iterator[int]:
    """Tiles worth comparing: the largest in bytes (tissue), the last (cut by the edge), then down by size, ten in all."""
    by_bytes = np.argsort(-stored.lengths, kind="stable")
    yield int(by_bytes[0])
    yield len(stored.lengths) - 1
    yield from (int(index) for index in by_bytes[1:9])
