"""Cross-entropies of DINOv2-style code, whose teacher outputs are already probabilities.

The teacher is centered (centered_softmax) or balanced (Sinkhorn-Knopp) separately, and the loss is

    CE(p, s) = -sum_k p_k log softmax(s/tau_s)_k

Rows of p need not sum to 1, and get no gradient. (Oquab et al. 2023, arXiv 2304.07193; Zhou et al.
2021, arXiv 2111.07832.)

Legend: S crops of the student, T crops of the teacher, B images, N tokens, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..checks import check_float_tensor, check_temperature
from ..dispatch import choose_impl, compute_dtype
from ..operators import ops
from ..pairwise_arguments import pair_count
from ..soft_cross_entropy import soft_cross_entropy
from .stacking import stack_crops


def cross_entropy(s: Tensor, t: Tensor, temp: float | Tensor, bw_inplace: bool = False) -> Tensor:
    """Compute -sum_k t_k log softmax(s/temp)_k of every row: the patch loss of iBOT and DINOv2.

    This is the `xformers.ops.cross_entropy` that dinov2/loss/ibot_patch_loss.py imports and negates
    and that no public xformers has.

    Args:
        s: [B, N, K] student logits (any leading dimensions), fp16/bf16/fp32/fp64; receives the
            gradient.
        t: teacher probabilities of the same shape, any of these dtypes; receives none. One of the
            two may have more leading dimensions, of size 1.
        temp: the student's temperature, > 0; a float, or a 0-d tensor on the logits' device.
        bw_inplace: write the gradient over `s` in the backward pass. Only use it if nothing reads
            `s` after the loss; see soft_cross_entropy's inplace_backward.

    Returns: [B, N], in nats, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes or devices that do not match, or a temperature that is not > 0.
        TypeError: logits or probabilities that are not floating-point tensors.

    """
    check_float_tensor("s", s)
    check_float_tensor("t", t)
    more, less = (s.shape, t.shape) if s.dim() > t.dim() else (t.shape, s.shape)
    if more != (1,) * (len(more) - len(less)) + less or len(less) < 2 or less[-1] < 1:
        raise ValueError(
            f"s and t must both be [B, N, K] with K >= 1, got {tuple(s.shape)} and {tuple(t.shape)}"
        )
    prototypes = less[-1]
    rows = soft_cross_entropy(
        s.reshape(1, -1, prototypes),
        t.reshape(1, -1, prototypes),
        student_temp=temp,
        inplace_backward=bw_inplace,
    )
    return rows.reshape(more[:-1])


def centered_softmax(logits: Tensor, center: Tensor, temp: float | Tensor) -> Tensor:
    """Compute the teacher's targets softmax((logits - center)/temp) in one pass over the logits.

    Args:
        logits: [.., K], fp16/bf16/fp32/fp64; receives no gradient.
        center: [K], any of these dtypes.
        temp: > 0; a float, or a 0-d tensor on the logits' device.

    Returns: probabilities of the shape of the logits, fp32 (fp64 for fp64 logits).

    Raises: ValueError, TypeError: a temperature that is not > 0, or on another device.

    """
    dtype = compute_dtype(logits)
    temp = check_temperature("teacher_temp", temp, dtype, logits.device)
    options = (0.0, temp) if isinstance(temp, Tensor) else (temp, None)
    rows = logits.detach().reshape(-1, logits.shape[-1])
    chosen = choose_impl("auto", (rows,))
    probs: Tensor = ops.sinkhorn_probabilities(rows, center.to(dtype), *options, chosen)
    return probs.view(logits.shape)


def dino_clstoken_loss(
    student_output_list: Sequence[Tensor] | Tensor,
    teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor,
    student_temp: float | Tensor = 0.1,
) -> Tensor:
    """Compute sum_q sum_v mean_b CE(p_q, s_v), DINOv2's DINOLoss (loss/dino_clstoken_loss.py).

    All pairs count, and the sum is not divided by their number: the caller does that. Lists are
    stacked, which copies them, unless they are the pieces of one tensor (`out.chunk(S)`): see
    stacking.stack_crops.

    Args:
        student_output_list: S tensors [B, K], logits, or one [S, B, K]; receives the gradient.
        teacher_out_softmaxed_centered_list: T tensors [B, K], probabilities, or one [T, B, K].
        student_temp: > 0; a float, or a 0-d tensor on the logits' device.

    Returns: a fp32 scalar in nats (fp64 for fp64 logits); 0 for an empty batch.

    Raises: ValueError, TypeError: as soft_cross_entropy and stacking.stack_crops.

    """
    student = stack_crops("student_output_list", student_output_list)
    probs = stack_crops("teacher_out_softmaxed_centered_list", teacher_out_softmaxed_centered_list)
    rows = soft_cross_entropy(student, probs, student_temp=student_temp)
    return rows.sum() / max(rows.shape[1], 1)


def dino_cross_entropy(
    student_logits: Tensor,
    teacher_probs: Tensor,
    *,
    student_temp: float | Tensor = 0.1,
    ignore_diagonal: bool = False,
    inplace_backward: bool = False,
) -> Tensor:
    """Compute the mean of CE(p_q, s_v) over pairs of crops and images, often written as an einsum.

    This is einsum("sbk,tbk->st") of log-probabilities and probabilities, with a zero diagonal if
    ignore_diagonal, summed and divided by -B*S*T, or by -(B*S*T - B*min(S, T)).

    Args:
        student_logits: [S, B, K], fp16/bf16/fp32/fp64; receives the gradient.
        teacher_probs: [T, B, K], any of these dtypes; receives none.
        student_temp: > 0; a float, or a 0-d tensor on the logits' device.
        ignore_diagonal: leave out the pairs of crop i with crop i.
        inplace_backward: write the gradient over the logits: see soft_cross_entropy.

    Returns: a fp32 scalar in nats (fp64 for fp64 logits); 0 for an empty batch.

    Raises:
        ValueError: shapes or devices that do not match, a temperature that is not > 0, or S = T = 1
            with ignore_diagonal, which leaves no pairs.
        TypeError: logits or probabilities that are not floating-point tensors.

    """
    student = check_float_tensor("student_logits", student_logits)
    probs = check_float_tensor("teacher_probs", teacher_probs)
    for name, tensor in (("student_logits", student), ("teacher_probs", probs)):
        if tensor.dim() != 3 or tensor.shape[0] < 1:
            raise ValueError(f"{name} must be 3-D with >= 1 crops, got shape {tuple(tensor.shape)}")
    pairs = pair_count(len(student), len(probs), ignore_diagonal)
    if pairs == 0:
        raise ValueError(
            "S = T = 1 with ignore_diagonal leaves no pairs of different crops to compute the loss "
            "from: expected at least two student or two teacher crops"
        )
    rows = soft_cross_entropy(
        student,
        probs,
        student_temp=student_temp,
        ignore_diagonal=ignore_diagonal,
        inplace_backward=inplace_backward,
    )
    return rows.sum() / (pairs * max(rows.shape[1], 1))
