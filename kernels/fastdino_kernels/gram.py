"""The Gram loss of DINOv3: patch tokens keep the pairwise similarities of an earlier teacher.

    L = mean_ij (x_i . x_j - y_i . y_j)^2    with tokens x_i of the student, y_i of the teacher

of norm 1. With E = X X^T - Y Y^T, dL/dX = 4/P^2 * E X. Forward computes both over blocks of E, so
that no matrix [P, P] is kept for the backward pass, and none is made where P is large: for tokens
of a whole batch it has (B*P)^2 entries.

Legend: G groups of tokens that are compared with each other, P tokens of a group, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_float_tensor, check_same_device
from .dispatch import choose_impl, compute_dtype, without_autocast
from .operators import LIBRARY, ops, register_fake

BLOCK_ELEMENTS = 1 << 22  # entries of E at a time: 16 MB in fp32

# The loss [] of normalised tokens [G, P, D], and its gradient, [0] without with_gradient.
LIBRARY.define(
    "gram_loss(Tensor student, Tensor teacher, bool with_gradient) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _loss_and_gradient(
    student: Tensor, teacher: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    G, P, _ = student.shape
    loss, gradient = _empty_results(student, teacher, with_gradient)
    loss.zero_()
    entries = max(G * P * P, 1)
    images = max(1, BLOCK_ELEMENTS // max(P * P, 1))
    tokens = max(1, min(P, BLOCK_ELEMENTS // max(P, 1)))
    for first in range(0, G, images):
        x, y = student[first : first + images], teacher[first : first + images]
        for start in range(0, P, tokens):
            some = slice(start, start + tokens)
            difference = torch.bmm(x[:, some], x.mT).baddbmm_(y[:, some], y.mT, alpha=-1)
            if with_gradient:
                torch.mul(
                    torch.bmm(difference, x),
                    4 / entries,
                    out=gradient[first : first + images, some],
                )
            loss += difference.square_().sum()
    return loss.div_(entries), gradient


def _empty_results(student: Tensor, _teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    shape = student.shape if with_gradient else (0,)
    return student.new_empty(()), student.new_empty(shape)


LIBRARY.impl("gram_loss", _loss_and_gradient, "CompositeExplicitAutograd")
register_fake("gram_loss", _empty_results)


def gram_loss(
    student: Tensor, teacher: Tensor, *, per_image: bool = True, impl: str = "auto"
) -> Tensor:
    """Compute the mean squared difference of the similarities of all pairs of patch tokens.

    It is computed in fp32 (fp64 if either input is), also under autocast. No tokens: loss 0. Second
    derivatives are not implemented (RuntimeError).

    Args:
        student: [.., P, D] patch tokens, fp16/bf16/fp32/fp64; receives the gradient.
        teacher: [.., P, D'] of the same images; receives no gradient. D' may differ from D.
        per_image: compare the tokens within each image; False: within the whole batch.
        impl: as elsewhere, but all names run PyTorch: the work is matrix products.

    Returns: a fp32 scalar (fp64 if either input is).

    Raises:
        ValueError: shapes or devices that do not match. The message has the expected and the
            actual value.
        TypeError: tokens that are not floating-point tensors.

    """
    check_float_tensor("student", student)
    check_float_tensor("teacher", teacher)
    if student.dim() < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student must be [.., P, D] and teacher [.., P, D'] with the same leading sizes, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    check_same_device("student", student, "teacher", teacher)
    choose_impl(impl, (student, teacher))
    dtype = compute_dtype(student, teacher)
    with without_autocast(student.device):
        groups = [
            _grouped(F.normalize(tokens.to(dtype), dim=-1), per_image)
            for tokens in (student, teacher.detach())
        ]
        loss: Tensor = _GramLoss.apply(*groups)
        return loss


def _grouped(tokens: Tensor, per_image: bool) -> Tensor:
    """Return tokens [.., P, D] as [G, P, D], or as one group [1, G*P, D]."""
    images = tokens.flatten(0, -3) if tokens.dim() > 2 else tokens[None]
    return images if per_image else images.flatten(0, 1)[None]


class _GramLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        loss, gradient = ops.gram_loss(student, teacher, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the Gram loss has no second derivative: expected a backward pass without "
                "create_graph"
            )
        (gradient,) = ctx.saved_tensors
        return grad_loss * gradient, None
