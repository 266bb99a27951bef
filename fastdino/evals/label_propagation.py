"""Label propagation: labels of a video's first frame, carried on by similar patch features.

Sources: Jabri et al. 2020; Caron et al. 2021, section 4.2.2, and the authors' code.
Shapes: h x w patches, D channels, C labels (0 is background), n context frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.1
# Queries are processed in squares of this many patches per side. Each square is compared only with
# the patches within the radius: (16 + 2 * 12)^2 per context frame instead of all 60 x 104.
_SQUARE = 16


def propagate_video(
    features: Iterable[Tensor],
    first_labels: Tensor,
    *,
    n_last_frames: int,
    radius: int,
    topk: int,
) -> Iterator[Tensor]:
    """Yield the soft labels [C, h, w] of the second and each later frame.

    The context of a frame is the first frame and up to n_last_frames before it, with their
    predicted labels. Only the context is kept in memory.

    Args:
        features: [h, w, D] of every frame including the first, in order.
        first_labels: [C, h, w], one-hot, with the dtype and device of the features.
        radius, topk: see `propagate`.
    """
    frames = (F.normalize(frame, dim=-1) for frame in features)
    first = next(frames)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=n_last_frames)
    for frame in frames:
        context = [(first, first_labels), *recent]
        keys, labels = (torch.stack(parts) for parts in zip(*context, strict=True))
        soft = propagate(frame, keys, labels, radius=radius, topk=topk)
        recent.append((frame, soft))
        yield soft


def propagate(
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    *,
    radius: int,
    topk: int,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Average the labels of each patch's nearest patches, weighted by exp(cosine / temperature).

    Args:
        query: [h, w, D], L2-normalized.
        keys: [n, h, w, D], L2-normalized.
        labels: [n, C, h, w], of the keys.
        radius: compare patches at most this many rows and columns apart; 0 for no limit.
        topk: number of nearest patches over all context frames; ties with the last also count.

    Returns: [C, h, w].
    """
    height, width, _ = query.shape
    reach = radius or max(height, width)
    rows, columns = (torch.arange(side, device=query.device) for side in (height, width))
    out = labels.new_empty(labels.shape[1:])
    for top in range(0, height, _SQUARE):
        for left in range(0, width, _SQUARE):
            square = slice(top, top + _SQUARE), slice(left, left + _SQUARE)
            near = (
                slice(max(0, top - reach), top + _SQUARE + reach),
                slice(max(0, left - reach), left + _SQUARE + reach),
            )
            far_rows = (rows[square[0], None] - rows[near[0]]).abs() > reach
            far_columns = (columns[square[1], None] - columns[near[1]]).abs() > reach
            # [query row, query column, key row, key column] -> [queries, keys of a frame]
            far = far_rows[:, None, :, None] | far_columns[None, :, None, :]
            far = far.flatten(2).flatten(0, 1)
            near_keys, near_labels = keys[:, near[0], near[1]], labels[:, :, near[0], near[1]]
            cosine = query[square].flatten(0, 1) @ near_keys.flatten(0, 2).T
            cosine.masked_fill_(far.repeat(1, len(keys)), -torch.inf)
            best = cosine.topk(min(topk, cosine.shape[1]), dim=1).values
            # Subtracting the maximum keeps the ratios, and avoids overflow at low temperatures.
            weights = ((cosine - best[:, :1]) / temperature).exp_()
            weights.masked_fill_(cosine < best[:, -1:], 0)
            weights /= weights.sum(1, keepdim=True)
            averages = weights @ near_labels.flatten(2).transpose(1, 2).flatten(0, 1)
            out[:, square[0], square[1]] = averages.T.unflatten(1, query[square].shape[:2])
    return out


def one_hot_patches(mask: NDArray[np.uint8], classes: int, grid: tuple[int, int]) -> Tensor:
    """Return one-hot labels [C, h, w] float32 of a mask [H, W] with values below C.

    A patch has the label of the nearest pixel to its center.
    """
    height, width = grid
    small = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    patches = torch.from_numpy(np.array(small)).long()
    return F.one_hot(patches, classes).permute(2, 0, 1).float()


def hard_labels(soft: Tensor, patch_size: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Convert soft labels [C, h, w] to a mask [H, W] of `size`, as in the paper's code.

    Upsamples to pixels bilinearly, rescales each label to 0..1 over the image (so that a faint
    object is not lost against the background), takes the argmax, then resizes to the nearest pixel.
    """
    pixels = F.interpolate(soft[None], scale_factor=float(patch_size), mode="bilinear")[0]
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    # A constant label cannot be rescaled: it is absent if 0, and covers the image otherwise.
    rescaled = torch.where(high > low, (pixels - low) / (high - low), (high > 0).to(pixels.dtype))
    mask = Image.fromarray(rescaled.argmax(0).to(torch.uint8).cpu().numpy())
    return np.array(mask.resize((size[1], size[0]), Image.Resampling.NEAREST))
