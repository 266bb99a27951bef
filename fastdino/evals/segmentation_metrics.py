"""How well masks follow an object: region similarity J and boundary accuracy F of DAVIS.

Source: Perazzi et al. 2016, section 5; Pont-Tuset et al. 2017, and the benchmark's own code for
what the papers leave open: the boundary's pixels, the disk, empty masks, the bins of the decay.
Legend: T frames of H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# A boundary pixel counts as found within this share of the image's diagonal, rounded up to pixels.
BOUNDARY_TOLERANCE = 0.008
RECALL_THRESHOLD = 0.5
# Pixels whose boundaries are widened at once: 32 frames of 480p.
_CHUNK_PIXELS = 1 << 24


@dataclass(frozen=True)
class Statistics:
    """Of one measure over an object's frames.

    The mean, the share of frames above .5, by how much the last quarter is worse than the first.
    """

    mean: float
    recall: float
    decay: float


def statistics(values: Tensor) -> Statistics:
    """Mean, recall and decay of J or F [T], T at least 1; neighbouring quarters share a frame."""
    scores = values.double().cpu().numpy()
    # The benchmark counts frames from 1; the 1e-10 makes halves round up.
    edges = np.round(np.linspace(1, len(scores), 5) + 1e-10).astype(int) - 1
    first, last = scores[: edges[1] + 1], scores[edges[3] :]
    return Statistics(
        mean=float(scores.mean()),
        recall=float((scores > RECALL_THRESHOLD).mean()),
        decay=float(first.mean() - last.mean()),
    )


def region_similarity(masks: Tensor, truth: Tensor) -> Tensor:
    """J, intersection over union [T] float64, of masks [T, H, W] bool; 1 where both are empty.

    Raises: ValueError: masks that are not two equal stacks of booleans.
    """
    _check_masks(masks, truth)
    intersection = (masks & truth).sum((1, 2)).double()
    union = (masks | truth).sum((1, 2)).double()
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def boundary_accuracy(
    masks: Tensor, truth: Tensor, *, tolerance: float = BOUNDARY_TOLERANCE
) -> Tensor:
    """F = 2 P R / (P + R) [T] float64 of the boundaries of masks [T, H, W] bool.

    P is the share of the masks' boundary pixels within reach of a true one, R of the true ones
    within reach of one of the masks'. Without any boundary pixel a share is 1: F is 1 where neither
    mask has a boundary, and 0 where one has.

    Args:
        masks, truth: one device.
        tolerance: the reach, a share of the diagonal.

    Raises: ValueError: masks that are not two equal stacks of booleans.
    """
    _check_masks(masks, truth)
    height, width = masks.shape[1:]
    disk = _disk(math.ceil(tolerance * math.hypot(height, width)), masks.device)
    frames = max(1, _CHUNK_PIXELS // (height * width))
    scores = []
    for found, true in zip(masks.split(frames), truth.split(frames), strict=True):
        found, true = boundary(found), boundary(true)
        precision = _share_within(found, _dilate(true, disk))
        recall = _share_within(true, _dilate(found, disk))
        both = precision + recall
        scores.append(torch.where(both > 0, 2 * precision * recall / both.clamp(min=1e-300), 0.0))
    return torch.cat(scores)


def boundary(masks: Tensor) -> Tensor:
    """Pixels [T, H, W] that differ from the one to the right, below, or both; masks are bool.

    Beyond the picture's edge the mask goes on as it ends: the edge is no boundary.
    """
    right = torch.cat((masks[..., 1:], masks[..., -1:]), -1)
    below = torch.cat((masks[..., 1:, :], masks[..., -1:, :]), -2)
    both = torch.cat((right[..., 1:, :], right[..., -1:, :]), -2)
    return (masks ^ right) | (masks ^ below) | (masks ^ both)


def _disk(radius: int, device: torch.device) -> Tensor:
    offsets = torch.arange(-radius, radius + 1, device=device)
    return offsets[:, None] ** 2 + offsets**2 <= radius**2


def _dilate(masks: Tensor, disk: Tensor) -> Tensor:
    """Pixels [T, H, W] that a disk [2r + 1, 2r + 1] around any pixel of the masks reaches."""
    height = masks.shape[1]
    out = torch.zeros_like(masks)
    # Row by row of the disk, each a segment of some half-width: a running maximum along x.
    for half, offsets in _rows_by_width(disk).items():
        wide = F.max_pool2d(masks[:, None].float(), (1, 2 * half + 1), 1, (0, half))[:, 0] > 0
        for y in offsets:
            if abs(y) >= height:
                continue
            source = slice(max(0, -y), height - max(0, y))
            target = slice(max(0, y), height - max(0, -y))
            out[:, target] |= wide[:, source]
    return out


def _rows_by_width(disk: Tensor) -> dict[int, list[int]]:
    """Half-width in pixels -> the rows of a disk that have it, counted from its middle."""
    rows: dict[int, list[int]] = {}
    for row, pixels in enumerate(disk.sum(1).tolist()):
        rows.setdefault(pixels // 2, []).append(row - disk.shape[0] // 2)
    return rows


def _share_within(boundaries: Tensor, reach: Tensor) -> Tensor:
    count = boundaries.sum((1, 2)).double()
    return torch.where(count > 0, (boundaries & reach).sum((1, 2)) / count.clamp(min=1), 1.0)


def _check_masks(masks: Tensor, truth: Tensor) -> None:
    if masks.ndim != 3 or masks.shape != truth.shape or {masks.dtype, truth.dtype} != {torch.bool}:
        raise ValueError(
            "expected two stacks [T, H, W] of booleans of one shape, got "
            f"{tuple(masks.shape)} {masks.dtype} and {tuple(truth.shape)} {truth.dtype}"
        )
