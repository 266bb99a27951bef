"""Steps of adamw_ema_update_ that flags and gradients that are not finite stop."""

import math

import pytest
import torch
from fastdino_kernels import reference

from tests import adamw_steps
from tests.adamw_steps import (
    assert_close,
    assert_copies,
    assert_norms,
    assert_right,
    assert_unchanged,
    make,
    step_by_step,
    triton_only,
)
from tests.multi_tensor import numpy_warns

target = adamw_steps.target


def poison(lists):
    """Put NaN and inf in gradients, and zeros of both signs in tensors that must not change."""
    lists.gradients[0][0] = math.nan
    lists.gradients[3][7] = math.inf
    for some in (lists.parameters, lists.teachers, lists.exp_avgs):
        some[3][:2] = torch.tensor([-0.0, 0.0])


@numpy_warns
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_skip_keeps_everything_bit_exact(dtype, target):
    lists = make(target["device"])
    poison(lists)
    before = lists.copies()
    skip = torch.ones((), dtype=dtype, device=target["device"])
    lists.step(target, skip=skip)
    assert_unchanged(lists, before)
    # The flag is read in each call.
    lists = make(target["device"])
    expected = step_by_step(lists)
    lists.step(target, skip=skip.zero_())
    assert_right(lists, expected)
    assert_copies(lists)


@numpy_warns
def test_found_inf_updates_only_the_teacher(target):
    lists = make(target["device"])
    poison(lists)
    before = lists.copies()
    teachers = reference.ema_update(
        [t.double() for t in lists.teachers], [p.double() for p in lists.parameters], 0.9
    )
    found_inf = torch.ones((), device=target["device"])
    lists.step(target, found_inf=found_inf, weight_decay=0.1 * found_inf)
    for names in ("parameters", "exp_avg", "steps"):
        assert_unchanged(lists, before, names)
    assert_close(lists.teachers, teachers)
    assert_copies(lists)
    before = lists.copies()
    lists.step(target, found_inf=found_inf, skip=found_inf)
    assert_unchanged(lists, before)


@numpy_warns
@pytest.mark.parametrize(
    ("value", "max_norm"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, None)]
)
def test_nonfinite_gradient_is_refused_and_counted(value, max_norm, target):
    lists = make(target["device"])
    good = lists.gradients[3].clone()
    lists.gradients[3][7] = value
    before = lists.copies()
    refused = torch.zeros((), dtype=torch.int64, device=target["device"])
    for count in (1, 2):
        norms = lists.step(target, refused_steps=refused, max_norm=max_norm)
        assert refused.item() == count
        assert_unchanged(lists, before)
        assert not math.isfinite(norms[3].item())
    lists.gradients[3] = good
    expected = step_by_step(lists, max_norm=max_norm or math.inf)
    lists.step(target, refused_steps=refused, max_norm=max_norm)
    assert refused.item() == 2
    assert_right(lists, expected)


@numpy_warns
def test_overflow_of_loss_scaling_is_not_counted(target):
    lists = make(target["device"])
    poison(lists)
    before = lists.copies()
    refused, found_inf = torch.zeros(2, device=target["device"]).unbind()
    found_inf.fill_(1)
    lists.step(target, refused_steps=refused, found_inf=found_inf)
    assert refused.item() == 0
    assert_unchanged(lists, before, "parameters")
    assert not torch.equal(lists.teachers[1], before["teachers[1]"])


@pytest.mark.parametrize("gradient", [torch.float32, torch.float16])
def test_gradients_are_divided_by_the_loss_scale(gradient, target):
    lists = make(target["device"], gradient=gradient)
    lists.gradients = [g * 1024 for g in lists.gradients]
    expected = step_by_step(lists, scale=1024.0)
    scale = torch.tensor(1024.0, device=target["device"])
    norms = lists.step(target, grad_scale=scale)
    assert_right(lists, expected)
    assert_norms(norms, expected)
    expected = step_by_step(lists, scale=1024.0, max_norm=math.inf)
    assert lists.step(target, grad_scale=scale, max_norm=None) is None
    assert_right(lists, expected)


@numpy_warns
@triton_only
@pytest.mark.parametrize("index", [0, 5, 9])
def test_any_nonfinite_gradient_refuses_the_step(index, target):
    lists = make(target["device"], [(3,)] * 10)
    lists.gradients[index][1] = math.nan
    before, refused = lists.copies(), torch.zeros((), device=target["device"])
    lists.step(target, refused_steps=refused)
    assert refused.item() == 1
    assert_unchanged(lists, before)


@triton_only
@pytest.mark.parametrize("known", [False, True])
def test_new_memory_may_hold_anything(known, target, monkeypatch):
    """The same for measured and for given norms."""
    lists = make(target["device"])
    expected = step_by_step(lists)
    norms = torch.stack(expected.norms).float() if known else None
    refused = torch.zeros((), dtype=torch.int64, device=target["device"])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(1))
    lists.step(target, refused_steps=refused, norms=norms)
    assert refused.item() == 0
    assert_right(lists, expected)
