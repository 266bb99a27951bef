"""The DINO loss and the patch loss of the inputs of the last layers: no matrix of logits exists.

Legend: S crops of the student, T crops of the teacher, B images, N masked patch tokens (rows),
D features, K prototypes.
"""

from __future__ import annotations

from torch import Tensor

from .checks import (
    check_center,
    check_denominator,
    check_row_weights,
    check_same_device,
    check_temperature,
)
from .dispatch import choose_impl, without_autocast
from .last_layer import check_layer, product_dtype
from .linear_pairwise import Layers, LinearOptions, linear_pairwise
from .pairwise import flat_center
from .pairwise_arguments import pair_count
from .row_chunks import check_chunk_rows


def linear_dino_loss(
    x_student: Tensor,
    x_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    ignore_diagonal: bool = True,
    weights: Tensor | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute dino_loss of the logits x W^T without making them all.

    The forward pass multiplies a chunk of images at a time, computes the chunk's loss and, if they
    are wanted, the gradients of x_student and weight_student; the backward pass only multiplies
    these by the incoming gradient. Memory beyond the arguments and the gradients: the logits of a
    chunk instead of (S + T)*B*K, under autocast the weights in its dtype, and the gradient of a
    half-precision weight in fp32. The FLOPs are those of the layers.

    Products are computed in the dtype of x and weight, or under autocast in autocast's, as by
    nn.Linear. Everything else is as in dino_loss, in fp32. Gradients of half precision are summed
    up in fp32 and rounded once at the end; where a matrix product cannot write fp32 (elsewhere than
    on CUDA), each chunk's share is rounded first.

    Args:
        x_student: [S, B, D], the last layer's input, fp16/bf16/fp32/fp64; receives a gradient.
        x_teacher: [T, B, D']; receives no gradient.
        weight_student: [K, D]; receives a gradient, in fp32 until the end of the backward pass,
            unless it requires none, as a frozen last layer. last_layer_weight returns it for plain
            and for weight-normed layers. No bias, no DTensor.
        weight_teacher: [K, D']; receives no gradient.
        center, student_temp, teacher_temp, ignore_diagonal, weights, impl: as in dino_loss.
        chunk_rows: most images of a chunk, >= 1; None: as many as have 96 MiB of logits, on a CPU
            24 MiB, in multiples of 64 if there are more (K = 65536, S + T = 12, bf16: 64).

    Returns: (loss, teacher_sum), as dino_loss.

    Raises:
        ValueError, TypeError: as dino_loss, for x and weights instead of logits; ValueError also
            for x and weight of different dtypes outside an autocast region, and for chunk_rows.
        RuntimeError: a second derivative.

    Example:
        >>> x = torch.randn(10, 16, 256, requires_grad=True)
        >>> layer = nn.Linear(256, 4096, bias=False)
        >>> weight = last_layer_weight(layer)
        >>> loss, teacher_sum = linear_dino_loss(
        ...     x, x[:2], weight, weight, torch.zeros(4096), student_temp=0.1, teacher_temp=0.04
        ... )
        >>> loss.backward()

    """
    layers = _check_layers(
        x_student, x_teacher, weight_student, weight_teacher, ("[S, B, D]", "[T, B, D]")
    )
    S, B, _ = x_student.shape
    T = len(x_teacher)
    pairs = pair_count(S, T, ignore_diagonal)
    if pairs == 0:
        raise ValueError(
            f"S = {S} and T = {T} leave no pairs of different crops to compute the loss from: "
            "expected S >= 2 student crops, or ignore_diagonal=False"
        )
    if ignore_diagonal and S < T:
        raise ValueError(
            "with ignore_diagonal, x_student must contain the teacher's T crops, so S >= T, "
            f"got S = {S} and T = {T}"
        )
    weights = check_row_weights(weights, {"[B]": (B,), "[S, B]": (S, B)}, x_student)
    total, teacher_sum = _total(
        layers, center, weights, (student_temp, teacher_temp),
        LinearOptions(bool(ignore_diagonal), impl, chunk_rows),
    )  # fmt: skip
    return total / max(pairs * B, 1), teacher_sum


def linear_patch_loss(
    x_student: Tensor,
    x_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute patch_loss of the logits x W^T without making them all.

    As linear_dino_loss, for rows that are paired one to one. For N = 3771 tokens, D = 256 and
    K = 65536 the logits of student and teacher are 988 MB in bf16; a chunk's are 100 MB.

    Args:
        x_student: [N, D], the last layer's input; receives a gradient.
        x_teacher: [N, D'] of the same tokens, in the same order; receives no gradient.
        weight_student, weight_teacher: as in linear_dino_loss.
        center, student_temp, teacher_temp, weights, denominator, impl: as in patch_loss.
        chunk_rows: most rows of a chunk, >= 1; None: as in linear_dino_loss (K = 65536: 384 in half
            precision on a GPU, 48 in fp32 on a CPU).

    Returns: (loss, teacher_sum), as patch_loss.

    Raises: ValueError, TypeError, RuntimeError: as linear_dino_loss and patch_loss.

    """
    layers = _check_layers(
        x_student, x_teacher, weight_student, weight_teacher, ("[N, D]", "[N, D]")
    )
    N = len(x_student)
    weights = check_row_weights(weights, {"[N]": (N,)}, x_student)
    divisor = check_denominator(denominator, layers.result_dtype(), x_student.device)
    # One student and one teacher crop whose images are the tokens.
    layers = layers._replace(x_student=x_student[None], x_teacher=x_teacher[None])
    total, teacher_sum = _total(
        layers,
        center,
        weights,
        (student_temp, teacher_temp),
        LinearOptions(False, impl, chunk_rows),
    )
    if N == 0:  # a count of tokens, as denominator, may be 0 too
        divisor = 1.0
    return total / (N if divisor is None else divisor), teacher_sum


def _check_layers(
    x_student: Tensor,
    x_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    dims: tuple[str, str],
) -> Layers:
    check_layer("x_student", x_student, "weight_student", weight_student, dims[0])
    check_layer("x_teacher", x_teacher, "weight_teacher", weight_teacher, dims[1])
    check_same_device("x_student", x_student, "x_teacher", x_teacher)
    if x_student.shape[-2] != x_teacher.shape[-2]:
        raise ValueError(
            f"x_student {dims[0]} and x_teacher {dims[1]} must have the same number of rows, "
            f"got shapes {tuple(x_student.shape)} and {tuple(x_teacher.shape)}"
        )
    if len(weight_student) != len(weight_teacher):
        raise ValueError(
            "weight_student and weight_teacher must have the same number K of prototypes, "
            f"got {len(weight_student)} and {len(weight_teacher)}"
        )
    return Layers(
        x_student,
        x_teacher,
        weight_student,
        weight_teacher,
        product_dtype("x_student", x_student, "weight_student", weight_student),
        product_dtype("x_teacher", x_teacher, "weight_teacher", weight_teacher),
    )


def _total(
    layers: Layers,
    center: Tensor,
    weights: Tensor | None,
    temps: tuple[float | Tensor, float | Tensor],
    options: LinearOptions,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the rows' cross-entropies, and the teacher's column sums."""
    check_center(center, layers.weight_teacher.t())
    check_chunk_rows(options.chunk_rows)
    dtype, device = layers.result_dtype(), layers.x_student.device
    options = options._replace(impl=choose_impl(options.impl, layers[:4]))
    student_temp = check_temperature("student_temp", temps[0], dtype, device)
    teacher_temp = check_temperature("teacher_temp", temps[1], dtype, device)
    if weights is not None:
        weights = weights.to(dtype).expand(layers.x_student.shape[:2])
    with without_autocast(device):
        return linear_pairwise(
            layers, flat_center(center), weights, (student_temp, teacher_temp), options
        )
