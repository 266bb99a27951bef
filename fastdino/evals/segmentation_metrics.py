"""Segmentation metrics: the Jaccard index, and J (region) and F (boundary) of DAVIS.

Sources: Perazzi et al. 2016, section 5; Pont-Tuset et al. 2017. Details that the papers leave open
follow the benchmark's code: boundary pixels, the disk, empty masks, the bins of the decay.
Shapes: T frames of H x W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Boundary pixels match within this share of the image's diagonal, rounded up to whole pixels.
BOUNDARY_TOLERANCE = 0.008
RECALL_THRESHOLD = 0.5
_CHUNK_PIXELS = 1 << 24  # pixels per dilation, about 40 frames of 480p


def statistics(values: Tensor) -> dict[str, float]:
    """Summarize J or F over an object's frames [T], T >= 1.

    Returns: mean; recall, the share of frames above 0.5; decay, the mean of the first quarter
        minus the mean of the last. Neighboring quarters share a frame.
    """
    scores = values.double().cpu().numpy()
    # The benchmark counts frames from 1; the 1e-10 makes halves round up.
    edges = np.round(np.linspace(1, len(scores), 5) + 1e-10).astype(int) - 1
    first, last = scores[: edges[1] + 1], scores[edges[3] :]
    return {
        "mean": float(scores.mean()),
        "recall": float((scores > RECALL_THRESHOLD).mean()),
        "decay": float(first.mean() - last.mean()),
    }


def jaccard(masks: Tensor, truth: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute the intersection over union of masks with the truth.

    Args:
        masks, truth: bool [..., H, W], broadcast against each other.
        valid: bool [..., H, W], the pixels that count; None for all.

    Returns: float64 [...], from 0 to 1; NaN where the union is empty.
    """
    both, either = masks & truth, masks | truth
    if valid is not None:
        both, either = both & valid, either & valid
    return both.sum((-2, -1)).double() / either.sum((-2, -1))


def region_similarity(masks: Tensor, truth: Tensor) -> Tensor:
    """Compute J, the Jaccard index [T] float64 of bool masks [T, H, W]; 1 if both are empty.

    Raises: ValueError: the masks are not two boolean stacks of one shape.
    """
    _check_masks(masks, truth)
    return jaccard(masks, truth).nan_to_num(1.0)


def boundary_accuracy(masks: Tensor, truth: Tensor) -> Tensor:
    """Compute F = 2 P R / (P + R), [T] float64, of the boundaries of bool masks [T, H, W].

    P is the share of the masks' boundary pixels within the tolerance of a true boundary pixel, and
    R the reverse. The share of no pixels is 1, so F is 1 if neither mask has a boundary and 0 if
    only one has. Masks and truth are on one device.

    Raises: ValueError: the masks are not two boolean stacks of one shape.
    """
    _check_masks(masks, truth)
    height, width = masks.shape[1:]
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(height, width))
    frames = max(1, _CHUNK_PIXELS // (height * width))
    scores = []
    for chunk, true_chunk in zip(masks.split(frames), truth.split(frames), strict=True):
        predicted, true = boundary(chunk), boundary(true_chunk)
        precision = _share_within(predicted, _dilate(true, radius))
        recall = _share_within(true, _dilate(predicted, radius))
        both = precision + recall
        scores.append(torch.where(both > 0, 2 * precision * recall / both.clamp(min=1e-300), 0.0))
    return torch.cat(scores)


def boundary(masks: Tensor) -> Tensor:
    """Mark pixels of bool masks [T, H, W] that differ from the one to the right, below, or both.

    Masks are extended past the edge of the image, so the edge itself is no boundary.
    """
    right = torch.cat((masks[..., 1:], masks[..., -1:]), -1)
    below = torch.cat((masks[..., 1:, :], masks[..., -1:, :]), -2)
    both = torch.cat((right[..., 1:, :], right[..., -1:, :]), -2)
    return (masks ^ right) | (masks ^ below) | (masks ^ both)


def _dilate(masks: Tensor, radius: int) -> Tensor:
    """Dilate masks [T, H, W] with a disk."""
    height = masks.shape[1]
    out = torch.zeros_like(masks)
    # Each row of the disk is a segment: dilate along x by its half-width, then shift along y.
    half_widths = {y: math.isqrt(radius**2 - y**2) for y in range(-radius, radius + 1)}
    for half in set(half_widths.values()):
        wide = F.max_pool2d(masks[:, None].float(), (1, 2 * half + 1), 1, (0, half))[:, 0] > 0
        for y, half_width in half_widths.items():
            if half_width == half and abs(y) < height:
                source = slice(max(0, -y), height - max(0, y))
                target = slice(max(0, y), height - max(0, -y))
                out[:, target] |= wide[:, source]
    return out


def _share_within(boundaries: Tensor, region: Tensor) -> Tensor:
    count = boundaries.sum((1, 2)).double()
    return torch.where(count > 0, (boundaries & region).sum((1, 2)) / count.clamp(min=1), 1.0)


def _check_masks(masks: Tensor, truth: Tensor) -> None:
    if masks.ndim != 3 or masks.shape != truth.shape or {masks.dtype, truth.dtype} != {torch.bool}:
        raise ValueError(
            "expected two boolean stacks [T, H, W] of one shape, got "
            f"{tuple(masks.shape)} {masks.dtype} and {tuple(truth.shape)} {truth.dtype}"
        )
