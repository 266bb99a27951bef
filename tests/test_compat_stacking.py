"""compat.stacking: lists of crops that are pieces of one tensor are not copied.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels.compat import lightly
from fastdino_kernels.compat.dinov2 import dino_clstoken_loss
from fastdino_kernels.compat.stacking import stack_crops
from torch import Tensor

from tests.logits import draw, draw_probs


def flat(S=4, B=3, K=7) -> tuple[Tensor, Tensor]:
    """Return a leaf [S*B, K] and a tensor computed from it."""
    leaf = torch.randn(
        S * B, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    return leaf, leaf * 2


@pytest.mark.parametrize(
    "cut",
    [
        lambda out: out.chunk(4),
        lambda out: out.split(3),
        lambda out: [out[3 * i : 3 * i + 3] for i in range(4)],
        lambda out: list(out.view(4, 3, 7)),
        lambda out: out.view(4, 3, 7).unbind(),
    ],
)
def test_pieces_of_one_tensor_are_not_copied(cut):
    leaf, out = flat()
    stacked = stack_crops("crops", cut(out))
    assert stacked.data_ptr() == out.data_ptr()
    weight = torch.arange(84.0, dtype=torch.float64).view(4, 3, 7)
    (stacked.square() * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, 8 * leaf.detach() * weight.view(12, 7))


def hooked(out: Tensor) -> list[Tensor]:
    pieces = list(out.chunk(4))
    pieces[2].register_hook(lambda grad: 3 * grad)
    return pieces


def retaining(out: Tensor) -> list[Tensor]:
    pieces = list(out.chunk(4))
    pieces[1].retain_grad()
    return pieces


def cut_without_gradient(out: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(out.chunk(4))


def one_detached(out: Tensor) -> list[Tensor]:
    pieces = list(out.chunk(4))
    return [*pieces[:3], pieces[3].detach()]


@pytest.mark.parametrize(
    "cut",
    [
        hooked,
        retaining,
        cut_without_gradient,
        one_detached,
        lambda out: out.chunk(4)[::-1],
        lambda out: out.chunk(4)[:3],
        lambda out: out.chunk(4)[1:],
        lambda out: [*out.chunk(4)[:3], out.chunk(4)[0]],
        lambda out: list(out.view(3, 4, 7).unbind(1)),
        lambda out: list(out.T.reshape(7, 4, 3).unbind(1)),
        lambda out: [piece.clone() for piece in out.chunk(4)],
        lambda out: [out.view(4, 3, 7)[i, :, :5] for i in range(4)],
        lambda out: (2 * out).chunk(2) + (3 * out).chunk(2),
        lambda out: (2 * out).chunk(4)[:2] + (3 * out).chunk(4)[2:],
        lambda out: (2 * out.T).T.chunk(4),
    ],
)
def test_other_lists_are_stacked_like_torch_stack(cut):
    grads = []
    for stack in (torch.stack, lambda pieces: stack_crops("crops", pieces)):
        leaf, out = flat()
        pieces = [piece for piece in cut(out) if piece.dim() == 2]
        stacked = stack(pieces) + 0 * leaf.sum()
        grads.append(run_backward(stacked, leaf))
    assert torch.equal(*grads)
    assert stack_crops("crops", pieces).data_ptr() != out.data_ptr()


def run_backward(stacked: Tensor, leaf: Tensor) -> Tensor:
    (stacked * torch.arange(stacked.numel()).view_as(stacked)).sum().backward()
    return leaf.grad


def test_pieces_may_be_leaves_that_require_a_gradient():
    pieces = [piece.requires_grad_() for piece in torch.zeros(12, 7).chunk(4)]
    stack_crops("crops", pieces).sum().backward()
    assert all(torch.equal(piece.grad, torch.ones(3, 7)) for piece in pieces)


def test_pieces_viewed_as_another_dtype_keep_it():
    pieces = [piece.view(torch.bfloat16) for piece in torch.ones(12, 7).half().chunk(4)]
    assert torch.equal(stack_crops("crops", pieces), torch.stack(pieces))
    assert stack_crops("crops", pieces).dtype == torch.bfloat16


def test_stacked_tensor_is_returned_unchanged():
    crops = torch.randn(4, 3, 7)
    assert stack_crops("crops", crops) is crops


def test_losses_accept_pieces_and_lists():
    _, probs = draw_probs(4, 2)
    teacher = draw(4, 2)[1]
    for loss_fn in (
        lambda crops: lightly.DINOLoss(7).double()(teacher, crops),
        lambda crops: dino_clstoken_loss(crops, probs),
    ):
        grads = []
        for form in (lambda out: out.chunk(4), lambda out: [c.clone() for c in out.chunk(4)]):
            leaf, out = flat()
            loss_fn(form(out)).backward()
            grads.append(leaf.grad)
        assert grads[0].abs().sum() > 0
        torch.testing.assert_close(*grads, rtol=1e-13, atol=0)
