"""Segmentation metrics: known answers, and the definitions evaluated per pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdino.evals import segmentation_metrics
from fastdino.evals.segmentation_metrics import (
    boundary,
    boundary_accuracy,
    jaccard,
    region_similarity,
    statistics,
)


def square(top, left, side, size=(100, 120)):
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, top : top + side, left : left + side] = True
    return mask


EMPTY, FULL = square(0, 0, 0), square(0, 0, 200)


# The tolerance of F for 100 x 120 px is ceil(0.008 * 156.2) = 2 px.
@pytest.mark.parametrize(
    ("mask", "truth", "j", "f"),
    [
        (square(10, 10, 40), square(10, 10, 40), 1, 1),
        (square(10, 12, 40), square(10, 10, 40), 38 / 42, 1),  # all within the tolerance
        (square(50, 60, 20), square(10, 10, 20), 0, 0),
        (EMPTY, square(10, 10, 5), 0, 0),
        (square(10, 10, 5), EMPTY, 0, 0),
        (EMPTY, EMPTY, 1, 1),
        (FULL, FULL, 1, 1),
        (FULL, EMPTY, 0, 1),  # neither has a boundary
    ],
)
def test_j_and_f_of_squares(mask, truth, j, f):
    assert region_similarity(mask, truth).tolist() == [pytest.approx(j, abs=1e-15)]
    assert boundary_accuracy(mask, truth).tolist() == [pytest.approx(f, abs=1e-15)]


def test_jaccard_counts_only_valid_pixels():
    truth = torch.zeros(4, 4, dtype=torch.bool)
    truth[:2] = True  # 8 pixels
    everywhere = torch.ones(4, 4, dtype=torch.bool)
    left = torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2] = True  # 4 of them, and 4 others
    masks = torch.stack((truth, ~truth, left, everywhere, ~everywhere))
    for valid, expected in (
        (None, [1, 0, 4 / 12, 8 / 16, 0]),
        (truth, [1, 0, 0.5, 1, 0]),
        (left, [1, 0, 4 / 8, 4 / 8, 0]),
    ):
        assert jaccard(masks, truth, valid).tolist() == pytest.approx(expected, abs=1e-15)
    assert jaccard(~everywhere, ~everywhere).isnan()


def reference_boundary(mask):
    padded = np.pad(mask, ((0, 1), (0, 1)), "edge")
    neighbors = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.any([mask != neighbor for neighbor in neighbors], axis=0)


def reference_f(mask, truth):
    """Compute F from the distances between all pairs of boundary pixels."""
    predicted, true = (np.argwhere(reference_boundary(m)) for m in (mask, truth))
    tolerance = math.ceil(0.008 * math.hypot(*mask.shape))
    distance = ((predicted[:, None] - true[None]) ** 2).sum(-1)
    if not len(predicted) or not len(true):
        return float(len(predicted) == len(true))
    precision = (distance.min(1) <= tolerance**2).mean()
    recall = (distance.min(0) <= tolerance**2).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("size", [(40, 50), (9, 260), (300, 4)])
def test_j_and_f_of_random_masks_match_the_definitions(monkeypatch, size):
    monkeypatch.setattr(segmentation_metrics, "_CHUNK_PIXELS", 2 * size[0] * size[1])
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]

    def blob():
        middle = rng.uniform(0, size)
        inside = (y - middle[0]) ** 2 + (x - middle[1]) ** 2 < rng.uniform(2, max(size) / 3) ** 2
        return inside ^ (rng.random(size) < 0.01)

    masks, truth = (np.stack([blob() for _ in range(5)]) for _ in range(2))
    truth[3], masks[4] = masks[3], False
    pair = torch.from_numpy(masks), torch.from_numpy(truth)
    assert np.array_equal(boundary(pair[0]).numpy(), [reference_boundary(mask) for mask in masks])
    f = [reference_f(*both) for both in zip(masks, truth, strict=True)]
    assert boundary_accuracy(*pair).tolist() == pytest.approx(f, abs=1e-12)
    assert len(set(f)) > 3
    j = [(a & b).sum() / (a | b).sum() for a, b in zip(masks, truth, strict=True)]
    assert region_similarity(*pair).tolist() == pytest.approx(j, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "recall", "decay"),
    [
        (torch.linspace(1, 0, 101), 50 / 101, 0.75),  # strictly above 0.5
        (torch.linspace(1, 0, 401), 200 / 401, 0.75),  # more frames than fit in a byte
        # Frames 1..10: the edges of the quarters, 1, 3.25, 5.5, 7.75, 10, round to 1, 3, 6, 8, 10.
        (torch.arange(10.0), 0.9, (0 + 1 + 2) / 3 - (7 + 8 + 9) / 3),
        # Frames 1..7: the edges 2.5 and 5.5 both round up.
        (torch.arange(7.0) ** 2, 6 / 7, (0 + 1 + 4) / 3 - (25 + 36) / 2),
        (torch.tensor([0.7], dtype=torch.float64), 1, 0),
    ],
)
def test_decay_is_the_first_quarter_minus_the_last(scores, recall, decay):
    expected = {"mean": scores.mean().item(), "recall": recall, "decay": decay}
    assert statistics(scores) == pytest.approx(expected)


@pytest.mark.parametrize("truth", [EMPTY[0], EMPTY.int(), EMPTY[:, :5]])
def test_masks_of_different_shapes_or_types_are_rejected(truth):
    for measure in (region_similarity, boundary_accuracy):
        with pytest.raises(ValueError, match="expected two boolean stacks"):
            measure(EMPTY, truth)
