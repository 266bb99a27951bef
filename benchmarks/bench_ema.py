"""The teacher's moving average over a whole network, with and without a bf16 copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import reference
from torch import Tensor

from benchmarks.contest import Compete, Contest, Variant, assert_close
from benchmarks.shapes import network_shapes, random_tensors

MOMENTUM = 0.996
Tensors = list[Tensor]
Update = Callable[[Tensors, Tensors, Tensors], object]


@dataclass(frozen=True)
class Size:
    """A backbone and its head of K prototypes."""

    arch: str
    K: int = 65536

    def __str__(self) -> str:
        return f"{self.arch} K{self.K}"


SIZES = {
    "cuda": [Size("ViT-S"), Size("ViT-B"), Size("ViT-L")],
    "cpu": [Size("ViT-S")],
    "quick": [Size("a toy", 1024)],
}


def paper_loop(teacher: Tensors, student: Tensors, _shadow: Tensors) -> None:
    """One parameter after the other, three operations each."""
    for t, s in zip(teacher, student, strict=True):
        t.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * s.detach().data)


def foreach_mul_add(teacher: Tensors, student: Tensors, _shadow: Tensors) -> None:
    torch._foreach_mul_(teacher, MOMENTUM)
    torch._foreach_add_(teacher, student, alpha=1 - MOMENTUM)


def foreach_lerp(teacher: Tensors, student: Tensors, _shadow: Tensors) -> None:
    torch._foreach_lerp_(teacher, student, 1 - MOMENTUM)


def ours(teacher: Tensors, student: Tensors, _shadow: Tensors) -> None:
    fastdino_kernels.ema_update_(teacher, student, MOMENTUM)


def loop_and_cast(teacher: Tensors, student: Tensors, shadow: Tensors) -> None:
    paper_loop(teacher, student, shadow)
    for copy, t in zip(shadow, teacher, strict=True):
        copy.copy_(t)


def lerp_and_cast(teacher: Tensors, student: Tensors, shadow: Tensors) -> None:
    foreach_lerp(teacher, student, shadow)
    torch._foreach_copy_(shadow, teacher)


def ours_with_shadow(teacher: Tensors, student: Tensors, shadow: Tensors) -> None:
    fastdino_kernels.ema_update_(teacher, student, MOMENTUM, shadow=shadow)


VARIANTS: dict[bool, dict[str, tuple[str, Update]]] = {
    False: {
        "the paper's loop": ("paper", paper_loop),
        "_foreach_mul_ + _foreach_add_": ("", foreach_mul_add),
        "_foreach_lerp_": ("", foreach_lerp),
        "fastdino_kernels": ("ours", ours),
    },
    True: {
        "the paper's loop + copies": ("paper", loop_and_cast),
        "_foreach_lerp_ + _foreach_copy_": ("", lerp_and_cast),
        "fastdino_kernels, shadow": ("ours", ours_with_shadow),
    },
}


def counted_bytes(size: Size, shadow: bool) -> tuple[int, str]:
    """Teacher and student read, teacher written, in fp32; the bf16 copy written."""
    parameters = sum(math.prod(shape) for shape in network_shapes(size.arch, size.K))
    each = 14 if shadow else 12
    return each * parameters, f"{each} bytes for each of {parameters} parameters"


def make_tensors(size: Size, device: torch.device) -> tuple[Tensors, Tensors, Tensors]:
    """Teacher, student, shadow."""
    shapes = network_shapes(size.arch, size.K)
    teacher, student = (random_tensors(shapes, seed, device, lambda _: 0.02) for seed in (0, 1))
    return teacher, student, [torch.empty_like(t, dtype=torch.bfloat16) for t in teacher]


def check(update: Update, size: Size, with_shadow: bool, device: torch.device) -> None:
    """Every parameter, and every copy, agrees with the equation in float64."""
    teacher, student, shadow = make_tensors(size, device)
    before = [t.clone() for t in teacher]
    update(teacher, student, shadow)
    for index, t in enumerate(teacher):
        right = reference.ema_update([before[index].double()], [student[index].double()], MOMENTUM)
        assert_close(f"teacher[{index}]", t, right[0], 1e-6)
        if with_shadow:
            assert_close(f"shadow[{index}]", shadow[index], right[0], 4e-3)


def ema_contest(size: Size, with_shadow: bool, device: torch.device) -> Contest:
    # Several times the L2 cache, so one set of tensors is enough.
    tensors = make_tensors(size, device)
    variants = [
        Variant(
            name,
            partial(partial, update, *tensors),
            partial(check, update, size, with_shadow, device),
            role,
        )
        for name, (role, update) in VARIANTS[with_shadow].items()
    ]
    name = f"EMA{' and its bf16 copy' if with_shadow else ''}, {size}"
    return Contest(name, variants, *counted_bytes(size, with_shadow))


@pytest.mark.parametrize("variant", VARIANTS[False])
def test_ema(compete: Compete, size: Size, variant: str) -> None:
    compete(ema_contest, size, False, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS[True])
def test_ema_with_shadow(compete: Compete, size: Size, variant: str) -> None:
    compete(ema_contest, size, True, variant=variant)
