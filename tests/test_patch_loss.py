"""fastdino_kernels.patch_loss against the reference in float64.

`target` is an implementation and a device: PyTorch, and Triton on a GPU or interpreted on a CPU.
Legend: N masked tokens (rows), K prototypes.
"""

import importlib
import math

import pytest
import torch
from fastdino_kernels import (
    dino_loss,
    patch_loss,
    reference,
    sinkhorn_center,
    sinkhorn_knopp,
    soft_cross_entropy,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.dino_losses import interpreted, wide_blocks
from tests.multi_tensor import capture, needs_cuda, numpy_warns

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
HALF = [torch.float16, torch.bfloat16]
FLOATS = [*HALF, torch.float32]
EPS = {dtype: torch.finfo(dtype).eps for dtype in (*FLOATS, torch.float64)}


def draw(N=5, K=37, dtype=torch.float32, seed=0, spread=1.0):
    """Return student and teacher logits, a center and weights of a spread as in DINOv2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = spread * normal(N, K), spread * normal(N, K)
    weights = 1 / torch.randint(1, 50, (N,), generator=generator).double()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return student.to(dtype), teacher.to(dtype), 0.1 * normal(K).to(wide), weights.to(wide)


def truth(student, teacher, center, weights, dtype=torch.float64, denominator=None):
    """Return the reference's loss, the gradient of 2*loss and the teacher sum in `dtype`."""
    student = student.detach().to(dtype, copy=True).requires_grad_()
    weights = weights if weights is None else weights.to(dtype)
    tensors = (teacher.to(dtype), center.to(dtype))
    loss, total = reference.patch_loss(student, *tensors, 0.1, 0.04, weights, denominator)
    (2 * loss).backward()
    return loss.detach(), student.grad, total


def ours(student, teacher, center, weights, impl="torch", device="cpu", **options):
    """Return the same of patch_loss, computed on `device`, on the CPU."""
    student = student.detach().to(device, copy=True).requires_grad_()
    options = TEMPS | {"weights": weights} | options
    made = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    loss, total = patch_loss(student, teacher.to(device), center.to(device), impl=impl, **made)
    (2 * loss).backward()
    return loss.detach().cpu(), student.grad.cpu(), total.cpu()


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    difference = (got.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-30)).item()


def assert_accurate(inputs, *, loss=1e-6, grad=2e-6, total=5e-7, denominator=None, **options):
    got = ours(*inputs, denominator=denominator, **options)
    expected = truth(*inputs, denominator=denominator)
    for g, e, limit in zip(got, expected, (loss, grad, total), strict=True):
        assert error(g, e) < limit


@pytest.mark.parametrize("denominator", [None, 3, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 7), (3, 1000), (130, 64), (2, 70_000)])
def test_matches_the_reference_in_float64(N, K, weighted, denominator):
    inputs = draw(N, K, torch.float64)
    inputs = inputs if weighted else (*inputs[:3], None)
    torch.testing.assert_close(
        ours(*inputs, denominator=denominator), truth(*inputs, denominator=denominator),
        rtol=1e-12, atol=1e-14,
    )  # fmt: skip


@pytest.mark.accuracy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "K"), [(7, 1), (6, 7), (4, 1000), (2, 4096), (2, 65537)])
def test_is_at_least_as_accurate_as_plain_pytorch(N, K, dtype, target, monkeypatch):
    if interpreted(target):
        wide_blocks(monkeypatch, K)
    inputs = draw(N, K, dtype)
    expected, plain = truth(*inputs), truth(*inputs, dtype=dtype)
    loss, grad, total = ours(*inputs, **target)
    assert (loss.dtype, grad.dtype, total.dtype) == (torch.float32, dtype, torch.float32)
    assert error(loss, expected[0]) <= error(plain[0], expected[0]) + 5e-7
    assert error(grad, expected[1]) <= error(plain[1], expected[1]) + 1e-6
    assert error(total, expected[2]) <= error(plain[2], expected[2]) + 5e-7


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "K"), [(9, 16), (3, 513), (5, 1004)])
def test_rows_that_chunks_and_groups_do_not_divide(N, K, dtype, target, monkeypatch):
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    monkeypatch.setattr(pairwise_triton, "MAX_GROUPS", 2)
    monkeypatch.setattr(pairwise_triton, "MAX_ROWS_OF_PROGRAMS", 2)
    monkeypatch.setattr(pairwise_triton, "FINISH_BLOCK", 4)
    assert_accurate(draw(N, K, dtype), grad=max(EPS[dtype], 2e-6), denominator=3, **target)


@pytest.mark.parametrize("dtype", HALF)
def test_small_weights_do_not_underflow_in_half_precision(dtype, target):
    student, teacher, center, weights = draw(4, 600, dtype)
    expected = truth(student, teacher, center, weights * 1e-6, denominator=1e-6)
    got = ours(student, teacher, center, weights * 1e-6, denominator=1e-6, **target)
    assert error(got[0], expected[0]) < 1e-6
    assert error(got[1], expected[1]) < EPS[dtype]


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.float16, 6e4), (torch.bfloat16, 1e30)]
)
def test_extreme_logits_stay_finite_and_accurate(dtype, size, target):
    student, teacher, center, weights = draw(3, 64, dtype)
    student[:, 5], student[:, 6] = size, -size
    teacher[:, 5], teacher[:, 7] = size, -size
    expected = truth(student, teacher, center, weights)
    got = ours(student, teacher, center, weights, **target)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-3, atol=1e-7)


def test_large_logits_far_from_zero_lose_no_digits(target):
    student, teacher, center, weights = draw(4, 600)
    assert_accurate((student + 1e4, teacher + 1e4, 0 * center, weights), grad=1e-5, **target)


@numpy_warns
def test_nan_and_infinite_logits_match_pytorch(target):
    student, teacher, center, weights = draw(6, 600)
    student[0, 4] = math.nan
    teacher[1, 4] = math.nan
    student[2, 3] = -math.inf  # an infinite loss, as the teacher gives it some probability
    student[3] = -math.inf  # no distribution: NaN
    teacher[4, :520] = -math.inf  # well defined
    teacher[5] = -math.inf
    kinds = []
    for i in range(6):
        row = (student[i : i + 1], teacher[i : i + 1], center, weights[i : i + 1])
        expected, got = truth(*row), ours(*row, **target)
        kinds.append(got[0].item())
        for g, e, rtol in zip(got, expected, (1e-6, 1e-4, 1e-6), strict=True):
            torch.testing.assert_close(g.double(), e, rtol=rtol, atol=1e-6, equal_nan=True)
    assert [math.isnan(kind) for kind in kinds] == [True, True, False, True, False, True]
    assert math.isinf(kinds[2])


@numpy_warns
def test_nan_row_leaves_the_other_rows_gradients_intact(target):
    student, teacher, center, weights = draw(4, 600)
    expected = ours(student, teacher, center, weights, **target)[1]
    student[1, 4] = math.nan
    loss, grad, _ = ours(student, teacher, center, weights, **target)
    assert loss.isnan()
    assert grad[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(grad[others], expected[others])


@pytest.mark.parametrize("denominator", [None, 8])
def test_empty_batch_has_loss_zero_and_a_graph(denominator, target):
    head = torch.nn.Linear(3, 7, device=target["device"])
    tokens = torch.zeros(0, 3, device=target["device"])
    center = torch.ones(7, device=target["device"])
    loss, total = patch_loss(
        head(tokens), torch.zeros(0, 7, device=target["device"]), center,
        weights=center[:0], denominator=denominator, impl=target["impl"], **TEMPS,
    )  # fmt: skip
    assert loss == 0
    assert torch.equal(total, torch.zeros_like(center))
    loss.backward()
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_equals_dino_loss_of_one_crop_and_soft_cross_entropy(target):
    student, teacher, center, weights = draw(6, 600)
    rows = soft_cross_entropy(
        student[None], ((teacher - center) / 0.04).softmax(-1)[None], student_temp=0.1
    )[0]
    loss, _, _ = ours(student, teacher, center, weights, denominator=4, **target)
    torch.testing.assert_close(loss, (rows * weights).sum() / 4, rtol=1e-5, atol=0)
    crops = (x.to(target["device"]) for x in (student[None], teacher[None], center))
    mean, _ = dino_loss(*crops, ignore_diagonal=False, impl=target["impl"], **TEMPS)
    torch.testing.assert_close(mean.cpu(), rows.mean(), rtol=1e-5, atol=0)


def test_center_of_sinkhorn_gives_its_targets():
    student, teacher, _, weights = draw(12, 20, torch.float64)
    center = sinkhorn_center(teacher, 0.07)
    loss, _ = patch_loss(
        student, teacher, center, student_temp=0.1, teacher_temp=0.07, weights=weights
    )
    probs = sinkhorn_knopp(teacher, 0.07)
    rows = soft_cross_entropy(student[None], probs[None], student_temp=0.1)[0]
    torch.testing.assert_close(loss, (rows * weights).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_weights_may_have_any_floating_point_dtype(dtype, target):
    student, teacher, center, weights = draw()
    weights = weights.to(dtype)
    expected = ours(student, teacher, center, weights.float(), **target)
    got = ours(student, teacher, center, weights, **target)
    assert all(map(torch.equal, got, expected))


def test_weights_of_any_stride(target):
    student, teacher, center, weights = draw()
    expected = ours(student, teacher, center, weights, **target)
    for view in (weights.repeat_interleave(3)[::3], weights[:1].expand(5)):
        got = ours(student, teacher, center, view, **target)
        if view.stride() == (0,):
            expected = ours(student, teacher, center, view.clone(), **target)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
def test_denominator_may_be_a_tensor(dtype, target):
    inputs = draw()
    expected = ours(*inputs, denominator=3, **target)
    got = ours(*inputs, denominator=torch.tensor(3, dtype=dtype), **target)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_temperatures_may_be_tensors(target):
    inputs = draw()
    temps = {name: torch.tensor(value) for name, value in TEMPS.items()}
    got = ours(*inputs, **temps, **target)
    torch.testing.assert_close(got, ours(*inputs, **target), rtol=1e-6, atol=1e-8)


def test_only_the_student_receives_a_gradient():
    student, teacher, center, weights = draw()
    denominator = torch.tensor(3.0)
    others = [x.requires_grad_() for x in (teacher, center, weights, denominator)]
    loss, total = patch_loss(
        student.requires_grad_(), teacher, center,
        weights=weights, denominator=denominator, **TEMPS,
    )  # fmt: skip
    loss.backward()
    assert not total.requires_grad
    assert [x.grad for x in others] == [None] * 4
    assert student.grad.count_nonzero() > 0


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["student", "teacher", "weights", "denominator"])
def test_change_before_the_backward_pass_is_refused(name, impl):
    names = ("student", "teacher", "center", "weights")
    tensors = dict(zip(names, draw(), strict=True)) | {"denominator": torch.tensor(3.0)}
    tensors["student"].requires_grad_()
    loss, _ = patch_loss(**tensors, **TEMPS, impl=impl)
    with torch.no_grad():
        tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_center_may_change_before_the_backward_pass(target):
    student, teacher, center, weights = draw()
    expected = ours(student, teacher, center, weights, **target)[1]
    student, teacher, center, weights = (
        x.to(target["device"], copy=True) for x in (student, teacher, center, weights)
    )
    student.requires_grad_()
    loss, _ = patch_loss(student, teacher, center, weights=weights, impl=target["impl"], **TEMPS)
    center.add_(100)
    (2 * loss).backward()
    assert torch.equal(student.grad.cpu(), expected)


def test_gradient_may_be_written_over_the_logits(target):
    student, teacher, center, weights = draw(5, 70)
    expected = ours(student, teacher, center, weights, **target)[1]
    leaf, teacher, center, weights = (
        x.to(target["device"]) for x in (student, teacher, center, weights)
    )
    logits = 1 * leaf.requires_grad_()
    options = TEMPS | {"impl": target["impl"], "inplace_backward": True, "weights": weights}
    loss, _ = patch_loss(logits, teacher, center, **options)
    other, _ = patch_loss(logits, teacher, center, **options)
    (2 * loss).backward()
    assert torch.equal(leaf.grad.cpu(), expected)
    assert torch.equal(logits.detach().cpu(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_non_contiguous_inputs(inplace_backward, target):
    student, teacher, center, weights = draw(5, 70)
    expected = ours(student, teacher, center, weights, **target)
    device = target["device"]
    teacher = teacher.to(device).repeat_interleave(2, dim=0)[::2]
    leaf = student.t().contiguous().to(device).requires_grad_()
    logits = (1 * leaf).t()
    loss, total = patch_loss(
        logits, teacher, center.to(device)[None], weights=weights.to(device),
        inplace_backward=inplace_backward, impl=target["impl"], **TEMPS,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(2 * loss, logits)
    for got, want in zip((loss.detach(), grad, total), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-8)


def test_same_input_gives_same_bits(target):
    inputs = draw(9, 1200)
    assert all(map(torch.equal, ours(*inputs, **target), ours(*inputs, **target)))


def test_mixed_dtypes(target):
    student, teacher, center, weights = draw(4, 600, torch.bfloat16)
    inputs = (student, teacher.float(), center, weights)
    assert_accurate(inputs, grad=EPS[torch.bfloat16], **target)
    loss, grad, total = ours(student, teacher.double(), center, weights)
    assert (loss.dtype, grad.dtype, total.dtype) == (torch.float64, student.dtype, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, target):
    inputs = draw(dtype=dtype)
    expected = ours(*inputs, **target)
    with torch.autocast(target["device"], dtype=torch.bfloat16):
        got = ours(*inputs, **target)
    assert all(map(torch.equal, got, expected))


def test_gradcheck():
    student, teacher, center, weights = draw(3, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: patch_loss(s, teacher, center, weights=weights, denominator=2, **TEMPS)[0],
        student.requires_grad_(),
    )


def test_second_derivative_is_an_error():
    student, teacher, center, _ = draw()
    loss, _ = patch_loss(student.requires_grad_(), teacher, center, **TEMPS)
    with pytest.raises(RuntimeError, match="no second derivative.*without create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiles_as_one_graph(inplace_backward, target):
    def step(student, teacher, center, weights):
        options = TEMPS | {"impl": target["impl"], "inplace_backward": inplace_backward}
        loss, total = patch_loss(
            2 * student, teacher, center, weights=weights, denominator=3, **options
        )
        return loss * 2, total

    inputs = [x.to(target["device"]) for x in draw(dtype=torch.bfloat16)]
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = inputs[0].clone().requires_grad_()
        loss, total = run(leaf, *inputs[1:])
        loss.backward()
        results.append((loss.detach(), leaf.grad, total))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_one_compiled_graph_serves_all_numbers_of_tokens_and_denominators():
    counter = CompileCounterWithBackend("aot_eager")

    def step(student, teacher, center, weights, denominator):
        options = TEMPS | {"weights": weights, "denominator": denominator}
        return patch_loss(student, teacher, center, **options)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, dynamic=True, fullgraph=True, backend=counter)
    for N in (5, 9, 4, 12):
        inputs = draw(N, 37, seed=N)
        got, want = (run(*inputs, 0.5 * N) for run in (compiled, step))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert counter.frame_count <= 2


def test_fake_tensors_pass_through(target):
    with FakeTensorMode():
        student = torch.randn(5, 7, device=target["device"], requires_grad=True)
        teacher = torch.randn(5, 7, device=target["device"])
        center, weights = (torch.randn(n, device=target["device"]) for n in (7, 5))
        loss, total = patch_loss(
            student, teacher, center, weights=weights, impl=target["impl"], **TEMPS
        )
        loss.backward()
    assert (loss.shape, total.shape, student.grad.shape) == ((), (7,), (5, 7))


@pytest.mark.gpu
@needs_cuda
def test_captured_graph_reads_inputs_and_numbers_anew():
    student, teacher, center, weights = (x.cuda() for x in draw(6, 4096, torch.bfloat16))
    student.requires_grad_()
    numbers = {name: torch.tensor(value, device="cuda") for name, value in TEMPS.items()}
    numbers["denominator"] = torch.tensor(3, device="cuda", dtype=torch.float32)

    def step():
        student.grad = None
        loss, total = patch_loss(
            student, teacher, center, weights=weights, impl="triton", **numbers
        )
        loss.backward()
        return loss.detach(), student.grad, total

    graph, captured = capture(step)
    others = draw(6, 4096, torch.bfloat16, seed=1)
    with torch.no_grad():
        for mine, other in zip((student, teacher, center, weights), others, strict=True):
            mine.copy_(other)
        numbers["denominator"].fill_(5)
    graph.replay()
    loss, grad, total = ours(*others, impl="triton", device="cuda", denominator=5)
    for got, want in zip(captured, (loss, grad / 2, total), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-8)


S = torch.zeros(3, 7)
C = torch.zeros(7)


@pytest.mark.parametrize(
    ("changes", "raises", "match"),
    [
        ({"student": S[None]}, ValueError, r"\[N, K\] .*got \(1, 3, 7\) and \(3, 7\)"),
        ({"teacher": S[:2]}, ValueError, r"got \(3, 7\) and \(2, 7\)"),
        ({"teacher": S[:, :5]}, ValueError, r"got \(3, 7\) and \(3, 5\)"),
        ({"student": S[:, :0], "teacher": S[:, :0], "center": C[:0]}, ValueError, "K >= 1"),
        ({"student": S.long()}, TypeError, "student .*got torch.int64"),
        ({"student": [1.0]}, TypeError, "student must be a torch.Tensor, got list"),
        ({"teacher": S.bool()}, TypeError, "teacher .*got torch.bool"),
        ({"teacher": S.to("meta")}, ValueError, "same device.*cpu and meta"),
        ({"center": C[:5]}, ValueError, r"center must be .* K = 7, got shape \(5,\)"),
        ({"center": C.to("meta")}, ValueError, "center and teacher must be on the same device"),
        ({"center": 0.0}, TypeError, "center must be a torch.Tensor, got float"),
        ({"weights": torch.ones(4)}, ValueError, r"weights must be \[N\] = \[3\], got shape \[4\]"),
        ({"weights": torch.ones(3, 1)}, ValueError, r"\[N\] = \[3\], got shape \[3, 1\]"),
        ({"weights": torch.ones(())}, ValueError, r"\[N\] = \[3\], got shape \[\]"),
        ({"weights": torch.ones(3).long()}, TypeError, "weights .*got torch.int64"),
        ({"weights": [1.0, 1.0, 1.0]}, TypeError, "weights must be a torch.Tensor, got list"),
        ({"weights": torch.ones(3, device="meta")}, ValueError, "weights and student .*same dev"),
        ({"weights": torch.tensor([1, -0.5, 0])}, ValueError, "weights must be >= 0, got -0.5"),
        ({"denominator": 0}, ValueError, "denominator must be > 0 and finite, got 0"),
        ({"denominator": -2.0}, ValueError, "denominator must be > 0 and finite, got -2"),
        ({"denominator": math.nan}, ValueError, "denominator must be > 0 and finite, got nan"),
        ({"denominator": "3"}, TypeError, "denominator .*got str"),
        ({"denominator": torch.ones(3)}, ValueError, r"denominator .*0-d tensor, got shape \(3,\)"),
        ({"denominator": torch.tensor(True)}, TypeError, "denominator .*got torch.bool"),
        ({"denominator": torch.ones((), device="meta")}, ValueError, "denominator .*got meta"),
        ({"student_temp": 0.0}, ValueError, r"student_temp must be > 0 .*got 0\.0"),
        ({"teacher_temp": math.inf}, ValueError, "teacher_temp must be > 0 .*got inf"),
        ({"teacher": S, "inplace_backward": True}, ValueError, "got student and teacher in the sa"),
        ({"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
    ],
)
def test_invalid_arguments(changes, raises, match):
    arguments = {"student": S, "teacher": S.clone(), "center": C} | TEMPS | changes
    with pytest.raises(raises, match=match):
        patch_loss(**arguments)
