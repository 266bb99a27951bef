"""compat.dinov2 against plain equations and, with DINOV2=<checkout>, against DINOv2's own classes.

Legend: S crops of the student, T crops of the teacher, B images, N tokens, K prototypes.
"""

from __future__ import annotations

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from fastdino_kernels import dino_loss, patch_loss, reference, sinkhorn_center
from fastdino_kernels.compat import dinov2
from torch import Tensor, nn
from torch.nn import functional as F

from tests.logits import draw, run
from tests.originals import load
from tests.processes import run_ranks

K = 7
TEMP = 0.07
# DINOv2's KoLeoLoss calls a deprecated function.
old_autocast = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")


class PlainLoss(nn.Module):
    """The centering of both losses, for one rank."""

    def __init__(self, shape, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.student_temp, self.center_momentum, self.pending = student_temp, center_momentum, None
        self.register_buffer("center", torch.zeros(shape))

    def softmax_center_teacher(self, teacher, teacher_temp):
        if self.pending is not None:
            m = self.center_momentum
            self.center = m * self.center + (1 - m) * self.pending
        self.pending = None
        return ((teacher - self.center) / teacher_temp).softmax(dim=-1)

    def update_center(self, teacher):
        self.pending = teacher.reshape(-1, teacher.shape[-1]).mean(dim=0)

    def sinkhorn_knopp_teacher(
        self, teacher, teacher_temp, n_masked_patches_tensor=None, n_iterations=3
    ):
        return reference.sinkhorn_knopp(teacher.float(), teacher_temp, n_iterations)

    def rows(self, student, probs):
        return -(probs * (student / self.student_temp).log_softmax(dim=-1)).sum(dim=-1)


class PlainDINOLoss(PlainLoss):
    def __init__(self, out_dim, *settings):
        super().__init__((1, out_dim), *settings)

    def forward(self, student_crops, teacher_crops):
        return sum(self.rows(s, t).mean() for s in student_crops for t in teacher_crops)


class PlainPatchLoss(PlainLoss):
    def __init__(self, out_dim, *settings):
        super().__init__((1, 1, out_dim), *settings)

    def forward(self, student, probs, masks):
        rows = self.rows(student, probs)
        means = [(rows[b] * masks[b]).sum() / max(masks[b].sum(), 1) for b in range(len(rows))]
        return torch.stack(means).mean()

    def forward_masked(
        self, student, probs, student_masks_flat, n_masked_patches=None, masks_weight=None
    ):
        rows = self.rows(student, probs)[:n_masked_patches]
        if masks_weight is None:
            counts = student_masks_flat.sum(dim=1).tolist()
            masks_weight = torch.tensor([1 / n for n in counts for _ in range(n)])
        return (rows * masks_weight).sum() / len(student_masks_flat)


class PlainKoLeoLoss(nn.Module):
    def forward(self, x, eps=1e-8):
        return reference.koleo_loss(x, x, 0, 1, eps)


PLAIN = SimpleNamespace(
    DINOLoss=PlainDINOLoss, iBOTPatchLoss=PlainPatchLoss, KoLeoLoss=PlainKoLeoLoss
)


def load_dinov2() -> SimpleNamespace:
    names = {"torch": torch, "nn": nn, "F": F, "dist": torch.distributed}
    folder = "dinov2/loss"
    token = load("DINOV2", f"{folder}/dino_clstoken_loss.py", "DINOLoss", **names)
    patch = ("iBOTPatchLoss", "lossfunc")
    patch = load("DINOV2", f"{folder}/ibot_patch_loss.py", *patch, logging=logging, **names)
    koleo = load("DINOV2", f"{folder}/koleo_loss.py", "KoLeoLoss", **names)
    return SimpleNamespace(**(vars(token) | vars(patch) | vars(koleo)))


@pytest.fixture(params=["equations", "checkout"])
def original(request) -> SimpleNamespace:
    """DINOLoss, iBOTPatchLoss and KoLeoLoss."""
    return PLAIN if request.param == "equations" else load_dinov2()


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}


def draw_masks(images=4, tokens=6, seed=0) -> Tensor:
    """Draw masks [B, N] of which the first has no tokens, as half of DINOv2's."""
    masks = torch.rand(images, tokens, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks[0] = False
    return masks


def masked(masks: Tensor, seed=0, dtype=torch.float32, padding=0) -> tuple[Tensor, Tensor]:
    """Draw logits [n, K] of the masked tokens for student and teacher."""
    student, teacher = draw(1, 1, int(masks.sum()) + padding, K, dtype, seed=seed)
    return student[0], teacher[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_token_loss_with_centering_over_steps(original, dtype):
    ours, theirs = (c.DINOLoss(K, 0.2, 0.7).to(dtype) for c in (dinov2, original))
    for step in range(4):
        student, teacher = draw(4, 2, 5, dtype=dtype, seed=step)
        results = []
        for loss in (ours, theirs):
            probs = loss.softmax_center_teacher(teacher.flatten(0, 1), teacher_temp=TEMP)
            loss.update_center(teacher.flatten(0, 1))
            probs = probs.view(teacher.shape)
            crops = run(lambda s, f=loss, p=probs: f(s.unbind(), p), student)
            pair = run(
                lambda s, f=loss, p=probs: f([s.flatten(0, 1)], [p.flatten(0, 1)]), student[:2]
            )
            results.append([probs, *crops, *pair, loss.center])
        assert_close(*results, **tolerance(dtype))
        assert (results[0][-1].abs().sum() > 0) == (step > 0)  # applied one step later


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("padding", [0, 3])
def test_patch_loss_with_centering_over_steps(original, dtype, given, padding):
    ours, theirs = (c.iBOTPatchLoss(K, 0.2, 0.7).to(dtype) for c in (dinov2, original))
    for step in range(4):
        masks = draw_masks(seed=step)
        n = int(masks.sum())
        student, teacher = masked(masks, step, dtype, padding)
        # As in DINOv2's collate: 1/(masked tokens of the image).
        weight = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
        options = {"masks_weight": weight * (1 + step)} if given else {}
        if padding:
            options["n_masked_patches"] = n
        results = []
        for loss in (ours, theirs):
            probs = loss.softmax_center_teacher(teacher[None], teacher_temp=TEMP).squeeze(0)
            loss.update_center(teacher[None, :n])
            got = run(loss.forward_masked, student, probs, masks, **options)
            results.append([probs, *got, loss.center])
        assert_close(*results, **(tolerance(dtype) if given else {}))
        if padding:
            assert results[0][2][n:].abs().sum() == 0


def test_sinkhorn_knopp_targets(original, one_process_group):
    ours, theirs = (c.DINOLoss(K) for c in (dinov2, original))
    _, teacher = draw(1, 1, 9, dtype=torch.float32)
    teacher = teacher[0]
    for n in (3, 1):
        assert_close(
            ours.sinkhorn_knopp_teacher(teacher, TEMP, n_iterations=n),
            theirs.sinkhorn_knopp_teacher(teacher, TEMP, n_iterations=n),
        )
    ours, theirs = (c.iBOTPatchLoss(K) for c in (dinov2, original))
    count = torch.tensor([9])
    assert_close(
        ours.sinkhorn_knopp_teacher(teacher, TEMP, n_masked_patches_tensor=count),
        theirs.sinkhorn_knopp_teacher(teacher, TEMP, n_masked_patches_tensor=count.clone()),
    )
    assert count == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patch_loss_of_all_tokens(original, dtype):
    ours, theirs = (c.iBOTPatchLoss(K, 0.2).to(dtype) for c in (dinov2, original))
    student, teacher = draw(4, 4, 6, dtype=dtype)
    for masks in (draw_masks(), draw_masks().float(), torch.zeros(4, 6, dtype=torch.bool)):
        results = [run(loss, student, teacher.softmax(-1), masks) for loss in (ours, theirs)]
        assert_close(*results, **tolerance(dtype))
        assert (results[0][0] > 0) == bool(masks.any())


@old_autocast
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_koleo_loss(original, dtype):
    x = draw(1, 1, 9, dtype=dtype)[0][0]
    results = [run(loss.KoLeoLoss(), x) for loss in (dinov2, original)]
    assert_close(*results, **tolerance(dtype))
    assert_close(*(run(loss.KoLeoLoss(), x[:0]) for loss in (dinov2,) * 2))
    assert dinov2.KoLeoLoss()(x[:0]) == 0


def test_koleo_neighbours_and_eps(original):
    x = F.normalize(draw(1, 1, 9, dtype=torch.float32)[0][0])
    distances = torch.cdist(x, x).fill_diagonal_(9)
    neighbours = dinov2.KoLeoLoss().pairwise_NNs_inner(x)
    assert torch.equal(neighbours, distances.argmin(dim=1))
    if original is PLAIN:
        assert_close(*(run(loss.KoLeoLoss(), x, eps=0.1) for loss in (dinov2, original)))
    else:
        assert torch.equal(original.KoLeoLoss().pairwise_NNs_inner(x), neighbours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_fp32(dtype, autocast):
    student, teacher = draw(3, 2, 4, dtype=dtype)
    token, patch = dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)
    wide = PlainDINOLoss(K).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        token.update_center(teacher[0])
        wide.update_center(teacher[0].double())
        probs = token.softmax_center_teacher(teacher, TEMP)
        expected = wide.softmax_center_teacher(teacher.double(), TEMP)
        assert_close(probs.double(), expected, atol=1e-5)
        assert_close(token.center.double(), wide.center)
        loss, grad = run(lambda s: token(s, probs), student)
        assert (loss.dtype, grad.dtype, token.center.dtype) == (torch.float32, dtype, torch.float32)
        expected = run(lambda s: wide(s, probs.double()), student.double())
        slack = torch.finfo(dtype).eps
        assert_close(loss.double(), expected[0])
        assert_close(grad.double(), expected[1], rtol=slack, atol=1e-5)
        masks = torch.ones(1, 4, dtype=torch.bool)
        loss, grad = run(lambda s: patch.forward_masked(s, probs[0], masks), student[0])
        expected = run(lambda s: wide.rows(s, probs[0].double()).mean(), student[0].double())
        assert_close(loss.double(), expected[0])
        assert_close(grad.double(), expected[1], rtol=slack, atol=1e-5)
        assert token.sinkhorn_knopp_teacher(teacher[0], TEMP).dtype == torch.float32
        assert dinov2.KoLeoLoss()(student[0]).dtype == torch.float32


@pytest.mark.parametrize("name", ["DINOLoss", "iBOTPatchLoss", "KoLeoLoss"])
def test_arguments_attributes_and_state(original, name):
    settings = (K, 0.2, 0.5) if name != "KoLeoLoss" else ()
    ours, theirs = (getattr(losses, name)(*settings) for losses in (dinov2, original))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    if name == "KoLeoLoss":
        return
    teacher = draw(2, 2, dtype=torch.float32)[1][: 1 if name == "DINOLoss" else 2]
    teacher = teacher[0] if name == "DINOLoss" else teacher
    for loss, other in ((theirs, ours), (ours, theirs)):
        loss.update_center(teacher)
        loss.softmax_center_teacher(teacher, TEMP)
        other.load_state_dict(loss.state_dict())
        assert torch.equal(other.center, loss.center)
    assert "student_temp=0.2, center_momentum=0.5" in repr(ours)
    if original is not PLAIN:
        assert {*vars(theirs)} <= {*vars(ours)}
        assert {*dir(theirs)} <= {*dir(ours)}
        ours.update_center(teacher)
        theirs.update_center(teacher)
        for attribute in ("updated", "student_temp", "center_momentum", "len_teacher_output",
                          "len_teacher_patch_tokens"):  # fmt: skip
            assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
    assert isinstance(pickle.loads(pickle.dumps(ours)), type(ours))


def test_center_moves_once_and_only_when_it_is_used():
    for loss, teacher in (
        (dinov2.DINOLoss(K), torch.ones(2, K)),
        (dinov2.iBOTPatchLoss(K), torch.ones(1, 2, K)),
    ):
        loss.update_center(teacher)
        assert not loss.updated
        assert loss.center.abs().sum() == 0
        center = loss.center
        for _ in range(2):
            loss.apply_center_update()
            assert loss.updated
            assert_close(loss.center, torch.full_like(center, 0.1))
        assert loss.center is center  # in place: a captured graph and a view stay valid


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_losses_from_logits_are_the_same(centering):
    student, teacher = draw(8, 2, dtype=torch.float32)
    masks = draw_masks()
    patches, targets = masked(masks)
    weights = torch.linspace(0.1, 1, len(patches))
    logits = teacher.flatten(0, 1)
    token, patch = dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)
    if centering == "centering":
        for step in range(2):  # the second step has a center
            probs = token.softmax_center_teacher(logits, TEMP)
            patch_probs = patch.softmax_center_teacher(targets[None], TEMP).squeeze(0)
            if step == 0:
                token.update_center(logits)
                patch.update_center(targets[None])
        centers = [token.center, patch.center.view(1, K)]
        assert min(center.abs().sum() for center in centers) > 0
    else:
        probs = token.sinkhorn_knopp_teacher(logits, TEMP)
        patch_probs = patch.sinkhorn_knopp_teacher(targets, TEMP)
        centers = [sinkhorn_center(x, TEMP) for x in (logits, targets)]
    temps = {"student_temp": 0.1, "teacher_temp": TEMP}
    expected = run(lambda s: token(s, probs.view_as(teacher)), student)
    got = run(
        lambda s: 16 * dino_loss(s, teacher, centers[0], **temps, ignore_diagonal=False)[0], student
    )
    assert_close(got, expected)
    expected = run(lambda s: patch.forward_masked(s, patch_probs, masks, None, weights), patches)
    options = {**temps, "weights": weights, "denominator": len(masks)}
    assert_close(run(lambda s: patch_loss(s, targets, centers[1], **options)[0], patches), expected)


def test_no_rows_have_loss_zero_and_keep_the_center():
    token, patch = dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)
    masks = torch.zeros(4, 6, dtype=torch.bool)
    for loss, teacher in ((token, torch.ones(0, K)), (patch, torch.ones(1, 0, K))):
        loss.center.fill_(3)
        loss.update_center(teacher)
        assert loss.softmax_center_teacher(teacher, TEMP).shape == teacher.shape
        assert torch.equal(loss.center, torch.full_like(loss.center, 3))
        assert loss.sinkhorn_knopp_teacher(torch.ones(0, K), TEMP).shape == (0, K)
    for weight in (None, torch.ones(0)):
        loss, grad = run(
            lambda s, w=weight: patch.forward_masked(s, s.detach(), masks, 0, w), torch.ones(3, K)
        )
        assert (loss, grad.abs().sum()) == (0, 0)
    assert patch.forward_masked(*torch.ones(2, 0, K), masks) == 0
    assert patch(*torch.ones(2, 0, 6, K), masks[:0]) == 0
    assert token(torch.ones(3, 0, K), torch.ones(2, 0, K)) == 0


def test_gradient_is_written_over_the_logits_only_on_request():
    masks = draw_masks()
    student, teacher = masked(masks)
    probs = teacher.softmax(-1)
    for inplace in (False, True):
        loss = dinov2.iBOTPatchLoss(K, inplace_backward=inplace)
        leaf = student.clone().requires_grad_()
        logits = leaf * 1
        loss.forward_masked(logits[: len(probs)], probs, masks).backward()
        expected = run(lambda s: PlainPatchLoss(K).forward_masked(s, probs, masks), student)[1]
        assert_close(leaf.grad, expected)
        assert torch.equal(logits.detach(), leaf.grad if inplace else student)


def test_compiles():
    masks = draw_masks()
    student, teacher = masked(masks)
    weights = torch.rand(len(student), generator=torch.Generator().manual_seed(1))
    pairs = [(dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)) for _ in range(2)]

    def step(index, student):
        token, patch = pairs[index]
        probs = token.softmax_center_teacher(teacher, TEMP)
        token.update_center(teacher)
        targets = patch.softmax_center_teacher(teacher[None], TEMP).squeeze(0)
        patch.update_center(teacher[None])
        masked_loss = patch.forward_masked(student, targets, masks, len(student), weights)
        balanced = patch.sinkhorn_knopp_teacher(teacher, TEMP, torch.tensor(len(teacher)))
        return token([student], [probs]) + masked_loss + token([student], [balanced])

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        assert_close(run(lambda s: compiled(0, s), student), run(lambda s: step(1, s), student))
    for ours, theirs in zip(*pairs, strict=True):
        assert_close(ours.center, theirs.center)
        assert ours.center.abs().sum() > 0


LOGITS, MASKS = torch.ones(3, K), torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda t, p: dinov2.DINOLoss(0), ValueError, "prototypes must be >= 1, got 0"),
        (lambda t, p: dinov2.DINOLoss(2.0), TypeError, "out_dim must be an int, got float"),
        (lambda t, p: dinov2.iBOTPatchLoss(K, 0.0), ValueError, "student_temp must be > 0 .*got 0"),
        (lambda t, p: dinov2.iBOTPatchLoss(K, 0.1, 2), ValueError, r"in \[0, 1\], got 2"),
        (lambda t, p: t([], [LOGITS]), ValueError, "student_output_list must hold at least one"),
        (lambda t, p: t([LOGITS], [LOGITS[:2]]), ValueError, r"same B and K.*\(1, 2, 7\)"),
        (lambda t, p: t.softmax_center_teacher(LOGITS, 0.0), ValueError, "temp must be > 0"),
        (lambda t, p: t.softmax_center_teacher(LOGITS[:, 1:], 1), ValueError,
         r"teacher_output must be \[.., K\] with K = 7, got shape \(3, 6\)"),
        (lambda t, p: t.update_center(LOGITS[None]), ValueError, r"\[B, K\] .*got shape \(1, 3, 7"),
        (lambda t, p: p.update_center(LOGITS[0]), ValueError, r"\[B, N, K\] .*got shape \(7,\)"),
        (lambda t, p: p.update_center(LOGITS.long()), TypeError, "teacher_patch_tokens must have"),
        (lambda t, p: t.update_center(LOGITS.to("meta")), ValueError, "device cpu, got meta"),
        (lambda t, p: p.sinkhorn_knopp_teacher(LOGITS[None], 1, None), ValueError, r"\[N, K\]"),
        (lambda t, p: p.sinkhorn_knopp_teacher(LOGITS, 1, None, 0), ValueError, "n_iterations"),
        (lambda t, p: p.forward_masked(LOGITS, LOGITS[:2], MASKS), ValueError, r"got \(3, 7\) and"),
        (lambda t, p: p.forward_masked(LOGITS, LOGITS, MASKS, 2), ValueError,
         r"one weight for each of 2 masked tokens, got shape \(3,\)"),
        (lambda t, p: p.forward_masked(LOGITS, LOGITS, MASKS, None, torch.ones(1)), ValueError,
         r"for each of 3 masked tokens, got shape \(1,\)"),
        (lambda t, p: p.forward_masked(LOGITS, LOGITS, MASKS.float()), ValueError,
         r"must be a bool tensor \[B, N\] .*got torch.float32 of shape \(1, 3\)"),
        (lambda t, p: p.forward_masked(LOGITS, LOGITS, [1]), TypeError, "masks_flat .* got list"),
        (lambda t, p: p.forward_masked(LOGITS, LOGITS, MASKS, None, [1.0]), TypeError, "got list"),
        (lambda t, p: p(LOGITS[None], LOGITS[None], MASKS[:, 1:]), ValueError,
         r"student_masks_flat \[B, N\], got \(1, 3, 7\) and \(1, 2\)"),
        (lambda t, p: dinov2.KoLeoLoss()(LOGITS, 0), ValueError, "eps must be > 0"),
        (lambda t, p: dinov2.KoLeoLoss()(LOGITS[0]), ValueError, r"x must be \[B, D\]"),
    ],
)  # fmt: skip
def test_invalid_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K))


def whole_batch(ranks: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """Draw (student, teacher) [n, K] of each rank, whose n differ."""
    return [masked(torch.ones(1, 3 + rank), 10 * step + rank) for rank in range(ranks)]


def distributed_steps(checkout: bool) -> None:
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ours = token, patch = dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)
    theirs = load_dinov2().iBOTPatchLoss(K) if checkout else None
    center = torch.zeros(K)
    for step in range(3):
        batch = whole_batch(ranks, step)
        student, teacher = batch[rank]
        probs = ((teacher - center) / TEMP).softmax(-1)
        for loss, logits in zip(ours, (teacher, teacher[None]), strict=True):
            assert_close(loss.softmax_center_teacher(logits, TEMP).view(probs.shape), probs)
            assert_close(loss.center.view(K), center)
            loss.update_center(logits)
        center = 0.9 * center + 0.1 * torch.stack([t.mean(0) for _, t in batch]).mean(0)
        targets = reference.sinkhorn_knopp(torch.cat([t for _, t in batch]), TEMP, 3)
        targets = targets.split([len(t) for _, t in batch])[rank]
        count = torch.tensor(len(teacher))
        got = patch.sinkhorn_knopp_teacher(teacher, TEMP, count)
        assert_close(got, targets, rtol=1e-4)
        assert torch.equal(token.sinkhorn_knopp_teacher(teacher, TEMP), got)
        if theirs is not None:
            assert_close(theirs.softmax_center_teacher(teacher[None], TEMP)[0], probs)
            theirs.update_center(teacher[None])
            assert_close(theirs.sinkhorn_knopp_teacher(teacher, TEMP, count), got, rtol=1e-4)
        loss = patch.forward_masked(student, got, torch.ones(1, len(got), dtype=torch.bool))
        assert_close(loss, PlainPatchLoss(K).rows(student, got).mean())  # of this rank alone
    # One rank has no rows: the others' mean, on every rank.
    for loss, logits in zip(ours, (teacher, teacher[None]), strict=True):
        loss.apply_center_update()
        loss.update_center(logits if rank else logits[..., :0, :])
        copies = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
        loss.apply_center_update()
        for other in copies:
            other.apply_center_update()
            assert torch.equal(other.center, loss.center)
        mean = torch.stack([t.mean(0) for _, t in batch[1:]]).mean(0)
        assert_close(loss.center.view(K), 0.9 * center + 0.1 * mean)
    torch.distributed.destroy_process_group()


def distributed_class_tokens() -> None:
    """Compare with DINOv2's DINOLoss, which needs the same number of rows on all ranks."""
    torch.distributed.init_process_group("gloo")
    ours, theirs = dinov2.DINOLoss(K), load_dinov2().DINOLoss(K)
    for step in range(3):
        _, teacher = draw(1, 1, 4, dtype=torch.float32, seed=step + torch.distributed.get_rank())
        results = []
        for loss in (ours, theirs):
            probs = loss.softmax_center_teacher(teacher[0], TEMP)
            loss.update_center(teacher[0])
            balanced = loss.sinkhorn_knopp_teacher(teacher[0], TEMP)
            results.append((probs, balanced, loss.center))
        assert_close(*results, rtol=1e-4)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_class_tokens(ranks):
    load_dinov2()
    run_ranks(ranks, distributed_class_tokens)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_different_numbers_of_rows(original, ranks):
    run_ranks(ranks, distributed_steps, original is not PLAIN)
