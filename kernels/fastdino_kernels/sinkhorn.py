"""Sinkhorn-Knopp targets of SwAV, DINOv2 and DINOv3, as a center of the teacher's logits.

The original (Caron et al. 2020, arXiv 2006.09882, Algorithm 1) divides Q = exp(x/tau) in turn by
the sums of its columns (prototypes) and of its rows, n times. Its last division is by row, so the
rows' factors cancel, and the result is a softmax:

    P = softmax_k((x - c)/tau)    with a center [K], which the DINO loss subtracts anyway

    first iteration     c_k  = tau * log(sum_b exp(x_bk/tau))
    each later one      c_k += tau * log(sum_b softmax_k((x_b - c)/tau))

Each iteration then shifts the center by the constant, without effect on P, for which the column
sums have mean 1. So no matrix [N, K] is made, and with several ranks only [K] numbers are reduced:
a sum per iteration, and a maximum before the first one. The number of rows is not needed.

Logits are read 2n - 1 times: once for the first iteration, twice for each later one, whose softmax
needs the rows' sums first. A column's and a row's largest value are subtracted before exp, so that
no logits overflow. In each later iteration every column has a row of probability >= 1/(N K), so
that no column underflows. (With M = exp(x/tau), column factors a and row factors b, an iteration
makes some row i have M_ik a_k b_i >= 1/(N K), while M_ij a_j b_i <= 1/K for all columns j.)

Legend: N rows (images, crops or patches) of this rank, K prototypes, tau the temperature.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple, Optional, Protocol

import torch
from torch import Tensor

from .checks import check_float_tensor, check_integer, check_temperature
from .collectives import Group, all_reduce_max_, all_reduce_sum_, check_equal_on_ranks, world_size
from .dispatch import choose_impl, compute_dtype
from .operators import LIBRARY, ops, register_fake

# A temperature is a float, or a 0-d tensor on the device, in which case the float is unused.
_OPTIONS = "float temp, Tensor? temp_t, str impl"
# Each column's largest logit [K] (-inf without rows), and sum_b exp((x_bk - largest_k)/temp) [K].
LIBRARY.define(
    f"sinkhorn_columns(Tensor teacher, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
# The column sums [K] of softmax((x - center)/temp).
LIBRARY.define(
    f"sinkhorn_masses(Tensor teacher, Tensor center, {_OPTIONS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
# softmax((x - center)/temp) [N, K].
LIBRARY.define(
    f"sinkhorn_probabilities(Tensor teacher, Tensor center, {_OPTIONS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _columns(
    teacher: Tensor, temp: float, temp_t: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    if len(teacher) == 0:
        largest, sums = _empty_columns(teacher)
        return largest.fill_(-torch.inf), sums.zero_()
    result: tuple[Tensor, Tensor] = implementation(impl).columns(teacher, either(temp, temp_t))
    return result


def _masses(
    teacher: Tensor, center: Tensor, temp: float, temp_t: Tensor | None, impl: str
) -> Tensor:
    if len(teacher) == 0:
        return torch.zeros_like(center)
    result: Tensor = implementation(impl).masses(teacher, center, either(temp, temp_t))
    return result


def _probabilities(
    teacher: Tensor, center: Tensor, temp: float, temp_t: Tensor | None, impl: str
) -> Tensor:
    probs = _empty_probabilities(teacher)
    if len(teacher) > 0:
        implementation(impl).write_probabilities(probs, teacher, center, either(temp, temp_t))
    return probs


def _empty_columns(teacher: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape, dtype = teacher.shape[1:], compute_dtype(teacher)
    return teacher.new_empty(shape, dtype=dtype), teacher.new_empty(shape, dtype=dtype)


def _empty_masses(_teacher: Tensor, center: Tensor, *_: object) -> Tensor:
    return torch.empty_like(center)


def _empty_probabilities(teacher: Tensor, *_: object) -> Tensor:
    return torch.empty(teacher.shape, dtype=compute_dtype(teacher), device=teacher.device)


def implementation(impl: str) -> ModuleType:
    """Import an implementation on first use, because Triton may be missing."""
    return importlib.import_module(f".sinkhorn_{impl}", __package__)


def either(temp: float, temp_t: Tensor | None) -> float | Tensor:
    """Return an operator's temperature."""
    return temp if temp_t is None else temp_t


LIBRARY.impl("sinkhorn_columns", _columns, "CompositeExplicitAutograd")
LIBRARY.impl("sinkhorn_masses", _masses, "CompositeExplicitAutograd")
LIBRARY.impl("sinkhorn_probabilities", _probabilities, "CompositeExplicitAutograd")
register_fake("sinkhorn_columns", _empty_columns)
register_fake("sinkhorn_masses", _empty_masses)
register_fake("sinkhorn_probabilities", _empty_probabilities)


@torch.no_grad()
def sinkhorn_center(
    teacher: Tensor,
    temp: float | Tensor,
    n_iterations: int = 3,
    group: Group | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute the center with which a centered softmax gives the Sinkhorn-Knopp targets.

    softmax((teacher - center)/temp) equals the result of `n_iterations` Sinkhorn-Knopp iterations
    over the rows of all ranks. So dino_loss(student, teacher, center, ...) with this `temp` as
    teacher_temp computes the loss with those targets. Do not put this center into a moving average:
    it belongs to these logits.

    Logits of any size are allowed. A NaN or +inf anywhere makes the whole center NaN on every rank,
    as in the original. With 2 or more iterations, so does a row or a prototype of only -inf. The
    same input gives the same bits.

    Args:
        teacher: [N, K] logits, fp16/bf16/fp32/fp64, K >= 1. Any strides; copied for Triton if K is
            not contiguous. N may differ between ranks, and may be 0.
        temp: > 0; a float, or a 0-d tensor on the logits' device, the same on all ranks. A tensor's
            value is not checked, and a captured CUDA graph reads it anew.
        n_iterations: >= 1, the same on all ranks.
        group: the process group, all of whose ranks must call this; None is the default one. No
            process group is needed.
        impl: "triton" (no temporary of size [N, K]), "torch" (on a CPU in blocks that fit its
            caches), or "auto".

    Returns: [K], fp32 (fp64 for fp64 logits), the same on all ranks; zeros if no rank has rows.

    Raises:
        ValueError: another shape, a temperature that is not > 0, n_iterations < 1, a group without
            this rank, or, on a CPU, ranks with different K. The message has the expected and the
            actual value.
        TypeError: logits that are not a floating-point tensor, n_iterations that is not an int.

    """
    teacher, options = _check(teacher, temp, n_iterations, group, impl)
    return balanced_center(_LogitPasses(teacher, options), options, n_iterations, group)


@torch.no_grad()
def sinkhorn_knopp(
    teacher: Tensor,
    temp: float | Tensor,
    n_iterations: int = 3,
    group: Group | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute Sinkhorn-Knopp targets as probabilities, for code that passes them as a tensor.

    This is softmax((teacher - center)/temp) with the center of sinkhorn_center, which needs no such
    tensor: dino_loss with that center reads half-precision logits instead.

    Args: as sinkhorn_center.

    Returns: [N, K], fp32 (fp64 for fp64 logits). Each row sums to 1.

    Raises: ValueError, TypeError: as sinkhorn_center.

    """
    teacher, options = _check(teacher, temp, n_iterations, group, impl)
    center = balanced_center(_LogitPasses(teacher, options), options, n_iterations, group)
    probabilities: Tensor = ops.sinkhorn_probabilities(teacher, center, *options)
    return probabilities


Options = tuple[float, Optional[Tensor], str]  # _OPTIONS


class Passes(Protocol):
    """Reads of the teacher's logits on this rank: the operators of this module."""

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return the results of sinkhorn_columns."""

    def masses(self, center: Tensor) -> Tensor:
        """Return the result of sinkhorn_masses."""


class _LogitPasses(NamedTuple):
    teacher: Tensor
    options: Options

    def columns(self) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = ops.sinkhorn_columns(self.teacher, *self.options)
        return result

    def masses(self, center: Tensor) -> Tensor:
        result: Tensor = ops.sinkhorn_masses(self.teacher, center, *self.options)
        return result


def _check(
    teacher: Tensor, temp: float | Tensor, n_iterations: int, group: Group | None, impl: str
) -> tuple[Tensor, Options]:
    check_float_tensor("teacher", teacher)
    if teacher.dim() != 2 or teacher.shape[1] < 1:
        raise ValueError(f"teacher must be [N, K] with K >= 1, got shape {tuple(teacher.shape)}")
    dtype, prototypes = compute_dtype(teacher), teacher.shape[1]
    chosen = choose_impl(impl, (teacher,))
    options = check_options(teacher, prototypes, dtype, (temp, n_iterations, group, chosen))
    return teacher.detach(), options


def check_options(
    like: Tensor,
    prototypes: int,
    dtype: torch.dtype,
    options: tuple[float | Tensor, int, Group | None, str],
) -> Options:
    """Return the operators' options from temp, n_iterations, group and an implementation.

    Args:
        like: a tensor on the logits' device.
        prototypes: K.
        dtype: of the center.
        options: as in sinkhorn_center, with the chosen implementation.

    Raises: ValueError, TypeError: as sinkhorn_center.

    """
    temp, n_iterations, group, chosen = options
    if check_integer("n_iterations", n_iterations) < 1:
        raise ValueError(f"n_iterations must be >= 1, got {n_iterations}")
    temp = check_temperature("temp", temp, dtype, like.device)
    check_equal_on_ranks("[K, n_iterations]", (prototypes, n_iterations), like, group)
    return (0.0, temp, chosen) if isinstance(temp, Tensor) else (temp, None, chosen)


def balanced_center(
    passes: Passes, options: Options, n_iterations: int, group: Group | None
) -> Tensor:
    """Compute the center of sinkhorn_center from reads of the logits."""
    temp = either(*options[:2])
    largest, sums = passes.columns()
    if world_size(group) > 1:
        own = largest.clone()
        all_reduce_max_(largest, group)
        sums = sums * exp_below(own, largest, temp)
        all_reduce_sum_(sums, group)
    highest = largest.max()
    rows = (exp_below(largest, highest, temp) * sums).mean()
    center = _below(largest, highest) + temp * (sums / rows).log()
    for _ in range(n_iterations - 1):
        masses = passes.masses(center)
        all_reduce_sum_(masses, group)
        # 0 only where a center beyond 1e6 is rounded by more than the temperature.
        masses.clamp_min_(torch.finfo(masses.dtype).tiny)
        center = center + temp * (masses / masses.mean()).log()
    return torch.where(rows == 0, 0.0, center)  # without rows on any rank


def exp_below(x: Tensor, largest: Tensor, temp: float | Tensor) -> Tensor:
    """Return exp((x - largest)/temp); 0 for -inf, also where the largest is -inf."""
    return (_below(x, largest) / temp).exp()


def _below(x: Tensor, largest: Tensor) -> Tensor:
    """Return x - largest; -inf for -inf, also where the largest is -inf."""
    return x - largest.masked_fill(largest == -torch.inf, 0.0)
