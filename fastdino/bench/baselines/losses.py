"""The DINO loss as other implementations compute it: a loop over pairs, and one einsum.

The baselines of `fastdino bench` and of the kernel benchmarks share them. The equations are in
fastdino_kernels.reference, which both are checked against.

Legend: S student crops, T teacher crops, B images, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# An fp32 sum of B*K products of one sign is 1.5e-4 off on a CPU at B*K = 2^19. The gradient does
# not depend on it.
EINSUM_TOLERANCE = 5e-4


def paper_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor]:
    """Return the loss and the sum over teacher rows as the paper's code computes them, pairwise.

    Caron et al. 2021, Algorithm 1: one log-softmax per pair of different crops. Under autocast,
    half-precision logits are divided by the temperature before the softmax upcasts them.

    Args:
        student: [S, B, K] logits.
        teacher: [T, B, K] logits.
        center: [K] or [1, K].

    Returns: a scalar in nats, and [K].
    """
    crops = (student.flatten(0, 1) / student_temp).chunk(len(student))
    rows = teacher.flatten(0, 1)
    targets = F.softmax((rows - center) / teacher_temp, dim=-1).detach().chunk(len(teacher))
    total, pairs = torch.zeros((), device=student.device), 0
    for q, target in enumerate(targets):
        for v, crop in enumerate(crops):
            if v != q:
                cross_entropy = torch.sum(-target * F.log_softmax(crop, dim=-1), dim=-1)
                total = total + cross_entropy.mean()
                pairs += 1
    return total / pairs, rows.sum(dim=0)


def einsum_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor]:
    """Return the same by one einsum over all pairs in fp32, as DINOv3 and lightly do."""
    log_probs = F.log_softmax(student.float() / student_temp, dim=-1)
    teacher = teacher.float()
    targets = F.softmax((teacher - center) / teacher_temp, dim=-1)
    cross_entropies = -torch.einsum("tbk,sbk->ts", targets, log_probs)
    pairs = len(teacher) * (len(student) - 1)
    same = torch.eye(len(teacher), len(student), dtype=torch.bool, device=student.device)
    loss = cross_entropies.masked_fill(same, 0.0).sum() / (pairs * student.shape[1])
    return loss, teacher.sum(dim=(0, 1))
