"""fastdino_kernels.dino_loss on tensors of any layout and address, and its gradient in place."""

import importlib

import pytest
import torch
from fastdino_kernels import dino_loss
from torch import Tensor

from tests.dino_losses import EPS, FLOATS, TEMPS, draw, ours

VIEWS = {
    "offset": lambda x: at_offset(x, 1),
    "long rows": lambda x: torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]],
    "not the first column": lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
    "aligned view": lambda x: torch.nn.functional.pad(x, (8, 8))[..., 8:-8],
}


def at_offset(x: Tensor, offset: int) -> Tensor:
    """Copy to an address that is `offset` elements beyond an aligned one."""
    return x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)


# Each view of each tensor; each dtype with each of both.
ADDRESSES = [
    (FLOATS[(i + j) % 3], view, which)
    for i, view in enumerate(VIEWS)
    for j, which in enumerate(("student", "teacher", "center"))
]


@pytest.mark.parametrize(("dtype", "view", "which"), ADDRESSES)
def test_rows_at_any_address(dtype, view, which, target):
    inputs = dict(zip(("student", "teacher", "center"), draw(3, 2, 2, 520, dtype), strict=True))
    expected = ours(*inputs.values(), **target)
    on_device = {name: tensor.to(target["device"]) for name, tensor in inputs.items()}
    on_device[which] = VIEWS[view](on_device[which])
    student = on_device["student"].requires_grad_()
    loss, total = dino_loss(
        student, on_device["teacher"], on_device["center"], impl=target["impl"], **TEMPS
    )
    (grad,) = torch.autograd.grad(loss, student)
    for got, want in zip((loss.detach(), grad, total), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=EPS[dtype] * 1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_only_rows_at_multiples_of_16_bytes_are_read_as_vectors(dtype):
    are_aligned = importlib.import_module("fastdino_kernels.pairwise_triton")._are_aligned
    crops = draw(3, 2, 2, 520, dtype)[0]
    views = {name: are_aligned(view(crops)) for name, view in VIEWS.items()}
    assert views == {name: name == "aligned view" for name in VIEWS}
    assert are_aligned(crops, None)
    assert not are_aligned(crops, at_offset(crops, 1))


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_offsets_beyond_32_bits(inplace_backward, target):
    # The last image is at an offset of 2^31 elements, in reserved memory that is not touched.
    S, T, B, K, stride = 2, 2, 3, 24, 1 << 30
    dense = draw(S, T, B, K, torch.float16)
    shapes = (((S, B, K), (K, stride, 1)), ((T, B, K), (K, stride, 1)))
    storage = torch.empty((2 << 30) + 2 * S * K, dtype=torch.float16, device=target["device"])
    far = [
        storage.as_strided(shape, strides, offset)
        for (shape, strides), offset in zip(shapes, (0, S * K), strict=True)
    ]
    for view, values in zip(far, dense, strict=False):
        view.copy_(values)
    expected = ours(*dense, **target)
    student = far[0].requires_grad_()
    center = dense[2].to(target["device"])
    options = TEMPS | {"impl": target["impl"], "inplace_backward": inplace_backward}
    if inplace_backward:  # the teacher needs its own memory
        far[1] = far[1].clone()
    loss, total = dino_loss(student, far[1], center, **options)
    (grad,) = torch.autograd.grad(loss, student)
    for got, want in zip((loss.detach(), grad, total), expected, strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_non_contiguous_inputs(inplace_backward, target):
    student, teacher, center = draw(4, 2, 3, 70)
    expected = ours(student, teacher, center, **target)
    strided = (
        (student.permute(2, 0, 1), (1, 2, 0)),  # K is not contiguous: copied
        (student.permute(1, 0, 2), (1, 0, 2)),  # image after image: not copied
    )
    teacher = teacher.repeat_interleave(2, dim=-1).to(target["device"])[..., ::2]
    center = center.repeat_interleave(3).to(target["device"])[::3][None]
    for values, order in strided:
        leaf = values.contiguous().to(target["device"]).requires_grad_()
        logits = (1 * leaf).permute(order)
        assert not logits.is_contiguous()
        loss, total = dino_loss(
            logits, teacher, center, inplace_backward=inplace_backward, impl=target["impl"], **TEMPS
        )
        (grad,) = torch.autograd.grad(loss, logits)
        for got, want in zip((loss.detach(), grad, total), expected, strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-8)


def test_gradient_may_be_written_over_the_logits(target):
    student, teacher, center = draw(4, 2, 3, 70)
    expected = ours(student, teacher, center, **target)
    leaf, teacher, center = (x.to(target["device"]) for x in (student, teacher, center))
    logits = 1 * leaf.requires_grad_()
    options = TEMPS | {"impl": target["impl"], "inplace_backward": True}
    loss, _ = dino_loss(logits, teacher, center, **options)
    other, _ = dino_loss(logits, teacher, center, **options)
    loss.backward()
    assert torch.equal(leaf.grad.cpu(), expected[1])
    assert torch.equal(logits.detach().cpu(), expected[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_gradient_is_not_written_over_logits_of_a_kept_graph(target):
    student, teacher, center = draw(4, 2, 3, 70)
    expected = ours(student, teacher, center, **target)[1]
    leaf, teacher, center = (x.to(target["device"]) for x in (student, teacher, center))
    logits = 1 * leaf.requires_grad_()
    options = TEMPS | {"impl": target["impl"], "inplace_backward": True}
    loss, _ = dino_loss(logits, teacher, center, **options)
    loss.backward(retain_graph=True)
    assert torch.equal(logits.detach().cpu(), student)
    loss.backward()
    assert torch.equal(leaf.grad.cpu(), 2 * expected)
    assert torch.equal(logits.detach().cpu(), expected)


def test_inplace_backward_rejects_shared_memory():
    student, teacher, center = draw(4, 2, 3, 8)
    options = TEMPS | {"inplace_backward": True}
    with pytest.raises(ValueError, match=r"share no memory, got strides \(0, 8, 1\)"):
        dino_loss(student[:1].expand(4, 3, 8), teacher, center, **options)
    with pytest.raises(ValueError, match="got student and teacher in the same storage"):
        dino_loss(student, student[:2], center, **options)
