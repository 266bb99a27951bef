from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastdino.evals import ranking_metrics
from fastdino.evals.ranking_metrics import (
    Relevance,
    average_precision,
    copydays_map,
    micro_ap,
    revisited_scores,
)


def places(*values):
    return np.array(values, np.int64)


def unit(*shape, seed):
    rng = np.random.default_rng(seed)
    return F.normalize(torch.from_numpy(rng.standard_normal(shape)), dim=1)


def asking(similarity):
    """Queries and a database whose similarities are these numbers, [Q, N]."""
    return torch.tensor(similarity, dtype=torch.float64), torch.eye(len(similarity[0])).double()


@pytest.mark.parametrize(
    ("ranks", "positives", "area"),
    [
        ((0,), 1, 1.0),
        ((0, 1, 2), 3, 1.0),
        ((1,), 1, (0 + 1 / 2) / 2),
        ((0, 2), 2, (1 + (1 / 2 + 2 / 3) / 2) / 2),
        ((0,), 4, 1 / 4),
        ((), 2, 0.0),
    ],
)
def test_average_precision_is_the_area_under_trapezoids(ranks, positives, area):
    assert average_precision(places(*ranks), positives) == pytest.approx(area, abs=1e-15)


def protocol(similarity, positives, left_out, ks=(1, 5, 10)):
    """One query of the revisited protocol, word for word: walk down the ranking, pass over what is
    left out; at each positive add a trapezoid between the precisions before and after it."""
    area, seen, found, last, hits_at = 0.0, 0, 0, 0, []
    for place in sorted(range(len(similarity)), key=lambda i: -similarity[i]):
        if place in left_out:
            continue
        before = found / seen if seen else 1.0
        seen += 1
        if place in positives:
            found += 1
            last = seen
            hits_at.append(seen)
            area += (before + found / seen) / 2 / len(positives)
    at = [min(last, k) for k in ks]
    return [area, *(sum(hit <= k for hit in hits_at) / k for k in at)]


def test_scores_are_the_revisited_protocols():
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
    found = revisited_scores(queries, database, relevance)
    for name, rows in expected.items():
        assert list(found[name]) == ["mAP", "mP@1", "mP@5", "mP@10"]
        assert list(found[name].values()) == pytest.approx(100 * np.mean(rows, axis=0), abs=1e-9)
    assert 5 < found["medium"]["mAP"] < 95


def test_junk_does_not_stand_in_the_way():
    # The ranking is junk, easy, other, hard.
    queries, database = asking([[0.9, 0.8, 0.7, 0.6]])
    found = revisited_scores(queries, database, [Relevance(places(1), places(3), places(0))])
    assert found["easy"]["mAP"] == 100
    assert found["hard"]["mAP"] == pytest.approx(100 * (0 + 1 / 2) / 2)
    assert found["medium"]["mAP"] == pytest.approx(100 * (1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert found["hard"]["mP@1"] == 0
    assert found["hard"]["mP@10"] == 50, "of the two up to the last positive"


def test_without_any_positive_there_is_no_score():
    queries, database = asking([[0.9, 0.8]])
    found = revisited_scores(queries, database, [Relevance(places(0), places(), places())])
    assert found["easy"]["mAP"] == 100
    assert set(found["hard"].values()) == {None}


def test_copies_are_looked_for_among_the_twenty_nearest():
    row = np.linspace(0.9, 0.1, 30).tolist()
    queries, database = asking([row, row])
    found = copydays_map(queries, database, [places(0), places(19)])
    assert found == pytest.approx(100 * (1 + (0 + 1 / 20) / 2) / 2)
    assert copydays_map(queries, database, [places(20), places(29)]) == 0


def plain_micro_ap(similarity, positives):
    pairs = [(s, n in own) for row, own in zip(similarity, positives, strict=True)
             for n, s in enumerate(row)]  # fmt: skip
    precisions = []
    for score, is_true in pairs:
        if is_true:
            retrieved = [true for other, true in pairs if other >= score]
            precisions.append(sum(retrieved) / len(retrieved))
    return 100 * sum(precisions) / len(precisions)


def test_micro_ap_ranks_all_pairs_together():
    # By similarity: true, false, true, false.
    queries, database = asking([[0.9, 0.1], [0.8, 0.5]])
    found = micro_ap(queries, database, [places(0), places(1)])
    assert found == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert copydays_map(queries, database, [places(0), places(1)]) == pytest.approx(100 * 5 / 8)


def test_micro_ap_of_random_pairs_and_of_equal_ones():
    queries, database = unit(13, 4, seed=3), unit(40, 4, seed=4)
    rng = np.random.default_rng(5)
    positives = [rng.permutation(40)[: 1 + i % 3] for i in range(13)]
    expected = plain_micro_ap((queries @ database.T).tolist(), [set(p) for p in positives])
    assert micro_ap(queries, database, positives) == pytest.approx(expected, abs=1e-5)
    rounded = ((queries @ database.T) * 4).round().tolist()
    expected = plain_micro_ap(rounded, [set(p) for p in positives])
    assert micro_ap(*asking(rounded), positives) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("elements", [1, 40 * 4, 40 * 12 + 1])
def test_chunks_change_nothing(monkeypatch, elements):
    queries, database = unit(13, 4, seed=3), unit(40, 4, seed=4)
    own = [places(i, i + 13) for i in range(13)]
    relevance = [Relevance(p, places(39), places()) for p in own]

    def all_scores():
        return (
            micro_ap(queries, database, own),
            copydays_map(queries, database, own),
            *revisited_scores(queries, database, relevance)["medium"].values(),
        )

    whole = all_scores()
    monkeypatch.setattr(ranking_metrics, "CHUNK_ELEMENTS", elements)
    assert all_scores() == pytest.approx(whole, abs=1e-9)
