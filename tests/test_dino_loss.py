"""fastdino_kernels.dino_loss against the plain equations in float64.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

import math

import pytest
import torch
from fastdino_kernels import chosen_impl, dino_loss, reference, teacher_entropy
from torch import Tensor

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
HALF = [torch.float16, torch.bfloat16]
# One unit in the last place, relative, of what a gradient is stored in.
EPS = {dtype: torch.finfo(dtype).eps for dtype in (*HALF, torch.float32, torch.float64)}


def draw(S=4, T=2, B=3, K=7, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = spread * normal(S, B, K), spread * normal(T, B, K)
    return student.to(dtype), teacher.to(dtype), 0.1 * normal(K).float()


def truth(student, teacher, center, scale=1.0, dtype=torch.float64, **temps):
    """Loss, gradient of scale*loss, and teacher sum, by the plain equations in `dtype`."""
    student = student.detach().to(dtype).requires_grad_()
    loss, total = reference.dino_loss(
        student, teacher.to(dtype), center.to(dtype), **(temps or TEMPS)
    )
    (scale * loss).backward()
    return loss.detach(), student.grad, total


def ours(student, teacher, center, scale=1.0, impl="torch", **temps):
    student = student.detach().clone().requires_grad_()
    loss, total = dino_loss(student, teacher, center, impl=impl, **(temps or TEMPS))
    (scale * loss).backward()
    return loss.detach(), student.grad, total


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    difference = (got.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize(("S", "T"), [(2, 1), (2, 2), (10, 2), (5, 3), (3, 3)])
@pytest.mark.parametrize(("B", "K"), [(1, 1), (3, 7), (2, 1000), (3, 4096)])
def test_equals_the_plain_equations_in_float64(S, T, B, K):
    inputs = draw(S, T, B, K, torch.float64)
    for got, expected in zip(ours(*inputs), truth(*inputs), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(("S", "T", "B", "K"), [(2, 1, 3, 7), (10, 2, 4, 4096), (4, 3, 2, 1000)])
def test_is_no_less_accurate_than_plain_pytorch_in_the_same_dtype(dtype, S, T, B, K):
    inputs = draw(S, T, B, K, dtype)
    expected = truth(*inputs)
    plain = truth(*inputs, dtype=dtype)
    loss, grad, total = ours(*inputs)
    assert (loss.dtype, grad.dtype, total.dtype) == (torch.float32, dtype, torch.float32)
    assert error(loss, expected[0]) <= error(plain[0], expected[0]) + 5e-7
    assert error(grad, expected[1]) <= error(plain[1], expected[1]) + EPS[torch.float32]
    assert error(total, expected[2]) <= error(plain[2], expected[2]) + 5e-7


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_loss_is_computed_in_fp32(dtype):
    inputs = draw(6, 2, 4, 1000, dtype)
    expected = truth(*inputs)
    loss, _, total = ours(*inputs)
    assert error(loss, expected[0]) < 1e-6
    assert error(total, expected[2]) < 1e-6


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_gradient_is_rounded_once_after_scaling(dtype):
    # Unscaled, a good part of these gradients would be zero in fp16.
    inputs = draw(4, 2, 16, 4096, dtype, spread=0.02)
    scale = 2.0**14
    expected = truth(*inputs, scale=scale)[1]
    grad = ours(*inputs, scale=scale)[1].double()
    slack = expected.abs() * EPS[dtype] * 0.51 + expected.abs().max() * 4e-7
    if dtype == torch.float16:
        slack += 2.0**-25  # half a subnormal step
        rounded_early = ((expected / scale).to(dtype) * scale).double()
        assert ((rounded_early - expected).abs() > slack).double().mean() > 0.1
    assert ((grad - expected).abs() <= slack).all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_a_constant_to_a_row_changes_nothing(impl, dtype):
    student, teacher, center = draw(4, 2, 3, 64, torch.float32)
    # Multiples of 1/8 shift exactly, so the logits really are equal up to the constant.
    student, teacher = (student * 8).round() / 8, (teacher * 8).round() / 8
    loss, grad, _ = ours(student.to(dtype), teacher.to(dtype), center, impl=impl)
    shifted = ours((student + 8).to(dtype), (teacher - 8).to(dtype), center, impl=impl)
    torch.testing.assert_close(shifted[0], loss, rtol=1e-4, atol=0)
    assert error(shifted[1], grad) < 1e-4 + EPS[dtype]


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.float16, 6e4), (torch.bfloat16, 1e30)]
)
def test_extreme_logits_stay_finite_and_right(dtype, size):
    student, teacher, center = draw(4, 2, 3, 64, dtype)
    student[:, :, 5], student[:, :, 6] = size, -size
    teacher[:, :, 5], teacher[:, :, 7] = size, -size
    expected = truth(student, teacher, center)
    loss, grad, total = ours(student, teacher, center)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert total.isfinite().all()
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-3, atol=1e-7)


def test_blocks_of_images_cover_a_batch_that_they_do_not_divide():
    B = 2 * torch.get_num_threads() + 1
    inputs = draw(3, 2, B, 40_000)
    expected = truth(*inputs)
    loss, grad, total = ours(*inputs)
    assert error(loss, expected[0]) < 1e-6
    assert error(grad, expected[1]) < 1e-5
    assert error(total, expected[2]) < 1e-6


def test_empty_batch_has_loss_zero():
    student, teacher, center = draw(4, 2, 0, 7)
    for impl in ("torch", "reference"):
        loss, grad, total = ours(student, teacher, center, impl=impl)
        assert loss == 0
        assert grad.shape == (4, 0, 7)
        assert torch.equal(total, torch.zeros(7))


def test_non_contiguous_inputs():
    student, teacher, center = draw(4, 2, 3, 70)
    expected = ours(student, teacher, center)
    strided = (
        student.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        teacher.repeat_interleave(2, dim=-1)[..., ::2],
        center.repeat_interleave(3)[::3][None],
    )
    assert not any(tensor[0].is_contiguous() for tensor in strided)
    for got, want in zip(ours(*strided), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_teacher_and_center_are_constants():
    student, teacher, center = draw()
    teacher.requires_grad_()
    center.requires_grad_()
    before = center.detach().clone()
    loss, total = dino_loss(student.requires_grad_(), teacher, center, **TEMPS)
    assert loss.requires_grad
    assert not total.requires_grad
    loss.backward()
    assert teacher.grad is None
    assert center.grad is None
    assert torch.equal(center, before)


def test_the_center_may_change_before_the_backward_pass():
    student, teacher, center = draw()
    expected = ours(student, teacher, center)[1]
    student.requires_grad_()
    loss, _ = dino_loss(student, teacher, center, **TEMPS)
    center.add_(100)
    loss.backward()
    assert torch.equal(student.grad, expected)


def test_temperatures_may_be_tensors():
    inputs = draw()
    temps = {name: torch.tensor(value) for name, value in TEMPS.items()}
    for got, expected in zip(ours(*inputs, **temps), ours(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_mixed_dtypes_compute_in_the_wider_one():
    student, teacher, center = draw(dtype=torch.bfloat16)
    expected = truth(student, teacher, center)
    loss, grad, total = ours(student, teacher.double(), center.bfloat16().double())
    assert (loss.dtype, grad.dtype, total.dtype) == (torch.float64, student.dtype, torch.float64)
    loss, grad, _ = ours(student, teacher.float(), center)
    assert (loss.dtype, grad.dtype) == (torch.float32, student.dtype)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)


def test_same_input_same_bits():
    inputs = draw(6, 2, 5, 20_000)
    for first, second in zip(ours(*inputs), ours(*inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(dtype):
    inputs = draw(dtype=dtype)
    expected = ours(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(*inputs)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_gradcheck():
    student, teacher, center = draw(3, 2, 2, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: dino_loss(s, teacher, center, impl="torch", **TEMPS)[0],
        student.requires_grad_(),
    )


def test_the_gradient_of_the_gradient_says_that_it_is_missing():
    student, teacher, center = draw()
    loss, _ = dino_loss(student.requires_grad_(), teacher, center, **TEMPS)
    with pytest.raises(RuntimeError, match="no second derivative.*without create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_compiles_as_one_graph():
    inputs = draw(dtype=torch.bfloat16)

    def step(student, teacher, center):
        loss, total = dino_loss(student, teacher, center, **TEMPS)
        return loss * 2, total

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = ours(*inputs, scale=2.0)
    student = inputs[0].clone().requires_grad_()
    loss, total = compiled(student, *inputs[1:])
    loss.backward()
    assert torch.equal(student.grad, expected[1])
    assert torch.equal(loss / 2, expected[0])
    assert torch.equal(total, expected[2])


def test_environment_variable_sets_the_default(monkeypatch):
    inputs = draw(dtype=torch.bfloat16)
    automatic = ours(*inputs, impl="auto")
    assert (
        "Pairwise" in dino_loss(inputs[0].requires_grad_(), *inputs[1:], **TEMPS)[0].grad_fn.name()
    )
    monkeypatch.setenv("FASTDINO_KERNELS", "reference")
    assert chosen_impl() == "reference"
    assert "Pairwise" not in dino_loss(*inputs, **TEMPS)[0].grad_fn.name()
    monkeypatch.setenv("FASTDINO_KERNELS", "abacus")
    with pytest.raises(ValueError, match=r"FASTDINO_KERNELS must be one of 'auto'.*'abacus'"):
        dino_loss(*inputs, **TEMPS)
    assert torch.equal(ours(*inputs, impl="torch")[1], automatic[1])


def call(student=(4, 3, 7), teacher=(2, 3, 7), center=(7,), **changes):
    tensors = [
        shape if not isinstance(shape, tuple) else torch.zeros(shape)
        for shape in (student, teacher, center)
    ]
    return dino_loss(*tensors, **{**TEMPS, **changes})


@pytest.mark.parametrize(
    ("changes", "raises", "match"),
    [
        ({"student": (12, 7)}, ValueError, r"student must be \[S, B, K\], got shape \(12, 7\)"),
        ({"teacher": (6, 7)}, ValueError, r"teacher must be .* got shape \(6, 7\)"),
        ({"teacher": (2, 3, 8), "center": (8,)}, ValueError, r"\(4, 3, 7\) and \(2, 3, 8\)"),
        ({"teacher": (2, 4, 7)}, ValueError, r"\(4, 3, 7\) and \(2, 4, 7\)"),
        ({"center": (8,)}, ValueError, r"center must be .* K = 7, got shape \(8,\)"),
        ({"center": (7, 1)}, ValueError, r"center must be .* got shape \(7, 1\)"),
        ({"student": (1, 3, 7)}, ValueError, "S = 1 and T = 2"),
        ({"student": (1, 3, 7), "teacher": (1, 3, 7)}, ValueError, "leaves no pairs"),
        ({"teacher": (0, 3, 7)}, ValueError, "T, K >= 1"),
        ({"student": (4, 3, 0), "teacher": (2, 3, 0), "center": (0,)}, ValueError, "K >= 1"),
        ({"student": [1.0]}, TypeError, "student must be a torch.Tensor, got list"),
        ({"student": torch.zeros(4, 3, 7).long()}, TypeError, "student.*torch.int64"),
        ({"teacher": torch.zeros(2, 3, 7, device="meta")}, ValueError, "same device.*meta"),
        ({"student_temp": 0.0}, ValueError, r"student_temp must be > 0 .*got 0\.0"),
        ({"teacher_temp": -1}, ValueError, "teacher_temp must be > 0 .*got -1"),
        ({"teacher_temp": math.nan}, ValueError, "teacher_temp must be > 0 .*got nan"),
        ({"teacher_temp": "warm"}, TypeError, "teacher_temp .*got str"),
        ({"teacher_temp": torch.ones(1)}, ValueError, r"0-d tensor, got shape \(1,\)"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'torch'.*got 'cuda'"),
    ],
)
def test_callers_mistakes(changes, raises, match):
    with pytest.raises(raises, match=match):
        call(**changes)


def test_teacher_entropy():
    _, teacher, center = draw(T=2, B=5, K=1000, dtype=torch.bfloat16)
    expected = reference.teacher_entropy(teacher.double(), center.double(), 0.04)
    got = teacher_entropy(teacher, center, 0.04)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    uniform = teacher_entropy(torch.zeros(2, 3, 50), torch.zeros(1, 50), 0.04)
    torch.testing.assert_close(uniform.item(), math.log(50), rtol=1e-6, atol=0)
    one_hot = teacher_entropy(1e6 * torch.eye(4)[None], torch.zeros(4), 0.04)
    assert one_hot == 0
    with pytest.raises(ValueError, match="B >= 1"):
        teacher_entropy(torch.zeros(2, 0, 7), torch.zeros(7), 0.04)


def test_loss_minus_entropy_is_zero_where_the_student_is_the_teacher():
    logits = draw(1, 1, 3, 20, torch.float64)[0].expand(4, 3, 20)
    center = torch.zeros(20, dtype=torch.float64)
    loss, _ = dino_loss(logits, logits[:2], center, student_temp=0.1, teacher_temp=0.1)
    torch.testing.assert_close(loss, teacher_entropy(logits[:2], center, 0.1))
