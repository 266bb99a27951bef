from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastdino.evals import ranking_metrics
from fastdino.evals.ranking_metrics import Relevance, copydays_map, micro_ap, revisited_scores


def indices(*values):
    return np.array(values, np.int64)


def unit(*shape, seed):
    rng = np.random.default_rng(seed)
    return F.normalize(torch.from_numpy(rng.standard_normal(shape)), dim=1)


def with_similarities(similarity):
    """Return queries and a database with these similarities, [Q, N]."""
    return torch.tensor(similarity, dtype=torch.float64), torch.eye(len(similarity[0])).double()


def protocol(similarity, positives, ignored, ks=(1, 5, 10)):
    """Score one query of the revisited protocol by walking down its ranking.

    Skips ignored images; at each positive adds the trapezoid between the precisions before and
    after it.
    """
    area, seen, hits, last, hits_at = 0.0, 0, 0, 0, []
    for index in sorted(range(len(similarity)), key=lambda i: -similarity[i]):
        if index in ignored:
            continue
        before = hits / seen if seen else 1.0
        seen += 1
        if index in positives:
            hits += 1
            last = seen
            hits_at.append(seen)
            area += (before + hits / seen) / 2 / len(positives)
    at = [min(last, k) for k in ks]
    return [area, *(sum(hit <= k for hit in hits_at) / k for k in at)]


def test_scores_match_the_revisited_protocol():
    queries, database = unit(9, 5, seed=0), unit(60, 5, seed=1)
    rng = np.random.default_rng(2)
    relevance, expected = [], {"easy": [], "medium": [], "hard": []}
    for query in range(9):
        shuffled = rng.permutation(60)
        easy, hard, junk = np.split(shuffled[: 5 + 3 * query], [query, query + 4])
        relevance.append(Relevance(easy, hard, junk))
        row = (queries[query] @ database.T).tolist()
        e, h, j = set(easy.tolist()), set(hard.tolist()), set(junk.tolist())
        for name, ok, out in (("easy", e, j | h), ("medium", e | h, j), ("hard", h, j | e)):
            if ok:
                expected[name].append(protocol(row, ok, out))
    assert len(expected["easy"]) == 8, "the first query has no easy positive"
    scores = revisited_scores(queries, database, relevance)
    for name, rows in expected.items():
        assert list(scores[name]) == ["mAP", "mP@1", "mP@5", "mP@10"]
        assert list(scores[name].values()) == pytest.approx(100 * np.mean(rows, axis=0), abs=1e-9)
    assert 5 < scores["medium"]["mAP"] < 95


def test_without_positives_scores_are_none():
    queries, database = with_similarities([[0.9, 0.8]])
    scores = revisited_scores(queries, database, [Relevance(indices(0), indices(), indices())])
    assert scores["easy"]["mAP"] == 100
    assert set(scores["hard"].values()) == {None}


def test_copydays_map_searches_the_20_nearest():
    row = np.linspace(0.9, 0.1, 30).tolist()
    queries, database = with_similarities([row, row])
    score = copydays_map(queries, database, [indices(0, 25), indices(19)])
    assert score == pytest.approx(100 * (1 / 2 + (0 + 1 / 20) / 2) / 2)
    assert copydays_map(queries, database, [indices(20), indices(29)]) == 0


def plain_micro_ap(similarity, positives):
    pairs = [(s, n in own) for row, own in zip(similarity, positives, strict=True)
             for n, s in enumerate(row)]  # fmt: skip
    precisions = []
    for score, is_true in pairs:
        if is_true:
            retrieved = [true for other, true in pairs if other >= score]
            precisions.append(sum(retrieved) / len(retrieved))
    return 100 * sum(precisions) / len(precisions)


def test_micro_ap_matches_the_plain_one_with_and_without_ties():
    queries, database = unit(13, 4, seed=3), unit(40, 4, seed=4)
    rng = np.random.default_rng(5)
    positives = [rng.permutation(40)[: 1 + i % 3] for i in range(13)]
    expected = plain_micro_ap((queries @ database.T).tolist(), [set(p) for p in positives])
    assert micro_ap(queries, database, positives) == pytest.approx(expected, abs=1e-5)
    rounded = ((queries @ database.T) * 4).round().tolist()
    expected = plain_micro_ap(rounded, [set(p) for p in positives])
    assert micro_ap(*with_similarities(rounded), positives) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("elements", [1, 40 * 4, 40 * 12 + 1])
def test_chunks_do_not_change_the_scores(monkeypatch, elements):
    queries, database = unit(13, 4, seed=3), unit(40, 4, seed=4)
    own = [indices(i, i + 13) for i in range(13)]
    relevance = [Relevance(p, indices(39), indices()) for p in own]

    def all_scores():
        return (
            micro_ap(queries, database, own),
            copydays_map(queries, database, own),
            *revisited_scores(queries, database, relevance)["medium"].values(),
        )

    whole = all_scores()
    monkeypatch.setattr(ranking_metrics, "CHUNK_ELEMENTS", elements)
    assert all_scores() == pytest.approx(whole, abs=1e-9)
