"""Logits of crops, and losses run on them, for the tests of losses."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(S, T, B=3, K=7, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(n, B, K, generator=generator, dtype=torch.float64) for n in (S, T)
    )
    return student.to(dtype), teacher.to(dtype)


def draw_probs(S, T, B=3, K=7, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    """Draw logits, and probabilities whose rows do not sum to 1, as after Sinkhorn-Knopp."""
    student, teacher = draw(S, T, B, K, torch.float64, seed)
    return student.to(dtype), (1.1 * torch.softmax(teacher / 0.5, dim=-1)).to(dtype)


def run(loss_fn, crops: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Run loss_fn(crops, ...) on a copy of the crops; return (loss, gradient of the crops)."""
    crops = crops.clone().requires_grad_()
    loss = loss_fn(crops, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), crops.grad


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rtol=1e-12) -> None:
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        torch.testing.assert_close(g, e, rtol=rtol, atol=rtol)


def run_both(ours, theirs, teacher: Tensor, student: Tensor, **arguments):
    """Run two lightly losses on lists of crops."""
    return [
        run(lambda s, f=f: f(list(teacher), list(s), **arguments), student) for f in (ours, theirs)
    ]
