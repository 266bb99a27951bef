"""Label propagation against the paper's equations, evaluated in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastdino.evals import label_propagation
from fastdino.evals.label_propagation import (
    hard_labels,
    one_hot_patches,
    propagate,
    propagate_video,
)


def reference_labels(query, keys, labels, *, radius, topk, temperature=0.1):
    """l_q = sum_k a_qk l_k / sum_k a_qk with a_qk = exp(cos(q, k) / tau), per patch in float64.

    k runs over the topk nearest patches of all frames within the radius, by rows and by columns.
    """
    out = torch.zeros(labels.shape[1:], dtype=torch.float64)
    for i, j in np.ndindex(query.shape[:2]):
        near = []
        for n, p, q in np.ndindex(keys.shape[:3]):
            if not radius or max(abs(p - i), abs(q - j)) <= radius:
                a, b = query[i, j].double(), keys[n, p, q].double()
                cosine = float(a @ b / a.norm() / b.norm())
                near.append((math.exp(cosine / temperature), n, p, q))
        near = sorted(near, reverse=True)[:topk]
        total = math.fsum(weight for weight, *_ in near)
        for weight, n, p, q in near:
            out[:, i, j] += weight / total * labels[n, :, p, q].double()
    return out


def random_context(frames, height, width):
    torch.manual_seed(0)
    query = F.normalize(torch.randn(height, width, 6, dtype=torch.float64), dim=-1)
    keys = F.normalize(torch.randn(frames, height, width, 6, dtype=torch.float64), dim=-1)
    labels = torch.rand(frames, 3, height, width, dtype=torch.float64)
    return query, keys, labels / labels.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("frames", "height", "width", "radius", "topk", "square"),
    [
        (1, 5, 7, 2, 3, 16),
        (3, 6, 5, 1, 5, 2),  # many squares
        (2, 5, 7, 0, 4, 3),  # no limit
        (2, 3, 4, 9, 50, 16),  # radius above the size, topk above the number of patches
        (2, 4, 4, 1, 50, 3),  # topk above the number of patches within the radius
        (1, 1, 6, 2, 1, 4),
    ],
)
def test_labels_match_the_paper(monkeypatch, frames, height, width, radius, topk, square):
    monkeypatch.setattr(label_propagation, "_SQUARE", square)
    query, keys, labels = random_context(frames, height, width)
    expected = reference_labels(query, keys, labels, radius=radius, topk=topk)
    soft = propagate(query, keys, labels, radius=radius, topk=topk)
    torch.testing.assert_close(soft, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(soft.sum(0), torch.ones(height, width, dtype=torch.float64))
    single = propagate(query.float(), keys.float(), labels.float(), radius=radius, topk=topk)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_ties_with_the_last_of_the_topk_count():
    query = torch.ones(1, 1, 2) / math.sqrt(2)
    keys = query.expand(4, 1, 1, 2)
    labels = torch.tensor([1.0, 0, 0, 0])[:, None, None, None]
    assert propagate(query, keys, labels, radius=1, topk=2).item() == pytest.approx(0.25)


def test_low_temperatures_do_not_overflow():
    query, keys, labels = random_context(2, 3, 3)
    soft = propagate(query, keys, labels, radius=0, topk=3, temperature=1e-3)
    nearest = propagate(query, keys, labels, radius=0, topk=1)
    assert soft.isfinite().all()
    torch.testing.assert_close(soft, nearest, rtol=0, atol=0.5)


@pytest.mark.parametrize("last", [0, 2])
def test_context_is_the_first_frame_and_the_last_few(last):
    torch.manual_seed(0)
    frames = [torch.randn(4, 5, 6, dtype=torch.float64) for _ in range(6)]
    first = random_context(1, 4, 5)[2][0]
    known = [first]
    for i, soft in enumerate(
        propagate_video(iter(frames), first, n_last_frames=last, radius=2, topk=3), start=1
    ):
        context = [0, *range(max(1, i - last), i)]
        keys = torch.stack([frames[j] for j in context])
        labels = torch.stack([known[j] for j in context])
        known.append(reference_labels(frames[i], keys, labels, radius=2, topk=3))
        torch.testing.assert_close(soft, known[i], rtol=1e-9, atol=1e-12)
    assert len(known) == len(frames)


def test_one_hot_label_of_a_patch_is_that_of_one_pixel():
    labels = np.zeros((8, 12), np.uint8)
    labels[2:6, 5:9] = 2
    patches = one_hot_patches(labels, 4, (4, 6))
    nearest = labels[1::2, 1::2]
    assert patches.tolist() == [(nearest == number).tolist() for number in range(4)]


def reference_hard_labels(soft, patch_size, size):
    """Upsample bilinearly, rescale each label to 0..1, take the argmax; numpy float64."""

    def axis(n):
        at = np.clip((np.arange(n * patch_size) + 0.5) / patch_size - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, n - 1), at - low

    values = soft.double().numpy()
    top, bottom, y = axis(values.shape[1])
    left, right, x = axis(values.shape[2])
    y, x = y[:, None], x[None]
    upper = values[:, top][:, :, left] * (1 - x) + values[:, top][:, :, right] * x
    lower = values[:, bottom][:, :, left] * (1 - x) + values[:, bottom][:, :, right] * x
    pixels = upper * (1 - y) + lower * y
    for label in pixels:
        if label.max() > 0:
            label -= label.min()
            label /= label.max()
    rows = np.floor((np.arange(size[0]) + 0.5) * pixels.shape[1] / size[0]).astype(int)
    columns = np.floor((np.arange(size[1]) + 0.5) * pixels.shape[2] / size[1]).astype(int)
    return pixels.argmax(0)[rows][:, columns]


@pytest.mark.parametrize("size", [(12, 20), (16, 32), (8, 16)])
def test_hard_labels_match_the_paper(size):
    torch.manual_seed(1)
    soft = torch.rand(3, 3, 5, dtype=torch.float64) * torch.tensor([1, 0.1, 0.4])[:, None, None]
    mask = hard_labels(soft, 4, size)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, reference_hard_labels(soft, 4, size))
    assert set(np.unique(mask)) == {0, 1, 2}  # the faint label is kept


def test_hard_labels_of_constant_labels():
    soft = torch.zeros(3, 2, 2)
    soft[0] = 1
    assert not hard_labels(soft, 4, (8, 8)).any()
    assert (hard_labels(soft[[1, 0, 2]], 4, (8, 8)) == 1).all()
