"""A slide whose pyramid is in memory: real pixels without a file, and damage where a test wants it."""

import cv2
import numpy as np

from pipeline.slides import BadTile, Level, SlideInfo
from pipeline.slides.cutting import Overview, on_white


class ArraySlide:
    """`image`: RGB or RGBA of level 0. `bad`: (level, x, y) px of a level that cannot be read."""

    def __init__(self, image, *, mpp=0.5, downsamples=(1, 4), bad=()):
        if image.shape[2] == 3:
            image = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
        height, width = image.shape[:2]
        self.pyramid = [cv2.resize(image, (-(-width // d), -(-height // d)), interpolation=cv2.INTER_AREA) for d in downsamples]
        self.bad = bad
        levels = [Level(p.shape[1], p.shape[0], (width / p.shape[1] + height / p.shape[0]) / 2) for p in self.pyramid]
        self.info = SlideInfo(
            "array", width, height, tuple(levels), mpp, mpp, "user", (), None, None, None, None, None, icc=False, content_fp="0", reader="array"
        )

    def read(self, place, *, level, size):
        x, y = (round(at / self.info.levels[level].downsample) for at in place)
        if any(at == level and x <= left < x + size[0] and y <= top < y + size[1] for at, left, top in self.bad):
            raise BadTile(f"damaged at level {level}")
        found = np.zeros((size[1], size[0], 4), np.uint8)
        part = self.pyramid[level][y : y + size[1], x : x + size[0]]
        found[: part.shape[0], : part.shape[1]] = part
        return found

    def read_rgb(self, place, *, level, size, white):
        return on_white(self.read(place, level=level, size=size), white)

    def close(self):
        pass


def overview_of(rgb, *, mpp=0.5, outside=None, unread=None):
    """An overview at 8 um/px of a slide of `mpp`."""
    nothing = np.zeros(rgb.shape[:2], bool)
    size = (round(rgb.shape[1] * 8 / mpp), round(rgb.shape[0] * 8 / mpp))
    return Overview(rgb, nothing if outside is None else outside, nothing if unread is None else unread, 8.0, size)
