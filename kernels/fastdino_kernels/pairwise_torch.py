"""The cross-entropy between teacher and student crops in vectorised PyTorch: CPU, MPS, fp64.

The algebra is that of the Triton kernels (pairwise.py has the equations), with powers of 2: on a
CPU torch.exp2 takes half the time of torch.exp. A CPU works on one block of images at a time, so
that every temporary stays in a core's cache.

Legend: S crops of the student (v), T crops of the teacher (q), b images of a block, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import compute_dtype
from .pairwise_arguments import Crops, PairwiseOptions

# Elements of one temporary per CPU thread: 256 KB in fp32, so that a few stay in a core's L2.
_BLOCK_ELEMENTS = 1 << 16


def forward(crops: Crops, options: PairwiseOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of the operator pairwise_forward.

    stats: [2, S + T, B], students first: the largest logit of a row, and the row's sum of
    2^((logit - largest)/(temp ln 2)); for teacher probabilities the second is their sum, the mass.
    """
    student, teacher, center, weights = crops
    student_temp, teacher_temp, ignore_diagonal, *_ = options
    S, T, B, K = crops.sizes()
    dtype, device = compute_dtype(student, teacher), student.device
    rows = torch.zeros(S, B, dtype=dtype, device=device)
    stats = torch.zeros(2, S + T, B, dtype=dtype, device=device)
    columns = K if center is not None else 0
    teacher_sum = torch.zeros(columns, dtype=dtype, device=device)
    center_used = teacher_sum.clone() if center is None else center.to(dtype, copy=True)
    scale = _log2_scale(student_temp, device)
    for block in blocks_of_images(B, K, device):
        targets = []
        for q, crop in enumerate(teacher[:, block]):
            if center is None:
                targets.append(_given(crop, dtype))
                stats[1, S + q, block] = targets[-1].mass
                continue
            crop = crop.to(dtype)
            for row in crop if device.type == "cpu" else crop.sum(dim=0, keepdim=True):
                teacher_sum += row  # a block has few rows: PyTorch's sum over them is slow
            z, largest = _scaled(crop.sub(center_used), dtype, _log2_scale(teacher_temp, device))
            probs = z.exp2_()
            total = probs.sum(dim=-1)
            stats[0, S + q, block], stats[1, S + q, block] = largest, total
            targets.append(Target(probs.div_(total[:, None]), torch.ones_like(total)))
        for views, target in _crops_and_targets(student[:, block], targets, ignore_diagonal):
            z, largest = _scaled(student[views, block], dtype, scale)
            if target is not None:
                cross = torch.mul(z, target.probs).sum(dim=-1)
            total = z.exp2_().sum(dim=-1)
            stats[0, views, block], stats[1, views, block] = largest, total
            if target is not None:
                rows[views, block] = (target.mass * total.log2() - cross) * math.log(2)
    if weights is not None:
        rows *= weights
    result = rows if crops.returns_rows(options) else rows.sum() / crops.divisor(options)
    return result, teacher_sum, center_used, stats


def backward(
    grad: Tensor,
    grad_result: Tensor,
    crops: Crops,
    stats: Tensor,
    options: PairwiseOptions,
) -> None:
    """Write the result of the operator pairwise_backward to `grad`, which may be the student."""
    student, teacher, center, weights = crops
    student_temp, teacher_temp, ignore_diagonal, *_ = options
    S, _, B, K = crops.sizes()
    dtype, device = stats.dtype, student.device
    student_scale = _log2_scale(student_temp, device)
    # d rows_v / d s_v = 1/student_temp * (mass * softmax(z_v) - sum_q P_q)
    factors = grad_result.to(dtype) * (math.log(2) / crops.divisor(options) * student_scale)
    # If all rows have the same factor (the loss is a mean), the targets are scaled only once.
    factor = factors if weights is None and not crops.returns_rows(options) else None
    factors = factors.expand(S, B) if weights is None else factors * weights
    for block in blocks_of_images(B, K, device):
        targets = []
        for q, crop in enumerate(teacher[:, block]):
            if center is None:
                target = _given(crop, dtype)
            else:
                largest, total = stats[:, S + q, block]
                logits = crop.to(dtype).sub(center)
                z, _ = _scaled(logits, dtype, _log2_scale(teacher_temp, device), largest)
                probs = z.exp2_()
                target = Target(probs.div_(total[:, None]), torch.ones_like(total))
            targets.append(target if factor is None else target.times(factor))
        for views, others in _crops_and_targets(student[:, block], targets, ignore_diagonal):
            if others is None:
                grad[views, block] = 0
                continue
            g = factors[views, block, None]
            largest, total = stats[:, views, block]
            z, _ = _scaled(student[views, block], dtype, student_scale, largest)
            share = z.exp2_().mul_((others.mass / total)[..., None])
            # The incoming scale is included: the only rounding to half is this write.
            if factor is None:
                torch.mul(share.sub_(others.probs), g, out=grad[views, block])
            else:
                torch.sub(share, others.probs, out=grad[views, block])


@dataclass(frozen=True)
class Target:
    """The student's targets: `probs` [b, K] and their sums `mass` [b]."""

    probs: Tensor
    mass: Tensor

    def times(self, factor: Tensor) -> Target:
        """Multiply both by one factor []."""
        return Target(self.probs * factor, self.mass * factor)


def _given(probs: Tensor, dtype: torch.dtype) -> Target:
    probs = probs.to(dtype)
    return Target(probs, probs.sum(dim=-1))


def _crops_and_targets(
    student: Tensor, targets: Sequence[Target], ignore_diagonal: bool
) -> Iterator[tuple[slice, Target | None]]:
    """Yield slices of the student's crops [S, b, K] that fit the caches, with their targets.

    With ignore_diagonal, a crop that the teacher has too has the other crops as target, or None if
    there are no others.
    """
    S, T = len(student), len(targets) if ignore_diagonal else 0
    for v in range(min(S, T)):
        yield slice(v, v + 1), _sum_of([t for q, t in enumerate(targets) if q != v])
    step = S if student.device.type != "cpu" else max(1, _cached() // student[0].numel())
    target = _sum_of(targets)
    for v in range(T, S, step):
        yield slice(v, min(v + step, S)), target


def _sum_of(targets: Sequence[Target]) -> Target | None:
    if not targets:
        return None
    probs = sum((t.probs for t in targets[1:]), targets[0].probs)
    return Target(probs, sum((t.mass for t in targets[1:]), targets[0].mass))


def _cached() -> int:
    """Return how many elements of a temporary the caches of all threads hold."""
    return torch.get_num_threads() * _BLOCK_ELEMENTS


def blocks_of_images(batch: int, prototypes: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of the batch: on a CPU, pieces that fit its caches; elsewhere, the whole."""
    step = batch
    if device.type == "cpu":
        step = max(torch.get_num_threads(), _cached() // prototypes)
    for start in range(0, batch, max(step, 1)):
        yield slice(start, min(start + step, batch))


def _log2_scale(temp: float | Tensor, device: torch.device) -> float | Tensor:
    """Return 1/(temp ln 2), on a CPU as a number, which saves dispatching an operand per block."""
    scale = 1 / (temp * math.log(2))
    return scale.item() if isinstance(scale, Tensor) and device.type == "cpu" else scale


def _scaled(
    logits: Tensor, dtype: torch.dtype, scale: float | Tensor, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (logits - largest) * scale as a new tensor of `dtype`, and each row's largest logit.

    Scaling first would pass a rounding error of 1e23 to exp2 for logits of 1e30.
    """
    wide = logits.to(dtype)
    if largest is None:
        largest = wide.amax(dim=-1)
    subtract = wide.sub if wide is logits else wide.sub_
    return subtract(largest[..., None]).mul_(scale), largest
