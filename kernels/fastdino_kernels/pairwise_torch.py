"""The cross-entropy between teacher and student crops in vectorised PyTorch: CPU, MPS, fp64.

The algebra is that of the Triton kernels (pairwise.py has the equations), with powers of 2. A CPU
works on one block of images at a time, in buffers that stay in a core's cache: the pages of new
temporaries would cost more than the arithmetic.

Legend: S crops of the student (v), T crops of the teacher (q), b images of a block, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import compute_dtype, without_autocast
from .pairwise_arguments import Crops, PairwiseOptions

# Elements of one temporary per CPU thread, 1 MB in fp32. With smaller ones the interpreter's time
# per operation counts, with larger ones they leave the caches.
_BLOCK_ELEMENTS = 1 << 18


def forward(crops: Crops, options: PairwiseOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of the operator pairwise_forward.

    stats: [2, S + T, B], students first: the largest logit of a row, and the row's sum of
    2^((logit - largest)/(temp ln 2)); for teacher probabilities the second is their sum, the mass.
    """
    student, teacher, center, weights = crops
    S, T, B, K = crops.sizes()
    dtype, device = compute_dtype(student, teacher), student.device
    rows = torch.zeros(S, B, dtype=dtype, device=device)
    stats = torch.zeros(2, S + T, B, dtype=dtype, device=device)
    columns = K if center is not None else 0
    teacher_sum = torch.zeros(columns, dtype=dtype, device=device)
    center_used = teacher_sum.clone() if center is None else center.to(dtype, copy=True)
    scale = _log2_scale(options.student_temp, device)
    teacher_scale = _log2_scale(options.teacher_temp, device)
    buffers = Buffers(dtype, device)
    for block in blocks_of_images(B, K, device):
        targets = []
        for q, crop in enumerate(teacher[:, block]):
            if center is None:
                targets.append(_given(crop, dtype))
                stats[1, S + q, block] = targets[-1].mass
                continue
            logits = buffers.widened("wide", crop)
            teacher_sum += sum_of_rows(logits)
            below = torch.sub(logits, center_used, out=buffers.get(f"target {q}", crop.shape))
            largest = below.amax(dim=-1)
            probs = below.sub_(largest[:, None]).mul_(teacher_scale).exp2_()
            total = probs.sum(dim=-1)
            stats[0, S + q, block], stats[1, S + q, block] = largest, total
            targets.append(Target(probs, 1 / total, torch.ones_like(total)))
        pairs = _crops_and_targets(student[:, block], targets, options.ignore_diagonal, buffers)
        for views, target in pairs:
            logits = buffers.widened("wide", student[views, block])
            largest = logits.amax(dim=-1)
            z = buffers.get("z", logits.shape)
            torch.sub(logits, largest[..., None], out=z).mul_(scale)
            if target is not None:
                product = buffers.get("wide", z.shape)
                cross = torch.mul(z, target.values, out=product).sum(dim=-1) * target.factor
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
    S, _, B, K = crops.sizes()
    dtype, device = stats.dtype, student.device
    scale = _log2_scale(options.student_temp, device)
    teacher_scale = _log2_scale(options.teacher_temp, device)
    # d rows_v / d s_v = 1/student_temp * (mass * softmax(z_v) - sum_q P_q)
    factors = grad_result.to(dtype) * (math.log(2) / crops.divisor(options) * scale)
    factors = factors.expand(S, B) if weights is None else factors * weights
    buffers = Buffers(dtype, device)
    for block in blocks_of_images(B, K, device):
        targets = []
        for q, crop in enumerate(teacher[:, block]):
            if center is None:
                targets.append(_given(crop, dtype))
                continue
            largest, total = stats[:, S + q, block]
            logits = buffers.widened("wide", crop)
            below = torch.sub(logits, center, out=buffers.get(f"target {q}", crop.shape))
            probs = below.sub_(largest[:, None]).mul_(teacher_scale).exp2_()
            targets.append(Target(probs, 1 / total, torch.ones_like(total)))
        pairs = _crops_and_targets(student[:, block], targets, options.ignore_diagonal, buffers)
        for views, target in pairs:
            if target is None:
                grad[views, block] = 0
                continue
            g = factors[views, block]
            largest, total = stats[:, views, block]
            logits = buffers.widened("z", student[views, block])
            z = torch.sub(logits, largest[..., None], out=buffers.get("z", logits.shape))
            share = z.mul_(scale).exp2_().mul_((g * target.mass / total)[..., None])
            # The incoming scale is included: the only rounding to half is the write.
            subtracted = target.values, (g * target.factor)[..., None]
            if grad.dtype == dtype:
                torch.addcmul(share, *subtracted, value=-1, out=grad[views, block])
            else:
                grad[views, block] = share.addcmul_(*subtracted, value=-1)


@dataclass(frozen=True)
class Target:
    """The student's targets factor * values, and their sums `mass` [b]."""

    values: Tensor  # [b, K]
    factor: Tensor  # [b]
    mass: Tensor


def sum_of_rows(x: Tensor) -> Tensor:
    """Return the sum [K] over the rows [n, K]; on a CPU by a product, which is faster there."""
    if x.device.type != "cpu":
        return x.sum(dim=0)
    with without_autocast(x.device):  # which would round the product to bf16
        return x.new_ones(len(x)) @ x


def _given(probs: Tensor, dtype: torch.dtype) -> Target:
    probs = probs.to(dtype)
    mass = probs.sum(dim=-1)
    return Target(probs, torch.ones_like(mass), mass)


class Buffers:
    """Memory for the temporaries of a block, which the next blocks use again."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.memory: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return the buffer of a name as a tensor of a shape, with any values."""
        size = math.prod(shape)
        memory = self.memory.get(name)
        if memory is None or len(memory) < size:
            memory = self.memory[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return memory[:size].view(shape)

    def widened(self, name: str, logits: Tensor) -> Tensor:
        """Return logits in the buffers' dtype: themselves, or a copy in the buffer of a name."""
        if logits.dtype == self.dtype:
            return logits
        return self.get(name, logits.shape).copy_(logits)


def _crops_and_targets(
    student: Tensor, targets: Sequence[Target], ignore_diagonal: bool, buffers: Buffers
) -> Iterator[tuple[slice, Target | None]]:
    """Yield slices of the student's crops [S, b, K] that fit the caches, with their targets.

    With ignore_diagonal, a crop that the teacher has too has the other crops as target, or None if
    there are no others. A target is valid until the next one.
    """
    S, T = len(student), len(targets) if ignore_diagonal else 0
    for v in range(min(S, T)):
        yield slice(v, v + 1), _sum_of([t for q, t in enumerate(targets) if q != v], buffers)
    step = S if student.device.type != "cpu" else max(1, _cached() // student[0].numel())
    if S > T:
        target = _sum_of(targets, buffers)
    for v in range(T, S, step):
        yield slice(v, min(v + step, S)), target


def _sum_of(targets: Sequence[Target], buffers: Buffers) -> Target | None:
    if len(targets) < 2:
        return targets[0] if targets else None
    first, *others = targets
    total, mass = buffers.get("sum", first.values.shape), first.mass
    torch.mul(first.values, first.factor[:, None], out=total)
    for target in others:
        total.addcmul_(target.values, target.factor[:, None])
        mass = mass + target.mass
    return Target(total, torch.ones_like(mass), mass)


def _cached() -> int:
    """Return how many elements of a temporary the caches of all threads hold."""
    return torch.get_num_threads() * _BLOCK_ELEMENTS


def blocks_of_images(batch: int, prototypes: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of the batch: on a CPU, pieces that fit its caches; elsewhere, the whole.

    torch.compile gets the whole too: it cannot trace the number of threads, and fuses operations.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(0, batch)
        return
    step = max(torch.get_num_threads(), _cached() // prototypes)
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _log2_scale(temp: float | Tensor, device: torch.device) -> float | Tensor:
    """Return 1/(temp ln 2), on a CPU as a number, which saves dispatching an operand per block."""
    scale = 1 / (temp * math.log(2))
    return scale.item() if isinstance(scale, Tensor) and device.type == "cpu" else scale
