"""The DINO loss between student and teacher crops, and the entropy of the teacher's targets.

Legend: S crops of the student, T crops of the teacher (the first T of the student's), B images,
K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    check_center,
    check_float_tensor,
    check_inplace_backward,
    check_row_weights,
    check_same_device,
    check_temperature,
)
from .dispatch import choose_impl, compute_dtype
from .pairwise import flat_center, pairwise_cross_entropy, without_gradient
from .pairwise_arguments import Crops, PairwiseOptions
from .pairwise_torch import blocks_of_images

REDUCTIONS = ("mean", "none")


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    ignore_diagonal: bool = True,
    reduction: str = "mean",
    weights: Tensor | None = None,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the DINO loss, averaged over the pairs of different crops and over the batch.

    L = mean_{q != v} mean_b -sum_k softmax((t_q - c)/tau_t)_k log softmax(s_v/tau_s)_k

    (Caron et al. 2021, arXiv 2104.14294, Eq. 3 and Algorithm 1.) With ignore_diagonal=False the
    pairs q = v count as well. With weights w and P pairs:

    rows_vb = w_vb * sum_q CE(q, v, b),  L = sum_vb rows_vb / (P * B), the weights' sum is not used

    Half-precision logits are computed in fp32 and the gradient is rounded once. If student or
    teacher is fp64, everything is computed in fp64. An empty batch has loss 0. Infinite logits
    behave as in PyTorch's softmax and log_softmax: NaN for a row of only -inf, also where its
    weight is 0. Second derivatives are not implemented.

    Args:
        student: [S, B, K] logits, fp16/bf16/fp32/fp64; receives the gradient. Its first T crops
            are the teacher's T crops. Any strides; copied only if K is not contiguous.
        teacher: [T, B, K] logits, T >= 1, and S >= T with ignore_diagonal; receives no gradient.
        center: [K] or [1, K]; not modified. It may be updated before the backward pass.
        student_temp: > 0; a float, or a 0-d tensor on the logits' device, which receives no
            gradient. A tensor's value is not checked, and a captured CUDA graph reads it anew.
        teacher_temp: as student_temp.
        ignore_diagonal: leave out the pairs of a crop with itself, q = v. Pass False for crops that
            differ throughout, such as DINOv2's local student crops, and for S = T = 1.
        reduction: "mean" for L, "none" for the rows.
        weights: w, [B] or [S, B], any floating-point dtype, >= 0; receive no gradient. Their sign
            is checked on a CPU only: a GPU's values are not read by the host.
        inplace_backward: write the gradient over the student's logits, which saves S*B*K elements
            of memory. Do not read the logits after the backward pass. With retain_graph=True the
            gradient has memory of its own, for the sake of the next backward pass.
        impl: "triton" (two launches forward, one backward), "torch" (vectorised), or "auto".

    Returns: (loss, teacher_sum): a fp32 scalar in nats (rows [S, B] with "none"), and the [K] fp32
        sum of the raw teacher logits over T and B, for the center update. Both are fp64 if the
        logits are.

    Raises:
        ValueError: shapes or devices that do not match, temperatures that are not > 0, S = T = 1
            with ignore_diagonal, which leaves no pairs, another reduction, negative weights, or
            inplace_backward on logits that share memory. The message has the expected and the
            actual value.
        TypeError: logits, center or weights that are not floating-point tensors.

    """
    _check_logits(student, teacher, center, ignore_diagonal)
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    S, B, _ = student.shape
    weights = check_row_weights(weights, {"[B]": (B,), "[S, B]": (S, B)}, student)
    chosen = choose_impl(impl, (student, teacher))
    dtype = compute_dtype(student, teacher)
    student_temp = check_temperature("student_temp", student_temp, dtype, student.device)
    teacher_temp = check_temperature("teacher_temp", teacher_temp, dtype, student.device)
    teacher, center = without_gradient(teacher), flat_center(center)
    if inplace_backward:
        check_inplace_backward("teacher", student, teacher)
    if weights is not None:
        weights = weights.to(dtype).expand(S, B)
    return pairwise_cross_entropy(
        Crops(student, teacher, center, weights),
        PairwiseOptions(student_temp, teacher_temp, bool(ignore_diagonal), reduction == "none"),
        inplace_backward=inplace_backward,
        impl=chosen,
    )


@torch.no_grad()
def teacher_entropy(teacher: Tensor, center: Tensor, teacher_temp: float | Tensor) -> Tensor:
    """Compute the mean entropy of the teacher's centered and sharpened distributions.

    The loss is this entropy plus KL(teacher || student). An entropy near 0 or near log K indicates
    a collapsed teacher (Caron et al. 2021, section 5.3).

    Args:
        teacher: [T, B, K] logits, B >= 1.
        center: [K] or [1, K].
        teacher_temp: > 0; a float, or a 0-d tensor.

    Returns: the mean over T and B, a fp32 scalar in nats (fp64 for fp64 logits).

    Raises: ValueError, TypeError: as dino_loss; ValueError also for an empty batch.

    """
    _check_teacher(teacher, center)
    if teacher.shape[1] == 0:
        raise ValueError(f"teacher must have B >= 1 rows, got shape {tuple(teacher.shape)}")
    dtype = compute_dtype(teacher)
    temp = check_temperature("teacher_temp", teacher_temp, dtype, teacher.device)
    center = center.reshape(-1).to(dtype)
    row_entropy = center.new_zeros(teacher.shape[:2])
    for block in blocks_of_images(teacher.shape[1], teacher.shape[2], teacher.device):
        for q, crop in enumerate(teacher[:, block]):
            log_probs = torch.log_softmax(torch.sub(crop, center).div_(temp), dim=-1)
            row_entropy[q, block] = (log_probs.exp() * log_probs).sum(dim=-1)
    return row_entropy.mean().neg_()


def _check_logits(student: Tensor, teacher: Tensor, center: Tensor, ignore_diagonal: bool) -> None:
    check_float_tensor("student", student)
    if student.dim() != 3:
        raise ValueError(f"student must be [S, B, K], got shape {tuple(student.shape)}")
    _check_teacher(teacher, center)
    if student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            "student [S, B, K] and teacher [T, B, K] must have the same B and K, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.shape[0] < 1:
        raise ValueError(f"student must have S >= 1 crops, got shape {tuple(student.shape)}")
    if ignore_diagonal and student.shape[0] < teacher.shape[0]:
        raise ValueError(
            "with ignore_diagonal, student must contain the teacher's T crops, so S >= T, "
            f"got S = {student.shape[0]} and T = {teacher.shape[0]}"
        )
    if ignore_diagonal and student.shape[0] == 1:
        raise ValueError(
            "S = T = 1 leaves no pairs of different crops to compute the loss from: "
            "expected S >= 2 student crops, or ignore_diagonal=False"
        )
    check_same_device("student", student, "teacher", teacher)


def _check_teacher(teacher: Tensor, center: Tensor) -> None:
    check_float_tensor("teacher", teacher)
    if teacher.dim() != 3 or teacher.shape[0] < 1 or teacher.shape[2] < 1:
        raise ValueError(
            f"teacher must be [T, B, K] with T, K >= 1, got shape {tuple(teacher.shape)}"
        )
    check_center(center, teacher)
