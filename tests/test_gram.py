"""fastdino_kernels.gram_loss against the reference in float64.

Legend: G images, P tokens of an image, D features.
"""

import importlib
import math

import pytest
import torch
from fastdino_kernels import gram_loss, reference
from fastdino_kernels.operators import ops
from torch import Tensor

from fastdino.bench.measurement import peak_bytes
from tests.logits import run

CPU = torch.device("cpu")
gram = importlib.import_module("fastdino_kernels.gram")


def draw(*shape, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype).unbind()
    )


@pytest.mark.parametrize("block", [1, 30, 100, 1 << 22])
@pytest.mark.parametrize("per_image", [True, False])
def test_matches_the_reference_in_float64(per_image, block, monkeypatch):
    monkeypatch.setattr(gram, "BLOCK_ELEMENTS", block)
    student, teacher = draw(3, 7, 5)
    view = (3, 7, 5) if per_image else (1, 21, 5)
    expected = run(
        lambda s, t: reference.gram_loss(s.reshape(view), t.reshape(view)), student, teacher
    )
    got = run(gram_loss, student, teacher, per_image=per_image)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_leading_dimensions_and_another_teacher_width():
    student, teacher = draw(2, 3, 7, 5)
    expected = gram_loss(student.flatten(0, 1), teacher.flatten(0, 1))
    torch.testing.assert_close(gram_loss(student, teacher), expected)
    torch.testing.assert_close(gram_loss(student[0, 0], teacher[0, 0], per_image=False),
                               gram_loss(student[0, 0], teacher[0, 0]))  # fmt: skip
    narrow = teacher[..., :3].flatten(0, 1)
    torch.testing.assert_close(
        gram_loss(student, teacher[..., :3]), reference.gram_loss(student.flatten(0, 1), narrow)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_fp32(dtype):
    student, teacher = draw(3, 20, 30, dtype=dtype)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
        with context:
            loss, grad = run(gram_loss, student, teacher)
        expected = run(reference.gram_loss, student.double(), teacher.double())
        assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
        assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
        slack = torch.finfo(dtype).eps * expected[1].abs().max().item()
        assert (grad - expected[1]).abs().max() < 4 * slack


def test_gradcheck_and_no_second_derivative():
    student, teacher = draw(2, 4, 3)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: gram_loss(s, teacher, per_image=False), student)
    loss = gram_loss(student, teacher)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_teacher_gets_no_gradient():
    student, teacher = (tokens.requires_grad_() for tokens in draw(2, 4, 3))
    gram_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not gram_loss(student.detach(), teacher).requires_grad


def test_tokens_of_zero_and_no_tokens():
    student, teacher = draw(2, 4, 3)
    student[0, 1], teacher[1] = 0, 0
    torch.testing.assert_close(
        run(gram_loss, student, teacher), run(reference.gram_loss, student, teacher)
    )
    for empty in (student[:0], student[:, :0]):
        loss, grad = run(gram_loss, empty, empty)
        assert loss == 0
        assert grad.shape == empty.shape
    student[0, 0, 0] = math.nan
    assert gram_loss(student, teacher).isnan()


def test_memory_is_bounded_by_a_block(monkeypatch):
    monkeypatch.setattr(gram, "BLOCK_ELEMENTS", 1 << 14)
    student, teacher = draw(16, 128, 4, dtype=torch.float32)
    peak = peak_bytes(lambda: run(gram_loss, student, teacher, per_image=False), CPU)
    assert peak < (16 * 128) ** 2 * 4 / 16


@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(with_gradient):
    torch.library.opcheck(ops.gram_loss.default, (*draw(2, 4, 3), with_gradient))


def test_compiles_as_one_graph():
    student, teacher = draw(2, 6, 5, dtype=torch.float32)
    compiled = torch.compile(gram_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, student, teacher), run(gram_loss, student, teacher))


X = torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "raises", "match"),
    [
        (X, X[:1], {}, ValueError, r"same leading sizes, got \(2, 4, 5\) and \(1, 4, 5\)"),
        (X[0, 0], X[0, 0], {}, ValueError, r"got \(5,\) and \(5,\)"),
        (X, X.to("meta"), {}, ValueError, "same device, got cpu and meta"),
        (X, X.long(), {}, TypeError, "teacher must have one of .*torch.int64"),
        (None, X, {}, TypeError, "student must be a torch.Tensor, got NoneType"),
        (X, X, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
    ],
)
def test_invalid_arguments(student, teacher, options, raises, match):
    with pytest.raises(raises, match=match):
        gram_loss(student, teacher, **options)


def test_tensors_without_memory():
    student, teacher = torch.randn(2, 3, 6, 4, device="meta")
    loss = gram_loss(student.requires_grad_(), teacher)
    loss.backward()
    assert (loss.shape, student.grad.shape) == ((), (3, 6, 4))
