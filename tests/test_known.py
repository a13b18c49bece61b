import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline import known as module
from pipeline.known import CHANGED, NEW, UNCHANGED, Known, hash64, member, repeated, without


def test_hashes_are_the_same_in_every_process():
    assert hash64(pa.array(["a", "photo 1.jpg", "ü"])).tolist() == [13950350942979735504, 6315197265963973221, 6689755093696353227]


def test_hashes_do_not_depend_on_how_strings_lie_in_memory(monkeypatch):
    """They are stored in receipts and in the names of chunks: hashed in small parts they must be what they were, hashed at once."""
    monkeypatch.setattr(module, "HASHED_AT_ONCE", 7)
    strings = [f"photo {i}" if i % 5 else None for i in range(100)]
    expected = pd.util.hash_array(np.array(strings, object), categorize=False)
    whole = pa.array(strings)
    for values in (whole, pa.chunked_array([whole[:3], whole[3:3], whole[3:64], whole[64:]]), whole.dictionary_encode().cast(pa.string())):
        assert hash64(values).tolist() == expected.tolist()
    assert hash64(whole.slice(13, 40)).tolist() == expected[13:53].tolist()
    assert len(hash64(pa.chunked_array([], pa.string()))) == 0


def test_repeated_strings_are_counted_and_clashes_of_hashes_are_not_taken_for_them(monkeypatch):
    strings = pa.array(["a", "b", "a", "c", "b", "a", "d"])
    assert repeated(strings) == repeated(pa.chunked_array([strings[:2], strings[2:]])) == {"a": 3, "b": 2}
    whole = module.hash64
    monkeypatch.setattr(module, "hash64", lambda values: whole(values) % np.uint64(2))
    assert repeated(strings) == {"a": 3, "b": 2}
    assert repeated(pa.array(["a", "b", "c"])) == {}


def test_without_agrees_with_numpy():
    rng = np.random.default_rng(0)
    for size in (0, 1, 5, 400):
        values, gone = (rng.integers(0, 300, size=n).astype(np.uint64) for n in (size, 200))
        assert without(values, gone).tolist() == np.setdiff1d(values, gone).tolist()
        assert without(values, gone[:0]).tolist() == np.unique(values).tolist()


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


def test_members_of_a_sorted_array_are_those_of_a_set_and_asking_often_does_not_sort_it_again():
    """np.isin sorts both: of 2 million rows a million vanished ones took 190 s of CPU to find."""
    rng = np.random.default_rng(0)
    among = np.sort(rng.integers(0, 10_000, size=3000).astype(np.uint64))
    for values in (rng.integers(0, 10_000, size=500).astype(np.uint64), among[-3:], among[:0]):
        assert member(values, among).tolist() == [value in set(among.tolist()) for value in values.tolist()]
    assert not member(among, among[:0]).any()
