"""Plain transcription of the paper's equations, the oracle of tests and benchmarks.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers",
arXiv 2104.14294; AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101. The functions are not fast, do
not modify their inputs, and compute in the dtype of their inputs: pass float64 for the exact
result, half precision for the result of plain PyTorch.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CLIP_EPS = 1e-6
UNIT_EPS = 1e-12
KOLEO_EPS = 1e-8


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    ignore_diagonal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the DINO loss of student [S, B, K] and teacher [T, B, K] logits (Eq. 3).

        L = mean_{q != v} mean_b -sum_k softmax((t_q - c)/tau_t)_k log softmax(s_v/tau_s)_k

    Without ignore_diagonal, the mean is over all pairs.

    Returns: (loss, teacher_sum): a scalar in nats, and the sum [K] of `teacher` over T and B.
    """
    log_probs = torch.log_softmax(student / student_temp, dim=-1)
    targets = torch.softmax((teacher.detach() - center.reshape(-1)) / teacher_temp, dim=-1)
    loss = torch.zeros((), dtype=student.dtype, device=student.device)
    pairs = 0
    for q, target in enumerate(targets):
        for v, log_prob in enumerate(log_probs):
            if ignore_diagonal and q == v:
                continue
            cross_entropy = -(target * log_prob).sum(dim=-1)
            loss = loss + cross_entropy.sum() / max(len(cross_entropy), 1)
            pairs += 1
    return loss / pairs, teacher.detach().sum(dim=(0, 1))


def soft_cross_entropy(
    student: Tensor, probs: Tensor, student_temp: float | Tensor, ignore_diagonal: bool
) -> Tensor:
    """Compute sum_q -sum_k probs_qk log softmax(s_v/tau_s)_k for each crop v and image: [S, B].

    q runs over the T crops of `probs` [T, B, K], with ignore_diagonal over those other than v.
    """
    log_probs = torch.log_softmax(student / student_temp, dim=-1)
    rows = torch.zeros(student.shape[:2], dtype=student.dtype, device=student.device)
    for q, target in enumerate(probs.detach()):
        cross_entropy = -(target * log_probs).sum(dim=-1)
        if ignore_diagonal and q < len(student):
            own = torch.arange(len(student), device=student.device)[:, None] == q
            cross_entropy = cross_entropy.masked_fill(own, 0)
        rows = rows + cross_entropy
    return rows


def patch_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute iBOT's loss of masked patch tokens, logits [N, K] (Zhou et al. 2021, Eq. 2).

        L = sum_i w_i * -sum_k softmax((t_i - c)/tau_t)_k log softmax(s_i/tau_s)_k / denominator

    The weights are 1 and the denominator is N by default.

    Returns: (loss, teacher_sum): a scalar in nats, and the sum [K] of `teacher` over N.
    """
    log_probs = torch.log_softmax(student / student_temp, dim=-1)
    targets = torch.softmax((teacher.detach() - center.reshape(-1)) / teacher_temp, dim=-1)
    rows = -(targets * log_probs).sum(dim=-1)
    if weights is not None:
        rows = rows * weights
    divisor = max(len(rows), 1) if denominator is None else denominator
    return rows.sum() / divisor, teacher.detach().sum(dim=0)


def teacher_entropy(teacher: Tensor, center: Tensor, teacher_temp: float | Tensor) -> Tensor:
    """Compute the mean entropy in nats of softmax((t - c)/tau_t) over the rows of [T, B, K]."""
    log_probs = torch.log_softmax((teacher - center.reshape(-1)) / teacher_temp, dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean()


def update_center(center: Tensor, teacher_sum: Tensor, rows: int, momentum: float) -> Tensor:
    """Return m*c + (1 - m) * teacher_sum/rows (Eq. 4); rows are those of all ranks together."""
    return momentum * center + (1 - momentum) * (teacher_sum / rows)


def ema_update(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor
) -> list[Tensor]:
    """Return m*theta_t + (1 - m)*theta_s (section 3.1) as new tensors."""
    return [momentum * t + (1 - momentum) * s for t, s in zip(teacher, student)]


def clip_grad_norms(grads: Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], list[Tensor]]:
    """Scale each gradient by max_norm/(norm + 1e-6) if that is < 1; also return the norms."""
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    factors = [max_norm / (norm + CLIP_EPS) for norm in norms]
    clipped = [
        grad * factor if factor < 1 else grad.clone() for grad, factor in zip(grads, factors)
    ]
    return clipped, norms


def clip_grad_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor]:
    """Scale all by min(1, max_norm/(norm + 1e-6)), as DINOv2; also return the global norm."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    factor = torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
    return [grad * factor for grad in grads], norm


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float | Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (parameter, exp_avg, exp_avg_sq) after AdamW's step number `step` >= 1 (Algorithm 2).

    p <- p - lr*wd*p - lr * (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)
    """
    beta1, beta2 = betas
    m = beta1 * exp_avg + (1 - beta1) * gradient
    v = beta2 * exp_avg_sq + (1 - beta2) * gradient**2
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return parameter - lr * weight_decay * parameter - lr * update, m, v


def unit_rows(weight: Tensor) -> Tensor:
    """Divide each row of [K, D] by its L2 norm, at least 1e-12: a weight norm of magnitude 1."""
    return weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(UNIT_EPS)


def sinkhorn_knopp(teacher: Tensor, temp: float | Tensor, n_iterations: int) -> Tensor:
    """Balance the teacher's logits [N, K] of all ranks, in the order of SwAV, DINOv2 and DINOv3.

    Q = exp(x/tau)^T; Q /= sum(Q); then n times: Q /= sums of its rows (prototypes), Q /= K,
    Q /= sums of its columns (samples), Q /= N; finally Q *= N (Caron et al. 2020, arXiv 2006.09882;
    facebookresearch/dinov2). It overflows in fp32 for x/tau > 88.

    Returns: targets [N, K], whose rows sum to 1.
    """
    Q = torch.exp(teacher / temp).t()
    K, N = Q.shape
    Q = Q / Q.sum()
    for _ in range(n_iterations):
        Q = Q / Q.sum(dim=1, keepdim=True) / K
        Q = Q / Q.sum(dim=0, keepdim=True) / N
    return (Q * N).t()


def koleo_loss(x: Tensor, others: Tensor, first: int, topk: int, eps: float = KOLEO_EPS) -> Tensor:
    """Compute -mean log ||x_i - x_j|| over the `topk` nearest neighbours j of each row of x [B, D].

    Sablayrolles et al. 2019, arXiv 1806.03198, as in facebookresearch/dinov2: rows of norm 1;
    neighbours by dot product; eps in the norm, elementwise in the difference, and in the
    logarithm. `others` [M, D] are the rows of all ranks, of which row first + i is x_i itself.
    """
    x, others = (rows / rows.norm(dim=1, keepdim=True).clamp_min(eps) for rows in (x, others))
    dots = x @ others.t()
    own = torch.arange(len(x), device=x.device)
    dots = dots.index_put((own, own + first), torch.full_like(dots[:, 0], -1))
    nearest = dots.topk(topk, dim=1).indices
    distances = (x[:, None] - others[nearest] + eps).norm(dim=2)
    return -(distances + eps).log().mean()


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of the Gram matrices of normalised tokens [G, P, D]."""
    student, teacher = (
        tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(UNIT_EPS)
        for tokens in (student, teacher)
    )
    return (student @ student.mT - teacher @ teacher.mT).square().mean()
