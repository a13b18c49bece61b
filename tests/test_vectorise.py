"""One chunk's items through a Vectoriser: an odd one costs itself only, and a machine that fails costs no item."""

import io
import logging

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.encoders.hashing import Hashing
from pipeline.journal import Journal, Watchdog
from pipeline.media import Limits
from pipeline.table.at import TableAt
from pipeline.table.stage import Staging
from pipeline.vectorise import ContractBroken, MachineFault, Vectoriser
from schemas.items import ITEM
from tests.sources import Quadrants


class Obeying(Hashing):
    """Hashing that raises what a text asks for, where it is in a batch of `most` or more."""

    def __init__(self, error=None, most=1):
        super().__init__(dim=16)
        self.error, self.most = error, most

    def encode(self, items):
        if len(items) >= self.most and "fail" in items["text"].to_pylist():
            raise self.error
        return super().encode(items)


class Narrow(Quadrants):
    """Quadrants that cannot prepare an image wider than 20 px."""

    def prepare(self, image):
        if image.shape[1] > 20:
            raise ValueError("too wide for me")
        return image


def outcome(tmp_path, encoder, *, texts=(), images=()):
    n = len(texts) or len(images)
    ids = [str(i) for i in range(n)]
    columns = [ids, ids, ids, list(texts) or [None] * n, list(images) or [None] * n, [None] * n]
    items = pa.table([pa.array(c, f.type) for c, f in zip(columns, ITEM, strict=True)], schema=ITEM)
    journal = Journal(Staging(TableAt(uri=str(tmp_path), name="t")), "chunk", Watchdog())
    return Vectoriser(encoder, Limits(), 8, {})(items, journal)


def picture(width, height=10):
    target = io.BytesIO()
    Image.new("RGB", (width, height), (9, 90, 200)).save(target, "PNG")
    return target.getvalue()


def reasons(found):
    return [problem and problem.reason for problem in found.problems]


def test_an_image_that_cannot_be_prepared_costs_itself_only(tmp_path):
    """It failed its whole chunk, on every run."""
    found = outcome(tmp_path, Narrow(), images=[picture(10), picture(30), picture(20)])
    assert reasons(found) == [None, "encode_failed", None]
    assert found.problems[1].detail.startswith("ValueError: too wide for me (test_vectorise.py, line ")
    np.testing.assert_allclose(np.linalg.norm(found.vectors[[0, 2]], axis=1), 1, rtol=1e-6)


def test_an_encoder_that_can_prepare_nothing_fails_the_chunk_not_the_items(tmp_path):
    with pytest.raises(ContractBroken, match=r"fails on each of 3 items: ValueError: too wide for me \(test_vectorise.py, line"):
        outcome(tmp_path, Narrow(), images=[picture(30)] * 3)
    assert reasons(outcome(tmp_path, Narrow(), images=[picture(30)])) == ["encode_failed"]


def test_what_is_wrong_with_an_item_does_not_keep_its_data(tmp_path):
    """Tracebacks did, in a cycle, until the garbage collector came by: 64 MiB for each reject."""
    found = outcome(tmp_path, Narrow(), images=[b"no image", picture(10), picture(30)])
    assert reasons(found) == ["not_an_image", None, "encode_failed"]
    assert all(problem.__traceback__ is problem.__context__ is None for problem in found.problems if problem)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_machine_that_fails_makes_no_reject(tmp_path, error):
    """An item that was alone in its batch when the memory ran out was rejected for ever."""
    with pytest.raises(MachineFault, match=r"item 0, taken alone: .* lower compute\.batch_size"):
        outcome(tmp_path, Obeying(error), texts=["fail"])


def test_a_batch_too_large_for_the_memory_is_encoded_one_by_one_and_told_once(tmp_path, caplog):
    """Nothing in the log said why the run was slow."""
    encoder = Obeying(MemoryError("17 GiB"), most=2)
    with caplog.at_level(logging.WARNING):
        found = outcome(tmp_path, encoder, texts=["fail", "a", "b"])
    assert reasons(found) == [None] * 3
    [record] = caplog.records
    assert record.getMessage().startswith("the encoder failed on 3 items together (MemoryError: 17 GiB)")
    assert "lower compute.batch_size" in record.getMessage()
