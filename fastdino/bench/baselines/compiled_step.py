"""A compiled step in the style of DINOv3, as an expert would write it in PyTorch.

SDPA in one pass per crop size, compiled transformer blocks, bf16 autocast on a GPU, one einsum for
all pairs of the loss, a global clip, fused AdamW, a multi-tensor EMA, no values read back to the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdino.bench.baselines import paper_step
from fastdino.bench.baselines.losses import EINSUM_TOLERANCE, einsum_loss
from fastdino.bench.baselines.training_step import StepSetup
from fastdino.training.optimizers import parameter_groups

BACKEND = "inductor"


class DropPath(nn.Module):
    """Stochastic depth whose rate is a buffer, so that all blocks share one compiled graph."""

    keep: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = (self.keep + torch.rand((len(x), 1, 1), device=x.device)).floor()
        return x * (mask / self.keep).to(x.dtype)


class Attention(paper_step.Attention):
    """Attention by PyTorch's scaled_dot_product_attention."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def student_block(dim: int, heads: int, drop_path_rate: float) -> paper_step.Block:
    """Build a block with stochastic depth."""
    return paper_step.Block(dim, Attention(dim, heads), DropPath(drop_path_rate))


def teacher_block(dim: int, heads: int, drop_path_rate: float) -> paper_step.Block:
    """Build a block without stochastic depth."""
    return paper_step.Block(dim, Attention(dim, heads), nn.Identity())


class CompiledStep(paper_step.PaperStep):
    """Blocks compiled by torch.compile, multi-tensor PyTorch for the rest."""

    clip = "global"
    loss_tolerance = EINSUM_TOLERANCE

    def __init__(self, setup: StepSetup):
        super().__init__(setup)
        bf16 = self.config.use_fp16 and self.device.type == "cuda"
        self.precision = "bf16" if bf16 else "fp32"
        for network in (self.student, self.teacher):
            for block in network.get_submodule("backbone.blocks").children():
                block.compile(backend=BACKEND, dynamic=False)

    def build(self, setup: StepSetup) -> tuple[nn.Module, nn.Module, Any]:
        config, rate = setup.config, setup.config.drop_path_rate
        loss = paper_step.Loss(config, einsum_loss)
        student, teacher = (
            paper_step.Network(
                paper_step.Backbone(config, drop_path_rate=rate, make_block=block),
                config.out_dim,
                norm_last_layer=fixed,
            )
            for block, fixed in ((student_block, config.norm_last_layer), (teacher_block, True))
        )
        return student, teacher, loss

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.student), fused=True)

    def step(self, crops: Sequence[Tensor]) -> Tensor:
        with self.autocast():
            with torch.no_grad():
                teacher = self.teacher(crops[:2])
            loss: Tensor = self.loss(self.student(crops), teacher)
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.clip_grad:
            parameters = self.student.parameters()
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_grad, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            teachers: list[Tensor] = list(self.teacher.parameters())
            students: list[Tensor] = list(self.student.parameters())
            torch._foreach_mul_(teachers, self.config.momentum_teacher)
            torch._foreach_add_(teachers, students, alpha=1 - self.config.momentum_teacher)
        return loss.detach()
