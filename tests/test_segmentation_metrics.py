"""J and F: known answers, and their definitions written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdino.evals import segmentation_metrics
from fastdino.evals.segmentation_metrics import (
    boundary,
    boundary_accuracy,
    region_similarity,
    statistics,
)


def square(top, left, side, size=(100, 120)):
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, top : top + side, left : left + side] = True
    return mask


EMPTY, FULL = square(0, 0, 0), square(0, 0, 200)


@pytest.mark.parametrize(
    ("mask", "truth", "j"),
    [
        (square(10, 10, 40), square(10, 10, 40), 1.0),
        (square(10, 20, 40), square(10, 10, 40), 30 / 50),
        (square(10, 10, 20), square(10, 10, 40), 1 / 4),
        (square(0, 0, 20), square(50, 50, 20), 0.0),
        (EMPTY, square(0, 0, 5), 0.0),
        (square(0, 0, 5), EMPTY, 0.0),
        (EMPTY, EMPTY, 1.0),
        (FULL, FULL, 1.0),
    ],
)
def test_j_of_known_squares(mask, truth, j):
    assert region_similarity(mask, truth).tolist() == [pytest.approx(j, abs=1e-15)]


# The reach of 100 x 120 px is ceil(.008 * 156.2) = 2 px.
@pytest.mark.parametrize(
    ("mask", "truth", "f"),
    [
        (square(10, 10, 40), square(10, 10, 40), 1.0),
        (square(10, 12, 40), square(10, 10, 40), 1.0),  # all within reach
        (square(50, 60, 20), square(10, 10, 20), 0.0),
        (EMPTY, square(10, 10, 5), 0.0),
        (square(10, 10, 5), EMPTY, 0.0),
        (EMPTY, EMPTY, 1.0),
        (FULL, EMPTY, 1.0),  # neither has a boundary
    ],
)
def test_f_of_known_squares(mask, truth, f):
    assert boundary_accuracy(mask, truth).tolist() == [pytest.approx(f, abs=1e-15)]


def test_f_of_a_square_shifted_beyond_reach():
    """Squares of 40 px, 5 px apart. A boundary is 4 * 40 + 1 pixels, offset by half a pixel: rows
    9 and 49, columns 9 and 49 (14 and 54) but for the outer corner. Found within 2 px are the long
    parts of both rows that overlap, and of the columns' ends what lies near a row."""
    mask, truth = square(10, 15, 40), square(10, 10, 40)
    plain = f_plainly(mask[0].numpy(), truth[0].numpy())
    assert boundary_accuracy(mask, truth).item() == pytest.approx(plain, abs=1e-12)
    assert 0.4 < plain < 0.7


def boundary_plainly(mask):
    height, width = mask.shape
    out = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1)):
                below, right = min(y + dy, height - 1), min(x + dx, width - 1)
                out[y, x] |= mask[y, x] != mask[below, right]
    return out


def f_plainly(mask, truth):
    """F by distances between all pairs of boundary pixels."""
    found, true = (np.argwhere(boundary_plainly(m)) for m in (mask, truth))
    reach = math.ceil(0.008 * math.hypot(*mask.shape))
    distance = ((found[:, None] - true[None]) ** 2).sum(-1)
    if not len(found) or not len(true):
        return float(len(found) == len(true))
    precision = (distance.min(1) <= reach**2).mean()
    recall = (distance.min(0) <= reach**2).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("size", [(40, 50), (9, 260), (300, 4)])
def test_j_and_f_of_ragged_masks_are_their_definitions(monkeypatch, size):
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
    assert np.array_equal(boundary(pair[0]).numpy(), [boundary_plainly(mask) for mask in masks])
    f = [f_plainly(*both) for both in zip(masks, truth, strict=True)]
    assert boundary_accuracy(*pair).tolist() == pytest.approx(f, abs=1e-12)
    assert len(set(f)) > 3
    j = [(a & b).sum() / (a | b).sum() for a, b in zip(masks, truth, strict=True)]
    assert region_similarity(*pair).tolist() == pytest.approx(j, abs=1e-12)


def test_boundaries_are_inside_the_picture():
    assert not boundary(FULL).any()
    assert boundary(square(0, 0, 3, (5, 6)))[0].int().tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_decay_is_the_first_quarter_less_the_last():
    falling = statistics(torch.linspace(1, 0, 101))
    assert falling.mean == pytest.approx(0.5)
    assert falling.recall == pytest.approx(50 / 101)  # above .5, not at it
    assert falling.decay == pytest.approx(0.75)
    # Frames 1..10: the quarters' edges 1, 3.25, 5.5, 7.75, 10 are rounded to 1, 3, 6, 8, 10.
    ten = statistics(torch.arange(10.0))
    assert ten.decay == pytest.approx((0 + 1 + 2) / 3 - (7 + 8 + 9) / 3)
    # Frames 1..7: the edges 2.5 and 5.5 are both rounded up.
    assert statistics(torch.arange(7.0) ** 2).decay == pytest.approx(
        (0 + 1 + 4) / 3 - (25 + 36) / 2
    )
    assert statistics(torch.tensor([0.7], dtype=torch.float64)).decay == 0


def test_more_frames_than_a_byte_counts_have_a_decay():
    assert statistics(torch.linspace(1, 0, 401)).decay == pytest.approx(0.75)


@pytest.mark.parametrize("truth", [EMPTY[0], EMPTY.int(), EMPTY[:, :5]])
def test_masks_that_do_not_fit_are_named(truth):
    for measure in (region_similarity, boundary_accuracy):
        with pytest.raises(ValueError, match="expected two stacks"):
            measure(EMPTY, truth)
