"""The drop-ins of fastdino_kernels.compat against what they replace, and the guide's own code.

lightly's loss is the installed package's; the other originals are written out from their equations.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastdino_kernels import DINOLoss
from fastdino_kernels.compat import lightly, solo_learn
from fastdino_kernels.compat.crops import stack_crops
from fastdino_kernels.compat.dinov2 import cross_entropy, dino_clstoken_loss, dino_cross_entropy
from fastdino_kernels.dispatch import triton_problem
from torch import Tensor

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "kernels/README.md"
# Exact in fp32: lightly rounds its temperatures to it, which fp64 would show.
WARM_UP = {"warmup_teacher_temp": 0.03125, "teacher_temp": 0.0625, "warmup_teacher_temp_epochs": 3}


def draw(S, T, B=3, K=7, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(n, B, K, generator=generator, dtype=torch.float64) for n in (S, T)
    )
    return student.to(dtype), teacher.to(dtype)


def draw_probs(S, T, B=3, K=7, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    """Logits, and probabilities whose rows do not quite sum to 1, as after Sinkhorn-Knopp."""
    student, teacher = draw(S, T, B, K, torch.float64, seed)
    return student.to(dtype), (1.1 * torch.softmax(teacher / 0.5, dim=-1)).to(dtype)


def run(loss_fn, crops: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the crops): loss_fn(crops, ...) on a copy that requires a gradient."""
    crops = crops.clone().requires_grad_()
    loss = loss_fn(crops, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), crops.grad


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rtol=1e-12) -> None:
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        torch.testing.assert_close(g, e, rtol=rtol, atol=rtol)


def of_both(ours, theirs, teacher: Tensor, student: Tensor, **arguments):
    """run() of two lightly losses on lists of crops."""
    return [
        run(lambda s, f=f: f(list(teacher), list(s), **arguments), student) for f in (ours, theirs)
    ]


@pytest.fixture
def original():
    """Class lightly.loss.DINOLoss of the installed package."""
    return pytest.importorskip("lightly.loss").DINOLoss


# lightly


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
        got, expected = of_both(ours, theirs, teacher, student, **arguments(step))
        assert_same(got, expected)
        assert ours.center.shape == (1, 1, 7)
        torch.testing.assert_close(ours.center, theirs.center, rtol=1e-12, atol=1e-14)


def test_lightly_by_default_and_in_float32(original):
    ours, theirs = lightly.DINOLoss(1000), original(1000)
    for step in range(3):
        student, teacher = draw(4, 2, 5, 1000, torch.float32, seed=step)
        got, expected = of_both(ours, theirs, teacher, student, epoch=40)
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


@pytest.mark.parametrize("form", [lambda t: t, list])
def test_lightly_update_center_by_itself(original, form):
    ours, theirs = (cls(7, center_momentum=0.25).double() for cls in (lightly.DINOLoss, original))
    for seed in range(2):
        _, teacher = draw(2, 2, seed=seed)
        ours.update_center(form(teacher))
        theirs.update_center(teacher)
    torch.testing.assert_close(ours.center, theirs.center, rtol=1e-12, atol=1e-14)


def test_lightly_the_teacher_gets_no_gradient_and_the_graph_keeps_the_old_center():
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


def test_lightly_an_empty_batch_has_no_loss_and_leaves_the_center():
    for S in (3, 1):
        loss_fn = lightly.DINOLoss(7)
        student, teacher = draw(S, 2, B=0, dtype=torch.float32)
        assert loss_fn(list(teacher), list(student)) == 0
        assert torch.equal(loss_fn.center, torch.zeros(1, 1, 7))


def test_one_crop_alone_is_the_same_error_and_leaves_the_center(original):
    student, teacher = draw(1, 1, dtype=torch.float32)
    for cls, match in ((original, "no cross-view terms"), (lightly.DINOLoss, "in teacher_out or")):
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
def test_lightly_mistaken_shapes(teacher, student, match):
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
def test_lightly_mistaken_temperatures(error, arguments, match, S):
    student, teacher = draw(S, 2, dtype=torch.float32)
    with pytest.raises(error, match=match):
        lightly.DINOLoss(7)(list(teacher), list(student), **arguments)


def test_lightly_mistaken_types_and_devices():
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
        ({"center_mode": "median"}, "center_mode must be 'mean', got 'median'"),
    ],
)
def test_lightly_mistaken_settings(changes, match):
    with pytest.raises(ValueError, match=match):
        lightly.DINOLoss(**{"output_dim": 7, **changes})


def distributed_steps(rank: int, folder: str) -> None:
    """One of two processes: lightly's loss and ours on its part of the batch, which is not half."""
    from lightly.loss import DINOLoss as Original

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    ours, theirs = (cls(7, **WARM_UP).double() for cls in (lightly.DINOLoss, Original))
    for step in range(3):
        student, teacher = draw(4, 2, B=2 + rank, seed=2 * step + rank)
        got, expected = of_both(ours, theirs, teacher, student, epoch=step)
        assert_same(got, expected)
        torch.testing.assert_close(ours.center, theirs.center, rtol=1e-12, atol=1e-14)
    alone = lightly.DINOLoss(7, **WARM_UP).double()
    torch.save({"center": ours.center, "alone": alone.center}, f"{folder}/{rank}.pt")
    with pytest.raises(ValueError, match="empty batch, in one of several processes"):
        ours(list(teacher[:, :0]), list(student[:, :0]))
    torch.distributed.destroy_process_group()


def test_lightly_in_two_processes(original, tmp_path):
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
    assert torch.equal(first["center"], second["center"])
    assert first["center"].abs().sum() > 0


# Crops that are pieces of one tensor


def flat(S=4, B=3, K=7) -> tuple[Tensor, Tensor]:
    """A leaf [S*B, K], and a tensor computed from it."""
    leaf = torch.randn(
        S * B, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    return leaf, leaf * 2


@pytest.mark.parametrize(
    "cut",
    [
        lambda out: out.chunk(4),
        lambda out: out.split(3),
        lambda out: [out[3 * i : 3 * i + 3] for i in range(4)],
        lambda out: list(out.view(4, 3, 7)),
        lambda out: out.view(4, 3, 7).unbind(),
    ],
)
def test_pieces_of_one_tensor_are_not_copied(cut):
    leaf, out = flat()
    stacked = stack_crops("crops", cut(out))
    assert stacked.data_ptr() == out.data_ptr()
    weight = torch.arange(84.0, dtype=torch.float64).view(4, 3, 7)
    (stacked.square() * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, 8 * leaf.detach() * weight.view(12, 7))


def hooked(out: Tensor) -> list[Tensor]:
    pieces = list(out.chunk(4))
    pieces[2].register_hook(lambda grad: 3 * grad)
    return pieces


def retaining(out: Tensor) -> list[Tensor]:
    pieces = list(out.chunk(4))
    pieces[1].retain_grad()
    return pieces


def cut_without_gradient(out: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(out.chunk(4))


def one_detached(out: Tensor) -> list[Tensor]:
    pieces = list(out.chunk(4))
    return [*pieces[:3], pieces[3].detach()]


@pytest.mark.parametrize(
    "cut",
    [
        hooked,
        retaining,
        cut_without_gradient,
        one_detached,
        lambda out: out.chunk(4)[::-1],
        lambda out: out.chunk(4)[:3],
        lambda out: out.chunk(4)[1:],
        lambda out: [*out.chunk(4)[:3], out.chunk(4)[0]],
        lambda out: list(out.view(3, 4, 7).unbind(1)),
        lambda out: list(out.T.reshape(7, 4, 3).unbind(1)),
        lambda out: [piece.clone() for piece in out.chunk(4)],
        lambda out: [out.view(4, 3, 7)[i, :, :5] for i in range(4)],
        lambda out: (2 * out).chunk(2) + (3 * out).chunk(2),
        lambda out: (2 * out).chunk(4)[:2] + (3 * out).chunk(4)[2:],
        lambda out: (2 * out.T).T.chunk(4),
    ],
)
def test_everything_else_is_stacked_as_torch_stacks(cut):
    grads = []
    for stack in (torch.stack, lambda pieces: stack_crops("crops", pieces)):
        leaf, out = flat()
        pieces = [piece for piece in cut(out) if piece.dim() == 2]
        stacked = stack(pieces) + 0 * leaf.sum()
        grads.append(run_backward(stacked, leaf))
    assert torch.equal(*grads)
    assert stack_crops("crops", pieces).data_ptr() != out.data_ptr()


def run_backward(stacked: Tensor, leaf: Tensor) -> Tensor:
    (stacked * torch.arange(stacked.numel()).view_as(stacked)).sum().backward()
    return leaf.grad


def test_pieces_may_require_a_gradient_by_themselves():
    pieces = [piece.requires_grad_() for piece in torch.zeros(12, 7).chunk(4)]
    stack_crops("crops", pieces).sum().backward()
    assert all(torch.equal(piece.grad, torch.ones(3, 7)) for piece in pieces)


def test_pieces_read_as_another_dtype_keep_it():
    pieces = [piece.view(torch.bfloat16) for piece in torch.ones(12, 7).half().chunk(4)]
    assert torch.equal(stack_crops("crops", pieces), torch.stack(pieces))
    assert stack_crops("crops", pieces).dtype == torch.bfloat16


def test_a_stacked_tensor_is_taken_as_it_is():
    crops = torch.randn(4, 3, 7)
    assert stack_crops("crops", crops) is crops


def test_the_losses_take_pieces_and_lists_alike():
    _, probs = draw_probs(4, 2)
    teacher = draw(4, 2)[1]
    for loss_fn in (
        lambda crops: lightly.DINOLoss(7).double()(teacher, crops),
        lambda crops: dino_clstoken_loss(crops, probs),
    ):
        grads = []
        for form in (lambda out: out.chunk(4), lambda out: [c.clone() for c in out.chunk(4)]):
            leaf, out = flat()
            loss_fn(form(out)).backward()
            grads.append(leaf.grad)
        assert grads[0].abs().sum() > 0
        torch.testing.assert_close(*grads, rtol=1e-13, atol=0)


# DINOv2, DINOv3, iBOT


def plain_cross_entropy(s: Tensor, t: Tensor, temp: float) -> Tensor:
    return -(t * torch.log_softmax(s / temp, dim=-1)).sum(dim=-1)


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 5, 1000), (4, 7), (2, 3, 2, 7), (1, 0, 7)])
@pytest.mark.parametrize("temp", [0.1, torch.tensor(0.25)])
def test_cross_entropy_is_the_equation_row_by_row(shape, temp):
    s, t = (x.reshape(shape) for x in draw_probs(1, 1, B=s_rows(shape), K=shape[-1]))
    got = run(lambda s: cross_entropy(s, t, temp), s)
    assert got[0].shape == shape[:-1]
    assert_same(got, run(lambda s: plain_cross_entropy(s, t, float(temp)), s))


def s_rows(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[:-1]).numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cross_entropy_of_half_precision_is_computed_in_float32(dtype):
    s, t = (x.view(2, 6, 50) for x in draw_probs(1, 1, 12, 50, dtype))
    loss, grad = run(lambda s: cross_entropy(s, t, 0.1), s)
    expected = run(lambda s: plain_cross_entropy(s, t.double(), 0.1), s.double())
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=1e-6)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected[1], rtol=step, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7)])
def test_cross_entropy_as_dinov2_calls_it(shape):
    # What its patch loss does: fp32 copies of a slice, and a sign that it takes back.
    def lossfunc(t, s, temp):
        s, t = s.float(), t.float()
        if s.ndim == 2:
            return -cross_entropy(s.unsqueeze(0), t.unsqueeze(0), temp, bw_inplace=True).squeeze(0)
        return -cross_entropy(s, t, temp, bw_inplace=True)

    for dtype in (torch.float16, torch.float32):
        logits, t = (x.view(12, 7) for x in draw_probs(1, 1, 12, 7, dtype))
        t = t[:6].view(shape)
        logits, expected_logits = (logits.clone().requires_grad_() for _ in range(2))
        loss = lossfunc(t, (logits * 1)[:6].view(shape), 0.1)
        assert loss.shape == shape[:-1]
        loss.sum().backward()
        expected = -plain_cross_entropy(expected_logits.float()[:6].view(shape), t.float(), 0.1)
        expected.sum().backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits.grad, expected_logits.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda s, t, inplace: cross_entropy(s, t, 0.1, bw_inplace=inplace).sum(),
        lambda s, t, inplace: dino_cross_entropy(s, t, inplace_backward=inplace),
    ],
)
def test_the_gradient_is_written_over_the_logits_only_when_asked(loss_fn):
    s, t = draw_probs(2, 2)
    expected = run(lambda s: loss_fn(s, t, False), s)[1]
    for inplace in (False, True):
        leaf = s.clone().requires_grad_()
        logits = leaf * 1
        loss_fn(logits, t, inplace).backward()
        torch.testing.assert_close(leaf.grad, expected)
        assert torch.equal(logits.detach(), leaf.grad if inplace else s)


def test_cross_entropy_gives_the_teacher_no_gradient():
    s, t = (x.view(2, 3, 7).requires_grad_() for x in draw_probs(1, 1, 6))
    cross_entropy(s, t, 0.1).sum().backward()
    assert t.grad is None


def test_cross_entropy_compiles():
    s, t = (x.view(2, 3, 7) for x in draw_probs(1, 1, 6))
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    assert_same(run(lambda s: compiled(s, t, 0.1), s), run(lambda s: cross_entropy(s, t, 0.1), s))


@pytest.mark.parametrize(
    ("s", "t", "match"),
    [
        ((2, 3, 7), (2, 2, 7), r"both be \[B, N, K\] with K >= 1, got \(2, 3, 7\) and \(2, 2, 7\)"),
        ((2, 3, 7), (1, 3, 7), "got"),
        ((7,), (7,), r"got \(7,\)"),
        ((2, 3, 0), (2, 3, 0), "K >= 1"),
    ],
)
def test_cross_entropys_mistaken_shapes(s, t, match):
    with pytest.raises(ValueError, match=match):
        cross_entropy(torch.ones(s), torch.ones(t), 0.1)


def test_cross_entropys_other_mistakes():
    s = torch.ones(2, 3, 7)
    with pytest.raises(ValueError, match="temp must be > 0 and finite, got 0.0"):
        cross_entropy(s, s, 0.0)
    with pytest.raises(TypeError, match="s must be a torch.Tensor, got list"):
        cross_entropy([s], s, 0.1)
    with pytest.raises(TypeError, match="t must have one of the dtypes"):
        cross_entropy(s, s.long(), 0.1)
    with pytest.raises(ValueError, match="same storage"):
        cross_entropy(s, s, 0.1, bw_inplace=True)


def plain_clstoken_loss(student: Tensor, probs: Tensor, temp: float) -> Tensor:
    """Every pair's mean over the batch, summed and not divided."""
    return sum(plain_cross_entropy(s, p, temp).mean() for s in student for p in probs)


@pytest.mark.parametrize(("S", "T"), [(8, 2), (1, 1), (2, 3)])
def test_clstoken_loss_sums_over_pairs_and_averages_over_images(S, T):
    student, probs = draw_probs(S, T)
    got = run(lambda s: dino_clstoken_loss(list(s), list(probs), 0.2), student)
    assert_same(got, run(lambda s: plain_clstoken_loss(s, probs, 0.2), student))
    assert_same(
        run(lambda s: dino_clstoken_loss(s, probs), student),
        run(lambda s: plain_clstoken_loss(s, probs, 0.1), student),
    )


def plain_einsum(student: Tensor, probs: Tensor, temp: float, ignore_diagonal: bool) -> Tensor:
    pairs = -torch.einsum("sbk,tbk->st", torch.log_softmax(student / temp, dim=-1), probs)
    S, T, B = len(student), len(probs), student.shape[1]
    if not ignore_diagonal:
        return pairs.sum() / (B * S * T)
    own = torch.arange(min(S, T))
    return (pairs.sum() - pairs[own, own].sum()) / (B * S * T - B * min(S, T))


@pytest.mark.parametrize(("S", "T"), [(10, 2), (2, 2), (2, 1), (1, 3), (8, 2)])
@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_dino_cross_entropy_is_the_einsum(S, T, ignore_diagonal):
    student, probs = draw_probs(S, T)
    options = {"student_temp": 0.2, "ignore_diagonal": ignore_diagonal}
    expected = run(lambda s: plain_einsum(s, probs, 0.2, ignore_diagonal), student)
    for inplace in (False, True):
        got = run(
            lambda s, i=inplace: dino_cross_entropy(s * 1, probs, **options, inplace_backward=i),
            student,
        )
        assert_same(got, expected)


def test_dino_cross_entropys_defaults():
    student, probs = draw_probs(3, 2)
    expected = plain_einsum(student, probs, 0.1, ignore_diagonal=False)
    torch.testing.assert_close(dino_cross_entropy(student, probs), expected)


@pytest.mark.parametrize("loss_fn", [dino_cross_entropy, dino_clstoken_loss])
def test_an_empty_batch_has_no_loss(loss_fn):
    assert loss_fn(*draw_probs(3, 2, B=0)) == 0


def test_dino_cross_entropys_mistakes():
    student, probs = draw_probs(1, 1)
    with pytest.raises(ValueError, match="S = T = 1 with ignore_diagonal leaves no pairs"):
        dino_cross_entropy(student, probs, ignore_diagonal=True)
    with pytest.raises(ValueError, match=r"student_logits must be 3-D.*got shape \(3, 7\)"):
        dino_cross_entropy(student[0], probs)
    with pytest.raises(ValueError, match=r"teacher_probs must be 3-D.*got shape \(0, 3, 7\)"):
        dino_cross_entropy(student, probs[:0])
    with pytest.raises(ValueError, match=r"same B and K.*\(1, 3, 7\) and \(1, 2, 7\)"):
        dino_cross_entropy(student, probs[:, :2])
    with pytest.raises(TypeError, match="teacher_probs must be a torch.Tensor, got list"):
        dino_cross_entropy(student, list(probs))
    with pytest.raises(ValueError, match=r"teacher_out_softmaxed_centered_list must hold at least"):
        dino_clstoken_loss([student[0]], [])


def losses_and_gradients(device: str) -> list[tuple[Tensor, Tensor]]:
    """run() of every drop-in on fp32 logits on the device, with its implementation as it is set."""
    student, teacher = (x.to(device) for x in draw(4, 2, K=70, dtype=torch.float32))
    few, probs = (x.to(device) for x in draw_probs(1, 2, K=70, dtype=torch.float32))
    alike, targets = (x.to(device) for x in draw_probs(2, 2, K=70, dtype=torch.float32))
    module = lightly.DINOLoss(70).to(device)
    solo = solo_learn.DINOLoss(70, 0.04, 0.04, 0, 1, num_large_crops=4).to(device)
    return [
        run(lambda s: module(list(teacher), list(s)), student),
        run(lambda s: module(list(teacher), list(s)), few),
        run(lambda s: solo(s.view(-1, 70), teacher.view(-1, 70)), student),
        run(lambda s: cross_entropy(s, targets, 0.1), alike),
        run(lambda s: dino_clstoken_loss(s, probs), student),
        run(lambda s: dino_cross_entropy(s, probs, ignore_diagonal=True), few),
    ]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_drop_ins_give_the_same_on_triton(device, monkeypatch):
    problem = triton_problem(device)
    if problem is not None or (device == "cuda" and not torch.cuda.is_available()):
        pytest.skip(problem or "no GPU")
    results = {}
    for impl in ("torch", "triton"):
        monkeypatch.setenv("FASTDINO_KERNELS", impl)
        results[impl] = losses_and_gradients(device)
    assert not torch.equal(results["torch"][0][1], results["triton"][0][1])  # it was another one
    for got, expected in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)


# solo-learn


def test_solo_learn_takes_its_constructor_and_its_epoch():
    ours = solo_learn.DINOLoss(
        num_prototypes=7,
        student_temp=0.2,
        warmup_teacher_temp=0.02,
        teacher_temp=0.06,
        warmup_teacher_temp_epochs=3,
        num_epochs=5,
        num_large_crops=4,
        center_momentum=0.7,
    ).double()
    same = DINOLoss(7, 4, 0.02, 0.06, 3, 5, 0.2, 0.7).double()
    assert ours.epoch == 0
    assert (ours.num_large_crops, ours.state_dict().keys()) == (4, {"center"})
    losses = []
    for epoch in range(5):
        student, teacher = (x.reshape(-1, 7) for x in draw(4, 2, seed=epoch % 2))
        ours.epoch = epoch
        got = run(ours, student, teacher)
        assert_same(got, run(same, student, teacher, epoch))
        losses.append(got[0].item())
    assert torch.equal(ours.center, same.center)
    assert len(set(losses)) == 5
    with pytest.raises(ValueError, match=r"epoch must be in 0\.\.4"):
        ours(student, teacher, epoch=5)


def test_solo_learn_has_two_crops_by_default():
    loss_fn = solo_learn.DINOLoss(7, 0.04, 0.04, 0, 1)
    student, teacher = (x.reshape(-1, 7) for x in draw(2, 2, dtype=torch.float32))
    assert loss_fn(student, teacher) == DINOLoss(7, 2, 0.04, 0.04, 0, 1)(student, teacher, 0)


# The guide


def guide_snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("snippet", guide_snippets())
def test_the_guides_code_runs(snippet):
    exec(snippet, {"__name__": "guide"})


def test_the_guides_names_exist():
    guide = GUIDE.read_text(encoding="utf-8")
    imports = set(re.findall(r"(from fastdino_kernels[\w.]* import \w+)", guide))
    assert {line.split()[-1] for line in imports} >= {"DINOLoss", "cross_entropy"}
    functions = re.findall(r"^\| `([\w.]+)` \|", section(guide, "What it does"), re.M)
    assert "compat.dinov2.cross_entropy" in functions
    for name in functions:
        module, _, attribute = f"fastdino_kernels.{name}".rpartition(".")
        imports.add(f"from {module} import {attribute}")
    for line in imports:
        exec(line, {})


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


if __name__ == "__main__":
    distributed_steps(int(sys.argv[1]), sys.argv[2])
