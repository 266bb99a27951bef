"""Drop-ins of fastdino_kernels.compat on Triton, and the code of the guide.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from fastdino_kernels.compat import dinov2, ibot, lightly, solo_learn
from fastdino_kernels.compat.dinov2 import cross_entropy, dino_clstoken_loss, dino_cross_entropy
from fastdino_kernels.dispatch import triton_problem
from torch import Tensor

from tests.logits import draw, draw_probs, run

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "kernels/README.md"


def losses_and_gradients(device: str) -> list[tuple[Tensor, Tensor]]:
    """Run every drop-in on fp32 logits on the device, with FASTDINO_KERNELS' implementation."""
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
        *dinov2_losses(student, teacher),
        *ibot_losses(student, teacher),
    ]


def dinov2_losses(student: Tensor, teacher: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Run DINOv2's classes on crops [S, B, K] and [T, B, K], after a step of the centers."""
    device, prototypes = teacher.device, teacher.shape[-1]
    token, patch = (loss(prototypes).to(device) for loss in (dinov2.DINOLoss, dinov2.iBOTPatchLoss))
    token.update_center(teacher[0])
    patch.update_center(teacher)
    masks = torch.ones(teacher.shape[:2], dtype=torch.bool, device=device)
    targets = patch.softmax_center_teacher(teacher, 0.07)
    balanced = token.sinkhorn_knopp_teacher(teacher.flatten(0, 1), 0.07)
    return [
        run(lambda s: token(s, token.softmax_center_teacher(teacher, 0.07)), student),
        run(lambda s: patch(s, targets, masks), student[: len(teacher)]),
        run(lambda s: patch.forward_masked(s, balanced, masks), student.flatten(0, 1)[:6]),
    ]


def ibot_losses(student: Tensor, teacher: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Run iBOT's class on crops [4, B, K] and [2, B, K], each crop also as patch tokens [B, 1, K].

    The second result is after a step of the centers.
    """
    S, B, K = student.shape
    loss = ibot.iBOTLoss(K, K, 2, S - 2, 0.04, 0.04, 0.07, 0.07, 0, 1).to(teacher.device)
    cls, masks = teacher.flatten(0, 1), torch.ones(2, B, 1, 1, device=teacher.device).bool()
    masks[0, 0] = False

    def compute(crops: Tensor) -> Tensor:
        first, rest = crops.flatten(0, 1).split((2 * B, (S - 2) * B))
        return loss((first, first[:, None]), (cls, cls[:, None]), rest, masks, 0)["loss"]

    return [run(compute, student) for _ in range(2)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_drop_ins_give_the_same_on_triton(device, monkeypatch):
    problem = triton_problem(device)
    if problem is not None or (device == "cuda" and not torch.cuda.is_available()):
        pytest.skip(problem or "no GPU")
    results = {}
    for impl in ("torch", "triton"):
        monkeypatch.setenv("FASTDINO_KERNELS", impl)
        results[impl] = losses_and_gradients(device)
    assert not torch.equal(results["torch"][0][1], results["triton"][0][1])  # both ran
    for got, expected in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)


def guide_snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("snippet", guide_snippets())
def test_code_of_the_guide_runs(snippet):
    exec(snippet, {"__name__": "guide"})


def test_names_in_the_guide_exist():
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
