"""fastdino_kernels.dino_loss and DINOLoss against the plain equations in float64.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastdino_kernels import DINOLoss, chosen_impl, dino_loss, reference, teacher_entropy
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
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"dino_loss_backward|double|once_differentiable"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck():
    student, teacher, center = draw(dtype=torch.bfloat16)
    temps = (torch.tensor(0.1), torch.tensor(0.04))
    loss_op = torch.ops.fastdino_kernels.dino_loss.default
    backward_op = torch.ops.fastdino_kernels.dino_loss_backward.default
    torch.library.opcheck(
        loss_op, (student.requires_grad_(), teacher, center, *temps, "torch"), atol=1e-6, rtol=1e-2
    )
    torch.library.opcheck(
        backward_op, (torch.tensor(2.0), student.detach(), teacher, center, *temps, "torch")
    )


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
    monkeypatch.setenv("FASTDINO_KERNELS", "reference")
    assert chosen_impl() == "reference"
    chosen = ours(*inputs, impl="auto")
    assert torch.equal(chosen[1], ours(*inputs, impl="reference")[1])
    assert not torch.equal(chosen[0], automatic[0]) or not torch.equal(chosen[1], automatic[1])
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


class PaperLoss:
    """What facebookresearch/dino's DINOLoss computes, by the plain equations."""

    def __init__(self, K, schedule, dtype, momentum=0.9):
        self.center, self.schedule, self.momentum = torch.zeros(1, K).to(dtype), schedule, momentum

    def __call__(self, student, teacher, epoch):
        loss, total = reference.dino_loss(
            student, teacher, self.center, 0.1, teacher_temp=self.schedule[epoch]
        )
        rows = len(teacher) * teacher.shape[1]
        self.center = reference.update_center(self.center, total, rows, self.momentum)
        return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module_follows_the_paper_over_several_steps(dtype):
    S, B, K = 5, 3, 11
    loss_fn = DINOLoss(K, S, 0.04, 0.07, 3, 5).to(dtype)
    schedule = [0.04, 0.055, 0.07, 0.07, 0.07]
    assert loss_fn.teacher_temp_schedule == pytest.approx(schedule, rel=1e-15)
    paper = PaperLoss(K, schedule, torch.float64)
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-7}
    for epoch in range(5):
        student, teacher, _ = draw(S, 2, B, K, dtype, seed=epoch)
        expected_student = student.double().requires_grad_()
        expected = paper(expected_student, teacher.double(), epoch)
        expected.backward()
        student.requires_grad_()
        # The module updates the center in place before the backward pass.
        loss = loss_fn(student.reshape(S * B, K), teacher.reshape(2 * B, K), epoch)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected, **tolerance)
        torch.testing.assert_close(student.grad.double(), expected_student.grad, **tolerance)
        torch.testing.assert_close(loss_fn.center.double(), paper.center, **tolerance)
    assert loss_fn.center.dtype == dtype
    assert loss_fn.center.abs().max() > 0.01


def test_accumulated_halves_give_the_whole_batch():
    S, B, K = 4, 6, 9
    student, teacher, _ = draw(S, 2, B, K, torch.float64)
    whole = DINOLoss(K, S, 0.04, 0.04, 0, 1).double()
    parts = DINOLoss(K, S, 0.04, 0.04, 0, 1).double()
    expected = whole(student.reshape(-1, K), teacher.reshape(-1, K), 0)
    losses, sums = [], []
    for half in (slice(0, 3), slice(3, 6)):
        loss, total = parts.pairwise(
            student[:, half].reshape(-1, K), teacher[:, half].reshape(-1, K), 0
        )
        losses.append(loss)
        sums.append(total)
    assert torch.equal(parts.center, torch.zeros_like(parts.center))
    kept = sum(sums).clone()
    parts.update_center(kept, 2 * B)
    torch.testing.assert_close(sum(losses) / 2, expected)
    torch.testing.assert_close(parts.center, whole.center)
    assert torch.equal(kept, sum(sums))


def test_state_dict_is_the_paper_codes():
    loss_fn = DINOLoss(8, 3, 0.04, 0.04, 0, 2)
    assert {name: value.shape for name, value in loss_fn.state_dict().items()} == {"center": (1, 8)}
    assert list(loss_fn.parameters()) == []
    loss_fn.load_state_dict({"center": torch.arange(8.0)[None]})
    assert torch.equal(loss_fn.center, torch.arange(8.0)[None])


def test_module_entropy_uses_its_center_and_temperature():
    loss_fn = DINOLoss(9, 3, 0.04, 0.08, 2, 2)
    loss_fn.center.copy_(torch.linspace(0, 1, 9))
    teacher = draw(K=9)[1].reshape(-1, 9)
    expected = teacher_entropy(teacher[None], loss_fn.center, 0.08)
    assert torch.equal(loss_fn.teacher_entropy(teacher, 1), expected)
    assert loss_fn.teacher_entropy(teacher, 0) < expected


def test_module_compiles_as_one_graph():
    K, S = 7, 4
    student, teacher, _ = draw(S, 2, 3, K)
    eager, traced = (DINOLoss(K, S, 0.04, 0.04, 0, 1) for _ in range(2))
    expected = eager(student.reshape(-1, K), teacher.reshape(-1, K), 0)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    loss = compiled(student.reshape(-1, K).requires_grad_(), teacher.reshape(-1, K), 0)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(traced.center, eager.center)


def test_empty_batch_leaves_the_center():
    loss_fn = DINOLoss(7, 4, 0.04, 0.04, 0, 1)
    loss_fn.center.fill_(2)
    assert loss_fn(torch.zeros(0, 7), torch.zeros(0, 7), 0) == 0
    assert torch.equal(loss_fn.center, torch.full((1, 7), 2.0))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"warmup_teacher_temp_epochs": 11}, r"\(11\) must not exceed nepochs \(10\): lower"),
        ({"warmup_teacher_temp_epochs": -1}, "warmup_teacher_temp_epochs must be >= 0, got -1"),
        ({"ncrops": 1}, "ncrops must be >= 2.*got 1"),
        ({"out_dim": 0}, "out_dim must be >= 1, got 0"),
        ({"teacher_temp": 0.0}, "teacher_temp must be > 0"),
        ({"warmup_teacher_temp": -0.1}, "warmup_teacher_temp must be > 0"),
        ({"student_temp": 0.0}, "student_temp must be > 0"),
        ({"center_momentum": 1.5}, r"center_momentum must be in \[0, 1\], got 1.5"),
    ],
)
def test_constructors_mistakes(changes, match):
    arguments = {
        "out_dim": 7,
        "ncrops": 4,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.04,
        "warmup_teacher_temp_epochs": 0,
        "nepochs": 10,
    }
    with pytest.raises(ValueError, match=match):
        DINOLoss(**{**arguments, **changes})


def test_modules_mistakes():
    loss_fn = DINOLoss(7, 4, 0.04, 0.04, 0, 2)
    student, teacher = torch.zeros(12, 7), torch.zeros(6, 7)
    for wrong in ((student[:11], teacher), (student, teacher[:5]), (student[:, :6], teacher)):
        with pytest.raises(ValueError, match=r"S = 4 and K = 7, got \(1[12], [67]\)"):
            loss_fn(*wrong, 0)
    for epoch in (2, -1):
        with pytest.raises(ValueError, match=rf"epoch must be in 0\.\.1 .*got {epoch}"):
            loss_fn(student, teacher, epoch)
    with pytest.raises(ValueError, match=r"teacher_sum must be \[K\] with K = 7, got .*\(6,\)"):
        loss_fn.update_center(torch.zeros(6), 2)
    with pytest.raises(ValueError, match="rows must be >= 0, got -1"):
        loss_fn.update_center(torch.zeros(7), -1)
    assert torch.equal(loss_fn.center, torch.zeros(1, 7))


def distributed_step(rank: int, folder: str) -> None:
    """One of two processes: two steps on its half of the batch; writes what it then has."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    S, B, K = 4, 6, 9
    loss_fn = DINOLoss(K, S, 0.04, 0.04, 0, 1).double()
    mine = slice(rank * B // 2, (rank + 1) * B // 2)
    losses = []
    for step in range(2):
        student, teacher, _ = draw(S, 2, B, K, torch.float64, seed=step)
        student, teacher = (x[:, mine].reshape(-1, K) for x in (student, teacher))
        losses.append(loss_fn(student, teacher, 0).item())
    torch.save({"losses": losses, "center": loss_fn.center.clone()}, f"{folder}/{rank}.pt")
    own_sum = torch.ones(K, dtype=torch.float64)
    loss_fn.update_center(own_sum, 1)
    assert torch.equal(own_sum, torch.ones_like(own_sum)), "update_center changed its argument"
    torch.distributed.destroy_process_group()


def test_two_processes_share_one_center(tmp_path):
    import fastdino_kernels

    packages = str(Path(fastdino_kernels.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
    # This file as a script, so that it does not matter how pytest imported it.
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    S, B, K = 4, 6, 9
    paper = PaperLoss(K, [0.04], torch.float64)
    for step in range(2):
        student, teacher, _ = draw(S, 2, B, K, torch.float64, seed=step)
        expected = paper(student, teacher, 0)
        mean = (first["losses"][step] + second["losses"][step]) / 2
        assert mean == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(first["center"], second["center"])
    torch.testing.assert_close(first["center"], paper.center)


if __name__ == "__main__":
    distributed_step(int(sys.argv[1]), sys.argv[2])
