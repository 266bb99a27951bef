"""Attention by plain batched products: accuracy against float64, and the memory it keeps."""

from __future__ import annotations

import pytest
import torch

from fastdino.models import matmul_attention
from fastdino.models.matmul_attention import matmul_attention as attend


def plain(query, key, value):
    """Attention of [S, N, H, D] in plain PyTorch, in the order of the paper's code."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def results(function, dtype, S, N, H, D, first_only=False):
    """Return the output and the gradients of strided noise that is equal in every dtype."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(S, N, 3, H, D, generator=generator, dtype=torch.float64).to(dtype)
    query, key, value = qkv.requires_grad_().unbind(2)
    out = function(query[:, :1] if first_only else query, key, value)
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [x.double() for x in (out, *torch.autograd.grad(out, qkv, gradient))]


@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 1, 2, 8), (5, 37, 3, 64), (2, 197, 3, 64), (4, 11, 1, 20), (2, 50, 2, 7)],
    ids=str,
)
def test_is_as_accurate_as_plain_operations(monkeypatch, shape, dtype, first_only):
    monkeypatch.setattr(matmul_attention, "_BLOCK_ELEMENTS", 10_000)  # several blocks
    arguments = (*shape, first_only)
    exact = results(lambda *qkv: plain(*(x.double() for x in qkv)), dtype, *arguments)
    low, got = (results(function, dtype, *arguments) for function in (plain, attend))
    for ours, theirs, want in zip(got, low, exact, strict=True):
        rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
        allowed = (theirs - want).abs().max() + rounding * want.abs().max()
        assert (ours - want).abs().max() <= allowed


@pytest.mark.parametrize("elements", [1, 3 * 2 * 81, 10**6], ids=["one", "uneven", "all"])
def test_blocks_do_not_change_the_result(monkeypatch, elements):
    whole = results(plain, torch.float64, 7, 9, 2, 8)
    monkeypatch.setattr(matmul_attention, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.testing.assert_close(results(attend, torch.float64, 7, 9, 2, 8), whole)


def test_only_a_backward_pass_keeps_the_weights(monkeypatch):
    saved = []
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            expected = attend(*qkv.unbind(2))
        assert not saved
        assert torch.equal(attend(*qkv.unbind(2)), expected)
    assert [tuple(x.shape) for x in saved] == [(2, 9, 2, 8)] * 3 + [(2, 2, 9, 9)]
    owned = {x.untyped_storage().data_ptr() for x in saved}
    assert owned == {qkv.untyped_storage().data_ptr(), saved[3].untyped_storage().data_ptr()}


def test_inputs_are_not_changed():
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    before = qkv.detach().clone()
    out = attend(*qkv.unbind(2))
    torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.equal(qkv, before)
