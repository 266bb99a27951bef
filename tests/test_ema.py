"""fastdino_kernels.ema_update_ against m*teacher + (1 - m)*student in float64."""

import math

import pytest
import torch
from fastdino_kernels import ema_update_, reference

SHAPES = [(3, 5), (7,), (), (0, 4), (2, 3, 4)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def truth(teacher, student, momentum):
    return reference.ema_update(
        [t.double() for t in teacher], [s.double() for s in student], momentum
    )


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("student_dtype", FLOATS)
@pytest.mark.parametrize("teacher_dtype", FLOATS)
def test_is_right_to_one_rounding(teacher_dtype, student_dtype, momentum, impl):
    teacher, student = draw(teacher_dtype), draw(student_dtype, seed=1)
    expected = truth(teacher, student, momentum)
    before = [s.clone() for s in student]
    ema_update_(teacher, student, momentum, impl=impl)
    rounding = torch.finfo(teacher_dtype).eps
    if impl == "reference":  # which rounds each product
        rounding *= 2
    for t, e, s, b in zip(teacher, expected, student, before, strict=True):
        assert t.dtype == teacher_dtype
        torch.testing.assert_close(t.double(), e, rtol=rounding, atol=rounding)
        assert torch.equal(s, b)


def test_a_hundred_steps_in_float64_agree_to_1e_12():
    teacher = draw(torch.float64)
    expected = [t.clone() for t in teacher]
    for step in range(100):
        momentum = 1 - 0.004 * (1 + math.cos(math.pi * step / 100)) / 2
        student = draw(torch.float64, seed=step)
        ema_update_(teacher, student, momentum)
        expected = reference.ema_update(expected, student, momentum)
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
def test_momentum_may_be_a_tensor(student_dtype, teacher_dtype, impl):
    teacher, student = draw(teacher_dtype), draw(student_dtype, seed=1)
    expected = truth(teacher, student, 0.3)
    ema_update_(teacher, student, torch.tensor(0.3, dtype=torch.float64), impl=impl)
    # Half is rounded once, from fp32.
    eps, half = torch.finfo(teacher_dtype).eps, teacher_dtype in (torch.bfloat16, torch.float16)
    rounding = 0.51 * eps if half else 2 * eps
    for t, e in zip(teacher, expected, strict=True):
        assert t.dtype == teacher_dtype
        torch.testing.assert_close(t.double(), e, rtol=rounding, atol=1e-6 if half else rounding)


def test_momentum_one_keeps_the_teacher_to_the_bit():
    teacher, student = draw(), draw(seed=1)
    before = [t.clone() for t in teacher]
    ema_update_(teacher, student, 1.0)
    assert all(torch.equal(t, b) for t, b in zip(teacher, before, strict=True))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_shadow_is_the_updated_teacher_rounded(impl):
    teacher, student = draw(), draw(seed=1)
    shadow = [torch.full_like(t, math.nan, dtype=torch.bfloat16) for t in teacher]
    ema_update_(teacher, student, 0.9, shadow=shadow, impl=impl)
    assert all(torch.equal(c, t.bfloat16()) for c, t in zip(shadow, teacher, strict=True))


def test_modules_parameters_are_updated_without_a_graph():
    student, teacher = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    expected = truth(list(teacher.parameters()), list(student.parameters()), 0.9)
    ema_update_(teacher.parameters(), student.parameters(), 0.9)
    for t, e in zip(teacher.parameters(), expected, strict=True):
        assert t.is_leaf
        assert t.requires_grad
        assert t.grad_fn is None
        torch.testing.assert_close(t.double(), e, rtol=1e-6, atol=1e-7)


def test_non_contiguous_tensors():
    teacher, student = torch.randn(4, 6)[:, ::2], torch.randn(3, 4).t()
    expected = truth([teacher], [student], 0.7)[0]
    ema_update_([teacher], [student], 0.7)
    torch.testing.assert_close(teacher.double(), expected, rtol=1e-6, atol=1e-7)


def test_nothing_to_update():
    ema_update_([], [], 0.9)
    ema_update_([], [], torch.tensor(0.9), shadow=[])


def test_compiles_as_one_graph():
    teacher, student = draw(), draw(torch.bfloat16, seed=1)
    expected = [t.clone() for t in teacher]
    ema_update_(expected, student, 0.9)

    def update(teacher, student):
        ema_update_(teacher, student, 0.9)

    torch.compile(update, fullgraph=True, backend="aot_eager")(teacher, student)
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t, e)


def test_environment_variable_names_an_implementation(monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", "abacus")
    with pytest.raises(ValueError, match=r"FASTDINO_KERNELS must be one of 'auto'.*'abacus'"):
        ema_update_(draw(), draw(seed=1), 0.9)


A, B = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "raises", "match"),
    [
        (([A], [B, B], 0.9), {}, ValueError, "same length, got 1 and 2"),
        (([A, A], [B, B.t()], 0.9), {}, ValueError, r"\[1\] .*got \(2, 3\) and \(3, 2\)"),
        (([A, A], [B, A], 0.9), {}, ValueError, r"teacher_tensors\[1\] .*same tensor"),
        (([A], [A.detach()], 0.9), {}, ValueError, "same tensor"),
        (([A], [B.to("meta")], 0.9), {}, ValueError, "same device, got cpu and meta"),
        (([A], [B.long()], 0.9), {}, TypeError, r"student_tensors\[0\] .*torch.int64"),
        (([A.long()], [B], 0.9), {}, TypeError, r"teacher_tensors\[0\] .*torch.int64"),
        (([A], [1.0], 0.9), {}, TypeError, r"student_tensors\[0\] .*got float"),
        (([A], [B], 1.1), {}, ValueError, r"momentum must be in \[0, 1\], got 1\.1"),
        (([A], [B], math.nan), {}, ValueError, "momentum .*got nan"),
        (([A], [B], "most"), {}, TypeError, "momentum .*got str"),
        (([A], [B], torch.ones(1)), {}, ValueError, r"0-d tensor, got shape \(1,\)"),
        (([A], [B], 0.9), {"shadow": []}, ValueError, "shadow .*got 1 and 0"),
        (([A], [B], 0.9), {"shadow": [A]}, ValueError, r"shadow\[0\] are the same tensor"),
        (([A], [B], 0.9), {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
    ],
)
def test_callers_mistakes_change_nothing(arguments, options, raises, match):
    with pytest.raises(raises, match=match):
        ema_update_(*arguments, **options)
    assert torch.equal(A, torch.zeros(2, 3))
    assert torch.equal(B, torch.ones(2, 3))
