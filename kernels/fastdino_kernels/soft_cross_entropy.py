"""Cross-entropy between student crops and teacher probabilities.

DINOv2, DINOv3, iBOT and SwAV use it with targets from Sinkhorn-Knopp or their own softmax.
Legend: S crops of the student, T crops of the teacher, B images (or any other rows, such as
patches), K prototypes.
"""

from __future__ import annotations

from torch import Tensor

from .checks import check_float_tensor, check_inplace_backward, check_same_device, check_temperature
from .dispatch import choose_impl, compute_dtype
from .pairwise import pairwise_cross_entropy, without_gradient
from .pairwise_arguments import Crops, PairwiseOptions


def soft_cross_entropy(
    student: Tensor,
    probs: Tensor,
    *,
    student_temp: float | Tensor,
    ignore_diagonal: bool = False,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Compute the cross-entropy of each student crop with the sum of the teacher's crops.

    rows_vb = sum_q -sum_k P_qbk log softmax(s_vb/tau_s)_k, over q != v with ignore_diagonal.

    The rows of `probs` need not sum to 1. Precision, infinite logits and second derivatives are as
    in dino_loss.

    Args:
        student: [S, B, K] logits, fp16/bf16/fp32/fp64; receives the gradient.
        probs: [T, B, K], T >= 1, any of these dtypes; receives no gradient.
        student_temp: > 0; a float, or a 0-d tensor on the logits' device, its value unchecked.
        ignore_diagonal: leave out the pairs of a crop with itself, q = v.
        inplace_backward: write the gradient over the student's logits, as in dino_loss.
        impl: "triton", "torch" or "auto".

    Returns: rows [S, B], fp32, in nats (fp64 if either input is).

    Raises:
        ValueError: shapes or devices that do not match, a temperature that is not > 0, or
            inplace_backward on logits that share memory. The message has the expected and the
            actual value.
        TypeError: logits or probabilities that are not floating-point tensors.

    """
    check_float_tensor("student", student)
    check_float_tensor("probs", probs)
    if student.dim() != 3 or probs.dim() != 3 or min(len(student), len(probs)) < 1:
        raise ValueError(
            "student must be [S, B, K] and probs [T, B, K] with S, T >= 1, "
            f"got {tuple(student.shape)} and {tuple(probs.shape)}"
        )
    if student.shape[1:] != probs.shape[1:] or student.shape[2] < 1:
        raise ValueError(
            "student [S, B, K] and probs [T, B, K] must have the same B and K >= 1, "
            f"got {tuple(student.shape)} and {tuple(probs.shape)}"
        )
    check_same_device("student", student, "probs", probs)
    chosen = choose_impl(impl, (student, probs))
    dtype = compute_dtype(student, probs)
    temp = check_temperature("student_temp", student_temp, dtype, student.device)
    probs = without_gradient(probs)
    if inplace_backward:
        check_inplace_backward("probs", student, probs)
    rows, _ = pairwise_cross_entropy(
        Crops(student, probs, None),
        PairwiseOptions(temp, 1.0, ignore_diagonal, rows=True),
        inplace_backward=inplace_backward,
        impl=chosen,
    )
    return rows
