"""What can be told of a tile from its own pixels: sharpness, white, black, grey, ink, stain. Columns to filter by; nothing is dropped.

About half a millisecond of a core for a 256 px tile.
"""

import numpy as np

from pipeline.slides.cutting import OVERVIEW_UM, WHITE, resized
from pipeline.slides.opencv import cv2
from pipeline.slides.stain import UNMIX, density
from pipeline.slides.tissue import VOID, inks

SHARPNESS_MPP = 0.5
"""Microns per px at which sharpness is measured. At 2 um/px even a tile blurred by 2 um passes hs2p's threshold of 50."""
MPP_TOLERANCE = 0.01
WHITE_ABOVE = 220
GREY_BELOW = 0.05


def quality(rgb: np.ndarray, *, mpp: float, white: tuple[int, int, int] = WHITE) -> dict[str, float | None]:
    """The columns of `schemas.slides.QUALITY` for one tile, uint8 (P, P, 3), of `mpp` microns per px on glass of colour `white`.

    Sharpness is null where the tile is coarser than SHARPNESS_MPP: it cannot be known there.
    """
    _, saturation, value = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    channels = cv2.split(rgb)
    lowest = cv2.min(cv2.min(channels[0], channels[1]), channels[2])
    # Optical density is a function of the level alone, and concentrations are linear in it: histograms give their means exactly.
    densities = np.array([_counts(channel) @ density(level) for channel, level in zip(channels, white, strict=True)]) / grey.size
    haematoxylin, eosin = UNMIX @ densities
    saturations = _counts(saturation)
    lapvar, lapvar_norm = _sharpness(grey, mpp)
    return {
        "lapvar": lapvar,
        "lapvar_norm": lapvar_norm,
        "white_frac": float(_counts(lowest)[WHITE_ABOVE + 1 :].sum()) / grey.size,
        "black_frac": float(_counts(value)[:VOID].sum()) / grey.size,
        "grey_frac": float(saturations[: int(np.ceil(GREY_BELOW * 255))].sum()) / grey.size,
        "pen_frac": _pen_fraction(rgb, mpp),
        "sat_mean": float(saturations @ np.arange(256)) / 255 / grey.size,
        "od_mean": float(densities.mean()),
        "h_mean": float(haematoxylin),
        "e_mean": float(eosin),
        "entropy": _entropy(_counts(grey) / grey.size),
    }


def _counts(channel: np.ndarray) -> np.ndarray:
    """How often each level occurs: float64 (256,)."""
    counts: np.ndarray = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.float64)
    return counts


def _sharpness(grey: np.ndarray, mpp: float) -> tuple[float | None, float | None]:
    """Variance of the Laplacian at SHARPNESS_MPP, and that over the variance of grey."""
    if mpp > SHARPNESS_MPP * (1 + MPP_TOLERANCE):
        return None, None
    if mpp < SHARPNESS_MPP * (1 - MPP_TOLERANCE):
        side = tuple(max(3, round(px * mpp / SHARPNESS_MPP)) for px in (grey.shape[1], grey.shape[0]))
        grey = resized(grey, (side[0], side[1]))
    lapvar = _variance(cv2.Laplacian(grey, cv2.CV_16S, ksize=1))
    return lapvar, lapvar / (_variance(grey) + 1)


def _variance(image: np.ndarray) -> float:
    return float(cv2.meanStdDev(image)[1][0, 0]) ** 2


def _pen_fraction(rgb: np.ndarray, mpp: float) -> float:
    """Share in the colours of ink, seen at the scale at which those were measured: nuclei and debris are single px, strokes are not."""
    factor = min(1.0, mpp / OVERVIEW_UM)
    small = resized(rgb, (max(1, round(rgb.shape[1] * factor)), max(1, round(rgb.shape[0] * factor))))
    found = np.zeros(small.shape[:2], bool)
    for ink in inks(small):
        if not ink.weak():
            found |= ink.stroke
    return float(found.mean())


def _entropy(shares: np.ndarray) -> float:
    """Shannon entropy in bits."""
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())
