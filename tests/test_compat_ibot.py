"""compat.ibot against plain equations and, with IBOT=<checkout>, against main_ibot.py's iBOTLoss.

Legend: G global crops, S crops of the student, B images, N tokens, K prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from fastdino_kernels.compat import ibot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from tests.logits import draw
from tests.originals import load
from tests.processes import run_ranks

K, K2 = 7, 5
SETTINGS = {
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.06,
    "warmup_teacher_temp2": 0.05,
    "teacher_temp2": 0.07,
    "warmup_teacher_temp_epochs": 3,
    "nepochs": 6,
}
OPTIONS = {
    "student_temp": 0.2,
    "center_momentum": 0.7,
    "center_momentum2": 0.6,
    "lambda1": 0.5,
    "lambda2": 2.0,
}


class PlainLoss(nn.Module):
    """The equations of both terms, without a warm-up for patch tokens that starts later."""

    def __init__(self, dim, dim2, ngcrops, nlcrops, *temps, student_temp=0.1, center_momentum=0.9,
                 center_momentum2=0.9, lambda1=1.0, lambda2=1.0, mim_start_epoch=0):  # fmt: skip
        super().__init__()
        self.ngcrops, self.ncrops, self.tau = ngcrops, ngcrops + nlcrops, student_temp
        self.momenta, self.lambdas = (center_momentum, center_momentum2), (lambda1, lambda2)
        warm, last, warm2, last2, self.epochs, _ = temps
        self.temps, self.start = ((warm, last), (warm2, last2)), (0, mim_start_epoch)
        self.register_buffer("center", torch.zeros(1, dim))
        self.register_buffer("center2", torch.zeros(1, 1, dim2))

    def temp(self, which, epoch):
        warm, last = self.temps[which]
        done = (epoch - self.start[which]) / (self.epochs - 1)
        return warm + (last - warm) * min(max(done, 0), 1)

    def forward(self, student_output, teacher_output, student_local_cls, student_mask, epoch):
        cls, patch = student_output
        cls = cls if student_local_cls is None else torch.cat((cls, student_local_cls))
        crops = [logits.chunk(self.ngcrops) for logits in (patch, *teacher_output)]
        terms, patch_terms = [], []
        for q, (_, teacher, _) in enumerate(zip(*crops, strict=True)):
            target = ((teacher - self.center) / self.temp(0, epoch)).softmax(-1)
            for v, student in enumerate(cls.chunk(self.ncrops)):
                if v != q:
                    terms.append(-(target * (student / self.tau).log_softmax(-1)).sum(-1).mean())
        for student, _, teacher, mask in zip(*crops, student_mask, strict=True):
            target = ((teacher - self.center2) / self.temp(1, epoch)).softmax(-1)
            rows = -(target * (student / self.tau).log_softmax(-1)).sum(-1)
            mask = mask.flatten(1)
            patch_terms.append(((rows * mask).sum(1) / mask.sum(1).clamp(min=1)).mean())
        losses = [
            weight * torch.stack(parts).mean()
            for weight, parts in zip(self.lambdas, (terms, patch_terms), strict=True)
        ]
        self.update_center(*teacher_output)
        return {"cls": losses[0], "patch": losses[1], "loss": sum(losses)}

    def update_center(self, cls, patch):
        m, m2 = self.momenta
        self.center = m * self.center + (1 - m) * cls.mean(0)
        self.center2 = m2 * self.center2 + (1 - m2) * patch.mean((0, 1))


@pytest.fixture(params=["equations", "checkout"])
def original(request, one_process_group) -> type[nn.Module]:
    """The class iBOTLoss; iBOT's own needs a process group."""
    return PlainLoss if request.param == "equations" else load_ibot()


def load_ibot() -> type[nn.Module]:
    names = {"torch": torch, "nn": nn, "F": F, "np": np, "dist": torch.distributed}
    return load("IBOT", "main_ibot.py", "iBOTLoss", **names).iBOTLoss


class Batch(NamedTuple):
    """Logits of the student that need a gradient, and the rest of the loss's arguments."""

    cls: Tensor
    patch: Tensor
    local: Tensor | None
    teacher: tuple[Tensor, Tensor]
    masks: list[Tensor]

    def run(self, loss_fn, epoch: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the losses, and the gradients of the student's logits."""
        leaves = [None if x is None else x.clone().requires_grad_() for x in self[:3]]
        cls, patch, local = leaves
        losses = loss_fn((cls, patch), self.teacher, local, self.masks, epoch)
        losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}, [
            leaf.grad for leaf in leaves if leaf is not None
        ]


def draw_batch(G=2, local=3, B=3, dtype=torch.float32, seed=0) -> Batch:
    """Draw a batch in which the first image of each crop has no masked tokens."""
    student, teacher = (x.flatten(0, 1) for x in draw(G + local, G, B, K, dtype, seed=seed))
    patches = [x.reshape(G * B, 6, K2) for x in draw(6 * G, 6 * G, B, K2, dtype, seed=seed + 50)]
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(B, 2, 3, generator=generator) < 0.5 for _ in range(G)]
    for mask in masks:
        mask[:1] = False
    rest = student[G * B :] if local else None
    return Batch(student[: G * B], patches[0], rest, (teacher, patches[1]), masks)


def build(cls, G=2, local=3, dtype=torch.float32, **options) -> nn.Module:
    return cls(K, K2, G, local, *SETTINGS.values(), **options).to(dtype)


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, OPTIONS, OPTIONS | {"mim_start_epoch": 2}])
@pytest.mark.parametrize(("G", "local"), [(2, 3), (2, 0), (1, 2), (3, 1)])
def test_losses_gradients_and_centers_over_epochs(original, dtype, options, G, local):
    ours, theirs = (build(cls, G, local, dtype, **options) for cls in (ibot.iBOTLoss, original))
    for epoch in range(SETTINGS["nepochs"]):
        batch = draw_batch(G, local, dtype=dtype, seed=epoch)
        got, expected = (batch.run(loss, epoch) for loss in (ours, theirs))
        tolerance = {} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
        assert_close(got, expected, **tolerance)
        assert_close(ours.state_dict(), dict(theirs.state_dict()), **tolerance)


def test_schedules_attributes_and_state(original):
    options = OPTIONS | {"mim_start_epoch": 2}
    ours, theirs = (build(cls, **options) for cls in (ibot.iBOTLoss, original))
    batch = draw_batch()
    for loss, other in ((theirs, ours), (ours, theirs)):
        batch.run(loss, 0)
        other.load_state_dict(loss.state_dict())
        assert all(map(torch.equal, ours.buffers(), theirs.buffers()))
    assert "patch_out_dim=5, ngcrops=2, nlcrops=3" in repr(ours)
    # Both have the temperatures of 6 epochs; that of patch tokens starts to rise in the third one.
    assert ours.teacher_temp_schedule == pytest.approx((0.04, 0.05, 0.06, 0.06, 0.06, 0.06))
    assert ours.teacher_temp2_schedule == pytest.approx((0.05, 0.05, 0.05, 0.06, 0.07, 0.07))
    if original is not PlainLoss:
        public = {name for name in {*vars(theirs), *dir(theirs)} if not name.startswith("__")}
        assert public <= {*vars(ours), *dir(ours)}
        for name in ("teacher_temp_schedule", "teacher_temp2_schedule", "ncrops", *OPTIONS):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name))


def test_a_kept_graph_has_the_gradient_of_each_term(original):
    gradients = []
    for cls in (ibot.iBOTLoss, original):
        batch = draw_batch()
        patch, student = batch.patch.requires_grad_(), (batch.cls.requires_grad_(), batch.patch * 1)
        losses = build(cls)(student, batch.teacher, batch.local, batch.masks, 0)
        for name in ("patch", "cls", "loss"):
            losses[name].backward(retain_graph=name != "loss")
        gradients.append((batch.cls.grad, patch.grad))
    assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    ours, wide = build(ibot.iBOTLoss), build(PlainLoss, dtype=torch.float64)
    batch = draw_batch(dtype=dtype)
    for epoch in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=epoch == 1):
            losses, gradients = batch.run(ours, epoch)
        double = Batch(*(x.double() for x in batch[:3]), [t.double() for t in batch.teacher],
                       batch.masks)  # fmt: skip
        expected, expected_gradients = double.run(wide, epoch)
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert_close({name: loss.double() for name, loss in losses.items()}, expected)
        for got, want in zip(gradients, expected_gradients, strict=True):
            assert got.dtype == dtype
            assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
        assert_close(ours.center.double(), wide.center)
        assert_close(ours.center2.double(), wide.center2)


def test_compiles_as_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    ours, theirs = (build(cls) for cls in (ibot.iBOTLoss, PlainLoss))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    for B in (9, 4, 11):
        batch = draw_batch(B=B)
        assert_close(batch.run(compiled, 1), batch.run(theirs, 1))
        assert_close(ours.center2, theirs.center2)
    assert counter.frame_count == 1


def test_tokens_that_are_not_masked_are_not_read():
    batch = draw_batch()
    batch.patch[0] = torch.nan  # the first image has no masked tokens
    losses, gradients = batch.run(build(ibot.iBOTLoss), 0)
    assert losses["patch"].isfinite()
    assert gradients[1][0].abs().sum() == 0


def test_no_masked_tokens_and_no_images():
    batch = draw_batch()
    loss = build(ibot.iBOTLoss)
    empty = batch._replace(masks=[torch.zeros_like(mask) for mask in batch.masks])
    losses, gradients = empty.run(loss, 0)
    assert (losses["patch"], gradients[1].abs().sum()) == (0, 0)
    assert losses["loss"] == losses["cls"] > 0
    center = loss.center2.clone()
    assert center.abs().sum() > 0  # of all tokens, masked or not
    losses, _ = draw_batch(B=0).run(loss, 0)
    assert losses["loss"] == 0
    assert torch.equal(loss.center2, center)


def distributed_steps(checkout: bool) -> None:
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ours, theirs = (build(cls) for cls in (ibot.iBOTLoss, load_ibot() if checkout else PlainLoss))
    for epoch in range(3):
        # iBOT's centers differ between ranks with different numbers of images.
        parts = [draw_batch(B=3 if checkout else 2 + r, seed=epoch + r) for r in range(ranks)]
        got, expected = (parts[rank].run(loss, epoch) for loss in (ours, theirs))
        if not checkout:
            theirs.load_state_dict(ours.state_dict())
        assert_close(got, expected)
        assert_close(ours.state_dict(), dict(theirs.state_dict()))
    before = ours.center.clone()
    batch = parts[rank]._asdict() | {"teacher": [t.clone() for t in parts[rank].teacher]}
    none = [t[:0] for t in batch["teacher"]]
    ours.update_center(*(batch["teacher"] if rank else none))  # without the first rank's images
    means = [part.teacher[0].mean(0) for part in parts[1:]]
    assert_close(ours.center, 0.9 * before + 0.1 * torch.stack(means).mean(0))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("checkout", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks(ranks, checkout):
    if checkout:
        load_ibot()
    run_ranks(ranks, distributed_steps, checkout)


CLS, PATCH = torch.ones(6, K), torch.ones(6, 6, K2)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"epoch": 6}, ValueError, r"epoch must be in 0..5 \(nepochs - 1\), got 6"),
        ({"epoch": -1}, ValueError, "got -1"),
        ({"epoch": 0.5}, TypeError, "float"),
        ({"student_output": (CLS[:5], PATCH)}, ValueError,
         r"student_output\[0\] and student_local_cls must be \[15, 7\], got shape \(14, 7\)"),
        ({"student_local_cls": None}, ValueError, r"must be \[15, 7\], got shape \(6, 7\)"),
        ({"student_local_cls": [CLS]}, TypeError, "student_local_cls must be a torch.Tensor"),
        ({"student_output": (CLS, PATCH[:, 1:])}, ValueError,
         r"student_output\[1\] must be \[6, 6, 5\], got shape \(6, 5, 5\)"),
        ({"teacher_output": (CLS[:, 1:], PATCH)}, ValueError, r"teacher_output\[0\] must be"),
        ({"teacher_output": (CLS, PATCH.long())}, TypeError, r"teacher_output\[1\] must have one"),
        ({"student_mask": [torch.ones(3, 2, 3)]}, ValueError, r"hold 2 masks \[B, h, w\]"),
        ({"student_mask": [[True]] * 2}, TypeError, "student_mask must hold tensors, got list"),
    ],
)  # fmt: skip
def test_invalid_arguments(changes, error, match):
    loss = build(ibot.iBOTLoss)
    batch = draw_batch()
    arguments = {
        "student_output": (batch.cls, batch.patch),
        "teacher_output": batch.teacher,
        "student_local_cls": batch.local,
        "student_mask": batch.masks,
        "epoch": 0,
    }
    with pytest.raises(error, match=match):
        loss(**(arguments | changes))
    assert loss.center.abs().sum() == loss.center2.abs().sum() == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"nlcrops": -1}, "nlcrops must be >= 0, got -1"),
        ({"ngcrops": 0}, "ngcrops must be >= 1, got 0"),
        ({"patch_out_dim": 0}, "patch_out_dim must be >= 1, got 0"),
        ({"center_momentum2": 1.5}, r"center_momentum2 must be in \[0, 1\], got 1.5"),
        ({"warmup_teacher_temp2": 0.0}, "warmup_teacher_temp2 must be > 0 and finite, got 0.0"),
        ({"teacher_temp2": 0.0}, "teacher_temp must be > 0 and finite, got 0.0"),
        ({"mim_start_epoch": 4}, r"warmup_teacher_temp_epochs \(3\) must not exceed nepochs \(2\)"),
    ],
)
def test_invalid_constructor_arguments(changes, match):
    arguments = {"out_dim": K, "patch_out_dim": K2, "ngcrops": 2, "nlcrops": 0, **SETTINGS}
    with pytest.raises(ValueError, match=match):
        ibot.iBOTLoss(**(arguments | changes))
