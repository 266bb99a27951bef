"""Numbers and temperatures that every public function of fastdino_kernels accepts or refuses."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from fastdino_kernels import (
    AdamWEMA,
    CropParams,
    DINOLoss,
    adamw_ema_update_,
    clip_grad_norm_,
    clip_grad_norms_,
    dino_loss,
    ema_update_,
    koleo_loss,
    multi_crop,
    sinkhorn_knopp,
    soft_cross_entropy,
    teacher_entropy,
)
from fastdino_kernels.compat import dinov2, lightly, solo_learn

S, T, B, K = 3, 2, 2, 8
GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (torch.randn(n, B, K, generator=GENERATOR) for n in (S, T))
CENTER, PROBS = torch.zeros(K), TEACHER.softmax(-1)


def parameter() -> torch.Tensor:
    tensor = torch.linspace(0, 1, 8).requires_grad_()
    tensor.grad = torch.ones(8)
    return tensor


def clip(function, number):
    clipped = parameter()
    function(clipped, number)
    return clipped.grad


def ema(number):
    teacher = torch.zeros(8)
    ema_update_([teacher], [torch.ones(8)], number)
    return teacher


def optimizer_step(number):
    student, teacher = parameter(), torch.zeros(8)
    options = {"lr": number, "betas": (number, number), "eps": number, "weight_decay": number}
    step = AdamWEMA([student], **options, max_norm=number, momentum=number, teacher=[teacher])
    step.step()
    return torch.cat([student.detach(), teacher])


def changed_group(number):
    student = parameter()
    optimizer = AdamWEMA([student])
    optimizer.param_groups[0] |= {"lr": number, "betas": (number, number), "weight_decay": number}
    optimizer.step()
    return student.detach()


def optimizer_call(number):
    student, *rest = (torch.ones(8) for _ in range(4))
    options = {"lr": number, "betas": (number, number), "eps": number, "weight_decay": number}
    adamw_ema_update_([student], *([x] for x in rest), torch.ones(1), **options, max_norm=number)
    return student


def module(number):
    loss_fn = DINOLoss(K, S, number, number, 2, 3, student_temp=number, center_momentum=number)
    loss = loss_fn(STUDENT.flatten(0, 1), TEACHER.flatten(0, 1), 1)
    return torch.cat([loss[None], loss_fn.center[0]])


def lightly_module(number):
    loss_fn = lightly.DINOLoss(K, number, number, 2, student_temp=number, center_momentum=number)
    loss = loss_fn(TEACHER, STUDENT, teacher_temp=number) + loss_fn(TEACHER, STUDENT, epoch=1)
    return torch.cat([loss[None], loss_fn.center.flatten()])


CALLS = {
    "dino_loss": lambda x: dino_loss(STUDENT, TEACHER, CENTER, student_temp=x, teacher_temp=x)[0],
    "soft_cross_entropy": lambda x: soft_cross_entropy(STUDENT, PROBS, student_temp=x),
    "teacher_entropy": lambda x: teacher_entropy(TEACHER, CENTER, x),
    "DINOLoss": module,
    "lightly": lightly_module,
    "lightly, more teacher crops": lambda x: lightly.DINOLoss(K)(STUDENT, TEACHER, teacher_temp=x),
    "dinov2": lambda x: dinov2.dino_clstoken_loss(STUDENT, PROBS, x),
    "dinov2 rows": lambda x: dinov2.cross_entropy(TEACHER, PROBS, x),
    "dinov3": lambda x: dinov2.dino_cross_entropy(STUDENT, PROBS, student_temp=x),
    "ema_update_": ema,
    "clip_grad_norms_": lambda x: clip(clip_grad_norms_, x),
    "clip_grad_norm_": lambda x: clip(clip_grad_norm_, x),
    "AdamWEMA": optimizer_step,
    "AdamWEMA's groups": changed_group,
    "adamw_ema_update_": optimizer_call,
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, Fraction])
@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_other_libraries_equal_python_floats(name, kind, impl, monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", impl)
    assert torch.equal(CALLS[name](kind(0.5)), CALLS[name](0.5))


@pytest.mark.parametrize("wrong", [True, np.True_, "0.5", 0.5j, None, np.array([0.5, 0.5])])
@pytest.mark.parametrize("name", CALLS)
def test_anything_but_a_number_is_a_type_error(name, wrong):
    if wrong is None and name == "lightly, more teacher crops":
        pytest.skip("None selects the default")
    with pytest.raises(TypeError, match=r"must be (a float|two floats)"):
        CALLS[name](wrong)


@pytest.mark.parametrize("make", [DINOLoss, solo_learn.DINOLoss])
def test_counts_and_epochs_may_be_numpy_integers(make):
    counts = [np.int64(K), np.int64(S), 0.04, 0.07, np.int32(2), np.uint8(3)]
    if make is solo_learn.DINOLoss:
        counts = [counts[0], *counts[2:], 0.1, counts[1]]
    plain = [int(x) if isinstance(x, np.integer) else x for x in counts]
    flat = STUDENT.flatten(0, 1), TEACHER.flatten(0, 1)
    assert torch.equal(make(*counts)(*flat, np.int64(1)), make(*plain)(*flat, 1))


def crops_of_size(size):
    box, off = torch.full((1, 2), 30, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.bool)
    order = torch.arange(4, dtype=torch.int32).expand(1, 2, 4).contiguous()
    factor, radius = torch.ones(1, 2, 4), torch.zeros(1, 2)
    params = CropParams(0 * box, 0 * box, box, box, off, off, order, factor, off, radius, off)
    image = torch.arange(37 * 50 * 3).remainder(256).to(torch.uint8).view(37, 50, 3)
    return multi_crop([image], params, size=size, mean=(0, 0, 0), std=(1, 1, 1))


INTEGERS = {
    "multi_crop": crops_of_size,
    "sinkhorn_knopp": lambda n: sinkhorn_knopp(TEACHER.flatten(0, 1), 0.1, n),
    "koleo_loss": lambda n: koleo_loss(STUDENT.flatten(0, 1), topk=n),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_may_be_numpy_integers(name):
    for kind in (np.int64, np.uint8):
        assert torch.equal(INTEGERS[name](kind(3)), INTEGERS[name](3))


@pytest.mark.parametrize("wrong", [3.0, True, "3", np.float64(3), None])
@pytest.mark.parametrize("name", INTEGERS)
def test_anything_but_an_integer_is_a_type_error(name, wrong):
    with pytest.raises(TypeError, match="must be an int, got"):
        INTEGERS[name](wrong)
