"""fastdino_kernels.dino_loss against the reference in float64.

`target` is an implementation and a device: PyTorch, and Triton on a GPU or interpreted on a CPU.
Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

import importlib
import math

import pytest
import torch
from fastdino_kernels import dino_loss, reference, soft_cross_entropy, teacher_entropy

from tests.dino_losses import (
    EPS,
    FLOATS,
    HALF,
    TEMPS,
    assert_accurate,
    draw,
    error,
    interpreted,
    ours,
    truth,
    wide_blocks,
)
from tests.multi_tensor import needs_cuda, numpy_warns


@pytest.mark.parametrize(("S", "T"), [(2, 1), (2, 2), (10, 2), (5, 3), (3, 3)])
@pytest.mark.parametrize(("B", "K"), [(1, 1), (3, 7), (2, 1000), (3, 4096)])
def test_matches_the_reference_in_float64(S, T, B, K):
    inputs = draw(S, T, B, K, torch.float64)
    torch.testing.assert_close(ours(*inputs), truth(*inputs), rtol=1e-12, atol=1e-14)


# Every dtype with every number of crops, every dtype with every K, and each number of crops with
# three K. The number of crops decides which pairs there are, K and the dtype how rows are divided.
CROPS = [(2, 1), (2, 2), (4, 2), (4, 1), (10, 1), (10, 2), (12, 2), (12, 1)]

PROTOTYPES = [1, 7, 65536, 4096, 1000, 65537]

ACCURACY_CASES = [
    (dtype, *CROPS[i], PROTOTYPES[(i + 2 * j) % len(PROTOTYPES)])
    for i in range(len(CROPS))
    for j, dtype in enumerate(FLOATS)
]


@pytest.mark.accuracy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "S", "T", "K"), ACCURACY_CASES)
def test_is_at_least_as_accurate_as_plain_pytorch(dtype, S, T, K, target, monkeypatch):
    if interpreted(target):
        wide_blocks(monkeypatch, K)
    inputs = draw(S, T, 2, K, dtype)
    expected = truth(*inputs)
    plain = truth(*inputs, dtype=dtype)
    loss, grad, total = ours(*inputs, **target)
    assert (loss.dtype, grad.dtype, total.dtype) == (torch.float32, dtype, torch.float32)
    assert error(loss, expected[0]) <= error(plain[0], expected[0]) + 5e-7
    assert error(grad, expected[1]) <= error(plain[1], expected[1]) + 1e-6
    assert error(total, expected[2]) <= error(plain[2], expected[2]) + 5e-7


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("S", "T", "B", "K"), [(3, 3, 2, 700), (4, 2, 5, 600)])
def test_groups_of_images_with_default_blocks(S, T, B, K, target, monkeypatch):
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    monkeypatch.setattr(pairwise_triton, "MAX_GROUPS", 2)  # five images: three and two
    monkeypatch.setattr(pairwise_triton, "SUM_GROUPS", 1)  # added one after the other
    assert_accurate(draw(S, T, B, K), loss=5e-7, grad=2e-6, total=5e-7, **target)


def test_last_program_sums_rows_in_several_rounds(target, monkeypatch):
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    monkeypatch.setattr(pairwise_triton, "FINISH_BLOCK", 8)
    assert_accurate(draw(3, 2, 7, 20), loss=5e-7, total=5e-7, **target)


def test_dino_size_with_default_configuration(target):
    inputs = draw(2, 2, 1, 65536, torch.bfloat16)
    assert_accurate(inputs, loss=5e-7, grad=EPS[torch.bfloat16], total=5e-7, **target)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [16, 513, 1000, 1004, 1032])
def test_rows_that_chunks_do_not_divide(dtype, K, target):
    inputs = draw(5, 3, 3, K, dtype)
    assert_accurate(inputs, loss=5e-7, grad=max(EPS[dtype], 2e-6), total=5e-7, **target)


@numpy_warns  # of elements beyond the last prototype
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("K", [7, 520, 1001])
def test_ragged_rows_of_extreme_or_equal_logits(K, target):
    student, teacher, center = draw(4, 2, 4, K)
    student[:, 0], teacher[:, 0] = 0, 0
    student[:, 1, -1], teacher[:, 1, -1] = 1e4, 1e4
    student[:, 2] -= 1e4
    teacher[:, 2] -= 1e4
    teacher[0, 3, : K - 1] = -1e4
    # A center would be subtracted from 1e4, and rounded.
    assert_accurate((student, teacher, 0 * center), loss=2e-6, grad=2e-5, total=2e-6, **target)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_loss_is_computed_in_fp32(dtype, target):
    assert_accurate(draw(6, 2, 4, 1000, dtype), loss=1e-6, total=1e-6, **target)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_gradient_is_rounded_once_after_scaling(dtype, target, monkeypatch):
    if interpreted(target):
        wide_blocks(monkeypatch, 4 * 4096)
    # Unscaled, a good part of these gradients would be zero in fp16.
    inputs = draw(4, 2, 16, 4096, dtype, spread=0.02)
    scale = 2.0**14
    expected = truth(*inputs, scale=scale)[1]
    grad = ours(*inputs, scale=scale, **target)[1].double()
    slack = expected.abs() * EPS[dtype] * 0.51 + expected.abs().max() * 4e-7
    if dtype == torch.float16:
        slack += 2.0**-25  # half a subnormal step
        rounded_early = ((expected / scale).to(dtype) * scale).double()
        assert ((rounded_early - expected).abs() > slack).double().mean() > 0.1
    assert ((grad - expected).abs() <= slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_a_constant_to_a_row_changes_nothing(dtype, target):
    student, teacher, center = draw(4, 2, 3, 64, torch.float32)
    # Multiples of 1/8 shift exactly, so the logits really are equal up to the constant.
    student, teacher = (student * 8).round() / 8, (teacher * 8).round() / 8
    loss, grad, _ = ours(student.to(dtype), teacher.to(dtype), center, **target)
    shifted = ours((student + 8).to(dtype), (teacher - 8).to(dtype), center, **target)
    torch.testing.assert_close(shifted[0], loss, rtol=1e-4, atol=0)
    assert error(shifted[1], grad) < 1e-4 + EPS[dtype]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e4), (torch.float32, 1e30), (torch.float16, 6e4), (torch.bfloat16, 1e30)],
)
def test_extreme_logits_stay_finite_and_accurate(dtype, size, target):
    student, teacher, center = draw(4, 2, 3, 64, dtype)
    student[:, :, 5], student[:, :, 6] = size, -size
    teacher[:, :, 5], teacher[:, :, 7] = size, -size
    expected = truth(student, teacher, center)
    loss, grad, total = ours(student, teacher, center, **target)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert total.isfinite().all()
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-3, atol=1e-7)


def test_large_logits_far_from_zero_lose_no_digits(target):
    # All near 1e4: scaled by 1/0.1 before the maximum is subtracted, they would keep two decimals.
    student, teacher, center = draw(4, 2, 3, 600)
    assert_accurate((student + 1e4, teacher + 1e4, 0 * center), loss=1e-6, grad=1e-5, **target)


@numpy_warns
def test_infinite_logits_match_pytorch(target):
    student, teacher, center = draw(2, 2, 6, 600)
    student[1, 0] = -math.inf  # no distribution: NaN
    student[1, 1, 3] = -math.inf  # an infinite loss, as the teacher gives it some probability
    student[1, 2, :512] = -math.inf  # likewise, all of a chunk
    teacher[0, 2] *= 0.01
    student[1, 3, 5], teacher[0, 3, 5] = -math.inf, -math.inf  # 0 * inf: NaN
    teacher[0, 4, :520] = -math.inf  # well defined
    teacher[0, 5] = -math.inf  # no distribution: NaN
    for b in range(6):
        image = student[:, b : b + 1], teacher[:, b : b + 1], center
        expected, got = truth(*image), ours(*image, **target)
        torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(
            got[1].double(), expected[1], rtol=1e-4, atol=1e-6, equal_nan=True
        )
    kinds = [truth(student[:, b : b + 1], teacher[:, b : b + 1], center)[0] for b in range(6)]
    assert [k.isnan().item() for k in kinds] == [True, False, False, True, False, True]
    assert [k.isinf().item() for k in kinds] == [False, True, True, False, False, False]


def test_blocks_cover_a_batch_they_do_not_divide():
    B = 2 * torch.get_num_threads() + 1
    assert_accurate(draw(3, 2, B, 40_000), loss=1e-6, grad=1e-5, total=1e-6)


def test_empty_batch_has_loss_zero(target):
    inputs = draw(4, 2, 0, 7)
    for loss, grad, total in (ours(*inputs, **target), truth(*inputs)):
        assert loss == 0
        assert grad.shape == (4, 0, 7)
        assert torch.equal(total, torch.zeros_like(total))


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


def test_center_may_change_before_the_backward_pass(target):
    inputs = draw()
    expected = ours(*inputs, **target)[1]
    student, teacher, center = (x.to(target["device"], copy=True) for x in inputs)
    loss, _ = dino_loss(student.requires_grad_(), teacher, center, impl=target["impl"], **TEMPS)
    center.add_(100)
    loss.backward()
    assert torch.equal(student.grad.cpu(), expected)


def test_temperatures_may_be_tensors(target):
    inputs = draw()
    expected = ours(*inputs, **target)
    for names in (["student_temp"], ["teacher_temp"], list(TEMPS)):
        temps = {name: torch.tensor(TEMPS[name]) for name in names}
        got = ours(*inputs, **temps, **target)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_mixed_dtypes_compute_in_the_wider_dtype():
    student, teacher, center = draw(dtype=torch.bfloat16)
    loss, grad, total = ours(student, teacher.double(), center.bfloat16().double())
    assert (loss.dtype, grad.dtype, total.dtype) == (torch.float64, student.dtype, torch.float64)


def test_student_and_teacher_may_differ_in_dtype(target):
    student, teacher, center = draw(K=600, dtype=torch.bfloat16)
    expected = truth(student, teacher, center)
    loss, grad, _ = ours(student, teacher.float(), center, **target)
    assert (loss.dtype, grad.dtype) == (torch.float32, student.dtype)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    assert error(grad, expected[1]) < EPS[torch.bfloat16]


def test_same_input_gives_same_bits(target):
    inputs = draw(4, 2, 3, 1200)
    assert all(map(torch.equal, ours(*inputs, **target), ours(*inputs, **target)))


@pytest.mark.gpu
@needs_cuda
def test_last_program_sees_every_row():
    student, teacher, center = (x.cuda() for x in draw(10, 2, 600, 32))
    probs = torch.softmax((teacher - center) / 0.04, dim=-1)
    rows = soft_cross_entropy(student, probs, student_temp=0.1, ignore_diagonal=True)
    first, _ = dino_loss(student, teacher, center, impl="triton", **TEMPS)
    torch.testing.assert_close(first, rows.double().sum().float() / (18 * 600), rtol=1e-5, atol=0)
    busy, work = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(200):
        with torch.cuda.stream(busy):
            work @ work
        assert torch.equal(dino_loss(student, teacher, center, impl="triton", **TEMPS)[0], first)


def test_gradcheck():
    student, teacher, center = draw(3, 2, 2, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: dino_loss(s, teacher, center, impl="torch", **TEMPS)[0], student.requires_grad_()
    )


def test_second_derivative_is_an_error():
    student, teacher, center = draw()
    loss, _ = dino_loss(student.requires_grad_(), teacher, center, **TEMPS)
    with pytest.raises(RuntimeError, match="no second derivative.*without create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


# Each shape with each reduction and with weights of images and of crops; for the most general shape
# also all combinations of the latter.
@pytest.mark.parametrize(
    ("S", "T", "ignore_diagonal", "each_crop", "reduction"),
    [
        (1, 1, False, False, "mean"), (1, 1, False, True, "none"),
        (1, 3, False, True, "mean"), (1, 3, False, False, "none"),
        (2, 2, False, False, "mean"), (2, 2, False, True, "none"),
        (2, 2, True, True, "mean"), (2, 2, True, False, "none"),
        (5, 2, True, False, "mean"), (5, 2, True, True, "mean"),
        (5, 2, True, False, "none"), (5, 2, True, True, "none"),
    ],
)  # fmt: skip
def test_rows_and_weights_match_the_reference(S, T, ignore_diagonal, each_crop, reduction, target):
    tensors = [x.double() for x in draw(S, T, 4, 600)]
    options = {"ignore_diagonal": ignore_diagonal, "reduction": reduction}
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand((S, 4) if each_crop else (4,), generator=generator)
    expected = weighted_truth(*tensors, weights, **options)
    got = weighted_ours(*tensors, weights, **options, **target)
    limits = (5e-7, 2e-6) if target["impl"] == "triton" else (1e-14, 1e-14)
    for g, e, limit in zip(got, expected, limits, strict=True):
        assert g.shape == e.shape
        assert error(g, e) < limit


def weighted_truth(student, teacher, center, weights, ignore_diagonal, reduction):
    """Return the rows or their mean over pairs and images, and the gradient of 2 * its sum."""
    S, B, T = len(student), student.shape[1], len(teacher)
    leaf = student.clone().requires_grad_()
    probs = torch.softmax((teacher - center) / 0.04, dim=-1)
    rows = reference.soft_cross_entropy(leaf, probs, 0.1, ignore_diagonal) * weights
    pairs = S * T - (min(S, T) if ignore_diagonal else 0)
    result = rows if reduction == "none" else rows.sum() / (pairs * B)
    (result * 2).sum().backward()
    return result.detach(), leaf.grad


def weighted_ours(student, teacher, center, weights, impl, device, **options):
    """Return the same of dino_loss, on the CPU."""
    dtype = torch.float32 if impl == "triton" else student.dtype
    leaf = student.to(device, dtype, copy=True).requires_grad_()
    tensors = (teacher.to(device, dtype), center.to(device, dtype))
    options |= {"weights": weights.to(device), "impl": impl}
    result, _ = dino_loss(leaf, *tensors, **TEMPS, **options)
    (result * 2).sum().backward()
    return result.detach().cpu(), leaf.grad.cpu()


def test_rows_have_their_own_gradients(target):
    student, teacher, center = draw(3, 2, 4, 70)
    incoming = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    probs = torch.softmax((teacher - center) / 0.04, dim=-1)
    grads = []
    for loss_fn in (
        lambda s: dino_loss(
            s, teacher.to(s.device), center.to(s.device),
            reduction="none", impl=target["impl"], **TEMPS,
        )[0],
        lambda s: soft_cross_entropy(
            s, probs.to(s.device), student_temp=0.1, ignore_diagonal=True, impl=target["impl"]
        ),
    ):  # fmt: skip
        leaf = student.to(target["device"], copy=True).requires_grad_()
        rows = loss_fn(leaf)
        rows.backward(incoming.to(target["device"]))
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_of_an_empty_batch(reduction, target):
    inputs = (*draw(3, 2, 0, 7), torch.ones(3, 0))
    result, grad = weighted_ours(*inputs, reduction=reduction, **target)
    assert result.shape == ((3, 0) if reduction == "none" else ())
    assert result.sum() == 0
    assert grad.shape == (3, 0, 7)


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
        ({"student": (0, 3, 7), "ignore_diagonal": False}, ValueError, "S >= 1"),
        ({"reduction": "sum"}, ValueError, 'reduction must be "mean" or "none", got \'sum\''),
        (
            {"weights": torch.ones(4)},
            ValueError,
            r"weights must be \[B\] = \[3\] or \[S, B\] = \[4, 3\], got shape \[4\]",
        ),
        ({"weights": torch.ones(3, 4)}, ValueError, r"got shape \[3, 4\]"),
        ({"weights": -torch.ones(4, 3)}, ValueError, "weights must be >= 0, got -1"),
        ({"weights": torch.ones(3).int()}, TypeError, "weights .*got torch.int32"),
        ({"weights": torch.ones(3, device="meta")}, ValueError, "weights and student .*meta"),
        ({"student_temp": 0.0}, ValueError, r"student_temp must be > 0 .*got 0\.0"),
        ({"teacher_temp": -1}, ValueError, "teacher_temp must be > 0 .*got -1"),
        ({"teacher_temp": math.nan}, ValueError, "teacher_temp must be > 0 .*got nan"),
        ({"teacher_temp": "warm"}, TypeError, "teacher_temp .*got str"),
        ({"teacher_temp": torch.ones(1)}, ValueError, r"0-d tensor, got shape \(1,\)"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'torch'.*got 'cuda'"),
    ],
)
def test_invalid_arguments(changes, raises, match):
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


def test_loss_equals_entropy_if_student_equals_teacher():
    logits = draw(1, 1, 3, 20, torch.float64)[0].expand(4, 3, 20)
    center = torch.zeros(20, dtype=torch.float64)
    loss, _ = dino_loss(logits, logits[:2], center, student_temp=0.1, teacher_temp=0.1)
    torch.testing.assert_close(loss, teacher_entropy(logits[:2], center, 0.1))
