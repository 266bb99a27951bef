"""Addresses that the kernels of the update access 128 bits at a time are multiples of 16.

A GPU fails at an address that is none. Triton's interpreter ignores the hint, so it is checked here
each time that a kernel gives it.
"""

import importlib

import numpy as np
import pytest
import torch
from fastdino_kernels import (
    adamw_ema_update_,
    clip_grad_norm_,
    clip_grad_norms_,
    ema_update_,
    reference,
)

from tests.multi_tensor import EPS, triton_only

# Elements: one chunk of every kernel and a few more.
N = 8192 + 5
# Elements between a multiple of 16 bytes and the first one: 0, 4 and 8 bytes of fp32, 2 of bf16.
OFFSETS = {torch.float32: (0, 1, 2), torch.bfloat16: (0, 1, 4)}
pytestmark = triton_only


@pytest.fixture
def hints(monkeypatch):
    """The alignments that kernels claim, in a list; a wrong claim is an error."""
    claimed = []
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def check(handle, name, values):
        if name == "tt.divisibility":
            claimed.extend(values)
            addresses = np.asarray(handle.data, np.uint64)
            assert not (addresses % np.uint64(values[0])).any(), "an address that is not aligned"
        handle.attr[name] = values

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", check)
    return claimed


def at(values, offset):
    """Return a copy of values that begins `offset` elements after a multiple of 16 bytes."""
    room = torch.empty(len(values) + 16, dtype=values.dtype, device=values.device)
    assert room.data_ptr() % 16 == 0
    return room[offset : offset + len(values)].copy_(values)


def numbers(seed, target, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, generator=generator).to(target["device"], dtype)


def assert_hints(hints, target, *, aligned):
    if target["device"] == "cpu":
        assert (16 in hints) == aligned


@pytest.mark.parametrize("dtype", OFFSETS)
@pytest.mark.parametrize("odd", ["teacher", "student", "shadow"])
def test_ema_aligns_no_tensor_that_is_not(odd, dtype, hints, target):
    roles = {"teacher": torch.float32, "student": dtype, "shadow": torch.bfloat16}
    results = []
    for offset in OFFSETS[roles[odd]]:
        hints.clear()
        t, s, c = (
            at(numbers(i, target, roles[name]), offset if name == odd else 0)
            for i, name in enumerate(roles)
        )
        ema_update_([t], [s], 0.3, shadow=[c], impl="triton")
        assert_hints(hints, target, aligned=offset == 0)
        results.append((t, c))
    (expected,) = reference.ema_update(
        [numbers(0, target).double()], [numbers(1, target, dtype).double()], 0.3
    )
    torch.testing.assert_close(results[0][0].double(), expected, rtol=4 * EPS, atol=4 * EPS)
    assert all(map(torch.equal, sum(results[1:], ()), results[0] * (len(results) - 1)))


ROLES = (
    "parameters", "gradients", "exp_avgs", "exp_avg_sqs", "teachers", "shadows", "teacher_shadows",
)  # fmt: skip


@pytest.mark.parametrize("odd", ROLES)
def test_adamw_ema_aligns_no_tensor_that_is_not(odd, hints, target):
    results = []
    for offset in OFFSETS[torch.bfloat16 if "shadow" in odd else torch.float32]:
        hints.clear()
        lists = {}
        for i, name in enumerate(ROLES):
            values = numbers(i, target, torch.bfloat16 if "shadow" in name else torch.float32)
            values = values.square() if name == "exp_avg_sqs" else values
            lists[name] = [at(values, offset if name == odd else 0)]
        steps = torch.full((1,), 7.0, device=target["device"])
        adamw_ema_update_(**lists, steps=steps, lr=0.01, momentum=0.9, impl="triton")
        assert_hints(hints, target, aligned=offset == 0)
        results.append([tensor for (tensor,) in lists.values()])
    for result in results[1:]:
        for name, tensor, aligned in zip(ROLES, result, results[0], strict=True):
            assert torch.equal(tensor, aligned), name


@pytest.mark.parametrize("clip", [clip_grad_norms_, clip_grad_norm_])
@pytest.mark.parametrize("dtype", OFFSETS)
def test_clip_aligns_no_gradient_that_is_not(dtype, clip, hints, target):
    """The aligned gradient next to it still is accessed at once, in the sum and in the product."""
    for offset in OFFSETS[dtype]:
        hints.clear()
        params = [torch.nn.Parameter(numbers(i, target, dtype)) for i in range(2)]
        for param, own in zip(params, (offset, 0), strict=True):
            param.grad = at(param.detach(), own)
        gradients = [param.grad.double() for param in params]
        clip(params, 1.0, impl="triton")
        if target["device"] == "cpu":
            assert len(hints) == (6 if offset == 0 else 3)  # sum, and product: load and store
        if clip is clip_grad_norms_:
            expected, _ = reference.clip_grad_norms(gradients, 1.0)
        else:
            expected, _ = reference.clip_grad_norm(gradients, 1.0)
        slack = torch.finfo(dtype).eps
        for param, right in zip(params, expected, strict=True):
            torch.testing.assert_close(param.grad.double(), right, rtol=2 * slack, atol=1e-9)
