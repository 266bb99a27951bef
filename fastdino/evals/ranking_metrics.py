"""How good a ranking is: the revisited Oxford/Paris protocol, Copydays' mAP, micro-AP.

Sources: Radenovic et al. 2018 (revisited Oxford and Paris); Douze et al. 2009 (Copydays); the
paper's code. All scores are in percent.

Legend: Q queries, N images of the database, D channels, all features L2-normalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Places = NDArray[np.int64]  # of images in the database

# Similarities held in memory at once: a chunk of queries against the whole database.
CHUNK_ELEMENTS = 1 << 25
PRECISION_AT = (1, 5, 10)
DIFFICULTIES = ("easy", "medium", "hard")
COPYDAYS_TOP = 20  # the paper's code looks for copies no further down


@dataclass(frozen=True)
class Relevance:
    """Which images of the database show what a query shows; no image stands in two of them."""

    easy: Places
    hard: Places
    junk: Places

    def split(self, difficulty: str) -> tuple[Places, Places]:
        """The positives of a difficulty, and what is left out of its ranking."""
        if difficulty == "easy":
            return self.easy, np.concatenate((self.junk, self.hard))
        if difficulty == "medium":
            return np.concatenate((self.easy, self.hard)), self.junk
        return self.hard, np.concatenate((self.junk, self.easy))


def average_precision(ranks: Places, positives: int) -> float:
    """The area under precision over recall, by trapezoids, from 0 to 1.

    Args:
        ranks: [found], of the positives that were found, from 0, rising.
        positives: how many there are to be found, at least 1.
    """
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float((before + after).sum() / (2 * positives))


def revisited_scores(
    queries: Tensor, database: Tensor, relevance: Sequence[Relevance]
) -> dict[str, dict[str, float | None]]:
    """The mAP and mP@1, 5, 10 of the revisited protocol: difficulty -> score -> percent.

    A query without positives of a difficulty does not count there; None where that is every query.
    mP@k of a query whose last positive comes before k is its precision there, as the protocol has
    it.

    Args:
        queries [Q, D], database [N, D]: on one device.
        relevance: of each query.
    """
    rows: dict[str, list[list[float]]] = {difficulty: [] for difficulty in DIFFICULTIES}
    remaining = iter(relevance)
    for similarity in similarities(queries, database):
        for order in similarity.argsort(dim=1, descending=True, stable=True).cpu().numpy():
            query = next(remaining)
            for difficulty in DIFFICULTIES:
                positives, left_out = query.split(difficulty)
                if len(positives):
                    rows[difficulty].append(_scores(order, positives, left_out))
    names = ["mAP", *(f"mP@{k}" for k in PRECISION_AT)]
    return {
        difficulty: dict(zip(names, _mean_percent(scores, len(names)), strict=True))
        for difficulty, scores in rows.items()
    }


def _scores(order: Places, positives: Places, left_out: Places) -> list[float]:
    """Average precision, and precision at each of PRECISION_AT, of one query's ranking."""
    kept = order[~np.isin(order, left_out)]
    ranks = np.flatnonzero(np.isin(kept, positives))
    at = [min(int(ranks[-1]) + 1, k) for k in PRECISION_AT]
    return [average_precision(ranks, len(positives)), *(float((ranks < k).sum() / k) for k in at)]


def _mean_percent(scores: list[list[float]], width: int) -> list[float | None]:
    if not scores:
        return [None] * width
    return [float(value) for value in 100 * np.mean(scores, axis=0)]


def copydays_map(queries: Tensor, database: Tensor, positives: Sequence[Places]) -> float:
    """Mean average precision of the copies' originals among the 20 nearest, in percent.

    Args:
        queries [Q, D], database [N, D]: on one device.
        positives: of each query, at least one.
    """
    total = 0.0
    remaining = iter(positives)
    top = min(COPYDAYS_TOP, len(database))
    for similarity in similarities(queries, database):
        for nearest in similarity.topk(top, dim=1).indices.cpu().numpy():
            own = next(remaining)
            total += average_precision(np.flatnonzero(np.isin(nearest, own)), len(own))
    return 100 * total / len(positives)


def micro_ap(queries: Tensor, database: Tensor, positives: Sequence[Places]) -> float:
    """Average precision of all Q N pairs in one ranking by similarity, in percent.

    It is the mean over the true pairs of the precision at their similarity; pairs of one similarity
    count as retrieved together. Unlike mAP it wants similarities that compare between queries.

    Args:
        queries [Q, D], database [N, D]: on one device.
        positives: of each query; of all together at least one.
    """
    # Two passes over the chunks instead of a sort of all pairs, which need not fit into memory.
    scores, first = [], 0
    for similarity in similarities(queries, database):
        own = positives[first : first + len(similarity)]
        lines = np.repeat(np.arange(len(own)), [len(places) for places in own])
        scores.append(similarity[torch.from_numpy(lines), torch.from_numpy(np.concatenate(own))])
        first += len(similarity)
    true, _ = torch.cat(scores).sort()
    # Pairs by how many of the true ones, rising, they are at least as similar as.
    counts = torch.zeros(len(true) + 1, dtype=torch.long, device=true.device)
    for similarity in similarities(queries, database):
        reached = torch.searchsorted(true, similarity.flatten(), right=True)
        counts += reached.bincount(minlength=len(counts))
    retrieved = counts.flip(0).cumsum(0).flip(0)  # [i]: pairs that reach i true ones or more
    # A pair at least as similar as true[i] reaches more true ones than lie below true[i].
    below = torch.searchsorted(true, true, right=False)
    precision = (len(true) - below) / retrieved[below + 1]
    return 100 * float(precision.double().mean())


def similarities(queries: Tensor, database: Tensor) -> Iterator[Tensor]:
    """[Q, D], [N, D] -> the rows of [Q, N] in order, as many at a time as fit into memory."""
    rows = max(1, CHUNK_ELEMENTS // max(len(database), 1))
    for chunk in queries.split(rows):
        yield chunk @ database.T
