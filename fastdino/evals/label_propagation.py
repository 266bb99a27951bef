"""Labels of a video's first frame carried to the others by the likeness of patch features.

Source: Jabri et al. 2020; Caron et al. 2021, section 4.2.2, and the authors' code.
Legend: h x w patches, D channels, C labels (0 is the background), n context frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.1
# Queries are taken in squares of so many patches: only what lies within the radius of a square is
# compared with it, (16 + 2 * 12)^2 patches a context frame instead of all 60 x 104.
_SQUARE = 16


def propagate_video(
    features: Iterable[Tensor],
    first_labels: Tensor,
    *,
    n_last_frames: int,
    radius: int,
    topk: int,
    temperature: float = TEMPERATURE,
) -> Iterator[Tensor]:
    """The soft labels [C, h, w] of the second frame, the third, and so on.

    Each frame takes its labels from the first and from up to n_last_frames before it, as they were
    found. Only these are held in memory.

    Args:
        features: [h, w, D] of every frame, the first included, in order.
        first_labels: [C, h, w], the first frame's, one-hot; dtype and device of the features.
        n_last_frames, radius, topk, temperature: as in `propagate`.
    """
    frames = (F.normalize(frame, dim=-1) for frame in features)
    first = next(frames)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=n_last_frames)
    for frame in frames:
        context = [(first, first_labels), *recent]
        keys, labels = (torch.stack(parts) for parts in zip(*context, strict=True))
        found = propagate(frame, keys, labels, radius=radius, topk=topk, temperature=temperature)
        recent.append((frame, found))
        yield found


def propagate(
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    *,
    radius: int,
    topk: int,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Labels [C, h, w]: of each patch the mean of its nearest patches', by exp(cosine/temperature).

    Args:
        query: [h, w, D], L2-normalised.
        keys: [n, h, w, D], likewise; labels: [n, C, h, w], theirs.
        radius: a patch is compared with those at most so many rows and columns away; 0: with all.
        topk: how many, over all context frames, count. Those equal to the last of them count too.
    """
    height, width, _ = query.shape
    reach = radius or max(height, width)
    rows, columns = (torch.arange(side, device=query.device) for side in (height, width))
    out = labels.new_empty(labels.shape[1:])
    for top in range(0, height, _SQUARE):
        for left in range(0, width, _SQUARE):
            here = slice(top, top + _SQUARE), slice(left, left + _SQUARE)
            near = (
                slice(max(0, top - reach), top + _SQUARE + reach),
                slice(max(0, left - reach), left + _SQUARE + reach),
            )
            row_near = (rows[here[0], None] - rows[None, near[0]]).abs() <= reach
            column_near = (columns[here[1], None] - columns[None, near[1]]).abs() <= reach
            # [query row, query column, key row, key column] -> [queries, keys of a frame]
            allowed = row_near[:, None, :, None] & column_near[None, :, None, :]
            allowed = allowed.flatten(2).flatten(0, 1)
            square = query[here]
            found = _nearest_labels(
                square.flatten(0, 1),
                keys[:, near[0], near[1]].flatten(1, 2),
                labels[:, :, near[0], near[1]].flatten(2),
                allowed,
                topk=topk,
                temperature=temperature,
            )
            out[:, here[0], here[1]] = found.T.unflatten(1, square.shape[:2])
    return out


def _nearest_labels(
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    allowed: Tensor,
    *,
    topk: int,
    temperature: float,
) -> Tensor:
    """[Q, C] for queries [Q, D], keys [n, S, D], their labels [n, C, S], pairs allowed [Q, S]."""
    cosine = query @ keys.flatten(0, 1).T
    cosine.masked_fill_(~allowed.repeat(1, len(keys)), -torch.inf)
    best = cosine.topk(min(topk, cosine.shape[1]), dim=1).values
    # Relative to the nearest one's: the same shares, and no overflow at low temperatures.
    weights = ((cosine - best[:, :1]) / temperature).exp_()
    weights.masked_fill_(cosine < best[:, -1:], 0)
    return (weights / weights.sum(1, keepdim=True)) @ labels.transpose(1, 2).flatten(0, 1)


def one_hot_patches(labels: np.ndarray, classes: int, grid: tuple[int, int]) -> Tensor:
    """[C, h, w] float32 of a mask [H, W] uint8 with labels below C: a pixel stands for a patch."""
    height, width = grid
    small = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    patches = torch.from_numpy(np.array(small)).long()
    return F.one_hot(patches, classes).permute(2, 0, 1).float()


def hard_labels(soft: Tensor, patch_size: int, size: tuple[int, int]) -> np.ndarray:
    """A mask [H, W] uint8 of soft labels [C, h, w], as the paper's code draws it.

    Bilinear to pixels; each label stretched to 0..1 over the picture, so that a faint object is not
    lost against the background; the largest; then nearest pixels to `size`, (H, W).
    """
    pixels = F.interpolate(soft[None], scale_factor=float(patch_size), mode="bilinear")[0]
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    # A label equal everywhere has nothing to stretch: it is nowhere, or it is all there is.
    stretched = torch.where(high > low, (pixels - low) / (high - low), (high > 0).to(pixels.dtype))
    mask = Image.fromarray(stretched.argmax(0).to(torch.uint8).cpu().numpy())
    return np.array(mask.resize((size[1], size[0]), Image.Resampling.NEAREST))
