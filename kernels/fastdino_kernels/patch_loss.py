"""The loss between masked patch tokens and the teacher's targets of the same tokens.

iBOT, DINOv2 and DINOv3 use it. Legend: N masked patch tokens of a batch (rows), K prototypes.
"""

from __future__ import annotations

from torch import Tensor

from .checks import (
    check_center,
    check_denominator,
    check_float_tensor,
    check_inplace_backward,
    check_row_weights,
    check_same_device,
    check_temperature,
)
from .dispatch import choose_impl, compute_dtype
from .pairwise import flat_center, pairwise_cross_entropy, without_gradient
from .pairwise_arguments import Crops, PairwiseOptions


def patch_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the weighted cross-entropy of each student row with the teacher's row of its token.

    L = sum_i w_i CE_i / denominator
    CE_i = -sum_k softmax((t_i - c)/tau_t)_k log softmax(s_i/tau_s)_k

    (Zhou et al. 2021, arXiv 2111.07832, Eq. 2; Oquab et al. 2023, arXiv 2304.07193.) In DINOv2, w_i
    is 1 over the number of masked tokens of the image of token i, and the denominator is the number
    of images, masked or not. With the center of sinkhorn_center the targets are those of
    Sinkhorn-Knopp. The logits are read once in the forward pass and once in the backward pass.

    Precision, infinite logits and second derivatives are as in dino_loss. Without rows the loss is
    0, with a gradient of 0 for what the logits depend on.

    Args:
        student: [N, K] logits, fp16/bf16/fp32/fp64, N >= 0; receives the gradient. Any strides;
            copied for Triton if K is not contiguous.
        teacher: [N, K] logits of the same tokens, in the same order; receives no gradient.
        center: [K] or [1, K]; not modified. It may be updated before the backward pass.
        student_temp: > 0; a float, or a 0-d tensor on the logits' device, which receives no
            gradient. A tensor's value is not checked, and a captured CUDA graph reads it anew.
        teacher_temp: as student_temp.
        weights: w, [N], any floating-point dtype, >= 0; receive no gradient; 1 by default. Their
            sign is checked on a CPU only: a GPU's values are not read by the host.
        denominator: > 0; a number, or a 0-d tensor as for student_temp, also of integers; N by
            default.
        inplace_backward: write the gradient over the student's logits, which saves N*K elements of
            memory. Do not read the logits after the backward pass. With retain_graph=True the
            gradient has memory of its own, for the sake of the next backward pass.
        impl: "triton" (two launches forward, one backward), "torch" (vectorised), or "auto".

    Returns: (loss, teacher_sum): a fp32 scalar in nats, and the [K] fp32 sum of the raw teacher
        logits over N, for the center update. Both are fp64 if the logits are.

    Raises:
        ValueError: shapes or devices that do not match, temperatures or a denominator that are not
            > 0, negative weights, or inplace_backward on logits that share memory. The message has
            the expected and the actual value.
        TypeError: logits, center or weights that are not floating-point tensors.

    """
    _check_logits(student, teacher)
    check_center(center, teacher)
    weights = check_row_weights(weights, {"[N]": (len(student),)}, student)
    chosen = choose_impl(impl, (student, teacher))
    dtype, device = compute_dtype(student, teacher), student.device
    student_temp = check_temperature("student_temp", student_temp, dtype, device)
    teacher_temp = check_temperature("teacher_temp", teacher_temp, dtype, device)
    divisor = check_denominator(denominator, dtype, device)
    teacher, center = without_gradient(teacher), flat_center(center)
    if inplace_backward:
        check_inplace_backward("teacher", student, teacher)
    if weights is not None:
        weights = weights.to(dtype)[None]
    # One student and one teacher crop whose images are the tokens.
    return pairwise_cross_entropy(
        Crops(student[None], teacher[None], center, weights),
        PairwiseOptions(student_temp, teacher_temp, ignore_diagonal=False, divisor=divisor),
        inplace_backward=inplace_backward,
        impl=chosen,
    )


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    check_float_tensor("student", student)
    check_float_tensor("teacher", teacher)
    if student.dim() != 2 or student.shape != teacher.shape or student.shape[1] < 1:
        raise ValueError(
            "student and teacher must both be [N, K] with K >= 1, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    check_same_device("student", student, "teacher", teacher)
