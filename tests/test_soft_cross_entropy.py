"""fastdino_kernels.soft_cross_entropy against the reference in float64.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

import importlib
import math

import pytest
import torch
from fastdino_kernels import dino_loss, reference, soft_cross_entropy

FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def draw(S=3, T=2, B=4, K=600, dtype=torch.float32, probs_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(S, B, K, generator=generator).to(dtype)
    probs = (4 * torch.randn(T, B, K, generator=generator)).softmax(-1)
    weights = torch.rand(S, B, generator=generator, dtype=torch.float64)
    return student, probs.to(probs_dtype), weights


def truth(student, probs, weights, ignore_diagonal=False, dtype=torch.float64):
    """Return the reference's rows and the gradient of their weighted sum in `dtype`."""
    student = student.detach().to(dtype).requires_grad_()
    rows = reference.soft_cross_entropy(student, probs.to(dtype), 0.1, ignore_diagonal)
    (rows * weights).sum().backward()
    return rows.detach(), student.grad


def ours(student, probs, weights, impl="torch", device="cpu", student_temp=0.1, **options):
    """Return the same of soft_cross_entropy, computed on `device`, on the CPU."""
    student = student.detach().to(device, copy=True).requires_grad_()
    if isinstance(student_temp, torch.Tensor):
        student_temp = student_temp.to(device)
    rows = soft_cross_entropy(
        1 * student, probs.to(device), student_temp=student_temp, impl=impl, **options
    )
    (rows * weights.to(device)).sum().backward()
    return rows.detach().cpu(), student.grad.cpu()


def error(got, expected):
    """Return the largest difference relative to the largest expected value."""
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def assert_accurate(inputs, **options):
    for got, expected in zip(ours(*inputs, **options), truth(*inputs), strict=True):
        assert error(got, expected) < 1e-6


@pytest.mark.accuracy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("ignore_diagonal", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("S", "T"), [(1, 1), (3, 2), (2, 4)])
def test_is_at_least_as_accurate_as_plain_pytorch(S, T, dtype, ignore_diagonal, target):
    inputs = draw(S, T, dtype=dtype)
    if S == T == 1 and ignore_diagonal:  # no pairs
        rows, grad = ours(*inputs, ignore_diagonal=True, **target)
        assert rows.count_nonzero() == grad.count_nonzero() == 0
        return
    expected = truth(*inputs, ignore_diagonal)
    plain = truth(*inputs, ignore_diagonal, dtype=dtype)
    rows, grad = ours(*inputs, ignore_diagonal=ignore_diagonal, **target)
    assert (rows.dtype, grad.dtype) == (torch.float32, dtype)
    assert error(rows, expected[0]) <= error(plain[0], expected[0]) + 5e-7
    assert error(grad, expected[1]) <= error(plain[1], expected[1]) + 1e-6


@pytest.mark.parametrize("probs_dtype", [torch.bfloat16, torch.float32])
def test_rows_of_probabilities_need_not_sum_to_one(probs_dtype, target):
    student, probs, weights = draw(probs_dtype=probs_dtype)
    assert_accurate((student, 3 * probs, weights), **target)


def test_float64_is_computed_in_float64():
    inputs = draw(dtype=torch.float64, probs_dtype=torch.float64)
    torch.testing.assert_close(ours(*inputs), truth(*inputs), rtol=1e-12, atol=1e-14)


def test_gradcheck():
    student, probs, _ = draw(2, 2, 2, 5, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: soft_cross_entropy(s, probs, student_temp=0.1, impl="torch"),
        student.requires_grad_(),
    )


def test_equals_dino_loss_with_its_probabilities(target):
    student, logits, _ = draw(4, 2)
    center = torch.linspace(-1, 1, 600)
    probs = ((logits - center) / 0.04).softmax(-1)
    loss, _ = dino_loss(student, logits, center, student_temp=0.1, teacher_temp=0.04)
    rows, _ = ours(student, probs, torch.zeros(4, 4), ignore_diagonal=True, **target)
    torch.testing.assert_close(rows.sum() / (6 * 4), loss, rtol=1e-5, atol=0)


def test_gradient_may_be_written_over_the_logits(target):
    student, probs, weights = draw()
    expected = ours(student, probs, weights, **target)[1]
    student, probs, weights = (x.to(target["device"]) for x in (student, probs, weights))
    leaf = student.requires_grad_()
    logits = 1 * leaf
    options = {"student_temp": 0.1, "inplace_backward": True, "impl": target["impl"]}
    (soft_cross_entropy(logits, probs, **options) * weights).sum().backward()
    assert torch.equal(leaf.grad.cpu(), expected)
    assert torch.equal(logits.detach().cpu(), expected)


def test_many_rows_with_few_programs(target, monkeypatch):
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    monkeypatch.setattr(pairwise_triton, "MAX_ROWS_OF_PROGRAMS", 4)
    assert_accurate(draw(1, 1, 11, 40), **target)


def test_temperature_may_be_a_tensor_and_the_batch_empty(target):
    inputs = draw()
    got = ours(*inputs, student_temp=torch.tensor(0.1), **target)
    torch.testing.assert_close(got, ours(*inputs, **target), rtol=1e-5, atol=1e-7)
    rows, grad = ours(*draw(B=0), **target)
    assert (rows.shape, grad.shape) == ((3, 0), (3, 0, 600))


def test_compiles_as_one_graph(target):
    student, probs, _ = (x.to(target["device"]) for x in draw())

    def step(student):
        rows = soft_cross_entropy(student, probs, student_temp=0.1, impl=target["impl"])
        return rows.mean()

    leaves = [student.clone().requires_grad_() for _ in range(2)]
    step(leaves[0]).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(leaves[1]).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


S, P = torch.zeros(3, 4, 5), torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    ("student", "probs", "options", "raises", "match"),
    [
        (S[0], P, {}, ValueError, r"got \(4, 5\) and \(2, 4, 5\)"),
        (S, P[:0], {}, ValueError, r"S, T >= 1, got \(3, 4, 5\) and \(0, 4, 5\)"),
        (S, P[:, :3], {}, ValueError, r"same B and K.*got \(3, 4, 5\) and \(2, 3, 5\)"),
        (S, P.to("meta"), {}, ValueError, "same device, got cpu and meta"),
        (S, P.long(), {}, TypeError, "probs .*torch.int64"),
        ([1.0], P, {}, TypeError, "student must be a torch.Tensor, got list"),
        (S, P, {"student_temp": 0.0}, ValueError, r"student_temp must be > 0 .*got 0\.0"),
        (S, P, {"student_temp": math.inf}, ValueError, "finite, got inf"),
        (S, P, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        (S, S[:2], {"inplace_backward": True}, ValueError, "student and probs in the same storage"),
    ],
)
def test_invalid_arguments(student, probs, options, raises, match):
    with pytest.raises(raises, match=match):
        soft_cross_entropy(student, probs, **({"student_temp": 0.1} | options))
