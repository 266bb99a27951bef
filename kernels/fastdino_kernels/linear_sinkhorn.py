"""Sinkhorn-Knopp targets of the inputs of the teacher's last layer, for the losses without logits.

sinkhorn.py has the algorithm. Each of its passes over the logits x W^T is done for a chunk of rows
at a time; the chunks' column sums are added up.

Legend: N rows (images, crops or patches) of this rank, D features, K prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .collectives import Group
from .dispatch import choose_impl, without_autocast
from .last_layer import check_layer, product_dtype
from .operators import LIBRARY, ops, register_fake
from .row_chunks import Logits, check_chunk_rows, result_dtype, row_chunks
from .sinkhorn import (
    Options,
    balanced_center,
    check_options,
    either,
    exp_below,
    implementation,
    sinkhorn_center,
)

# A temperature is a float, or a 0-d tensor on the device, in which case the float is unused.
_OPTIONS = "float temp, Tensor? temp_t, str impl, ScalarType dtype, SymInt? chunk_rows"
# The results of sinkhorn_columns and sinkhorn_masses of the logits x W^T, which are computed in
# `dtype`.
LIBRARY.define(
    f"linear_sinkhorn_columns(Tensor x, Tensor weight, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    f"linear_sinkhorn_masses(Tensor x, Tensor weight, Tensor center, {_OPTIONS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _columns(
    x: Tensor,
    weight: Tensor,
    temp: float,
    temp_t: Tensor | None,
    impl: str,
    dtype: torch.dtype,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor]:
    largest, sums = _empty_columns(x, weight, temp, temp_t, impl, dtype)
    largest.fill_(-torch.inf)
    sums.zero_()
    x, logits, scale = x.to(dtype), Logits(weight, dtype), either(temp, temp_t)
    for rows in row_chunks(len(x), logits.row_bytes, x.device, chunk_rows):
        chunk_largest, chunk_sums = implementation(impl).columns(logits.of(x[rows]), scale)
        both = torch.maximum(largest, chunk_largest)
        sums = sums * exp_below(largest, both, scale)
        sums += chunk_sums * exp_below(chunk_largest, both, scale)
        largest = both
    return largest, sums


def _masses(
    x: Tensor,
    weight: Tensor,
    center: Tensor,
    temp: float,
    temp_t: Tensor | None,
    impl: str,
    dtype: torch.dtype,
    chunk_rows: int | None,
) -> Tensor:
    total = torch.zeros_like(center)
    x, logits, scale = x.to(dtype), Logits(weight, dtype), either(temp, temp_t)
    for rows in row_chunks(len(x), logits.row_bytes, x.device, chunk_rows):
        total += implementation(impl).masses(logits.of(x[rows]), center, scale)
    return total


def _empty_columns(
    x: Tensor,
    weight: Tensor,
    _temp: float,
    _temp_t: Tensor | None,
    _impl: str,
    dtype: torch.dtype,
    *_: object,
) -> tuple[Tensor, Tensor]:
    shape, dtype = (len(weight),), result_dtype(dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _empty_masses(_x: Tensor, _weight: Tensor, center: Tensor, *_: object) -> Tensor:
    return torch.empty_like(center)


LIBRARY.impl("linear_sinkhorn_columns", _columns, "CompositeExplicitAutograd")
LIBRARY.impl("linear_sinkhorn_masses", _masses, "CompositeExplicitAutograd")
register_fake("linear_sinkhorn_columns", _empty_columns)
register_fake("linear_sinkhorn_masses", _empty_masses)


class _LinearPasses(NamedTuple):
    """sinkhorn.Passes that compute the logits anew."""

    x: Tensor
    weight: Tensor
    options: Options
    dtype: torch.dtype
    chunk_rows: int | None

    def columns(self) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = ops.linear_sinkhorn_columns(
            self.x, self.weight, *self.options, self.dtype, self.chunk_rows
        )
        return result

    def masses(self, center: Tensor) -> Tensor:
        result: Tensor = ops.linear_sinkhorn_masses(
            self.x, self.weight, center, *self.options, self.dtype, self.chunk_rows
        )
        return result


@torch.no_grad()
def linear_sinkhorn_center(
    x_teacher: Tensor,
    weight_teacher: Tensor,
    temp: float | Tensor,
    n_iterations: int = 3,
    *,
    group: Group | None = None,
    keep_logits: bool = False,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute sinkhorn_center of the teacher's logits x W^T, for linear_dino_loss and _patch_loss.

    The logits are computed in each of the n iterations, a chunk at a time, or once, if they are
    kept. With w bytes per logit, for N = 3771, D = 256, K = 65536, bf16 and n = 3:

    | keep_logits | memory             | products               | passes over the logits      |
    |-------------|--------------------|------------------------|-----------------------------|
    | False       | a chunk: 96 MiB    | n: 2 n N K D = 380     | n writes, 2n - 1 reads, in  |
    |             | (a CPU: 24 MiB)    | GFLOP                  | chunks: 8 N K w = 4.0 GB    |
    | True        | N K w = 494 MB     | 1: 127 GFLOP           | 1 write, 2n - 1 reads:      |
    |             |                    |                        | 6 N K w = 3.0 GB            |

    Under autocast the products and their logits have its dtype, and a copy of the weight. The loss
    computes the logits once more in any case.

    Args:
        x_teacher: [N, D], the last layer's input, fp16/bf16/fp32/fp64. N may differ between ranks,
            and may be 0.
        weight_teacher: [K, D], as in linear_dino_loss.
        temp, n_iterations, group, impl: as in sinkhorn_center.
        keep_logits: compute all logits [N, K] once and keep them until the center is known.
        chunk_rows: most rows of a chunk, >= 1; None: as many as have 96 MiB of logits, on a CPU
            24 MiB, in multiples of 64 if there are more.

    Returns: [K], as sinkhorn_center, to the rounding of products.

    Raises: ValueError, TypeError: as sinkhorn_center and linear_dino_loss.

    """
    check_layer("x_teacher", x_teacher, "weight_teacher", weight_teacher, "[N, D]")
    check_chunk_rows(chunk_rows)
    product = product_dtype("x_teacher", x_teacher, "weight_teacher", weight_teacher)
    x, weight = x_teacher.detach(), weight_teacher.detach()
    with without_autocast(x.device):
        if keep_logits:
            logits = x.to(product) @ weight.to(product).t()
            return sinkhorn_center(logits, temp, n_iterations, group, impl)
        chosen = choose_impl(impl, (x, weight))
        options = check_options(
            x, len(weight), result_dtype(product), (temp, n_iterations, group, chosen)
        )
        passes = _LinearPasses(x, weight, options, product, chunk_rows)
        return balanced_center(passes, options, n_iterations, group)
