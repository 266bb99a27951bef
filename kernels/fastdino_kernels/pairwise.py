"""Cross-entropy between every teacher crop and every student crop, as differentiable operators.

dino_loss, patch_loss and soft_cross_entropy are built on it. With P_q the teacher's probabilities,
z_v = s_v/student_temp, and q running over the teacher's crops (q != v with ignore_diagonal):

    rows_v    = sum_q -<P_q, log softmax(z_v)> = mass * lse(z_v) - <sum_q P_q, z_v>
    d rows_v  = 1/student_temp * (mass * softmax(z_v) - sum_q P_q) d s_v,  mass = sum_q sum_k P_qk

The result is rows_v times optional weights [S, B], or the sum of these over a divisor. So each
student crop is compared with the sum of its targets once, only two numbers per row are
saved, and each pass reads every logit once.

The operators are in torch.ops.fastdino_kernels, with fake implementations, so that torch.compile,
fake tensors and CUDA graphs support them. Under autocast they compute in the dtypes they are
given: half-precision logits in fp32 inside. They use torch.library's lower-level calls and one
autograd.Function because torch.library.custom_op costs 50 us per call.

Legend: S crops of the student (v), T crops of the teacher (q), B images, K prototypes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dispatch import compute_dtype
from .operators import LIBRARY, keeps_graph, needs_dispatcher, ops, register_fake
from .pairwise_arguments import Crops, PairwiseOptions

# A temperature is a float, or a 0-d tensor on the device, in which case the float is unused; so is
# the divisor of the loss, by default the number of pairs times B.
_OPTIONS = (
    "float student_temp, float teacher_temp, Tensor? student_temp_t, Tensor? teacher_temp_t, "
    "bool ignore_diagonal, str impl, Tensor? weights=None, float? divisor=None, "
    "Tensor? divisor_t=None, bool rows=False"
)
# With a center [K] the teacher has logits, and the results are (loss [], teacher_sum [K],
# center_used [K], stats): the weighted sum over pairs and images over the divisor (or, with `rows`,
# rows [S, B]), the sum over T and B, and a copy of the center for the backward pass, since the
# caller may change it before. Without one the teacher has probabilities, and they are (rows [S, B],
# [0], [0], stats). stats [2, S + T, B] are private to the implementation. All have the compute
# dtype.
LIBRARY.define(
    f"pairwise_forward(Tensor student, Tensor teacher, Tensor? center, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
# The gradient [S, B, K] of the student's logits, in their dtype, from that of the result: of the
# loss [], or of rows [S, B].
LIBRARY.define(
    "pairwise_backward(Tensor grad_result, Tensor student, Tensor teacher, "
    f"Tensor? center, Tensor stats, {_OPTIONS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
# The same, written over the student's logits.
LIBRARY.define(
    "pairwise_backward_(Tensor grad_result, Tensor(a!) student, Tensor teacher, "
    f"Tensor? center, Tensor stats, {_OPTIONS}) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(
    student: Tensor, teacher: Tensor, center: Tensor | None, *flat: Any
) -> tuple[Tensor, ...]:
    if student.shape[1] == 0:
        outputs = _empty_results(student, teacher, center, *flat)
        for output in outputs:
            output.zero_()
        return outputs
    crops, options, impl = _unpack(student, teacher, center, *flat)
    results: tuple[Tensor, ...] = _implementation(impl).forward(crops, options)
    return results


def _empty_results(
    student: Tensor, teacher: Tensor, center: Tensor | None, *flat: Any
) -> tuple[Tensor, ...]:
    crops, options, _ = _unpack(student, teacher, center, *flat)
    S, T, B, K = crops.sizes()
    dtype = compute_dtype(student, teacher)
    columns = 0 if center is None else K
    shape = (S, B) if crops.returns_rows(options) else ()
    shapes = (shape, (columns,), (columns,), (2, S + T, B))
    return tuple(torch.empty(shape, dtype=dtype, device=student.device) for shape in shapes)


def _backward(grad_result: Tensor, student: Tensor, *rest: Any) -> Tensor:
    grad = _empty_gradient(grad_result, student)
    _write_gradient(grad, grad_result, student, *rest)
    return grad


def _empty_gradient(grad_result: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _backward_(grad_result: Tensor, student: Tensor, *rest: Any) -> None:
    _write_gradient(student, grad_result, student, *rest)
    # Autograd cannot see the writes of a kernel: graphs that saved the logits become invalid.
    torch.autograd.graph.increment_version(student)


def _write_gradient(
    grad: Tensor,
    grad_result: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    stats: Tensor,
    *flat: Any,
) -> None:
    if grad.numel() > 0:
        crops, options, impl = _unpack(student, teacher, center, *flat)
        _implementation(impl).backward(grad, grad_result, crops, stats, options)


def _unpack(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: float,
    student_temp_t: Tensor | None,
    teacher_temp_t: Tensor | None,
    ignore_diagonal: bool,
    impl: str,
    weights: Tensor | None = None,
    divisor: float | None = None,
    divisor_t: Tensor | None = None,
    rows: bool = False,
) -> tuple[Crops, PairwiseOptions, str]:
    """Return the arguments of an implementation and its name from those of an operator."""
    options = PairwiseOptions(
        student_temp if student_temp_t is None else student_temp_t,
        teacher_temp if teacher_temp_t is None else teacher_temp_t,
        ignore_diagonal,
        rows,
        divisor if divisor_t is None else divisor_t,
    )
    return Crops(student, teacher, center, weights), options, impl


@functools.cache
def _implementation(impl: str) -> ModuleType:
    """Import an implementation on first use, because Triton may be missing."""
    return importlib.import_module(f".pairwise_{impl}", __package__)


# On every backend that PyTorch knows: impl="torch" runs wherever its operations do.
LIBRARY.impl("pairwise_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("pairwise_backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("pairwise_backward_", _backward_, "CompositeExplicitAutograd")
register_fake("pairwise_forward", _empty_results)
register_fake("pairwise_backward", _empty_gradient)
register_fake("pairwise_backward_", lambda *_: None)


def pairwise_cross_entropy(
    crops: Crops, options: PairwiseOptions, *, inplace_backward: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """Return (result, teacher_sum) of pairwise_forward; only the student receives a gradient."""
    temps = (options.student_temp, options.teacher_temp)
    divisor = options.divisor
    return PairwiseCrossEntropy.apply(
        crops.student,
        crops.teacher,
        crops.center,
        inplace_backward,
        *(0.0 if isinstance(temp, Tensor) else float(temp) for temp in temps),
        *(temp if isinstance(temp, Tensor) else None for temp in temps),
        options.ignore_diagonal,
        impl,
        crops.weights,
        None if isinstance(divisor, Tensor) else divisor,
        divisor if isinstance(divisor, Tensor) else None,
        options.rows,
    )


class PairwiseCrossEntropy(torch.autograd.Function):
    """(loss [] or rows [S, B], teacher_sum [K] or [0]): pairwise_forward, with its arguments.

    Only the student's logits receive a gradient, and only once. With `inplace_backward` the last
    backward pass writes it over them, and autograd refuses other uses of the overwritten logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        center: Tensor | None,
        inplace_backward: bool,
        *flat: Any,
    ) -> tuple[Tensor, Tensor]:
        arguments = (student, teacher, center, *flat)
        forward = ops.pairwise_forward if _traced(arguments) else _forward
        result, teacher_sum, center_used, stats = forward(*arguments)
        # Everything that the backward pass reads is saved, so that autograd refuses changes of it.
        center_used = None if center is None else center_used
        tensors = [x if isinstance(x, Tensor) else None for x in flat]
        ctx.save_for_backward(student, teacher, center_used, stats, *tensors)
        ctx.settings = [None if isinstance(x, Tensor) else x for x in flat]
        ctx.inplace_backward = inplace_backward
        ctx.mark_non_differentiable(teacher_sum)
        ctx.set_materialize_grads(False)  # or zeros [K] would be made for teacher_sum
        return result, teacher_sum

    @staticmethod
    def backward(
        ctx: Any, grad_result: Tensor | None, _grad_teacher_sum: None
    ) -> tuple[Tensor | None, ...]:
        others = (None,) * (3 + len(ctx.settings))
        if grad_result is None:
            return (None, *others)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the loss has no second derivative: expected a backward pass without create_graph"
            )
        student, teacher, center, stats, *tensors = ctx.saved_tensors
        flat = [x if tensor is None else tensor for x, tensor in zip(ctx.settings, tensors)]
        arguments = (grad_result, student, teacher, center, stats, *flat)
        traced = _traced(arguments)
        if ctx.inplace_backward and (torch.compiler.is_compiling() or not keeps_graph()):
            (ops.pairwise_backward_ if traced else _backward_)(*arguments)
            grad = student
        else:
            grad = (ops.pairwise_backward if traced else _backward)(*arguments)
        return (grad, *others)


def _traced(arguments: Sequence[object]) -> bool:
    return needs_dispatcher([x for x in arguments if isinstance(x, Tensor)])


def without_gradient(tensor: Tensor) -> Tensor:
    """Return the tensor itself, detached if it requires a gradient."""
    return tensor.detach() if tensor.requires_grad else tensor


def flat_center(center: Tensor) -> Tensor:
    """Return a center [K] or [1, K] as a contiguous [K] without gradient."""
    center = without_gradient(center)
    if center.dim() != 1 or not center.is_contiguous():
        center = center.reshape(-1).contiguous()
    return center
