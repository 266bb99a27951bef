"""compat.solo_learn against DINOLoss.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels import DINOLoss
from fastdino_kernels.compat import solo_learn

from tests.logits import assert_same, draw, run
from tests.processes import run_two


def test_solo_learn_constructor_and_epoch():
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


def plain_loss(student, teacher, center, temp, crops=2):
    """Average the cross-entropy over the pairs of different crops; student temperature 0.1."""
    targets = torch.softmax((teacher - center) / temp, dim=-1).chunk(2)
    log_probs = torch.log_softmax(student / 0.1, dim=-1).chunk(crops)
    terms = [
        -(q * p).sum(dim=-1).mean()
        for i, q in enumerate(targets)
        for j, p in enumerate(log_probs)
        if i != j
    ]
    return sum(terms) / len(terms)


def test_solo_learn_follows_the_equations_for_several_steps():
    ours, center = solo_learn.DINOLoss(7, 0.02, 0.06, 3, 5).double(), torch.zeros(7).double()
    for epoch, temp in enumerate([0.02, 0.04, 0.06, 0.06, 0.06]):
        student, teacher = (x.reshape(-1, 7) for x in draw(2, 2, seed=epoch))
        ours.epoch = epoch
        got = run(ours, student, teacher)
        assert_same(got, run(plain_loss, student, teacher, center, temp))
        center = 0.9 * center + 0.1 * teacher.mean(dim=0)
        torch.testing.assert_close(ours.center[0], center, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("epoch", [-1, -2, -5])
def test_negative_epochs_count_from_the_last_one(epoch):
    ours = solo_learn.DINOLoss(7, 0.02, 0.06, 5, 5, center_momentum=1.0)
    student, teacher = (x.reshape(-1, 7) for x in draw(2, 2, dtype=torch.float32))
    ours.epoch = epoch
    assert ours(student, teacher) == ours(student, teacher, epoch=5 + epoch)
    with pytest.raises(ValueError, match="epoch must be in"):
        ours(student, teacher, epoch=-6)


@pytest.mark.parametrize("epoch", [0, torch.tensor(0), torch.tensor(3)])
def test_given_epoch_overrides_the_attribute(epoch):
    ours = solo_learn.DINOLoss(7, 0.02, 0.06, 3, 5, center_momentum=1.0)
    student, teacher = (x.reshape(-1, 7) for x in draw(2, 2, dtype=torch.float32))
    expected = {n: DINOLoss(7, 2, 0.02, 0.06, 3, 5)(student, teacher, n) for n in range(4)}
    ours.epoch = 1
    torch.testing.assert_close(ours(student, teacher, epoch), expected[int(epoch)])
    assert abs(expected[int(epoch)] - expected[1]) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_update_center_takes_the_logits(dtype):
    ours = solo_learn.DINOLoss(7, 0.04, 0.04, 0, 1, center_momentum=0.75)
    _, teacher = draw(2, 3, dtype=dtype)
    teacher = teacher.reshape(-1, 7)
    ours.update_center(teacher.requires_grad_())
    expected = 0.25 * teacher.detach().double().mean(dim=0, keepdim=True)
    torch.testing.assert_close(ours.center.double(), expected, rtol=1e-6, atol=1e-8)
    assert not ours.center.requires_grad


def test_forward_updates_the_center_from_the_sum_of_the_loss(monkeypatch):
    ours = solo_learn.DINOLoss(7, 0.04, 0.04, 0, 1)
    student, teacher = (x.reshape(-1, 7) for x in draw(2, 2, dtype=torch.float32))
    monkeypatch.setattr(ours, "update_center", None)  # a second read of the logits
    ours(student, teacher)
    torch.testing.assert_close(ours.center, 0.1 * teacher.mean(dim=0, keepdim=True))


@pytest.mark.parametrize(
    ("error", "logits", "match"),
    [
        (ValueError, torch.ones(4, 6), r"\[N, K\] with K = 7, got shape \(4, 6\)"),
        (ValueError, torch.ones(7), r"got shape \(7,\)"),
        (ValueError, torch.ones(2, 4, 7), r"got shape \(2, 4, 7\)"),
        (TypeError, torch.ones(4, 7, dtype=torch.int64), "torch.int64"),
        (TypeError, [1.0] * 7, "torch.Tensor, got list"),
    ],
)
def test_update_center_refuses_anything_but_logits(error, logits, match):
    ours = solo_learn.DINOLoss(7, 0.04, 0.04, 0, 1)
    with pytest.raises(error, match=match):
        ours.update_center(logits)
    ours.update_center(torch.ones(0, 7))
    assert ours.center.abs().sum() == 0


def distributed_updates() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    _, both = draw(2, 2, dtype=torch.float64)
    losses = [solo_learn.DINOLoss(7, 0.04, 0.04, 0, 1).double() for _ in range(2)]
    losses[0].update_center(both[rank])
    losses[1](both[rank, :2], both[rank, :2])
    expected = 0.1 * both.mean(dim=(0, 1))
    torch.testing.assert_close(losses[0].center[0], expected)
    torch.testing.assert_close(losses[1].center[0], 0.1 * both[:, :2].mean(dim=(0, 1)))
    torch.distributed.destroy_process_group()


def test_update_center_on_two_ranks():
    run_two(distributed_updates)
