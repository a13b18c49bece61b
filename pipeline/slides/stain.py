"""Stain normalisation, fitted once for a slide and applied to its tiles: Macenko's, and Reinhard's in CIE LAB.

Fitting a tile by itself swings with what is on it and fails where little is; a slide's overview is fitted instead, and a slide that cannot
be says why. What is fitted is a small frozen value that is stored with the slide and is part of what its vectors depend on.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from pipeline.slides.opencv import cv2

Method = Literal["macenko", "reinhard"]
VARIANTS = {
    "macenko": "Macenko 2009 on the slide's overview, 8 um/px: density against the glass, beta 0.15, percentiles 1 and 99, to white 240, version 1",
    "reinhard": "Reinhard 2001 in 8-bit CIE LAB, mean and deviation of the tissue in the slide's overview, 8 um/px, version 1",
}
"""What exactly each method is here; results of other programs' variants are not the same."""

REFERENCE = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
"""Density (red, green, blue) of unit haematoxylin and eosin: the columns that Macenko's authors published, and everyone uses."""
REFERENCE_C99 = (1.9705, 1.0308)
UNMIX = np.linalg.pinv(REFERENCE)
"""(2, 3): density to concentrations of the reference stains."""
REFERENCE_WHITE = 240
REFERENCE_LAB = ((142.6, 151.9, 117.4), (45.7, 10.7, 5.6))
"""Mean and deviation of L, a, b, in OpenCV's 8 bits, of the tissue of OpenSlide's CMU-1-Small-Region at 8 um/px."""

BETA = 0.15
LEAST_PX = 100
LEAST_C99 = 0.05
LEAST_ANGLE = 10.0
MOST_NOISE = 0.9
"""Third variance by the second: above it, the plane of two stains is not to be told from noise."""
LEAST_DEVIATION = 1.0


class NoFit(Exception):
    """A slide whose stain cannot be fitted: why. Its tiles stay as they are."""


def density(white: int) -> np.ndarray:
    """Optical density of each 8-bit level, -ln((I + 1) / white): float64 (256,). Below 0 for what is brighter than the glass."""
    levels: np.ndarray = -np.log((np.arange(256) + 1) / white)
    return levels


@dataclass(frozen=True)
class Macenko:
    """One slide's stains."""

    haematoxylin: tuple[float, float, float]
    """Unit density vector, red, green, blue."""
    eosin: tuple[float, float, float]
    c99: tuple[float, float]
    """99th percentile of each concentration."""
    white: tuple[int, int, int]

    @cached_property
    def _change(self) -> tuple[np.ndarray, np.ndarray]:
        """Density by level and channel, float32 (1, 256, 3), and the matrix from a slide's density to the reference's, negative."""
        table = np.stack([density(level) for level in self.white], axis=-1)[None].astype(np.float32)
        unmix = np.linalg.pinv(np.array([self.haematoxylin, self.eosin]).T)
        scale = np.array(REFERENCE_C99) / self.c99
        return table, -(REFERENCE * scale @ unmix).astype(np.float32)

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """A tile, uint8 (H, W, 3), as if stained and lit as the reference is."""
        table, matrix = self._change
        changed: np.ndarray = cv2.convertScaleAbs(cv2.exp(cv2.transform(cv2.LUT(rgb, table), matrix)), alpha=REFERENCE_WHITE)
        return changed


@dataclass(frozen=True)
class Reinhard:
    """One slide's colours: mean and deviation of L, a and b over its tissue."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @cached_property
    def _table(self) -> np.ndarray:
        """The new level of each level of each channel: uint8 (1, 256, 3)."""
        mean, deviation = (np.array(values) for values in REFERENCE_LAB)
        levels = (np.arange(256)[:, None] - self.mean) * (deviation / self.deviation) + mean
        table: np.ndarray = levels.round().clip(0, 255).astype(np.uint8)[None]
        return table

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """A tile, uint8 (H, W, 3), with the reference's mean and deviation. Glass changes with it: use Macenko where that matters."""
        changed: np.ndarray = cv2.cvtColor(cv2.LUT(cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB), self._table), cv2.COLOR_LAB2RGB)
        return changed


Stain = Macenko | Reinhard


def fit_stain(method: Method, rgb: np.ndarray, *, tissue: np.ndarray, white: tuple[int, int, int]) -> Stain:
    """The stain of a slide from its overview, uint8 (H, W, 3), where `tissue`, bool (H, W), is true. Raises NoFit."""
    pixels = rgb[tissue]
    if len(pixels) < LEAST_PX:
        raise NoFit(f"{len(pixels)} px of tissue in the overview, fewer than {LEAST_PX}")
    return _macenko(pixels, white) if method == "macenko" else _reinhard(pixels)


def _macenko(pixels: np.ndarray, white: tuple[int, int, int]) -> Macenko:
    """Macenko et al., ISBI 2009: the two stains are the extreme directions of density in the plane that holds most of it."""
    densities = np.stack([density(level)[pixels[:, channel]] for channel, level in enumerate(white)], axis=-1)
    stained = densities[(densities > BETA).all(axis=1)]
    if len(stained) < LEAST_PX:
        raise NoFit(f"{len(stained)} px are stained in every channel, fewer than {LEAST_PX}")
    vectors = _extremes(stained)
    angle = np.degrees(np.arccos(np.clip(vectors[:, 0] @ vectors[:, 1], -1, 1)))
    if angle < LEAST_ANGLE:
        raise NoFit(f"the two stains are {angle:.1f} degrees apart, less than {LEAST_ANGLE:g}: one stain only")
    if vectors[2, 1] > vectors[1, 1]:
        raise NoFit("the second stain takes more blue than green: it is brown, such as DAB, not eosin")
    c99 = np.percentile(np.linalg.pinv(vectors) @ stained.T, 99, axis=1)
    if c99.min() < LEAST_C99:
        raise NoFit(f"a stain is hardly there: its 99th percentile is {c99.min():.3f}, less than {LEAST_C99}")
    haematoxylin, eosin = (tuple(float(v) for v in column.round(6)) for column in vectors.T)
    return Macenko(haematoxylin, eosin, (round(float(c99[0]), 6), round(float(c99[1]), 6)), white)  # type: ignore[arg-type]


def _extremes(stained: np.ndarray) -> np.ndarray:
    """Unit vectors (3, 2) of haematoxylin, the one that takes more red, and of the other stain."""
    variances, axes = np.linalg.eigh(np.cov(stained.T))
    if variances[0] > MOST_NOISE * variances[1]:
        raise NoFit("its colours do not lie in a plane: no two stains can be told apart")
    plane = axes[:, [2, 1]]
    plane = plane * np.where(plane[0] < 0, -1, 1)
    projected = stained @ plane
    low, high = np.percentile(np.arctan2(projected[:, 1], projected[:, 0]), [1, 99])
    vectors: np.ndarray = plane @ np.array([[np.cos(low), np.cos(high)], [np.sin(low), np.sin(high)]])
    return vectors[:, ::-1] if vectors[0, 0] < vectors[0, 1] else vectors


def _reinhard(pixels: np.ndarray) -> Reinhard:
    """Reinhard et al., IEEE CG&A 2001, in CIE LAB and over tissue alone."""
    lab = cv2.cvtColor(pixels[None], cv2.COLOR_RGB2LAB)[0].astype(np.float64)
    mean, deviation = lab.mean(axis=0).round(4), lab.std(axis=0).round(4)
    if deviation.min() < LEAST_DEVIATION:
        raise NoFit(f"its tissue has hardly any contrast: a deviation of {deviation.min():.2f} of 255, less than {LEAST_DEVIATION:g}")
    return Reinhard(tuple(mean.tolist()), tuple(deviation.tolist()))


def to_json(stain: Stain) -> str:
    """As it is stored in the slide's row."""
    return json.dumps({"method": type(stain).__name__.lower(), **asdict(stain)})


def from_json(text: str) -> Stain:
    """The stain that `to_json` wrote."""
    values = json.loads(text)
    kind = {"macenko": Macenko, "reinhard": Reinhard}[values.pop("method")]
    stain: Stain = kind(**{name: tuple(value) for name, value in values.items()})
    return stain
