"""check_encoder finds each way in which an encoder can break its contract."""

import numpy as np
import pytest

from pipeline.encoders.hashing import Hashing
from pipeline.testing import check_encoder
from tests.encoders.models import items_of

RNG = np.random.default_rng(0)
ITEMS = items_of(["a cat", "a dog", None, "something else"], [None, None, RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8), None])


class Broken(Hashing):
    """An encoder with one fault: `fault` changes the vectors of a whole batch."""

    def __init__(self, fault=lambda vectors: vectors):
        super().__init__()
        self.fault = fault

    def encode(self, items):
        return self.fault(super().encode(items))


def test_an_encoder_that_keeps_the_contract_passes():
    check_encoder(Broken(), ITEMS, again=Broken())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda v: v * 2, "norm 1"),
        (lambda v: v.astype(np.float64), "float32"),
        (lambda v: v[:, :-1], "shape"),
        (lambda v: v.tolist(), "numpy array"),
        (lambda v: np.where(v > 0.2, np.nan, v), "NaN"),
        (lambda v: v[np.lexsort(v.T)], "order"),
        (lambda v: np.roll(v, 1, axis=0), "order|alone"),
        (lambda v: v if len(v) < 2 else -v, "alone"),
    ],
)
def test_wrong_vectors_are_found(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_encoder(Broken(fault), ITEMS)


def test_state_shared_between_threads_is_found():
    class Shared(Hashing):
        def encode(self, items):
            import time

            self.items = items
            for _ in range(5):
                time.sleep(0.002)
                self.items = self.items.slice(0, self.items.num_rows - 1)
            return super().encode(items.slice(0, self.items.num_rows + 5))

    with pytest.raises(AssertionError, match="threads"):
        check_encoder(Shared(), items_of([f"text {n}" for n in range(40)]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fingerprint", "", "fingerprint"),
        ("lineage", {"weights": object()}, "JSON"),
        ("dim", 0, "dim"),
        ("prepare", lambda image: image / 255, "uint8"),
        ("for_queries", lambda: Hashing(32), "one space"),
    ],
)
def test_wrong_attributes_are_found(name, value, message):
    encoder = Broken()
    setattr(encoder, name, value)
    with pytest.raises(AssertionError, match=message):
        check_encoder(encoder, ITEMS)


def test_a_fingerprint_that_changes_from_one_to_the_next_is_found():
    other = Broken()
    other.fingerprint = "another"
    with pytest.raises(AssertionError, match="different fingerprints"):
        check_encoder(Broken(), ITEMS, again=other)
