import numpy as np
import pyarrow as pa

from pipeline.known import CHANGED, NEW, UNCHANGED, Known, hash64


def test_hashes_are_the_same_in_every_process():
    assert hash64(pa.array(["a", "photo 1.jpg", "ü"])).tolist() == [13950350942979735504, 6315197265963973221, 6689755093696353227]


def test_classify_agrees_with_a_dictionary():
    rng = np.random.default_rng(0)
    known, reference = Known(), {}
    for _ in range(40):
        ids = rng.choice(2000, size=rng.integers(1, 200), replace=False).astype(np.uint64)
        versions = rng.integers(0, 3, size=len(ids)).astype(np.uint64)
        known.add(ids, versions)
        reference.update(zip(ids.tolist(), versions.tolist(), strict=True))
    ids = np.arange(2500, dtype=np.uint64)
    versions = rng.integers(0, 3, size=len(ids)).astype(np.uint64)
    expected = [
        NEW if i not in reference else UNCHANGED if reference[i] == v else CHANGED for i, v in zip(ids.tolist(), versions.tolist(), strict=True)
    ]
    assert known.classify(ids, versions).tolist() == expected


def test_many_small_additions_stay_few_segments():
    known = Known()
    for i in range(1000):
        known.add(np.array([i], np.uint64), np.array([0], np.uint64))
    assert len(known.segments) <= 12
    assert known.find(np.array([0, 999, 1000], np.uint64))[0].tolist() == [True, True, False]


def test_an_empty_map_knows_nothing():
    found, versions = Known().find(np.array([1, 2], np.uint64))
    assert not found.any()
    assert not versions.any()
