"""Ranking metrics: the revisited Oxford/Paris protocol, mAP of Copydays, micro-AP.

All scores are in percent. Sources: Radenovic et al. 2018 (revisited Oxford and Paris); Douze et
al. 2009 (Copydays); the paper's code.

Shapes: Q queries, N database images, D channels; all features are L2-normalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]  # of database images

# Similarities held in memory at a time: a chunk of queries against the whole database.
CHUNK_ELEMENTS = 1 << 25
PRECISION_AT = (1, 5, 10)
DIFFICULTIES = ("easy", "medium", "hard")
COPYDAYS_TOP = 20  # the paper's code searches this many neighbours


@dataclass(frozen=True)
class Relevance:
    """Database images that show the object of a query, in three disjoint sets."""

    easy: Indices
    hard: Indices
    junk: Indices

    def split(self, difficulty: str) -> tuple[Indices, Indices]:
        """Return the positives at a difficulty, and the images ignored in its ranking."""
        if difficulty == "easy":
            return self.easy, np.concatenate((self.junk, self.hard))
        if difficulty == "medium":
            return np.concatenate((self.easy, self.hard)), self.junk
        return self.hard, np.concatenate((self.junk, self.easy))


def restrict(indices: Indices, usable: Indices) -> Indices:
    """Return the positions in `usable`, which rises, of those indices that are in it."""
    return np.searchsorted(usable, indices[np.isin(indices, usable)])


def average_precision(ranks: Indices, positives: int) -> float:
    """Return the area under the precision-recall curve, by trapezoids, from 0 to 1.

    Args:
        ranks: ranks of the retrieved positives, from 0, rising.
        positives: number of positives, retrieved or not, at least 1.
    """
    retrieved = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, retrieved / np.maximum(ranks, 1))
    after = (retrieved + 1) / (ranks + 1)
    return float((before + after).sum() / (2 * positives))


def revisited_scores(
    queries: Tensor, database: Tensor, relevance: Sequence[Relevance]
) -> dict[str, dict[str, float | None]]:
    """Return mAP and mP@1, 5, 10 of the revisited protocol: difficulty -> score -> percent.

    Queries without positives at a difficulty are ignored; if all are, the scores are None. If the
    last positive of a query ranks before k, mP@k is the precision at that rank, as the protocol
    defines it.

    Args:
        queries [Q, D], database [N, D]: on one device.
        relevance: one per query.
    """
    rows: dict[str, list[list[float]]] = {difficulty: [] for difficulty in DIFFICULTIES}
    remaining = iter(relevance)
    for similarity in similarities(queries, database):
        for order in similarity.argsort(dim=1, descending=True, stable=True).cpu().numpy():
            query = next(remaining)
            for difficulty in DIFFICULTIES:
                positives, ignored = query.split(difficulty)
                if len(positives):
                    rows[difficulty].append(_scores(order, positives, ignored))
    names = ["mAP", *(f"mP@{k}" for k in PRECISION_AT)]
    result: dict[str, dict[str, float | None]] = {}
    for difficulty, scores in rows.items():
        means = (100 * np.mean(scores, axis=0)).tolist() if scores else [None] * len(names)
        result[difficulty] = dict(zip(names, means, strict=True))
    return result


def _scores(order: Indices, positives: Indices, ignored: Indices) -> list[float]:
    """Return the average precision and precisions at PRECISION_AT of one query's ranking."""
    kept = order[~np.isin(order, ignored)]
    ranks = np.flatnonzero(np.isin(kept, positives))
    at = [min(int(ranks[-1]) + 1, k) for k in PRECISION_AT]
    return [average_precision(ranks, len(positives)), *(float((ranks < k).sum() / k) for k in at)]


def copydays_map(queries: Tensor, database: Tensor, positives: Sequence[Indices]) -> float:
    """Return the mean average precision of the originals among the 20 nearest images, in percent.

    Args:
        queries [Q, D], database [N, D]: on one device.
        positives: at least one index per query.
    """
    total = 0.0
    remaining = iter(positives)
    top = min(COPYDAYS_TOP, len(database))
    for similarity in similarities(queries, database):
        for neighbours in similarity.topk(top, dim=1).indices.cpu().numpy():
            own = next(remaining)
            total += average_precision(np.flatnonzero(np.isin(neighbours, own)), len(own))
    return 100 * total / len(positives)


def micro_ap(queries: Tensor, database: Tensor, positives: Sequence[Indices]) -> float:
    """Return the average precision of all Q N pairs ranked together by similarity, in percent.

    This is the mean, over the true pairs, of the precision at their similarity; pairs of equal
    similarity count as retrieved together. Unlike mAP, it requires similarities that are comparable
    between queries.

    Args:
        queries [Q, D], database [N, D]: on one device.
        positives: indices per query; at least one in total.
    """
    # Two passes over the chunks; sorting all pairs may not fit into memory.
    scores, start = [], 0
    for similarity in similarities(queries, database):
        own = positives[start : start + len(similarity)]
        rows = np.repeat(np.arange(len(own)), [len(indices) for indices in own])
        scores.append(similarity[torch.from_numpy(rows), torch.from_numpy(np.concatenate(own))])
        start += len(similarity)
    true, _ = torch.cat(scores).sort()
    # counts[i]: pairs at least as similar as exactly i of the true pairs.
    counts = torch.zeros(len(true) + 1, dtype=torch.long, device=true.device)
    for similarity in similarities(queries, database):
        reached = torch.searchsorted(true, similarity.flatten(), right=True)
        counts += reached.bincount(minlength=len(counts))
    retrieved = counts.flip(0).cumsum(0).flip(0)  # pairs at least as similar as i or more
    # A pair reaches true[i] if it reaches more true pairs than there are below true[i].
    below = torch.searchsorted(true, true, right=False)
    precision = (len(true) - below) / retrieved[below + 1]
    return 100 * float(precision.double().mean())


def similarities(queries: Tensor, database: Tensor) -> Iterator[Tensor]:
    """Yield the rows of queries @ database.T, [Q, N], in chunks that fit into memory."""
    rows = max(1, CHUNK_ELEMENTS // max(len(database), 1))
    for chunk in queries.split(rows):
        yield chunk @ database.T
