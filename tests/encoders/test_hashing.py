"""Hashing: the same everywhere, near for what is alike, never zero, fast."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.encoders.hashing import Hashing, mean_colours
from pipeline.testing import check_encoder
from tests.encoders.models import items_of

RNG = np.random.default_rng(0)


def noise(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_hashing_keeps_the_contract():
    items = items_of(["a cat", None, "", "Zwei Wörter", None, "🙂"], [None, noise(50, 70), None, None, noise(3, 2), None])
    check_encoder(Hashing(), items, again=Hashing())


def test_hashing_gives_the_same_bits_in_another_process():
    """Python's own hash() differs from process to process; a table filled by many must not."""
    code = "from tests.encoders.test_hashing import digest; print(digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert done.stdout == digest() + "\n"


def digest():
    image = np.arange(20 * 30 * 3, dtype=np.uint16).astype(np.uint8).reshape(20, 30, 3)
    return Hashing(dim=16).encode(items_of(["a red cat", None], [None, image])).tobytes().hex()


def test_bits_of_release_one_stay():
    """A table filled by an older release must still be found in by a newer one."""
    assert np.allclose(Hashing(dim=4).encode(items_of(["a red cat"])), [[0.8945, 0.0, 0.0, -0.447]], atol=1e-4)


def test_texts_with_words_in_common_are_near():
    cat, cats, other = Hashing(256).encode(items_of(["A red cat, asleep", "a red cat is sleeping", "stock markets fell"]))
    assert cat @ cats > 0.4 > 0.2 > cat @ other


def test_case_and_punctuation_do_not_count():
    first, second = Hashing().encode(items_of(["A red cat", "a RED -- cat!!"]))
    assert (first == second).all()


def test_a_text_is_hashed_alike_next_to_any_other():
    texts = ["", "a", "a\0b", "\0", "cat dog", "Σίσυφος", "日本語 テキスト", "x" * 5000]
    together = Hashing().encode(items_of(texts))
    assert all((Hashing().encode(items_of([text]))[0] == vector).all() for text, vector in zip(texts, together, strict=True))


def test_mean_colours_are_means():
    image = noise(43, 91)
    rows, columns = np.arange(9) * 43 // 8, np.arange(9) * 91 // 8
    for y in range(8):
        for x in range(8):
            part = image[rows[y] : rows[y + 1], columns[x] : columns[x + 1]].reshape(-1, 3)
            assert np.abs(mean_colours(image)[y, x] - part.mean(axis=0)).max() <= 0.5


def test_prepared_and_full_size_images_get_the_same_vector():
    encoder, image = Hashing(), noise(300, 401)
    full, small = encoder.encode(items_of([None, None], [image, encoder.prepare(image)]))
    assert (full == small).all()


def test_similar_pictures_are_near():
    sky = np.zeros((90, 120, 3), np.uint8)
    sky[:45] = [90, 160, 250]
    darker, red = (sky * 0.9).astype(np.uint8), sky[..., ::-1].copy()
    a, b, c = Hashing().encode(items_of([None] * 3, [sky, darker, red]))
    assert a @ b > 0.95 > a @ c


def test_a_text_beside_an_image_does_not_change_its_vector():
    image = noise(20, 20)
    with_text, without = Hashing().encode(items_of(["a cat", None], [image, image]))
    assert (with_text == without).all()


def test_an_item_with_nothing_to_embed_is_named():
    with pytest.raises(ValueError, match="item-1"):
        Hashing().encode(items_of(["a", None]))


def test_dim_changes_the_fingerprint_and_must_be_sensible():
    assert Hashing(64).fingerprint == Hashing().fingerprint != Hashing(65).fingerprint
    with pytest.raises(ConfigError, match="between 4"):
        Hashing(0)


def test_texts_are_hashed_at_fifty_thousand_a_second():
    items = items_of([f"a short text, number {n}, with a few words" for n in range(20_000)])
    rates = []
    for _ in range(3):
        start = time.process_time()
        Hashing().encode(items)
        rates.append(20_000 / (time.process_time() - start))
    assert max(rates) > 50_000
