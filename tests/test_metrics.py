import math

import numpy as np
import pytest

from pipeline.metrics import mrr_at, ndcg_at, ranking, recall_at


def drawn(seed, num_queries=40, num_documents=30):
    rng = np.random.default_rng(seed)
    found = np.stack([rng.permutation(num_documents)[:20] for _ in range(num_queries)])
    relevant = []
    for _ in range(num_queries):
        numbers = rng.choice(num_documents, rng.integers(1, 6), replace=False)
        relevant.append({int(number): float(rng.integers(1, 4)) for number in numbers})
    return found, relevant


@pytest.mark.parametrize("k", [1, 5, 20])
def test_metrics_equal_their_definitions(k):
    found, relevant = drawn(k)
    recall, reciprocal, ndcg = [], [], []
    for row, gains in zip(found, relevant, strict=True):
        first = [int(number) for number in row][:k]
        recall.append(len(set(first) & set(gains)) / len(gains))
        places = [place for place in range(1, k + 1) if first[place - 1] in gains]
        reciprocal.append(1 / places[0] if places else 0)
        had = sum(gains.get(first[place - 1], 0) / math.log2(1 + place) for place in range(1, k + 1))
        best = sorted(gains.values())[::-1]
        ndcg.append(had / sum(best[place - 1] / math.log2(1 + place) for place in range(1, min(k, len(best)) + 1)))
    assert recall_at(found, relevant, k) == pytest.approx(sum(recall) / len(recall), abs=1e-12)
    assert mrr_at(found, relevant, k) == pytest.approx(sum(reciprocal) / len(reciprocal), abs=1e-12)
    assert ndcg_at(found, relevant, k) == pytest.approx(sum(ndcg) / len(ndcg), abs=1e-12)


def test_metrics_of_a_ranking_that_can_be_checked_by_hand():
    found = np.array([[3, 1, 2], [0, 4, 5]])
    relevant = [{1: 1.0}, {9: 1.0}]
    assert recall_at(found, relevant, 1) == 0
    assert recall_at(found, relevant, 2) == 0.5
    assert mrr_at(found, relevant, 3) == 0.25
    assert ndcg_at(found, relevant, 3) == pytest.approx(0.5 / math.log2(3))


def test_the_ranking_is_that_of_sorted_scores_in_any_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    queries, documents = rng.standard_normal((9, 8)), rng.standard_normal((50, 8))
    expected = [sorted(range(50), key=lambda number, query=query: -float(query @ documents[number]))[:7] for query in queries]
    np.testing.assert_array_equal(ranking(queries, documents, 7), expected)
    monkeypatch.setattr("pipeline.metrics.BLOCK", 100)
    np.testing.assert_array_equal(ranking(queries, documents, 7), expected)
    assert ranking(queries, documents, 99).shape == (9, 50)


def test_a_query_that_nothing_answers_is_refused():
    with pytest.raises(ValueError, match="query 1 must have a relevant document"):
        recall_at(np.array([[0], [1]]), [{0: 1.0}, {}], 1)
    with pytest.raises(ValueError, match="of the same queries"):
        recall_at(np.array([[0]]), [], 1)
