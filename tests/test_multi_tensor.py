"""Inputs that ema_update_, the clips and adamw_ema_update_ treat alike."""

from __future__ import annotations

import numpy
import pytest
import torch
from fastdino_kernels import (
    AdamWEMA,
    adamw_ema_update_,
    clip_grad_norm_,
    clip_grad_norms_,
    ema_update_,
)

X, Y = torch.arange(4.0), torch.arange(4.0) + 2


def negative_view(x):
    return torch._neg_view(-x)


def imaginary_part(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def parameter(gradient):
    p = torch.nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient
    return p


def step(parameters, gradients, **options):
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    steps = torch.zeros(len(parameters), device=parameters[0].device)
    return adamw_ema_update_(parameters, gradients, *moments, steps, **({"lr": 0.1} | options))


negative = pytest.mark.parametrize("negate", [negative_view, imaginary_part])


@negative
def test_negative_views_are_read(negate):
    assert torch.equal(negate(Y), Y)
    teacher, ours, theirs = X.clone(), X.clone(), X.clone()
    ema_update_([teacher], [negate(Y)], 0.5)
    assert torch.equal(teacher, (X + Y) / 2)
    step([ours], [negate(Y)])
    step([theirs], [Y])
    assert torch.equal(ours, theirs)


def test_negative_view_of_known_memory_is_read(target):
    x, teacher = Y.to(target["device"]), X.clone().to(target["device"])
    for student, sign in ((x, 1), (torch._neg_view(x), -1), (x, 1)):
        before = teacher.clone()
        ema_update_([teacher], [student], 0.5, impl=target["impl"])
        torch.testing.assert_close(teacher, (before + sign * x) / 2)


@negative
@pytest.mark.parametrize(
    "call",
    [
        lambda x: ema_update_([x], [Y], 0.5),
        lambda x: ema_update_([X.clone()], [Y], 0.5, shadow=[x]),
        lambda x: clip_grad_norms_(parameter(x), 0.1),
        lambda x: clip_grad_norm_(parameter(x), 0.1),
        lambda x: step([x], [Y]),
        lambda x: step([X.clone()], [Y], teachers=[x], momentum=0.5),
    ],
)
def test_negative_views_are_not_written(negate, call):
    x = negate(X)
    with pytest.raises(ValueError, match=r"is written: expected no negative view.*resolve_neg"):
        call(x)
    assert torch.equal(x, X)


@pytest.mark.parametrize("number", [numpy.float32, numpy.float64, numpy.float16])
def test_numbers_of_numpy_are_accepted(number):
    half, teacher = number(0.5), X.clone()
    ema_update_([teacher], [Y], half)
    assert torch.equal(teacher, (X + Y) / 2)
    p = parameter(Y.clone())
    assert clip_grad_norms_(p, half).item() == pytest.approx(Y.norm().item())
    assert clip_grad_norm_(p, half).item() == pytest.approx(0.5)
    assert p.grad.norm().item() == pytest.approx(0.5, rel=1e-5)
    ours, theirs = X.clone(), X.clone()
    options = {"betas": (half, half), "eps": half, "weight_decay": half, "max_norm": half}
    step([ours], [Y], lr=half, **options)
    step([theirs], [Y], lr=0.5, **(dict.fromkeys(options, 0.5) | {"betas": (0.5, 0.5)}))
    assert torch.equal(ours, theirs)


def test_tensors_without_memory_are_accepted():
    """On "meta" only shapes are computed, and nothing is read."""
    x, y, z = (torch.zeros(3, device="meta") for _ in range(3))
    ema_update_([x], [y], torch.tensor(0.9), shadow=[z])
    params = [parameter(x), parameter(torch.zeros(2, 2, device="meta"))]
    assert clip_grad_norms_(params, 1.0).shape == (2,)
    assert clip_grad_norm_(params, 1.0).shape == ()
    optimizer = AdamWEMA(params, max_norm=1.0, teacher=[y, None], skip_nonfinite=True)
    optimizer.step(skip=torch.zeros((), device="meta"))
    assert optimizer.norms.device.type == "meta"
    assert optimizer.norms.shape == (2,)
