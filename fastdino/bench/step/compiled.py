"""A compiled step in the style of DINOv3, by our own hand: what a good engineer writes in PyTorch.

SDPA in one pass a crop size, transformer blocks compiled, bf16 autocast on a GPU, all pairs of the
loss by one einsum, a global clip, fused AdamW, a multi-tensor EMA, nothing read back to the host.

Legend: S crops of the student, 2 of the teacher, B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdino.bench.step import paper
from fastdino.bench.step.arm import CENTER_MOMENTUM, STUDENT_TEMP, Setting
from fastdino.config import TrainConfig
from fastdino.training.optimizers import parameter_groups

BACKEND = "inductor"
# Its value is an fp32 sum of B*K products of one sign: on a CPU 1.5e-4 off at B*K = 2^19. The
# gradient does not pass through it.
EINSUM_TOLERANCE = 5e-4


class DropPath(nn.Module):
    """Stochastic depth whose rate is data, so that all blocks share one compiled graph."""

    keep: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = (self.keep + torch.rand((len(x), 1, 1), device=x.device)).floor()
        return x * (mask / self.keep).to(x.dtype)


class Attention(paper.Attention):
    """By PyTorch's scaled_dot_product_attention."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def student_block(dim: int, heads: int, drop_path_rate: float) -> paper.Block:
    """A block that drops samples."""
    return paper.Block(dim, Attention(dim, heads), DropPath(drop_path_rate))


def teacher_block(dim: int, heads: int, drop_path_rate: float) -> paper.Block:
    """A block that drops none."""
    return paper.Block(dim, Attention(dim, heads), nn.Identity())


class EinsumLoss(nn.Module):
    """All pairs at once, in fp32; moves the center."""

    center: Tensor

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.ncrops, self.teacher_temp = config.ncrops, config.teacher_temp
        self.register_buffer("center", torch.zeros(config.out_dim))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[S * B, K], [2 * B, K] -> 0-d."""
        student = student.float().unflatten(0, (self.ncrops, -1))
        teacher = teacher.float().unflatten(0, (2, -1))
        log_probs = F.log_softmax(student / STUDENT_TEMP, dim=-1)
        targets = F.softmax((teacher - self.center) / self.teacher_temp, dim=-1)
        entropies = -torch.einsum("tbk,sbk->ts", targets, log_probs)
        loss = entropies.fill_diagonal_(0).sum() / (2 * (self.ncrops - 1) * student.shape[1])
        self.center.lerp_(teacher.mean(dim=(0, 1)), 1 - CENTER_MOMENTUM)
        return loss


class CompiledArm(paper.PaperArm):
    """Blocks compiled by torch.compile, the rest multi-tensor PyTorch."""

    clip = "global"
    loss_tolerance = EINSUM_TOLERANCE

    def __init__(self, setting: Setting):
        super().__init__(setting)
        bf16 = self.config.use_fp16 and self.device.type == "cuda"
        self.precision = "bf16" if bf16 else "fp32"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        for network in (self.student, self.teacher):
            for block in network.get_submodule("backbone.blocks").children():
                block.compile(backend=BACKEND, dynamic=False)

    def build(self, setting: Setting) -> tuple[nn.Module, nn.Module, Any]:
        config, K = setting.config, setting.config.out_dim
        student = paper.Network(
            paper.Backbone(config, drop_path_rate=config.drop_path_rate, make_block=student_block),
            K,
            norm_last_layer=config.norm_last_layer,
        )
        backbone = paper.Backbone(config, make_block=teacher_block)
        teacher = paper.Network(backbone, K, norm_last_layer=True)
        return student, teacher, EinsumLoss(config)

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
