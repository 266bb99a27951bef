"""The KoLeo regularizer, which spreads features over the sphere, as in DINOv2 and DINOv3.

    L = -mean_i log(||x_i - x_n(i) + eps|| + eps)    with rows x_i of norm 1

n(i) is the row with the largest dot product (Sablayrolles et al. 2019, arXiv 1806.03198; Oquab et
al. 2023, arXiv 2304.07193). The choice of n(i) has no gradient, both rows of a pair have one.

The search for n(i) is a matrix product, which PyTorch leaves to the vendor's library, over blocks
of rows, so that no matrix [B, B] is made where B is large. A Triton kernel that fused the maximum
into the product would save one write and one read of the dot products: 16 KB each at B = 64, 17 MB
each for 64 rows against 65536 gathered ones, 8 us of an H200 next to a product of that size. It
would not pay.

Legend: B rows of this rank, M rows of all ranks of the group, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_float_tensor, check_integer, check_positive
from .collectives import Group, all_reduce_sum_, check_equal_on_ranks, world_size
from .dispatch import choose_impl, compute_dtype, without_autocast
from .operators import LIBRARY, ops, register_fake

EPS = 1e-8
BLOCK_ELEMENTS = 1 << 22  # dot products at a time: 16 MB in fp32

# Indices [B, topk] of the rows of others [M, D] with the largest dot products with each row of
# x [B, D], largest first and the first of equal ones. Row first + i of others is x_i itself, and
# `own` stands for its dot product: by default, as in DINOv2, the row itself is the last choice, not
# an impossible one.
LIBRARY.define(
    "nearest_rows(Tensor x, Tensor others, SymInt first, int topk, float own=-1.0) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _nearest_rows(x: Tensor, others: Tensor, first: int, topk: int, own: float = -1.0) -> Tensor:
    nearest = _empty_indices(x, others, first, topk)
    step = max(1, BLOCK_ELEMENTS // max(len(others), 1))
    for start in range(0, len(x), step):
        dots = x[start : start + step] @ others.t()
        dots.diagonal(first + start).fill_(own)
        for place in range(topk):
            index = dots.argmax(dim=1, keepdim=True)
            nearest[start : start + step, place : place + 1] = index
            dots.scatter_(1, index, -torch.inf)
    return nearest


def _empty_indices(x: Tensor, _others: Tensor, _first: int, topk: int, *_: object) -> Tensor:
    # Not len(x), which would fix the size under torch.compile.
    return torch.empty(x.shape[0], topk, dtype=torch.int64, device=x.device)


LIBRARY.impl("nearest_rows", _nearest_rows, "CompositeExplicitAutograd")
register_fake("nearest_rows", _empty_indices)


def koleo_loss(
    x: Tensor,
    *,
    group: Group | None = None,
    topk: int = 1,
    eps: float = EPS,
    impl: str = "auto",
) -> Tensor:
    """Compute the KoLeo regularizer of features, before the projection head.

    It is computed in fp32 (fp64 for fp64 features), also under autocast. A row without another one
    is its own neighbour, at a distance of about 0, as in DINOv2. No rows: loss 0.

    Args:
        x: [B, D] features, fp16/bf16/fp32/fp64; receives the gradient. DINOv2 adds one loss per
            global crop.
        group: None compares the rows of this rank, as DINOv2. A process group (such as
            torch.distributed.group.WORLD) compares them with the rows of all its ranks, which must
            all call this with the same B. Neighbours on other ranks receive their gradient.
        topk: number of neighbours, whose terms are averaged; below M, or 1.
        eps: > 0; added as in the equation above, and the least norm of a row.
        impl: as elsewhere, but all names run PyTorch.

    Returns: the loss of this rank's rows, a fp32 scalar (fp64 for fp64 features).

    Raises:
        ValueError: another shape, topk or eps out of its range, a group without this rank, or, on a
            CPU, ranks with different B or D. The message has the expected and the actual value.
        TypeError: features that are not a floating-point tensor, or topk that is not an int.

    """
    check_float_tensor("x", x)
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x must be [B, D] with D >= 1, got shape {tuple(x.shape)}")
    topk, eps = check_integer("topk", topk), check_positive("eps", eps)
    choose_impl(impl, (x,))
    ranks = 1 if group is None else world_size(group)
    most = ranks * len(x) - 1
    if topk != 1 and not 1 <= topk <= most:
        raise ValueError(
            f"topk must be in 1..{max(1, most)} for {ranks * len(x)} rows on all ranks, got {topk}"
        )
    with without_autocast(x.device):
        rows = F.normalize(x.to(compute_dtype(x)), dim=1, eps=eps)
        others, first = rows, 0
        if ranks > 1:
            check_equal_on_ranks("[B, D]", tuple(x.shape), x, group)
            first = torch.distributed.get_rank(group) * len(x)
            others = _GatherRows.apply(rows, group)
        nearest = ops.nearest_rows(rows.detach(), others.detach(), first, topk)
        return neighbour_loss(rows, others[nearest], 2.0, eps)


def neighbour_loss(rows: Tensor, neighbours: Tensor, p: float, eps: float) -> Tensor:
    """Return -mean log(||x - y + eps||_p + eps) of rows [B, D] and neighbours [B, topk, D]."""
    distances = F.pairwise_distance(rows[:, None], neighbours, p, eps)
    return -(distances + eps).log().sum() / max(distances.numel(), 1)


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all ranks; a row's gradient is the sum of those on all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(world_size(group))]
        torch.distributed.all_gather(parts, rows.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        all_reduce_sum_(total, ctx.group)
        rank = torch.distributed.get_rank(ctx.group)
        return total.chunk(world_size(ctx.group))[rank], None
