"""fastdino_kernels.DINOLoss against the paper's equations, on one rank and on two.

Legend: S crops of the student, B images, K prototypes.
"""

import math
from pathlib import Path

import pytest
import torch
from fastdino_kernels import DINOLoss, reference, teacher_entropy
from torch._dynamo.testing import CompileCounterWithBackend

from tests.logits import run
from tests.processes import run_two


def draw(S, T, B, K, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(S, B, K).to(dtype), normal(T, B, K).to(dtype)


class PaperLoss:
    """Reference of facebookresearch/dino's DINOLoss."""

    def __init__(self, K, schedule, dtype, momentum=0.9):
        self.center, self.schedule, self.momentum = torch.zeros(1, K).to(dtype), schedule, momentum

    def __call__(self, student, teacher, epoch):
        loss, total = reference.dino_loss(
            student, teacher, self.center, 0.1, teacher_temp=self.schedule[epoch]
        )
        rows = len(teacher) * teacher.shape[1]
        self.center = reference.update_center(self.center, total, rows, self.momentum)
        return loss


def sinkhorn_loss(student, teacher, temp):
    """Return the reference loss of logits [S, B, K] and [2, B, K], and the targets' entropy."""
    probs = reference.sinkhorn_knopp(teacher.flatten(0, 1), temp, 3).reshape(teacher.shape)
    rows = reference.soft_cross_entropy(student, probs, 0.1, ignore_diagonal=True)
    entropy = torch.special.entr(probs).sum(-1).mean()
    return rows.mean(1).sum() / (2 * len(student) - 2), entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_module_matches_the_reference(dtype):
    S, B, K = 5, 3, 11
    loss_fn = DINOLoss(K, S, 0.04, 0.07, 3, 4, centering="sinkhorn").to(dtype)
    loss_fn.center.copy_(torch.linspace(-1, 1, K))  # a checkpoint's, which no target contains
    before = loss_fn.center.clone()
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    )
    for epoch, temp in enumerate([0.04, 0.055, 0.07, 0.07]):
        student, teacher = draw(S, 2, B, K, dtype, seed=epoch)
        exact = student.double().requires_grad_()
        expected, entropy = sinkhorn_loss(exact, teacher.double(), temp)
        expected.backward()
        student = student.reshape(S * B, K).detach().requires_grad_()
        rows = teacher.reshape(2 * B, K)
        loss = loss_fn(student, rows, epoch)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected.detach(), **tolerance)
        torch.testing.assert_close(student.grad.double().reshape(S, B, K), exact.grad, **tolerance)
        got = loss_fn.teacher_entropy(rows, epoch)
        torch.testing.assert_close(got.double(), entropy, **tolerance)
        center = loss_fn.target_center(rows, epoch)
        torch.testing.assert_close(loss_fn.target_center(rows, torch.tensor(epoch)), center)
        assert torch.equal(loss_fn.pairwise(student, rows, epoch, center)[0], loss)
        assert torch.equal(loss_fn.teacher_entropy(rows, epoch, center), got)
    assert torch.equal(loss_fn.center, before)
    assert loss_fn.state_dict().keys() == {"center"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module_matches_the_paper_over_several_steps(dtype):
    S, B, K = 5, 3, 11
    loss_fn = DINOLoss(K, S, 0.04, 0.07, 3, 5).to(dtype)
    schedule = [0.04, 0.055, 0.07, 0.07, 0.07]
    assert loss_fn.teacher_temp_schedule == pytest.approx(schedule, rel=1e-15)
    paper = PaperLoss(K, schedule, torch.float64)
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-7}
    for epoch in range(5):
        student, teacher = draw(S, 2, B, K, dtype, seed=epoch)
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


def test_epoch_may_be_a_tensor():
    K, S = 11, 3
    loss_fn = DINOLoss(K, S, 0.04, 0.07, 3, 5)
    loss_fn.center.copy_(torch.linspace(-1, 1, K))
    student, teacher = (x.reshape(-1, K) for x in draw(S, 2, 3, K))
    losses = []
    for epoch in range(5):
        loss, _ = loss_fn.pairwise(student, teacher, epoch)
        same, _ = loss_fn.pairwise(student, teacher, torch.tensor(epoch))
        torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
        losses.append(loss.item())
    assert len({f"{loss:.4f}" for loss in losses}) == 3  # of the warm-up


@pytest.mark.parametrize(
    ("warm_up", "expected"),
    [(0, (0.07, 0.07, 0.07)), (1, (0.04, 0.07, 0.07)), (2, (0.04, 0.07, 0.07)),
     (3, (0.04, 0.055, 0.07))],
)  # fmt: skip
def test_schedule_of_short_warm_ups(warm_up, expected):
    """As numpy.linspace: one epoch has the first temperature, more have both ends."""
    schedule = DINOLoss(7, 2, 0.04, 0.07, warm_up, 3).teacher_temp_schedule
    assert schedule == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_gradient_is_written_over_the_logits_only_on_request(inplace_backward):
    student, teacher = (x.reshape(-1, 9) for x in draw(3, 2, 4, 9))
    loss_fn = DINOLoss(9, 3, 0.04, 0.04, 0, 1, inplace_backward=inplace_backward)
    leaf = student.clone().requires_grad_()
    logits = 1 * leaf
    loss_fn(logits, teacher, 0).backward()
    assert leaf.grad.count_nonzero() > 0
    assert torch.equal(logits.detach(), leaf.grad if inplace_backward else student)


def test_accumulated_halves_equal_the_whole_batch():
    S, B, K = 4, 6, 9
    student, teacher = draw(S, 2, B, K, torch.float64)
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


def test_state_dict_matches_the_paper_code():
    loss_fn = DINOLoss(8, 3, 0.04, 0.04, 0, 2)
    assert {name: value.shape for name, value in loss_fn.state_dict().items()} == {"center": (1, 8)}
    assert list(loss_fn.parameters()) == []
    loss_fn.load_state_dict({"center": torch.arange(8.0)[None]})
    assert torch.equal(loss_fn.center, torch.arange(8.0)[None])


def test_module_entropy_uses_its_center_and_temperature():
    loss_fn = DINOLoss(9, 3, 0.04, 0.08, 2, 2)
    loss_fn.center.copy_(torch.linspace(0, 1, 9))
    teacher = draw(2, 2, 3, 9)[1].reshape(-1, 9)
    expected = teacher_entropy(teacher[None], loss_fn.center, 0.08)
    assert torch.equal(loss_fn.teacher_entropy(teacher, 1), expected)
    assert loss_fn.teacher_entropy(teacher, 0) < expected


@pytest.mark.parametrize("centering", ["centering", "sinkhorn"])
def test_module_compiles_as_one_graph_for_all_epochs(centering):
    K, S, epochs = 7, 4, 12
    eager, traced = (DINOLoss(K, S, 0.04, 0.07, 10, epochs, centering=centering) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    for epoch in range(epochs):
        student, teacher = (x.reshape(-1, K) for x in draw(S, 2, 3, K, seed=epoch))
        expected = eager(student, teacher, epoch)
        loss = compiled(student.requires_grad_(), teacher, epoch)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(traced.center, eager.center)
    assert counter.frame_count <= 3  # torch.compile pins 0 and 1


def test_sinkhorn_has_no_center_update():
    loss_fn = DINOLoss(3, 2, 0.04, 0.07, 0, 1, centering="sinkhorn")
    loss_fn.update_center(torch.ones(3), 4)
    loss_fn.start_center_update(torch.ones(3), 4)(skip=torch.tensor(0.0))
    assert torch.equal(loss_fn.center, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"teacher_sum must be \[K\] with K = 3, got .*\(2,\)"):
        loss_fn.update_center(torch.ones(2), 4)


@pytest.mark.parametrize("skip", [0.0, 0.5, 1.0, 2.0])
def test_center_update_can_be_skipped_on_the_device(skip):
    loss_fn, plain = DINOLoss(3, 2, 0.04, 0.07, 0, 1), DINOLoss(3, 2, 0.04, 0.07, 0, 1)
    total = torch.tensor([1.0, 2.0, math.nan if skip else 3.0])
    loss_fn.start_center_update(total, 4)(skip=torch.tensor(skip))
    if not skip:
        plain.update_center(total, 4)
    assert torch.equal(loss_fn.center, plain.center)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn"])
def test_empty_batch_keeps_the_center(centering):
    loss_fn = DINOLoss(7, 4, 0.04, 0.04, 0, 1, centering=centering)
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
        (
            {"centering": "sinkhorn_knopp"},
            "centering must be one of centering, sinkhorn, got 'sink",
        ),
        (
            {"centering": "sinkhorn", "center_momentum": 0.5},
            "expected the default center_momentum, got 0.5; remove center_momentum",
        ),
    ],
)
def test_invalid_constructor_arguments(changes, match):
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


def test_invalid_inputs():
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


def distributed_step(folder: Path) -> None:
    """Run two steps on this rank's half of the batch and save the losses and the center."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    S, B, K = 4, 6, 9
    loss_fn = DINOLoss(K, S, 0.04, 0.04, 0, 1).double()
    mine = slice(rank * B // 2, (rank + 1) * B // 2)
    losses = []
    for step in range(2):
        student, teacher = draw(S, 2, B, K, torch.float64, seed=step)
        student, teacher = (x[:, mine].reshape(-1, K) for x in (student, teacher))
        losses.append(loss_fn(student, teacher, 0).item())
    balanced = DINOLoss(K, S, 0.04, 0.04, 0, 1, centering="sinkhorn").double()
    rows = student.requires_grad_()
    balanced_loss = balanced(rows, teacher, 0)
    balanced_loss.backward()
    results = {"losses": losses, "center": loss_fn.center.clone()}
    results["sinkhorn"] = (balanced_loss.detach(), rows.grad.reshape(S, B // 2, K) / 2)
    torch.save(results, folder / f"{rank}.pt")
    own_sum = torch.ones(K, dtype=torch.float64)
    loss_fn.update_center(own_sum, 1)
    assert torch.equal(own_sum, torch.ones_like(own_sum)), "update_center changed its argument"
    torch.distributed.destroy_process_group()


def test_two_ranks_share_one_center(tmp_path):
    run_two(distributed_step, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    S, B, K = 4, 6, 9
    paper = PaperLoss(K, [0.04], torch.float64)
    for step in range(2):
        student, teacher = draw(S, 2, B, K, torch.float64, seed=step)
        expected = paper(student, teacher, 0)
        mean = (first["losses"][step] + second["losses"][step]) / 2
        assert mean == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(first["center"], second["center"])
    torch.testing.assert_close(first["center"], paper.center)
    # Sinkhorn-Knopp balances the rows of both ranks. `student` and `teacher` are of the last step.
    expected, gradient = run(lambda student: sinkhorn_loss(student, teacher, 0.04)[0], student)
    losses, gradients = zip(first["sinkhorn"], second["sinkhorn"], strict=True)
    torch.testing.assert_close(sum(losses) / 2, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(gradients, dim=1), gradient, rtol=1e-10, atol=1e-14)
