import math

import numpy as np
import pytest
import torch

from pipeline.training.gather import world
from pipeline.training.held_out import _Reader
from pipeline.training.infonce import InfoNCE
from pipeline.training.journal import Journal, all_keys
from pipeline.training.ranks import run_on_ranks
from pipeline.training.watch import BINS, Watched, collapse

ROWS = 7


def vectors(seed):
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs_of_a_rank():
    rank, num_ranks = world()
    watched = Watched(InfoNCE())
    watched(vectors(1)[rank::num_ranks], vectors(2)[rank::num_ranks])
    return watched.signs(), all_keys(list(range(ROWS))[rank::num_ranks], torch.device("cpu"))


def test_signs_of_collapse_equal_their_definitions_on_any_number_of_ranks():
    queries, positives = (side.numpy() / np.linalg.norm(side.numpy(), axis=1, keepdims=True) for side in (vectors(1), vectors(2)))
    own = [float(queries[i] @ positives[i]) for i in range(ROWS)]
    others = [float(queries[i] @ positives[j]) for i in range(ROWS) for j in range(ROWS) if i != j]
    singular = np.sqrt(np.linalg.eigvalsh(positives.T @ positives))
    shares = singular / singular.sum()
    expected = {
        "cosine_positive": sum(own) / len(own),
        "cosine_negative": sum(others) / len(others),
        "cosine_documents": float(np.mean([positives[i] @ positives[j] for i in range(ROWS) for j in range(ROWS) if i != j])),
        "effective_rank": math.exp(-sum(share * math.log(share) for share in shares)),
    }
    counts = {name: np.histogram(values, bins=BINS, range=(-1, 1))[0].tolist() for name, values in (("positive", own), ("negative", others))}
    for (signs, similarities), keys in [signs_of_a_rank(), *run_on_ranks(signs_of_a_rank, 2)]:
        assert signs == pytest.approx(expected, rel=1e-6)
        assert similarities == counts
        assert keys == [f"{number:016x}" for number in range(ROWS)]


def test_collapse_shows_as_an_effective_rank_of_one():
    watched = Watched(InfoNCE())
    watched(vectors(1), vectors(2)[:1].repeat(ROWS, 1))
    signs, _ = watched.signs()
    assert signs["effective_rank"] == pytest.approx(1, abs=1e-5)
    healthy = {"cosine_documents": 0.1, "effective_rank": 20.0, "cosine_positive": 0.8, "cosine_negative": 0.1}
    assert collapse(healthy, healthy) == {}
    assert set(collapse(healthy, signs)) == {"alike", "few", "lost"}


def test_a_journal_that_a_crash_cut_short_goes_on(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for line in (
        {"step": 0, "held_out": {}},
        {"step": 0, "loss": 2.0},
        {"step": 1, "loss": 1.0},
        {"step": 2, "held_out": {}},
        {"step": 2, "loss": 0.5},
    ):
        journal.add(line)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    journal.begin(2)
    assert journal.lines() == [{"step": 0, "held_out": {}}, {"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}, {"step": 2, "held_out": {}}]
    journal.begin(0)
    assert journal.lines() == []


class Same(_Reader):
    """Stands for a model: the vector of a message is its row's number and whether it is a query."""

    def _told(self, wanted):
        return [((row, place), place is None) for row, place in wanted]


class Echo:
    def prepare(self, told, *, query):
        return told


def vectors_on_a_rank(num, chunk=None):
    def embed(rows):
        assert len(rows) <= (chunk or 64)
        return torch.tensor([[1.0, row, 0.0 if place is None else 1.0] for row, place in rows])

    return Same(Echo(), embed, None, None, chunk).vectors([(row, None if row % 2 else 0) for row in range(num)])


def test_held_out_vectors_come_in_order_from_any_number_of_ranks():
    for num in (1, 2, 5, 200):
        alone = vectors_on_a_rank(num)
        assert np.allclose(alone[:, 1] / alone[:, 0], range(num))
        # No more at once than in training: an evaluation took more memory than a step, and ended the run.
        for found in (vectors_on_a_rank(num, 3), *run_on_ranks(vectors_on_a_rank, 2, num, 3)):
            np.testing.assert_array_equal(found, alone)
