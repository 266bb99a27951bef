"""compat.dinov3 against the equations. DINOv3's code is not used: its license is restrictive.

Legend: S crops of the student, T crops of the teacher, B images, N and P tokens, D features, K
prototypes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from fastdino_kernels import dino_loss, reference, sinkhorn_center
from fastdino_kernels.compat import dinov2, dinov3
from torch import Tensor

from tests.logits import draw, draw_probs, run
from tests.processes import run_ranks

K = 7
TEMP = 0.07


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def plain_loss(student: Tensor, probs: Tensor, ignore_diagonal: bool) -> Tensor:
    """Sum over pairs and images, divided by B*S*T, or by B*(S*T - min(S, T))."""
    S, B, _ = student.shape
    total, pairs = 0, 0
    for v in range(S):
        for q in range(len(probs)):
            if v != q or not ignore_diagonal:
                total = total - (probs[q] * (student[v] / 0.1).log_softmax(-1)).sum()
                pairs += 1
    assert pairs == S * len(probs) - ignore_diagonal * min(S, len(probs))
    return total / (B * pairs)


@pytest.mark.parametrize("ignore_diagonal", [False, True])
@pytest.mark.parametrize(("S", "T"), [(2, 2), (8, 2), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_token_loss(S, T, ignore_diagonal, dtype):
    student, probs = draw_probs(S, T, dtype=dtype)
    loss = dinov3.DINOLoss(K)
    got = run(loss, student, probs, ignore_diagonal=ignore_diagonal)
    assert_close(got, run(plain_loss, student, probs, ignore_diagonal))
    if not ignore_diagonal:
        assert_close(run(loss, student, probs), got)


@pytest.mark.parametrize("name", ["DINOLoss", "iBOTPatchLoss"])
def test_centers_and_targets_are_those_of_dinov2(name):
    ours, same = (getattr(module, name)(K, 0.2, 0.7) for module in (dinov3, dinov2))
    assert (ours.student_temp, ours.center_momentum) == (0.2, 0.7)
    for step in range(3):
        teacher = draw(1, 1, seed=step, dtype=torch.float32)[1]
        logits = teacher[0] if name == "DINOLoss" else teacher
        assert torch.equal(
            ours.softmax_center_teacher(logits, TEMP), same.softmax_center_teacher(logits, TEMP)
        )
        assert torch.equal(ours.center, same.center)
        ours.update_center(logits)
        same.update_center(logits)
        before = ours.softmax_center_teacher(logits, TEMP, update_centers=False)
        assert torch.equal(ours.center, same.center)  # still pending
        assert_close(before, ((logits - ours.center) / TEMP).softmax(-1))
        assert torch.equal(
            ours.sinkhorn_knopp_teacher(teacher[0], TEMP),
            same.sinkhorn_knopp_teacher(teacher[0], TEMP, None)
            if name == "iBOTPatchLoss"
            else same.sinkhorn_knopp_teacher(teacher[0], TEMP),
        )
    same.load_state_dict(ours.state_dict())
    ours.init_weights()
    assert ours.center.abs().sum() == 0
    assert same.center.abs().sum() > 0


@pytest.mark.parametrize("name", ["DINOLoss", "iBOTPatchLoss"])
def test_center_of_a_module_from_the_meta_device(name):
    with torch.device("meta"):
        loss = getattr(dinov3, name)(K)
    loss.to_empty(device="cpu").center.fill_(torch.nan)
    loss.init_weights()
    assert torch.equal(loss.center, getattr(dinov3, name)(K).center)


def test_patch_loss_divides_by_all_images():
    masks = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    student, probs = (x[0] for x in draw_probs(1, 1, 4, dtype=torch.float32))
    weights = torch.full((4,), 0.5)
    rows = -(probs * (student / 0.1).log_softmax(-1)).sum(-1)
    for options in ({}, {"n_masked_patches": 4, "masks_weight": weights}):
        loss = dinov3.iBOTPatchLoss(K).forward_masked(
            student, probs, student_masks_flat=masks, **options
        )
        assert_close(loss, 0.5 * rows.sum() / 3)


@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_faster_call_from_logits_is_the_same(ignore_diagonal):
    student, teacher = draw(2, 2, dtype=torch.float32)
    loss = dinov3.DINOLoss(K)
    probs = loss.sinkhorn_knopp_teacher(teacher.flatten(0, 1), TEMP).view_as(teacher)
    expected = run(loss, student, probs, ignore_diagonal)
    center = sinkhorn_center(teacher.flatten(0, 1), TEMP)
    options = {"student_temp": 0.1, "teacher_temp": TEMP, "ignore_diagonal": ignore_diagonal}
    assert_close(run(lambda s: dino_loss(s, teacher, center, **options)[0], student), expected)


@pytest.mark.parametrize("img_level", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_loss(img_level, dtype):
    student, teacher = (x.to(dtype) for x in draw(2, 2, 5))
    plain = [x.float() if img_level else x.float().flatten(0, 1)[None] for x in (student, teacher)]
    expected = reference.gram_loss(*plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(dinov3.GramLoss(img_level=img_level)(student, teacher), expected)
        other = dinov3.GramLoss(img_level=not img_level)
        assert_close(other(student, teacher, img_level=img_level), expected)
        assert abs(other(student, teacher) - expected) > 1e-3
    loss, grad = run(dinov3.GramLoss(img_level=img_level), student, teacher)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)


def test_koleo_without_ranks():
    x = draw(1, 1, 9)[0][0]
    for topk in (1, 3):
        expected = run(lambda x, k=topk: reference.koleo_loss(x, x, 0, k), x)
        for size in (None, 9):
            assert_close(run(dinov3.KoLeoLossDistributed(topk, size), x), expected)
    assert_close(run(dinov3.KoLeoLoss(), x), run(dinov3.KoLeoLossDistributed(), x))


def koleo_on_ranks() -> None:
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    every = draw(1, 1, 3 * ranks)[0][0]
    own = every.split(3)[rank]
    for size in (None, 6, 3):
        span = ranks if size is None else size // 3
        if ranks % span:
            with pytest.raises(
                ValueError, match=f"divides the world size {ranks}, with 3 rows .*6"
            ):
                dinov3.KoLeoLossDistributed(1, size)(own)
            continue
        first = rank // span * span
        group = every[3 * first : 3 * (first + span)]
        loss_fn = dinov3.KoLeoLossDistributed(2, size)
        for _ in range(2):
            loss, grad = run(loss_fn, own)
            loss_fn = copy.deepcopy(loss_fn)
            assert_close(loss, reference.koleo_loss(own, group, 3 * (rank - first), 2))
            # The gradients of one rank's rows come from the losses of its group's ranks.
            _, total = run(lambda x, n=span: n * reference.koleo_loss(x, x, 0, 2), group)
            assert_close(grad, total.split(3)[rank - first])
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [3, 4])
def test_koleo_compares_the_rows_of_a_group_of_ranks(ranks):
    run_ranks(ranks, koleo_on_ranks)


def test_compiles():
    student, probs = draw_probs(2, 2, dtype=torch.float32)
    token, patch, gram = dinov3.DINOLoss(K), dinov3.iBOTPatchLoss(K), dinov3.GramLoss()
    koleo, masks = dinov3.KoLeoLossDistributed(), torch.ones(3, 1, dtype=torch.bool)

    def step(student):
        weights = torch.ones(3)
        patches = patch.forward_masked(student[0], probs[0], masks, 3, weights)
        return token(student, probs) + patches + gram(student, probs) + koleo(student[1])

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_close(run(compiled, student), run(step, student))


LOGITS = torch.ones(2, 3, K)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: dinov3.DINOLoss(K)(LOGITS[:1], LOGITS[:1], True), ValueError, "leaves no pairs"),
        (lambda: dinov3.DINOLoss(K)([LOGITS], LOGITS), TypeError, "student_logits .*got list"),
        (lambda: dinov3.DINOLoss(K).softmax_center_teacher(LOGITS[0, 0, 1:], 1), ValueError,
         "K = 7"),
        (lambda: dinov3.GramLoss(apply_norm=False), ValueError, "apply_norm must be True"),
        (lambda: dinov3.GramLoss(remove_neg=True), ValueError, "remove_neg must be False"),
        (lambda: dinov3.GramLoss(remove_only_teacher_neg=True), ValueError, "is not supported"),
        (lambda: dinov3.GramLoss()(LOGITS, LOGITS[:1]), ValueError, "the same leading sizes"),
        (lambda: dinov3.KoLeoLossDistributed(0), ValueError, "topk must be >= 1, got 0"),
        (lambda: dinov3.KoLeoLossDistributed(1, 0), ValueError, "loss_group_size must be >= 1"),
        (lambda: dinov3.KoLeoLossDistributed(1.0), TypeError, "topk must be an int, got float"),
        (lambda: dinov3.KoLeoLossDistributed(3)(LOGITS[0]), ValueError, r"topk must be in 1..2"),
        (lambda: dinov3.KoLeoLossDistributed(1, 4)(LOGITS[0]), ValueError,
         "divides the world size 1, with 3 rows on each rank, got 4"),
        (lambda: dinov3.KoLeoLossDistributed()([LOGITS]), TypeError, "student_output .*got list"),
    ],
)  # fmt: skip
def test_invalid_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()
