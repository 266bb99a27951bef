"""compat.lightly.KoLeoLoss against the equation and the installed lightly's loss.

Legend: B rows, D features.
"""

from __future__ import annotations

import math

import pytest
import torch
from fastdino_kernels import koleo
from fastdino_kernels.compat.lightly import KoLeoLoss
from torch import Tensor

from tests.logits import assert_same, run


def draw(B=9, D=5, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype)


def plain_koleo(x: Tensor, p: float, eps: float) -> Tensor:
    """Compute -mean log ||x_i - x_n(i)||, the similarity of a row with itself being -2."""
    x = x / x.norm(dim=1, keepdim=True).clamp_min(eps)
    dots = (x @ x.t()).masked_fill(torch.eye(len(x), dtype=torch.bool), -2)
    distances = torch.linalg.vector_norm(x - x[dots.argmax(dim=1)] + eps, ord=p, dim=1)
    return -(distances + eps).log().mean()


@pytest.mark.parametrize(("p", "eps"), [(2, 1e-8), (1, 1e-8), (3.0, 1e-4)])
@pytest.mark.parametrize("B", [2, 9, 40])
def test_loss_and_gradient_follow_the_equation_and_lightly(p, eps, B):
    x, ours = draw(B), KoLeoLoss(p, eps)
    got = run(ours, x)
    assert_same(got, run(plain_koleo, x, p, eps), rtol=1e-11)
    original = pytest.importorskip("lightly.loss").KoLeoLoss(p, eps)
    assert_same(got, run(original, x), rtol=1e-11)
    assert (ours.p, ours.eps) == (p, eps)
    assert ours.state_dict().keys() == original.state_dict().keys()


def test_rows_in_blocks_give_the_same(monkeypatch):
    expected = run(KoLeoLoss(), draw())
    monkeypatch.setattr(koleo, "BLOCK_ELEMENTS", 20)  # two rows at a time
    assert_same(run(KoLeoLoss(), draw()), expected)


def test_opposite_rows_are_neighbours_of_each_other():
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    assert KoLeoLoss()(x).item() == pytest.approx(-math.log(2), rel=1e-6)


def test_single_row_is_its_own_neighbour_and_no_rows_have_loss_zero():
    assert KoLeoLoss()(torch.ones(1, 1)).item() == pytest.approx(-math.log(2e-8), rel=1e-5)
    empty = torch.ones(0, 5, requires_grad=True)
    loss = KoLeoLoss()(empty)
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = draw(dtype=dtype)
    loss, grad = run(KoLeoLoss(), x)
    expected = run(plain_koleo, x.double(), 2, 1e-8)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-6)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected[1], rtol=step, atol=1e-5)


def test_autocast_changes_nothing():
    x = draw(dtype=torch.float32)
    expected = run(KoLeoLoss(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(KoLeoLoss(), x)
    assert all(map(torch.equal, got, expected))


def test_compiles_as_one_graph():
    x = draw(dtype=torch.float32)
    compiled = torch.compile(KoLeoLoss(), backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, x), run(KoLeoLoss(), x), rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "x", "match"),
    [
        (ValueError, torch.ones(5), r"x must be \[B, D\].*got shape \(5,\)"),
        (ValueError, torch.ones(3, 0), "D >= 1"),
        (TypeError, torch.ones(3, 5, dtype=torch.int64), "int64"),
        (TypeError, "features", "got str"),
    ],
)
def test_invalid_features(error, x, match):
    with pytest.raises(error, match=match):
        KoLeoLoss()(x)


@pytest.mark.parametrize("arguments", [{"p": 0}, {"eps": 0.0}, {"p": float("nan")}])
def test_invalid_constructor_arguments(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be > 0"):
        KoLeoLoss(**arguments)


def test_tensors_without_memory():
    loss = KoLeoLoss()(torch.randn(6, 4, device="meta"))
    assert (loss.shape, loss.device.type) == ((), "meta")
