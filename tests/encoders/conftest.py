"""Real photographs for the encoders' tests."""

import csv

import pytest

from pipeline.media import Limits, decode
from tests.encoders.models import items_of


@pytest.fixture(scope="session")
def photos(assets):
    """The 37 photographs with their titles: rows of captions.csv, decoded images."""
    with (assets / "photos" / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, [decode((assets / "photos" / row["filepath"]).read_bytes(), Limits()) for row in rows]


@pytest.fixture(scope="session")
def mixed_items(photos):
    """Three items with an image, three with a text, of several sizes and lengths."""
    _, images = photos
    texts = [None] * 3 + ["a cat", "two words and then some more of them, " * 4, "Ünïcode: 日本語 🙂"]
    return items_of(texts, [images[0], images[23], images[34], None, None, None])
