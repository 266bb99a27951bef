"""The loss as people compute it today, from its equations: what ours is compared with.

Each takes student [S, B, K], teacher [T, B, K], center [K] and two temperatures, and returns (loss,
teacher_sum [K]). Legend: S crops of the student, T of the teacher, B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]


def paper_eager(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Caron et al. 2021 as the paper's code runs it, a log-softmax for every pair.

    Half-precision logits are divided by the temperature as they are, and autocast takes the softmax
    in fp32: so it is under the mixed precision of the paper's training command.
    """
    half = student.dtype != torch.float32
    with torch.autocast(student.device.type, dtype=student.dtype, enabled=half):
        crops = (student.flatten(0, 1) / student_temp).chunk(len(student))
        targets = torch.softmax((teacher.flatten(0, 1) - center) / teacher_temp, dim=-1)
        total, pairs = torch.zeros((), device=student.device), 0
        for q, target in enumerate(targets.detach().chunk(len(teacher))):
            for v, crop in enumerate(crops):
                if v != q:
                    cross_entropy = torch.sum(-target * torch.log_softmax(crop, dim=-1), dim=-1)
                    total = total + cross_entropy.mean()
                    pairs += 1
        return total / pairs, teacher.flatten(0, 1).sum(dim=0)


def einsum_form(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor]:
    """All pairs at once by an einsum over [T, S], in fp32, as DINOv3 and lightly do."""
    log_probs = torch.log_softmax(student.float() / student_temp, dim=-1)
    targets = torch.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    cross_entropies = -torch.einsum("tbk,sbk->ts", targets, log_probs)
    pairs = len(teacher) * len(student) - len(teacher)
    same = torch.eye(len(teacher), len(student), dtype=torch.bool, device=student.device)
    loss = cross_entropies.masked_fill(same, 0.0).sum() / (pairs * student.shape[1])
    return loss, teacher.float().sum(dim=(0, 1))
