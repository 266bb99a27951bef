"""compat.lightly.DINOLoss against the equations and the installed lightly's loss.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastdino_kernels.compat import lightly
from fastdino_kernels.compat.stacking import stack_crops

from tests.logits import assert_same, draw, run, run_both
from tests.processes import run_two

# Exact in fp32, to which lightly rounds its temperatures.
WARM_UP = {"warmup_teacher_temp": 0.03125, "teacher_temp": 0.0625, "warmup_teacher_temp_epochs": 3}


@pytest.fixture
def original():
    """The class lightly.loss.DINOLoss of the installed package."""
    return pytest.importorskip("lightly.loss").DINOLoss


@pytest.mark.parametrize(("S", "T"), [(2, 1), (2, 2), (10, 1), (10, 2), (2, 3), (1, 2), (3, 3)])
@pytest.mark.parametrize(
    "arguments",
    [
        lambda step: {},
        lambda step: {"epoch": step},
        lambda step: {"teacher_temp": 0.5**step / 4},
        lambda step: {"teacher_temp": 0.125, "epoch": step},
    ],
    ids=["default", "epoch", "teacher_temp", "both"],
)
def test_lightly_gives_the_same_losses_gradients_and_centers(original, S, T, arguments):
    # The warm-up ends within the five steps.
    settings = {"student_temp": 0.2, "center_momentum": 0.7, **WARM_UP}
    ours, theirs = (cls(7, **settings).double() for cls in (lightly.DINOLoss, original))
    for step in range(5):
        student, teacher = draw(S, T, seed=step)
        got, expected = run_both(ours, theirs, teacher, student, **arguments(step))
        assert_same(got, expected)
        assert ours.center.shape == (1, 1, 7)
        torch.testing.assert_close(ours.center, theirs.center, rtol=1e-12, atol=1e-14)


def test_lightly_by_default_and_in_float32(original):
    ours, theirs = lightly.DINOLoss(1000), original(1000)
    for step in range(3):
        student, teacher = draw(4, 2, 5, 1000, torch.float32, seed=step)
        got, expected = run_both(ours, theirs, teacher, student, epoch=40)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(ours.center, theirs.center, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("S", "T"), [(4, 2), (1, 2)])
def test_lightly_half_precision_is_computed_in_float32(original, dtype, S, T):
    ours, theirs = lightly.DINOLoss(7), original(7)
    student, teacher = draw(S, T, dtype=dtype)
    loss, grad = run(lambda s: ours(list(teacher), list(s)), student)
    expected = run(lambda s: theirs(list(teacher.float()), list(s)), student.float())
    assert (loss.dtype, grad.dtype, ours.center.dtype) == (torch.float32, dtype, torch.float32)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    step = torch.finfo(dtype).eps  # one rounding of a gradient
    torch.testing.assert_close(grad.float(), expected[1], rtol=step, atol=1e-6)
    torch.testing.assert_close(ours.center, theirs.center, rtol=1e-5, atol=1e-7)


def test_lightly_has_the_same_arguments_attributes_and_state(original):
    settings = (7, 0.03125, 0.0625, 4, 0.2, 0.5, "mean")
    ours, theirs = lightly.DINOLoss(*settings), original(*settings)
    for name in ("teacher_temp", "student_temp", "center_momentum", "warmup_teacher_temp_epochs"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert torch.equal(ours.teacher_temp_schedule, theirs.teacher_temp_schedule)
    student, teacher = draw(3, 2, dtype=torch.float32)
    theirs(list(teacher), list(student))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.center, theirs.center)
    assert ours.center.abs().sum() > 0
    ours(list(teacher), list(student))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.center, theirs.center)
    assert "center_momentum=0.5" in repr(ours)


def test_lightly_temperatures_may_be_tensors_and_change_between_calls():
    student, teacher = draw(3, 2)
    loss_fn = lightly.DINOLoss(7, center_momentum=1.0, teacher_temp=0.0625).double()
    expected = loss_fn(teacher, student, teacher_temp=0.25)
    assert torch.equal(loss_fn(teacher, student, teacher_temp=torch.tensor(0.25)), expected)
    assert not torch.equal(loss_fn(teacher, student), expected)
    loss_fn.teacher_temp = 0.25
    assert torch.equal(loss_fn(teacher, student), expected)
    assert torch.equal(loss_fn(teacher, student, epoch=100), expected)


@pytest.mark.parametrize("by_epoch", [False, True])
@pytest.mark.parametrize(("S", "T"), [(2, 2), (10, 2), (2, 3)])
def test_dino_loss_follows_the_equations_for_several_steps(S, T, by_epoch):
    ours, center = lightly.DINOLoss(7, **WARM_UP).double(), torch.zeros(7).double()
    for step, warm in enumerate([0.03125, 0.046875, 0.0625, 0.0625]):
        student, teacher = draw(S, T, seed=step)
        temp, arguments = (warm, {"epoch": step}) if by_epoch else (0.0625, {})
        got = run(lambda s, t=teacher, a=arguments: ours(list(t), list(s), **a), student)
        expected = run(plain_loss, student, teacher, center, 0.1, temp)
        assert_same(got, expected)
        center = 0.9 * center + 0.1 * teacher.mean(dim=(0, 1))
        torch.testing.assert_close(ours.center, center.view(1, 1, 7), rtol=1e-12, atol=1e-14)


def plain_loss(student, teacher, center, student_temp, teacher_temp):
    """Average over the pairs of different crops, written plainly."""
    targets = torch.softmax((teacher - center) / teacher_temp, dim=-1)
    log_probs = torch.log_softmax(student / student_temp, dim=-1)
    terms = [
        -(q * p).sum(dim=-1).mean()
        for i, q in enumerate(targets)
        for j, p in enumerate(log_probs)
        if i != j
    ]
    return sum(terms) / len(terms)


def test_update_center_of_one_crop_is_that_of_lightly(original):
    ours, theirs = (cls(7).double() for cls in (lightly.DINOLoss, original))
    _, teacher = draw(2, 1)
    ours.update_center(teacher[0])
    theirs.update_center(teacher[0])
    torch.testing.assert_close(ours.center, theirs.center, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", [lambda t: t, list])
def test_lightly_update_center(original, form):
    ours, theirs = (cls(7, center_momentum=0.25).double() for cls in (lightly.DINOLoss, original))
    for seed in range(2):
        _, teacher = draw(2, 2, seed=seed)
        ours.update_center(form(teacher))
        theirs.update_center(teacher)
    torch.testing.assert_close(ours.center, theirs.center, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_update_center_sums_half_precision_in_fp32(dtype):
    ours = lightly.DINOLoss(7, center_momentum=0.75)
    _, teacher = draw(1, 2, B=300, dtype=dtype)
    ours.update_center(teacher)
    expected = 0.25 * teacher.double().mean(dim=(0, 1))
    torch.testing.assert_close(ours.center[0, 0].double(), expected, rtol=1e-5, atol=1e-7)


def test_lightly_teacher_gets_no_gradient_and_graph_keeps_the_old_center():
    student, teacher = draw(3, 2)
    loss_fn = lightly.DINOLoss(7).double()
    teacher.requires_grad_()
    student.requires_grad_()
    loss = loss_fn(list(teacher), list(student))
    loss_fn.center.fill_(9.0)
    loss.backward()
    assert teacher.grad is None
    again = run(lambda s: lightly.DINOLoss(7).double()(list(teacher), list(s)), student.detach())
    assert torch.equal(student.grad, again[1])


def test_lightly_empty_batch_has_loss_zero_and_keeps_the_center():
    for S in (3, 1):
        loss_fn = lightly.DINOLoss(7)
        student, teacher = draw(S, 2, B=0, dtype=torch.float32)
        assert loss_fn(list(teacher), list(student)) == 0
        assert torch.equal(loss_fn.center, torch.zeros(1, 1, 7))


def test_single_crop_is_an_error_and_keeps_the_center(original):
    student, teacher = draw(1, 1, dtype=torch.float32)
    for cls, match in ((original, "no cross-view terms"), (lightly.DINOLoss, "at least two views")):
        loss_fn = cls(7)
        with pytest.raises(ValueError, match=match):
            loss_fn(list(teacher), list(student))
        assert torch.equal(loss_fn.center, torch.zeros(1, 1, 7))


@pytest.mark.parametrize("arguments", [{"teacher_temp": 0.05}, {"epoch": 50}])
def test_lightly_compiles(arguments):
    student, teacher = draw(3, 2, dtype=torch.float32)
    losses = [lightly.DINOLoss(7), lightly.DINOLoss(7)]

    def step(index, student):
        return losses[index](teacher.unbind(), student.unbind(), **arguments)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got = run(lambda s: compiled(0, s), student)
        assert_same(got, run(lambda s: step(1, s), student), rtol=1e-6)
    assert losses[0].center.abs().sum() > 0
    torch.testing.assert_close(losses[0].center, losses[1].center)


@pytest.mark.parametrize(
    ("teacher", "student", "match"),
    [
        ([(3, 7)] * 2, [(2, 7)] * 2, r"same B and K.*\(2, 3, 7\).*\(2, 2, 7\)"),
        ([(3, 7)] * 2, [(1, 7)] * 2, r"same B and K.*\(2, 3, 7\).*\(2, 1, 7\)"),
        ([(3, 7)] * 2, [(3, 6)] * 2, r"same B and K"),
        ([(3, 6)] * 2, [(3, 6)] * 2, r"K = 7 prototypes \(output_dim\), got 6"),
        ([], [(3, 7)] * 2, r"teacher_out must hold at least one \[B, K\] tensor, got none"),
        ([(3, 7)] * 2, [], "student_out must hold at least one"),
        ([(3, 7)] * 2, [(3, 7), (2, 7)], r"one shape, got \(3, 7\) and, at index 1, \(2, 7\)"),
        ([(3, 7)] * 2, [(3, 1, 7)] * 2, r"student_out\[0\] must be \[B, K\], got shape \(3, 1, 7"),
    ],
)
def test_lightly_invalid_shapes(teacher, student, match):
    loss_fn = lightly.DINOLoss(7)
    with pytest.raises(ValueError, match=match):
        loss_fn([torch.ones(s) for s in teacher], [torch.ones(s) for s in student])
    assert torch.equal(loss_fn.center, torch.zeros(1, 1, 7))


@pytest.mark.parametrize(
    ("error", "arguments", "match"),
    [
        (ValueError, {"epoch": -1}, "epoch must be >= 0, got -1"),
        (ValueError, {"teacher_temp": 0.0}, "teacher_temp must be > 0 and finite, got 0.0"),
        (ValueError, {"teacher_temp": torch.ones(2)}, r"0-d tensor, got shape \(2,\)"),
        (TypeError, {"teacher_temp": "warm"}, "teacher_temp must be a float.*got str"),
        (TypeError, {"epoch": 0.5}, "float"),
    ],
)
@pytest.mark.parametrize("S", [3, 1])
def test_lightly_invalid_temperatures(error, arguments, match, S):
    student, teacher = draw(S, 2, dtype=torch.float32)
    with pytest.raises(error, match=match):
        lightly.DINOLoss(7)(list(teacher), list(student), **arguments)


def test_lightly_invalid_types_and_devices():
    loss_fn = lightly.DINOLoss(7)
    with pytest.raises(TypeError, match=r"student_out\[1\] must be a torch.Tensor, got str"):
        loss_fn(torch.ones(2, 3, 7), [torch.ones(3, 7), "crop"])
    with pytest.raises(TypeError, match=r"teacher_out must have one of the dtypes .*int64"):
        loss_fn(torch.ones(2, 3, 7, dtype=torch.int64), torch.ones(2, 3, 7))
    with pytest.raises(ValueError, match=r"center's device cpu, got meta"):
        loss_fn(torch.ones(2, 3, 7, device="meta"), torch.ones(2, 3, 7))
    with pytest.raises(ValueError, match=r"one \[S, B, K\] tensor.*got shape \(6, 7\)"):
        loss_fn(torch.ones(6, 7), torch.ones(2, 3, 7))
    with pytest.raises(ValueError, match=r"one device, got cpu and, at index 1, meta"):
        stack_crops("crops", [torch.ones(3, 7), torch.ones(3, 7, device="meta")])
    with pytest.raises(ValueError, match="K = 7"):
        loss_fn.update_center(torch.ones(2, 3, 6))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"output_dim": 0}, "output_dim must be >= 1, got 0"),
        ({"teacher_temp": 0.0}, "teacher_temp must be > 0 and finite, got 0.0"),
        ({"warmup_teacher_temp": -1.0}, "warmup_teacher_temp must be > 0"),
        ({"student_temp": float("inf")}, "student_temp must be > 0 and finite, got inf"),
        ({"warmup_teacher_temp_epochs": -1}, "warmup_teacher_temp_epochs must be >= 0, got -1"),
        ({"center_momentum": 1.5}, r"center_momentum must be in \[0, 1\], got 1.5"),
        ({"center_mode": "median"}, "Unknown mode 'median'"),
    ],
)
def test_lightly_invalid_constructor_arguments(changes, match):
    with pytest.raises(ValueError, match=match):
        lightly.DINOLoss(**{"output_dim": 7, **changes})


def distributed_steps(folder: Path) -> None:
    """Run lightly's loss and ours on this rank's part of the batch; the parts are not equal."""
    from lightly.loss import DINOLoss as Original

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ours, theirs = (cls(7, **WARM_UP).double() for cls in (lightly.DINOLoss, Original))
    for step in range(3):
        student, teacher = draw(4, 2, B=2 + rank, seed=2 * step + rank)
        got, expected = run_both(ours, theirs, teacher, student, epoch=step)
        assert_same(got, expected)
        torch.testing.assert_close(ours.center, theirs.center, rtol=1e-12, atol=1e-14)
    # The second rank has an empty batch, and then both: the center moves to the first one's mean.
    before = ours.center.clone()
    for step, rows in enumerate((3 * (1 - rank), 0)):
        student, teacher = draw(4, 2, B=3)
        loss = ours(list(teacher[:, :rows]), list(student[:, :rows]))
        assert (loss == 0) == (rows == 0), step
    expected = 0.9 * before + 0.1 * teacher.mean(dim=(0, 1))
    torch.testing.assert_close(ours.center, expected, rtol=1e-12, atol=1e-14)
    torch.save({"center": ours.center}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_lightly_on_two_ranks(original, tmp_path):
    run_two(distributed_steps, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["center"], second["center"])
    assert first["center"].abs().sum() > 0
