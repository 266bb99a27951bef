"""compat.lightly's patch losses against the equations and the installed lightly's losses.

Legend: B images, H and W the height and width in tokens, N tokens of an image, M masked tokens,
K prototypes.
"""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels.compat.lightly import IBOTPatchLoss, IBOTPlusPlusPatchLoss
from fastdino_kernels.dispatch import triton_problem
from torch import Tensor

from tests.logits import assert_same, draw, run
from tests.processes import run_two

K = 7


def draw_mask(B=4, H=3, W=5, seed=0) -> Tensor:
    """Mask all tokens of the first image, none of the second, and one of the third."""
    mask = torch.rand(B, H, W, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[:1], mask[1:3], mask[2:3, 0, 1] = True, False, True
    return mask


def masked_logits(mask: Tensor, dtype=torch.float64, seed=0, prototypes=K) -> tuple[Tensor, Tensor]:
    """Draw the logits [M, K] of student and teacher."""
    student, teacher = draw(1, 1, int(mask.sum()), prototypes, dtype, seed)
    return student[0], teacher[0]


def plain_rows(student, teacher, center, student_temp, teacher_temp) -> Tensor:
    targets = torch.softmax((teacher - center) / teacher_temp, dim=-1)
    return -(targets * torch.log_softmax(student / student_temp, dim=-1)).sum(dim=-1)


def plain_ibot(student, teacher, mask, center, student_temp, teacher_temp) -> Tensor:
    """Average over all images the mean over the masked tokens of each."""
    rows = plain_rows(student, teacher, center, student_temp, teacher_temp)
    parts = rows.split(mask.flatten(1).sum(dim=1).tolist())
    return sum(part.mean() for part in parts if len(part)) / len(mask)


@pytest.fixture
def original():
    """The module lightly.loss of the installed package."""
    return pytest.importorskip("lightly.loss")


@pytest.mark.parametrize("temp", [None, 0.03125, torch.tensor(0.25)])
def test_patch_loss_follows_the_equation_and_lightly_over_several_steps(original, temp):
    settings = (K, 0.0625, 0.2, "mean", 0.7)
    ours, theirs = (cls(*settings).double() for cls in (IBOTPatchLoss, original.IBOTPatchLoss))
    center = torch.zeros(K, dtype=torch.float64)
    for step in range(4):
        mask = draw_mask(seed=step)
        student, teacher = masked_logits(mask, seed=step)
        got = run(lambda s, t=teacher, m=mask: ours(t, s, m, temp), student)
        used = 0.0625 if temp is None else float(temp)
        assert_same(got, run(plain_ibot, student, teacher, mask, center, 0.2, used))
        # lightly's torch.tensor(0-d tensor) warns.
        expected = run(lambda s, t=teacher, m=mask, u=used: theirs(t, s, m, u), student)
        torch.testing.assert_close(got[0], expected[0].double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-9)
        center = 0.7 * center + 0.3 * teacher.mean(dim=0)
        torch.testing.assert_close(ours.center.value[0], center, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.center.value, theirs.center.value, rtol=1e-12, atol=1e-14)


def test_patch_loss_in_float32_is_lightly_to_rounding(original):
    ours, theirs = IBOTPatchLoss(1000), original.IBOTPatchLoss(1000)
    center = torch.zeros(1000, dtype=torch.float64)
    for step in range(3):
        mask = draw_mask(seed=step)
        student, teacher = masked_logits(mask, torch.float32, step, 1000)
        got, expected = (
            run(lambda s, t=teacher, m=mask, f=loss: f(t, s, m), student) for loss in (ours, theirs)
        )
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-8)
        center = 0.9 * center + 0.1 * teacher.double().mean(dim=0)
        errors = [(loss.center.value[0] - center).abs().max() for loss in (ours, theirs)]
        assert errors[0] <= errors[1] + 1e-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    mask = draw_mask()
    student, teacher = masked_logits(mask, dtype)
    ours = IBOTPatchLoss(K)
    loss, grad = run(lambda s: ours(teacher, s, mask), student)
    expected = run(plain_ibot, student.double(), teacher.double(), mask, 0, 0.1, 0.04)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    assert ours.center.value.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)
    step = torch.finfo(dtype).eps  # one rounding of a gradient
    torch.testing.assert_close(grad.double(), expected[1], rtol=step, atol=1e-5)
    expected_center = 0.1 * teacher.double().mean(dim=0)
    torch.testing.assert_close(ours.center.value[0].double(), expected_center, rtol=1e-6, atol=1e-7)


def test_autocast_and_a_teacher_with_a_graph_change_nothing():
    mask = draw_mask()
    student, teacher = masked_logits(mask, torch.float32)
    expected = run(lambda s: IBOTPatchLoss(K)(teacher, s, mask), student)
    teacher.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(lambda s: IBOTPatchLoss(K)(teacher, s, mask), student)
    assert all(map(torch.equal, got, expected))
    assert teacher.grad is None


def test_state_and_attributes_are_those_of_lightly(original):
    settings = (K, 0.05, 0.2, "mean", 0.5)
    for name in ("IBOTPatchLoss", "IBOTPlusPlusPatchLoss"):
        cls = {"IBOTPatchLoss": IBOTPatchLoss}.get(name, IBOTPlusPlusPatchLoss)
        ours, theirs = cls(*settings), getattr(original, name)(*settings)
        mask = draw_mask()
        student, teacher = masked_logits(torch.ones_like(mask), torch.float32)
        theirs(teacher, student, torch.ones_like(mask))
        ours.load_state_dict(theirs.state_dict())
        assert ours.center.value.abs().sum() > 0
        assert torch.equal(ours.center.value, theirs.center.value)
        assert ours.state_dict().keys() == theirs.state_dict().keys() == {"center.center"}
        assert (ours.teacher_temp, ours.student_temp) == (0.05, 0.2)
        assert ours.center.momentum == theirs.center.momentum == 0.5
    assert "teacher_temp=0.05" in repr(ours)


def test_no_masked_token_has_loss_zero_and_keeps_the_center():
    ours = IBOTPatchLoss(K)
    ours(*reversed(masked_logits(draw_mask(), torch.float32)), draw_mask())
    before = ours.center.value.clone()
    for mask in (torch.zeros(3, 2, 2, dtype=torch.bool), torch.zeros(0, 2, 2, dtype=torch.bool)):
        student, teacher = masked_logits(mask, torch.float32)
        loss, grad = run(lambda s, t=teacher, m=mask: ours(t, s, m), student)
        assert (loss, grad.shape) == (0, (0, K))
        assert torch.equal(ours.center.value, before)


def test_wrong_number_of_masked_tokens_gives_nan_where_it_is_not_checked(monkeypatch):
    mask = draw_mask()
    student, teacher = masked_logits(mask, torch.float32)
    # As on a GPU, where the check would wait for the device.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    fewer, more = mask.clone(), mask.clone()
    fewer[0, 0, 0], more[1, 0, 0] = False, True
    for wrong in (fewer, more, torch.zeros_like(mask)):
        assert IBOTPatchLoss(K)(teacher, student, wrong).isnan()
    assert not IBOTPatchLoss(K)(teacher, student, mask).isnan()


def test_graph_keeps_the_old_center():
    mask = draw_mask()
    student, teacher = masked_logits(mask)
    expected = run(lambda s: IBOTPatchLoss(K).double()(teacher, s, mask), student)[1]
    ours = IBOTPatchLoss(K).double()
    student.requires_grad_()
    loss = ours(teacher, student, mask)
    ours.center.center.fill_(9.0)
    loss.backward()
    assert torch.equal(student.grad, expected)


@pytest.mark.parametrize("plus_plus", [False, True])
def test_compiles_as_one_graph(plus_plus):
    mask = draw_mask()
    rows = torch.ones_like(mask) if plus_plus else mask
    student, teacher = masked_logits(rows, torch.float32)
    cls = IBOTPlusPlusPatchLoss if plus_plus else IBOTPatchLoss
    eager, traced = cls(K), cls(K)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got = run(lambda s: compiled(teacher, s, mask), student)
        assert_same(got, run(lambda s: eager(teacher, s, mask), student), rtol=1e-6)
    torch.testing.assert_close(traced.center.value, eager.center.value)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_triton_gives_the_same(device, monkeypatch):
    problem = triton_problem(device)
    if problem is not None or (device == "cuda" and not torch.cuda.is_available()):
        pytest.skip(problem or "no GPU")
    mask = draw_mask().to(device)
    student, teacher = (x.to(device) for x in masked_logits(draw_mask(), torch.float32))
    results = []
    for impl in ("torch", "triton"):
        monkeypatch.setenv("FASTDINO_KERNELS", impl)
        ours = IBOTPatchLoss(K).to(device)
        results.append((*run(lambda s, f=ours: f(teacher, s, mask), student), ours.center.value))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "teacher", "student", "mask", "match"),
    [
        (ValueError, (8, K), (8, K), (2, 2, 2, 2), r"\[B, H, W\].*got \(2, 2, 2, 2\)"),
        (ValueError, (2, 4, K), (2, 4, K), (2, 2, 2), r"teacher_out \[M, K\], got .*\(2, 4, 7\)"),
        (ValueError, (8, K), (7, K), (2, 2, 2), r"same shape, got \(8, 7\) and \(7, 7\)"),
        (ValueError, (8, 6), (8, 6), (2, 2, 2), r"K = 7 prototypes \(output_dim\), got .*\(8, 6\)"),
        (ValueError, (7, K), (7, K), (2, 2, 2), "as many True as teacher_out has rows, got 8 and"),
        (TypeError, (8, K), (8, K), None, "mask must be a tensor of torch.bool, got NoneType"),
    ],
)
def test_invalid_shapes(error, teacher, student, mask, match):
    ours = IBOTPatchLoss(K)
    mask = mask and torch.ones(mask, dtype=torch.bool)
    with pytest.raises(error, match=match):
        ours(torch.ones(teacher), torch.ones(student), mask)
    assert torch.equal(ours.center.value, torch.zeros(1, K))


def test_invalid_types_devices_and_temperatures():
    ours, x, mask = IBOTPatchLoss(K), torch.ones(8, K), torch.ones(2, 2, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match="teacher_out must be a torch.Tensor, got list"):
        ours([x], x, mask)
    with pytest.raises(TypeError, match="student_out must have one of the dtypes.*int64"):
        ours(x, x.long(), mask)
    with pytest.raises(TypeError, match="torch.bool, got torch.int64"):
        ours(x, x, mask.long())
    with pytest.raises(ValueError, match="center's device cpu, got meta"):
        ours(x.to("meta"), x.to("meta"), mask)
    with pytest.raises(ValueError, match="same device"):
        ours(x, x, mask.to("meta"))
    with pytest.raises(ValueError, match="teacher_temp must be > 0 and finite, got 0.0"):
        ours(x, x, mask, 0.0)
    with pytest.raises(TypeError, match="teacher_temp must be a float.*got str"):
        ours(x, x, mask, "warm")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"output_dim": 0}, "output_dim must be >= 1, got 0"),
        ({"teacher_temp": 0.0}, "teacher_temp must be > 0"),
        ({"student_temp": -1.0}, "student_temp must be > 0"),
        ({"center_mode": "median"}, "Unknown mode 'median'"),
        ({"center_momentum": 2.0}, r"momentum must be in \[0, 1\], got 2.0"),
    ],
)
@pytest.mark.parametrize("cls", [IBOTPatchLoss, IBOTPlusPlusPatchLoss])
def test_invalid_constructor_arguments(cls, changes, match):
    with pytest.raises(ValueError, match=match):
        cls(**{"output_dim": K, **changes})


def plain_plus_plus(student, teacher, mask, visible_weight, center) -> Tensor:
    """Average over images: masked tokens' mean plus the weighted mean of the visible ones."""
    rows = plain_rows(student, teacher, center, 0.1, 0.0625)
    images = []
    for image, own in zip(rows, mask.flatten(1), strict=True):
        masked, visible = image[own], image[~own]
        images.append(
            (masked.mean() if len(masked) else 0)
            + visible_weight * (visible.mean() if len(visible) else 0)
        )
    return sum(images) / len(images)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("visible_weight", [0.0, 1.0, 0.3])
def test_plus_plus_follows_the_equation_and_lightly(original, rank, visible_weight):
    ours, theirs = (
        cls(K, 0.0625).double() for cls in (IBOTPlusPlusPatchLoss, original.IBOTPlusPlusPatchLoss)
    )
    center = torch.zeros(K, dtype=torch.float64)
    for step in range(3):
        mask = draw_mask(seed=step)
        student, teacher = (x[0].view(4, 15, K) for x in draw(1, 1, 60, K, seed=step))
        given = teacher.flatten(0, 1) if rank == 2 else teacher

        def loss(s, f, t=given, m=mask):
            s = s.flatten(0, 1) if rank == 2 else s
            return f(t, s, m.flatten(1), visible_loss_weight=visible_weight)

        got = run(loss, student, ours)
        assert_same(got, run(plain_plus_plus, student, teacher, mask, visible_weight, center))
        assert_same(got, run(loss, student, theirs), rtol=1e-7)
        center = 0.9 * center + 0.1 * teacher.mean(dim=(0, 1))
        torch.testing.assert_close(ours.center.value[0], center, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.center.value, theirs.center.value, rtol=1e-12, atol=1e-14)


def test_plus_plus_without_a_mask_is_the_mean_over_all_tokens():
    student, teacher = (x[0].view(4, 15, K) for x in draw(1, 1, 60))
    got = run(lambda s: IBOTPlusPlusPatchLoss(K).double()(teacher, s), student)
    expected = run(lambda s: plain_rows(s, teacher, 0, 0.1, 0.04).mean(), student)
    assert_same(got, expected)
    empty = torch.ones(0, 15, K)
    assert IBOTPlusPlusPatchLoss(K)(empty, empty) == 0
    assert IBOTPlusPlusPatchLoss(K)(empty, empty, torch.ones(0, 15, dtype=torch.bool)) == 0


@pytest.mark.parametrize(
    ("shape", "mask", "weight", "match"),
    [
        ((2, 5, 3, K), None, 1.0, "rank 2 or 3"),
        ((10, K), None, 1.0, "mask is required"),
        ((7, K), (3, 2), 1.0, "7 rows, not divisible by the mask's B = 3"),
        ((2, 4, K), (2, 5), 1.0, r"B\*N = 8 elements .*got shape \(2, 5\)"),
        ((2, 4, K), (4, 2), 1.0, r"for B = 2 images, got shape \(4, 2\)"),
        ((2, 4, K), (8,), 1.0, r"got shape \(8,\)"),
        ((2, 4, K), (2, 4), -1.0, "visible_loss_weight must be >= 0, got -1.0"),
    ],
)
def test_plus_plus_invalid_arguments(shape, mask, weight, match):
    x, mask = torch.ones(shape), mask and torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=match):
        IBOTPlusPlusPatchLoss(K)(x, x, mask, visible_loss_weight=weight)


def distributed_steps() -> None:
    """Ranks with different numbers of masked tokens; at last the second one has none."""
    from lightly.loss import IBOTPatchLoss as Original

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ours, theirs = (cls(K, 0.0625).double() for cls in (IBOTPatchLoss, Original))
    for step in range(3):
        mask = draw_mask(B=2 + rank, seed=2 * step + rank)
        student, teacher = masked_logits(mask, seed=2 * step + rank)
        got, expected = (
            run(lambda s, t=teacher, m=mask, f=f: f(t, s, m), student) for f in (ours, theirs)
        )
        assert_same(got, expected, rtol=1e-7)
        torch.testing.assert_close(ours.center.value, theirs.center.value, rtol=1e-12, atol=1e-14)
    before = ours.center.value[0].clone()
    mask = draw_mask() & (rank == 0)
    student, teacher = masked_logits(mask)
    assert (ours(teacher, student, mask) == 0) == (rank == 1)
    expected = 0.9 * before + 0.1 * masked_logits(draw_mask())[1].mean(dim=0)
    torch.testing.assert_close(ours.center.value[0], expected, rtol=1e-12, atol=1e-14)
    torch.distributed.destroy_process_group()


def test_two_ranks(original):
    run_two(distributed_steps)
