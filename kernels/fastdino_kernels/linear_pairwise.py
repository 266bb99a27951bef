"""Pairwise cross-entropy of the logits of two linear layers, in chunks of images.

linear_dino_loss and linear_patch_loss are built on it. The forward pass computes the loss and its
gradients, so that only the logits of one chunk exist at a time. For each chunk, with the functions
that pairwise.py calls:

    s = x W^T,  t = x' W'^T     the logits of student and teacher
    total += sum of the rows' cross-entropies
    s     <- d total / d s      written over the logits
    dx     = s W
    dW    += s^T x              in fp32

The backward pass multiplies dx and dW by the incoming gradient, in place unless the graph is kept
for another backward pass, so that no gradient is held twice.

FLOPs: 2 K D per row of the teacher, 6 K D per row of the student: those of the two layers, with
their backward pass. The logits of a chunk are written, read twice and overwritten, and the
student's are read twice more. Each chunk also reads the student's weight twice and the teacher's
once, and reads and writes dW.

Legend: S crops of the student, T crops of the teacher, B images, D features, K prototypes.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operators import LIBRARY, keeps_graph, ops, register_fake
from .pairwise_arguments import Crops, PairwiseOptions
from .row_chunks import Logits, add_product_, product, result_dtype, row_chunks

# fp16 has no numbers below 6e-8. The gradients of a chunk's logits are multiplied by this, as by a
# GradScaler's 2^16 for the mean over 4096 rows; the mean is taken in fp32, when they are summed up.
_FP16_SCALE = 16.0

# Results: total [], the weighted sum of the rows' cross-entropies; the teacher's column sums [K];
# gradients of total by x_student [S, B, D] and weight_student [K, D], or [0] if not wanted, times
# gradient_scale. All have the compute dtype. chunk_rows: most images of a chunk.
LIBRARY.define(
    "linear_pairwise(Tensor x_student, Tensor x_teacher, Tensor weight_student, "
    "Tensor weight_teacher, Tensor center, Tensor? weights, Tensor? student_temp_t, "
    "Tensor? teacher_temp_t, float student_temp, float teacher_temp, bool ignore_diagonal, "
    "str impl, ScalarType student_dtype, ScalarType teacher_dtype, SymInt? chunk_rows, "
    "bool x_gradient, bool weight_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


class Layers(NamedTuple):
    """The last layers of student and teacher and their inputs; no bias."""

    x_student: Tensor  # [S, B, D]
    x_teacher: Tensor  # [T, B, D'], whose D' may differ
    weight_student: Tensor  # [K, D]
    weight_teacher: Tensor  # [K, D']
    student_dtype: torch.dtype  # of the products
    teacher_dtype: torch.dtype

    def result_dtype(self) -> torch.dtype:
        """Return the dtype of the loss."""
        return result_dtype(self.student_dtype, self.teacher_dtype)


class LinearOptions(NamedTuple):
    """Options of the loss; chunk_rows: most images of a chunk, None: chosen from their size."""

    ignore_diagonal: bool
    impl: str
    chunk_rows: int | None


def linear_pairwise(
    layers: Layers,
    center: Tensor,
    weights: Tensor | None,
    temps: tuple[float | Tensor, float | Tensor],
    options: LinearOptions,
) -> tuple[Tensor, Tensor]:
    """Return (total [], teacher_sum [K]); the student's rows and weight receive a gradient.

    Args:
        layers: with whatever requires a gradient.
        center: [K].
        weights: [S, B] of the compute dtype, or None.
        temps: of student and teacher, each a number or a 0-d tensor.
        options: as the operator's.

    """
    enabled = torch.is_grad_enabled()
    wanted = [enabled and x.requires_grad for x in (layers.x_student, layers.weight_student)]
    return _LinearPairwise.apply(
        layers.x_student,
        layers.weight_student,
        layers.x_teacher.detach(),
        layers.weight_teacher.detach(),
        center,
        weights,
        *(temp if isinstance(temp, Tensor) else None for temp in temps),
        *(0.0 if isinstance(temp, Tensor) else float(temp) for temp in temps),
        options.ignore_diagonal,
        options.impl,
        layers.student_dtype,
        layers.teacher_dtype,
        options.chunk_rows,
        *wanted,
    )


class _LinearPairwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_student: Tensor, weight_student: Tensor, x_teacher: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        total, teacher_sum, dx, dweight = ops.linear_pairwise(
            x_student, x_teacher, weight_student, *rest
        )
        ctx.save_for_backward(dx, dweight)
        ctx.dtypes, ctx.others = (x_student.dtype, weight_student.dtype), (None,) * (1 + len(rest))
        *_, student_dtype, _, _, ctx.x_gradient, ctx.weight_gradient = rest
        ctx.scale = _gradient_scale(student_dtype)
        ctx.mark_non_differentiable(teacher_sum)
        ctx.set_materialize_grads(False)  # or zeros [K] would be made for teacher_sum
        return total, teacher_sum

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor | None, _grad_teacher_sum: None
    ) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None, None, *ctx.others)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the loss has no second derivative: expected a backward pass without create_graph"
            )
        dx, dweight = ctx.saved_tensors
        factor = grad_total / ctx.scale
        x_dtype, weight_dtype = ctx.dtypes
        return (
            _times(dx, factor).to(x_dtype) if ctx.x_gradient else None,
            _times(dweight, factor).to(weight_dtype) if ctx.weight_gradient else None,
            *ctx.others,
        )


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply, in place unless another backward pass may read the gradient."""
    if torch.compiler.is_compiling() or keeps_graph():
        return gradient * factor
    return gradient.mul_(factor)


def _gradient_scale(student_dtype: torch.dtype) -> float:
    return _FP16_SCALE if student_dtype == torch.float16 else 1.0


def _loss_and_gradients(
    x_student: Tensor,
    x_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    center: Tensor,
    weights: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student_temp_t, teacher_temp_t, student_temp, teacher_temp, ignore_diagonal, impl = flat[:6]
    student_dtype, teacher_dtype, chunk_rows, x_gradient, weight_gradient = flat[6:]
    options = PairwiseOptions(
        student_temp if student_temp_t is None else student_temp_t,
        teacher_temp if teacher_temp_t is None else teacher_temp_t,
        ignore_diagonal,
        divisor=1.0,
    )
    results = _empty_results(
        x_student, x_teacher, weight_student, weight_teacher, center, weights, *flat
    )
    total, teacher_sum, dx, dweight = results
    for result in (total, teacher_sum) if x_student.shape[1] > 0 else results:
        result.zero_()
    x_student, x_teacher = x_student.to(student_dtype), x_teacher.to(teacher_dtype)
    center = center.to(total.dtype)
    weights, largest = _scaled_weights(weights, student_dtype)
    student, teacher = Logits(weight_student, student_dtype), Logits(weight_teacher, teacher_dtype)
    scale = torch.full_like(total, _gradient_scale(student_dtype))
    implementation = importlib.import_module(f".pairwise_{impl}", __package__)
    image_bytes = len(x_student) * student.row_bytes + len(x_teacher) * teacher.row_bytes
    for images in row_chunks(x_student.shape[1], image_bytes, x_student.device, chunk_rows):
        crops = Crops(
            student.of(x_student[:, images]),
            teacher.of(x_teacher[:, images]),
            center,
            None if weights is None else weights[:, images].contiguous(),
        )
        loss, column_sums, _, stats = implementation.forward(crops, options)
        total += loss
        teacher_sum += column_sums
        if not (x_gradient or weight_gradient):
            continue
        implementation.backward(crops.student, scale, crops, stats, options)
        gradient = crops.student.flatten(0, 1)
        if x_gradient:
            dx[:, images] = product(gradient, student.weight, dx.dtype).view_as(dx[:, images])
        if weight_gradient:
            rows = x_student[:, images].flatten(0, 1)
            add_product_(dweight, gradient.t(), rows, replace=images.start == 0)
    if largest is not None:
        for result in (total, dx, dweight):
            result.mul_(largest)
    return total, teacher_sum, dx, dweight


def _scaled_weights(
    weights: Tensor | None, student_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights and what the results lack: for fp16, whose largest number is 65504.

    The gradients of a chunk's fp16 logits then neither overflow nor vanish with the weights.
    """
    if weights is None or weights.numel() == 0 or student_dtype != torch.float16:
        return weights, None
    largest = weights.max().clamp_min(torch.finfo(weights.dtype).tiny)
    return weights / largest, largest


def _empty_results(
    x_student: Tensor,
    _x_teacher: Tensor,
    weight_student: Tensor,
    _weight_teacher: Tensor,
    _center: Tensor,
    _weights: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student_dtype, teacher_dtype, _, x_gradient, weight_gradient = flat[6:]
    dtype = result_dtype(student_dtype, teacher_dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x_student.device)

    return (
        empty(),
        empty(len(weight_student)),
        empty(*(x_student.shape if x_gradient else (0,))),
        empty(*(weight_student.shape if weight_gradient else (0,))),
    )


# On every backend that PyTorch knows: impl="torch" runs wherever its operations do.
LIBRARY.impl("linear_pairwise", _loss_and_gradients, "CompositeExplicitAutograd")
register_fake("linear_pairwise", _empty_results)
