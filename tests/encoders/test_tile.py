"""An encoder of tiles: the inner one's vectors, under a name that says what was done to the pixels."""

import numpy as np
import pytest

from pipeline.config import ConfigError, Ref
from pipeline.encoders.hashing import Hashing
from pipeline.encoders.tile import TileEncoder
from pipeline.testing import check_encoder
from tests.encoders.models import items_of

RNG = np.random.default_rng(0)
ITEMS = items_of(
    [None, "mitosis", None], [RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), None, RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)]
)


class Sided(Hashing):
    """Hashing whose query side is another one."""

    def for_queries(self):
        side = Sided(self.dim)
        side.encode = lambda items: -Hashing.encode(side, items)
        return side


def test_it_keeps_the_contract_and_gives_the_inner_vectors():
    encoder = TileEncoder(Hashing(16))
    check_encoder(encoder, ITEMS, again=TileEncoder(Hashing(16)))
    np.testing.assert_array_equal(encoder.encode(ITEMS), Hashing(16).encode(ITEMS))


def test_the_fingerprint_tells_apart_what_gives_other_vectors():
    made = [TileEncoder(Hashing(16)), TileEncoder(Hashing(32)), *(TileEncoder(Hashing(16), stain=stain) for stain in ("macenko", "reinhard"))]
    assert len({encoder.fingerprint for encoder in made} | {Hashing(16).fingerprint}) == 5


def test_a_job_file_names_the_inner_encoder_in_the_arguments():
    ref = Ref(target="pipeline.encoders.tile:TileEncoder", args={"encoder": {"target": "pipeline.encoders.hashing:Hashing", "args": {"dim": 16}}})
    assert ref.build().fingerprint == TileEncoder(Hashing(16)).fingerprint


def test_the_query_side_is_the_inner_encoders():
    encoder = TileEncoder(Sided(16))
    queries = encoder.for_queries()
    assert queries.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(queries.encode(ITEMS), -encoder.encode(ITEMS))


def test_an_unknown_stain_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'macenko'"):
        TileEncoder(Hashing(16), stain="macenka")
