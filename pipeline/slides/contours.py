"""Outlines of a mask as polygons, and as GeoJSON that QuPath opens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.slides.opencv import cv2

SMOOTH_PX = 0.5
"""How far, in px of the mask, an outline may run from the px edges: steps become slopes, and a slide's outline some kB."""


@dataclass(frozen=True)
class Polygon:
    """One connected part: rings of (x, y), float64 (N, 2), not repeating the first point; px of level 0."""

    exterior: np.ndarray
    holes: tuple[np.ndarray, ...]


def polygons(mask: np.ndarray, *, size: tuple[int, int]) -> list[Polygon]:
    """The parts of a mask that spans a slide of `size` (width, height), largest first."""
    if not mask.any():
        return []
    rings, tree = cv2.findContours(_lattice(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    scale = np.array([size[0] / mask.shape[1], size[1] / mask.shape[0]]) / 2
    drawn = [_smoothed(ring) * scale for ring in rings]
    holes: dict[int, list[np.ndarray]] = {}
    for ring, (_, _, _, parent) in zip(drawn, tree[0], strict=True):
        if parent >= 0 and len(ring) > 2:
            holes.setdefault(parent, []).append(ring)
    found = [Polygon(ring, tuple(holes.get(i, ()))) for i, ring in enumerate(drawn) if tree[0][i][3] < 0 and len(ring) > 2]
    return sorted(found, key=lambda part: -cv2.contourArea(part.exterior.astype(np.float32)))


def _lattice(mask: np.ndarray) -> np.ndarray:
    """Each px as 3 x 3 of a lattice twice as fine, sharing borders: OpenCV runs through the middle of border px, so here along px edges."""
    height, width = mask.shape
    lattice = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    lattice[1::2, 1::2] = mask
    widened: np.ndarray = cv2.dilate(lattice, np.ones((3, 3), np.uint8))
    return widened


def _smoothed(ring: np.ndarray) -> np.ndarray:
    smooth: np.ndarray = cv2.approxPolyDP(ring, 2 * SMOOTH_PX, closed=True)[:, 0].astype(np.float64)
    return smooth


def geojson(parts: Sequence[Polygon], *, name: str = "Tissue") -> str:
    """A FeatureCollection of annotations as QuPath reads it, px of level 0 of the full image."""
    return _collection([_feature(part, name) for part in parts])


def _collection(features: Sequence[dict[str, Any]]) -> str:
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":"))


def _feature(part: Polygon, name: str) -> dict[str, Any]:
    # GeoJSON, RFC 7946 3.1.6: a ring ends where it began.
    rings = [np.concatenate([ring, ring[:1]]).round(1).tolist() for ring in (part.exterior, *part.holes)]
    properties = {"objectType": "annotation", "classification": {"name": name, "color": [47, 111, 94]}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}, "properties": properties}


def for_qupath(contour: str, bounds: Sequence[int] | None) -> str:
    """The GeoJSON of a slide's row, counted as QuPath counts: from the corner of the scanned part, where a format has one."""
    if not bounds:
        return contour
    features = json.loads(contour)["features"]
    for feature in features:
        rings = feature["geometry"]["coordinates"]
        feature["geometry"]["coordinates"] = [(np.array(ring) - bounds[:2]).round(1).tolist() for ring in rings]
    return _collection(features)
