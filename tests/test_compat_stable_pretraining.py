"""compat.stable_pretraining against the equations of stable-pretraining's losses.

Legend: S views of the student, T views of the teacher, B images, N patches, K prototypes.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fastdino_kernels import reference
from fastdino_kernels.compat.stable_pretraining import (
    DINOv1Loss,
    DINOv2Loss,
    cross_entropy_loss,
    iBOTPatchLoss,
    sinkhorn_knopp,
)
from torch import Tensor

from tests.logits import assert_same, draw, draw_probs, run
from tests.processes import run_two

TEMP = 0.07


def plain_rows(s: Tensor, t: Tensor, temp: float) -> Tensor:
    return -(t * torch.log_softmax(s / temp, dim=-1)).sum(dim=-1)


def plain_views(student: Tensor, probs: Tensor, temp: float) -> Tensor:
    """Average the cross-entropy over the pairs of different views and over the batch."""
    pairs = [
        plain_rows(s, t, temp).mean()
        for i, s in enumerate(student)
        for j, t in enumerate(probs)
        if i != j
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(("S", "T"), [(2, 2), (10, 2), (2, 1), (1, 3)])
def test_loss_of_views_follows_the_equation(S, T):
    student, probs = draw_probs(S, T)
    got = run(DINOv1Loss(0.2), student, probs)
    assert_same(got, run(plain_views, student, probs, 0.2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    student, probs = draw_probs(4, 2, B=3, K=50, dtype=dtype)
    loss, grad = run(DINOv1Loss(), student, probs)
    expected = run(plain_views, student.double(), probs.double(), 0.1)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-6)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected[1], rtol=step, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_center_over_several_steps(dtype):
    """The first update sets the center; an update counts at the next softmax."""
    ours, center = DINOv1Loss(center_momentum=0.7), None
    for step in range(4):
        _, teacher = draw(2, 2, dtype=dtype, seed=step)
        exact = teacher.double()
        assert ours.updated == (step == 0)
        probs = ours.softmax_center_teacher(teacher, TEMP)
        assert ours.updated
        assert probs.dtype == torch.promote_types(dtype, torch.float32)
        expected = torch.softmax((exact - (0 if center is None else center)) / TEMP, dim=-1)
        torch.testing.assert_close(probs.double(), expected, rtol=1e-4, atol=1e-6)
        ours.update_center(teacher)
        mean = exact.mean(dim=(0, 1))
        center = mean if center is None else 0.7 * center + 0.3 * mean
    ours.apply_center_update()
    assert ours.center.shape == (1, 7)
    torch.testing.assert_close(ours.center[0].double(), center, rtol=1e-5, atol=1e-6)
    assert not ours.state_dict()


def test_module_with_a_pending_update_can_be_saved_and_copied(tmp_path):
    ours = DINOv1Loss()
    ours.update_center(draw(2, 2)[1])
    torch.save(ours, tmp_path / "loss.pt")
    saved = torch.load(tmp_path / "loss.pt", weights_only=False)
    for copied in (saved, copy.deepcopy(ours)):
        copied.apply_center_update()
        torch.testing.assert_close(copied.center[0], draw(2, 2)[1].mean(dim=(0, 1)))
    assert not ours.updated


def test_softmax_without_the_pending_update():
    ours = DINOv1Loss()
    _, teacher = draw(2, 2)
    ours.update_center(teacher)
    probs = ours.softmax_center_teacher(teacher, TEMP, update_centers=False)
    torch.testing.assert_close(probs, torch.softmax(teacher / TEMP, dim=-1))
    assert ours.center is None
    moved = ours.softmax_center_teacher(teacher, TEMP)
    expected = torch.softmax((teacher - teacher.mean(dim=(0, 1))) / TEMP, dim=-1)
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("num_samples", [None, 6, torch.tensor(6)])
@pytest.mark.parametrize("n_iterations", [1, 3])
def test_sinkhorn_knopp_targets(num_samples, n_iterations):
    _, teacher = draw(1, 2)
    expected = reference.sinkhorn_knopp(teacher.flatten(0, 1), TEMP, n_iterations)
    for function, logits in (
        (sinkhorn_knopp, teacher),
        (DINOv1Loss().sinkhorn_knopp_teacher, teacher),
        (iBOTPatchLoss().sinkhorn_knopp_teacher, teacher.flatten(0, 1)),
    ):
        probs = function(logits, TEMP, num_samples, n_iterations)
        assert probs.shape == logits.shape
        torch.testing.assert_close(probs.view(-1, 7), expected, rtol=1e-10, atol=1e-13)
    large = sinkhorn_knopp(1e4 * teacher.float(), teacher_temp=TEMP, num_samples=6)
    assert large.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7)])
def test_cross_entropy_and_patch_loss(shape):
    s, t = (x.reshape(shape) for x in draw_probs(1, 1, B=6))
    assert_same(
        run(lambda s: cross_entropy_loss(t, s, 0.2), s), run(lambda s: plain_rows(s, t, 0.2), s)
    )
    got = run(iBOTPatchLoss(0.2), s, t)
    assert_same(got, run(lambda s: plain_rows(s, t, 0.2).mean(), s))


def test_weighted_sum_of_both_losses():
    ours = DINOv2Loss(0.5, 2.0, 0.2, 0.9, 0.3)
    student, probs = draw_probs(4, 2)
    patches, targets = (x[0] for x in draw_probs(1, 1, B=5, seed=1))
    both = run(lambda s: ours(s, probs, patches, targets), student)
    expected = run(
        lambda s: 0.5 * plain_views(s, probs, 0.2) + 2 * plain_rows(patches, targets, 0.3).mean(),
        student,
    )
    assert_same(both, expected)
    alone = 0.5 * plain_views(student, probs, 0.2)
    torch.testing.assert_close(ours(student, probs), alone)
    torch.testing.assert_close(ours(student, probs, patches), alone)
    assert ours.dino_loss.center_momentum == 0.9


def test_empty_batches_have_loss_zero_and_keep_the_center():
    student, probs = draw_probs(2, 2, B=0)
    loss, grad = run(DINOv2Loss(), student, probs, student[0], probs[0])
    assert (loss, grad.shape) == (0, (2, 0, 7))
    ours = DINOv1Loss()
    ours.update_center(draw(2, 2)[1])
    ours.apply_center_update()
    before = ours.center.clone()
    ours.update_center(probs)
    assert torch.equal(ours.softmax_center_teacher(probs, TEMP), probs)
    assert torch.equal(ours.center, before)
    assert sinkhorn_knopp(probs[0], TEMP).shape == (0, 7)


def test_first_batch_without_images_leaves_the_center_unset():
    ours = DINOv1Loss()
    ours.update_center(torch.ones(2, 0, 7))
    ours.apply_center_update()
    assert ours.center is None
    ours.update_center(torch.ones(2, 3, 7))
    ours.apply_center_update()
    torch.testing.assert_close(ours.center, torch.ones(1, 7))


def test_autocast_and_teacher_with_a_graph_change_nothing():
    student, probs = draw_probs(3, 2, dtype=torch.float32)
    expected = run(DINOv1Loss(), student, probs)
    probs.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(DINOv1Loss(), student, probs)
        patch = iBOTPatchLoss()(student[0], probs[0])
    assert all(map(torch.equal, got, expected))
    assert (probs.grad, patch.dtype) == (None, torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: DINOv1Loss(0.0), ValueError, "temperature_student must be > 0"),
        (lambda: DINOv1Loss(center_momentum=2), ValueError, r"center_momentum must be in \[0, 1\]"),
        (lambda: iBOTPatchLoss(-1.0), ValueError, "student_temp must be > 0"),
        (lambda: DINOv2Loss("1"), TypeError, "dino_loss_weight must be a float, got str"),
        (lambda: DINOv1Loss()(*draw_probs(1, 1)), ValueError, "leaves no pairs"),
        (lambda: DINOv1Loss().update_center(torch.ones(3, 7)), ValueError, r"\[T, B, K\], got sh"),
        (lambda: DINOv1Loss().update_center([1.0]), TypeError, "teacher_output must be a torch.Te"),
        (lambda: sinkhorn_knopp(torch.ones(7), 0.1), ValueError, r"got shape \(7,\)"),
        (lambda: sinkhorn_knopp(torch.ones(3, 0), 0.1), ValueError, "K >= 1"),
        (lambda: sinkhorn_knopp(torch.ones(3, 7), 0.0), ValueError, "temp must be > 0"),
        (lambda: iBOTPatchLoss()(torch.ones(3, 7), torch.ones(2, 7)), ValueError, "got"),
        (
            lambda: DINOv1Loss().softmax_center_teacher(torch.ones(3, 7), 0.0),
            ValueError,
            "teacher_temp must be > 0",
        ),
        (
            lambda: DINOv1Loss().softmax_center_teacher(torch.ones(3, 7).long(), 0.1),
            TypeError,
            "torch.int64",
        ),
    ],
)
def test_invalid_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_center_of_another_size_is_an_error():
    ours = DINOv1Loss()
    ours.update_center(torch.ones(2, 3, 7))
    with pytest.raises(ValueError, match="center's K = 7, got 6"):
        ours.softmax_center_teacher(torch.ones(3, 6), TEMP)


def distributed_steps() -> None:
    """Sinkhorn-Knopp and the center on two ranks with different numbers of rows."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    batches = [draw(1, 2, B=2 + 3 * n, seed=n)[1] for n in range(2)]
    ours = DINOv1Loss()
    for _ in range(2):
        ours.update_center(batches[rank])
        ours.apply_center_update()
    ours.update_center(batches[0][:, : 2 * (1 - rank)])  # the second rank has none
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    for loss in (ours, *copies):
        loss.apply_center_update()
        assert torch.equal(loss.center, ours.center)
    means = [batch.mean(dim=(0, 1)) for batch in batches]
    expected = 0.9 * (means[0] + means[1]) / 2 + 0.1 * means[0]
    torch.testing.assert_close(ours.center[0], expected)
    flat = [batch.flatten(0, 1) for batch in batches]
    whole = reference.sinkhorn_knopp(torch.cat(flat), TEMP, 3).split([len(x) for x in flat])
    torch.testing.assert_close(
        iBOTPatchLoss().sinkhorn_knopp_teacher(flat[rank], TEMP), whole[rank]
    )
    torch.distributed.destroy_process_group()


def test_two_ranks():
    run_two(distributed_steps)


def test_center_of_a_validation_in_inference_mode_can_be_updated():
    loss, logits = DINOv1Loss(), torch.randn(3, 4, 7)
    for batch, inference in zip(logits, (True, False, True), strict=True):
        with torch.inference_mode(inference):
            loss.update_center(batch[None])
            loss.apply_center_update()
    first, second, third = logits.mean(1)
    expected = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third
    torch.testing.assert_close(loss.center[0], expected)
