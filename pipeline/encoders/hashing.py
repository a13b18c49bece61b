"""Hashing: an encoder without weights, for tests, for trying out a job, and as the floor that a model has to beat.

Texts with words and letters in common get near vectors, and so do pictures with like colours in like places. Nothing
relates a text to a picture. The arithmetic is in integers up to the last step: equal vectors on every machine.
"""

import hashlib
import re

import numpy as np
import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.encoders.inputs import inputs_of
from pipeline.encoders.lineage import fingerprint_of

GRID = 8
"""An image is seen as 8 x 8 mean colours."""
WORD_WEIGHT = 2
"""A word counts as much as two of the letter triples in it."""
_SLICE = 4096  # texts hashed at once: bounds the memory


class Hashing:
    """Signed feature hashing (Weinberger et al. 2009, arXiv:0902.2206) of texts, random projection of images."""

    tolerance = 1e-6

    def __init__(self, dim: int = 64) -> None:
        if not 4 <= dim <= 65_536:
            raise ConfigError(f"dim={dim} must lie between 4 and 65536")
        self.dim = dim
        self.lineage: dict[str, object] = {
            "encoder": "hashing",
            "dim": dim,
            "text": f"words x {WORD_WEIGHT} and letter triples, version 1",
            "image": f"{GRID} x {GRID} mean colours, projected, version 1",
        }
        self.fingerprint = fingerprint_of(self.lineage)
        self._projection_FD = _projection(GRID * GRID * 3 + 1, dim)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Mean colours of the image's 8 x 8 parts, uint8 (8, 8, 3)."""
        return mean_colours(image)

    def encode(self, items: pa.Table) -> np.ndarray:
        """Vectors of the images, and of the texts of items without one: (N, dim) float32, norm 1."""
        inputs = inputs_of(items)
        return inputs.merge(self._encode_images(inputs.images), self._encode_texts(inputs.texts))

    def _encode_images(self, images: list[np.ndarray]) -> np.ndarray:
        if not images:
            return np.zeros((0, self.dim), np.float32)
        grids = np.stack([self.prepare(image) for image in images]).reshape(len(images), -1).astype(np.int64)
        # Around mid-grey, or all pictures would point the same way; the last column keeps a mid-grey picture from being zero.
        centred = np.concatenate([grids - 128, np.ones((len(images), 1), np.int64)], axis=1)
        return _unit(centred @ self._projection_FD)

    def _encode_texts(self, texts: list[str]) -> np.ndarray:
        parts = [_text_counts(texts[start : start + _SLICE], self.dim) for start in range(0, len(texts), _SLICE)]
        return _unit(np.concatenate(parts)) if parts else np.zeros((0, self.dim), np.float32)


def mean_colours(image: np.ndarray) -> np.ndarray:
    """Area means of an image cut into 8 x 8 parts: uint8 (H, W, 3) to uint8 (8, 8, 3); a smaller image is repeated first."""
    for axis in (0, 1):
        if image.shape[axis] < GRID:
            image = np.take(image, np.arange(GRID) * image.shape[axis] // GRID, axis=axis)
    rows = np.arange(GRID + 1) * image.shape[0] // GRID
    columns = np.arange(GRID + 1) * image.shape[1] // GRID
    sums = np.add.reduceat(np.add.reduceat(image, rows[:-1], axis=0, dtype=np.uint32), columns[:-1], axis=1)
    areas = np.outer(np.diff(rows), np.diff(columns))[..., None]
    means: np.ndarray = (sums + areas // 2) // areas
    return means.astype(np.uint8)


def _projection(num_features: int, dim: int) -> np.ndarray:
    """A matrix of random odd integers from -255 to 255, the same everywhere (numpy's generators may change)."""
    stream = hashlib.shake_256(b"tessera.hashing.projection").digest(num_features * dim)
    return np.frombuffer(stream, np.uint8).astype(np.int64).reshape(num_features, dim) * 2 - 255


def _text_counts(texts: list[str], dim: int) -> np.ndarray:
    """Signed counts of hashed words and letter triples, float64 (N, dim); never a zero row."""
    # All texts as one row of code points: a space around each word, a zero after each text.
    joined = "\0".join(text.replace("\0", " ") for text in texts).lower()
    joined = re.sub(r"[^\w\0]+", " ", joined).replace("\0", " \0 ")
    points = np.frombuffer(f" {joined} \0".encode("utf-32-le"), np.uint32).astype(np.uint64)
    is_letter = points > ord(" ")
    row_of = np.cumsum(points == 0)
    triples = (points[:-2] | points[1:-1] << np.uint64(21) | points[2:] << np.uint64(42))[is_letter[1:-1]]
    words, row_of_word = _words(points[is_letter], is_letter, row_of)

    counts = np.zeros(len(texts) * dim)
    for features, rows, weight in ((triples, row_of[is_letter], 1), (words, row_of_word, WORD_WEIGHT)):
        hashes = _mix(features)
        signs = (hashes >> np.uint64(63)).astype(np.float64) * 2 - 1
        buckets = rows * dim + (hashes % np.uint64(dim)).astype(np.int64)
        counts += np.bincount(buckets, signs * weight, minlength=len(counts))
    counts_ND = counts.reshape(len(texts), dim)
    counts_ND[:, 0] += 2.0**-10  # counts are whole numbers, so no sum of them can undo this
    return counts_ND


def _words(letters: np.ndarray, is_letter: np.ndarray, row_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each word, made of its letters and their places in it, and the row the word is in."""
    begins = is_letter & ~np.concatenate([[False], is_letter[:-1]])
    starts = np.flatnonzero(begins[is_letter])
    if len(starts) == 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    places = np.arange(len(letters)) - np.repeat(starts, np.diff(starts, append=len(letters)))
    return np.add.reduceat(_mix(letters | places.astype(np.uint64) << np.uint64(32)), starts), row_of[begins]


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014, OOPSLA): every bit of a value changes half the bits of its hash."""
    with np.errstate(over="ignore"):
        values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        values ^= values >> np.uint64(31)
    return values


def _unit(sums: np.ndarray) -> np.ndarray:
    vectors: np.ndarray = sums / np.sqrt((sums.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    return vectors.astype(np.float32)
