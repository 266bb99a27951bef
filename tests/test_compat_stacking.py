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


class Scale(torch.autograd.Function):
    """Return a view, and scale its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 0.1 * grad


class ScaledSlice(Scale):
    """The same for a slice."""

    @staticmethod
    def forward(ctx, x, start, end):
        ctx.saved = len(x), start, end
        return x[start:end]

    @staticmethod
    def backward(ctx, grad):
        rows, start, end = ctx.saved
        return 0.1 * torch.nn.functional.pad(grad, (0, 0, start, rows - end)), None, None


def hooked(out: Tensor) -> list[Tensor]:
    pieces = list(out.chunk(4))
    pieces[2].register_hook(lambda grad: 3 * grad)
    return pieces


def of_hooked_piece(out: Tensor) -> list[Tensor]:
    piece = out[3:]
    piece.register_hook(lambda grad: 3 * grad)
    return list(piece.chunk(3))


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


def one_cut_without_gradient(out: Tensor) -> list[Tensor]:
    return [*cut_without_gradient(out)[:1], *out.chunk(4)[1:]]


def changed_in_place(out: Tensor) -> list[Tensor]:
    pieces = [out[3 * i : 3 * i + 3] for i in range(4)]
    pieces[1].mul_(5)
    return pieces


WHOLE = {
    "chunk": lambda out: out.chunk(4),
    "split": lambda out: out.split(3),
    "split with sizes": lambda out: out.split([3, 3, 3, 3]),
    "slices": lambda out: [out[3 * i : 3 * i + 3] for i in range(4)],
    "changed in place": changed_in_place,
}
CONSECUTIVE = {
    "hooked": hooked,
    "retaining": retaining,
    "without gradient": cut_without_gradient,
    "one without gradient": one_cut_without_gradient,
    "rows": lambda out: [row.view(1, 7) for row in out],
    "of a transposed tensor": lambda out: (2 * out.T).T.chunk(4),
    "first": lambda out: out.chunk(4)[:3],
    "last": lambda out: out.chunk(4)[1:],
    "of a view": lambda out: list(out.view(4, 3, 7)),
    "of a view, unbound": lambda out: out.view(4, 3, 7).unbind(),
    "of a piece": lambda out: out[:9].chunk(3),
    "of a later piece": lambda out: out[3:].split(3),
    "of a hooked piece": of_hooked_piece,
    "of a custom view": lambda out: Scale.apply(out).chunk(4),
    "custom views": lambda out: [Scale.apply(piece) for piece in out.chunk(4)],
    "custom slices": lambda out: [ScaledSlice.apply(out, 3 * i, 3 * i + 3) for i in range(4)],
    "one custom view": lambda out: [*out.chunk(4)[:3], Scale.apply(out[9:])],
    "custom views of slices": lambda out: [Scale.apply(out[:6]), Scale.apply(out[6:])],
    "transposed twice": lambda out: [piece.T.T for piece in out.chunk(4)],
    "negative": lambda out: [torch._neg_view(piece) for piece in out.chunk(4)],
}
COPIED = {
    "one negative": lambda out: [out[:3], torch._neg_view(out[3:6]), out[6:9], out[9:]],
    "one detached": one_detached,
    "reversed": lambda out: out.chunk(4)[::-1],
    "repeated": lambda out: [*out.chunk(4)[:3], out.chunk(4)[0]],
    "with a gap": lambda out: out.chunk(4)[::2],
    "interleaved": lambda out: list(out.view(3, 4, 7).unbind(1)),
    "strided": lambda out: list(out.T.reshape(7, 4, 3).unbind(1)),
    "transposed": lambda out: [piece.T for piece in out.chunk(4)],
    "expanded": lambda out: [row.expand(3, 7) for row in out[:4]],
    "clones": lambda out: [piece.clone() for piece in out.chunk(4)],
    "columns": lambda out: [out.view(4, 3, 7)[i, :, :5] for i in range(4)],
    "two tensors": lambda out: (2 * out).chunk(2) + (3 * out).chunk(2),
    "two tensors, in order": lambda out: (2 * out).chunk(4)[:2] + (3 * out).chunk(4)[2:],
    "all apart from the graph": lambda out: [piece.data for piece in out.chunk(4)],
    "one apart from the graph": lambda out: [*out.chunk(4)[:3], out.data[9:]],
}


@pytest.mark.parametrize("name", [*WHOLE, *CONSECUTIVE, *COPIED])
def test_gradients_are_those_of_torch_stack(name):
    cut = (WHOLE | CONSECUTIVE | COPIED)[name]
    results = []
    for stack in (torch.stack, lambda pieces: stack_crops("crops", pieces)):
        leaf, out = flat()
        pieces = cut(out)
        stacked = stack(pieces)
        retained = [piece for piece in pieces if piece.retains_grad]
        weighted = stacked * torch.arange(stacked.numel()).view_as(stacked)
        (weighted.sum() + 0 * leaf.sum()).backward()
        results.append([stacked, leaf.grad, *(piece.grad for piece in retained)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", [*WHOLE, *CONSECUTIVE, *COPIED])
def test_consecutive_pieces_are_not_copied(name):
    pieces = (WHOLE | CONSECUTIVE | COPIED)[name](flat()[1])
    shared = stack_crops("crops", pieces).data_ptr() == pieces[0].data_ptr()
    assert shared == (name not in COPIED)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("leaf", [False, True])
def test_gradient_of_all_pieces_goes_to_the_whole_tensor(name, leaf):
    base = flat()[not leaf]
    if leaf and name == "changed in place":
        pytest.skip("a leaf that requires a gradient cannot be changed")
    stacked = stack_crops("crops", WHOLE[name](base))
    assert stacked._base is base
    assert stacked.grad_fn.next_functions[0][0] is torch.autograd.graph.get_gradient_edge(base).node


@pytest.mark.parametrize("name", CONSECUTIVE)
def test_change_of_a_piece_before_the_backward_pass_is_refused(name):
    leaf, out = flat()
    pieces = CONSECUTIVE[name](out)
    loss = stack_crops("crops", pieces).square().sum() + leaf.sum()
    with torch.no_grad():
        pieces[0]._base.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_pieces_made_in_inference_mode_are_not_copied():
    with torch.inference_mode():
        out = torch.ones(12, 7)
        assert stack_crops("crops", out.chunk(4)).data_ptr() == out.data_ptr()
        apart = [out[:3], torch.zeros(12, 7)[3:6]]
        assert torch.equal(stack_crops("crops", apart), torch.stack(apart))


def test_one_piece_alone_is_not_copied():
    for alone in (lambda out: [out], lambda out: [out[9:]], lambda out: [Scale.apply(out)]):
        leaf, out = flat()
        (piece,) = alone(out)
        stacked = stack_crops("crops", [piece])
        assert stacked.shape == (1, *piece.shape)
        assert stacked.data_ptr() == piece.data_ptr()
        stacked.sum().backward()
        expected = torch.autograd.grad(alone(leaf * 2)[0].sum(), leaf)[0]
        assert torch.equal(leaf.grad, expected)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast_casts_no_crops(dtype):
    crops = [torch.ones(2, 3, dtype=dtype) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        assert stack_crops("crops", crops).dtype == dtype


def test_crops_without_memory():
    crops = [torch.randn(3, 4, device="meta") for _ in range(2)]
    stacked = stack_crops("crops", crops)
    assert (stacked.shape, stacked.device.type) == ((2, 3, 4), "meta")
