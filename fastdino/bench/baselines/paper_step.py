"""The paper's step in plain PyTorch: the reference of the correctness check and the main baseline.

Nothing is faster than in the authors' code: attention as two products and a softmax, one
log-softmax per pair of crops, one operation per parameter in clip and EMA, values read back to the
host. It uses none of fastdino's networks, losses or updates.

Source: Caron et al. 2021, Algorithm 1, section 3 and appendix; the authors' code for the order.
Legend: B images, N tokens, H heads, D width, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdino.bench.baselines.losses import paper_loss
from fastdino.bench.baselines.training_step import (
    CENTER_MOMENTUM,
    STUDENT_TEMP,
    StepSetup,
    TrainingStep,
    vit_sizes,
)
from fastdino.config import TrainConfig
from fastdino.errors import NonFiniteError
from fastdino.runtime import AUTOCAST_DTYPES, choose_precision
from fastdino.training.optimizers import parameter_groups


class DropPath(nn.Module):
    """Stochastic depth: drop a branch per sample and rescale the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.keep = 1 - rate

    def forward(self, x: Tensor) -> Tensor:
        if self.keep == 1:
            return x
        mask = self.keep + torch.rand((len(x), 1, 1), dtype=x.dtype, device=x.device)
        return x.div(self.keep) * mask.floor_()


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(D/H)) V, with the attention weights in memory."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map queries, keys and values [B, H, N, D/H] to the same shape."""
        scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        return scores.softmax(dim=-1) @ value

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(*qkv.unbind(0)).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Linear, GELU (erf), linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, attention: Attention, drop_path: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.drop_path = drop_path
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def plain_block(dim: int, heads: int, drop_path_rate: float) -> Block:
    """Build the block of the authors' code."""
    return Block(dim, Attention(dim, heads), DropPath(drop_path_rate))


class PatchEmbed(nn.Module):
    """[B, 3, height, width] -> [B, patches, D] by a convolution of stride `patch_size`."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Backbone(nn.Module):
    """Vision transformer: [B, 3, height, width] -> the normalized CLS token, [B, D]."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        drop_path_rate: float = 0.0,
        make_block: Callable[[int, int, float], Block] = plain_block,
    ):
        super().__init__()
        arch = vit_sizes(config)
        dim, depth = arch["embed_dim"], arch["depth"]
        self.patch_size = config.patch_size
        self.side = config.global_crops_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.side**2, dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(make_block(dim, arch["num_heads"], rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, grid: int) -> Tensor:
        """Return the position embedding [1, 1 + grid^2, D], resized as in the authors' code."""
        if grid == self.side:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        scale = ((grid + 0.1) / self.side,) * 2
        resized = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        x = x + self.positions(images.shape[-1] // self.patch_size)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class LastLayer(nn.Module):
    """x W^T with rows weight_g * weight_v / ||weight_v||, normalized in each pass."""

    def __init__(self, K: int, *, train_magnitude: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(K, 1), requires_grad=train_magnitude)
        self.weight_v = nn.Parameter(torch.empty(K, 256))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class Head(nn.Module):
    """Three linear layers with GELU, L2 normalization, weight-normed prototypes: [rows, K]."""

    def __init__(self, dim: int, K: int, *, norm_last_layer: bool):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        self.last_layer = LastLayer(K, train_magnitude=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """Backbone and head: one backbone pass per crop size, one head pass."""

    def __init__(self, backbone: Backbone, K: int, *, norm_last_layer: bool):
        super().__init__()
        self.backbone = backbone
        dim = backbone.norm.normalized_shape[0]
        self.head = Head(dim, K, norm_last_layer=norm_last_layer)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        sizes = groupby(crops, key=lambda crop: crop.shape[-1])
        return self.head(torch.cat([self.backbone(torch.cat(list(group))) for _, group in sizes]))


def plain_network(config: TrainConfig) -> Network:
    """Build the student of a config."""
    backbone = Backbone(config, drop_path_rate=config.drop_path_rate)
    return Network(backbone, config.out_dim, norm_last_layer=config.norm_last_layer)


class Loss(nn.Module):
    """The cross-entropy of all pairs of different crops, and its center.

    pairwise: paper_loss or einsum_loss.
    """

    center: Tensor

    def __init__(
        self,
        config: TrainConfig,
        pairwise: Callable[..., tuple[Tensor, Tensor]] = paper_loss,
    ):
        super().__init__()
        self.ncrops, self.teacher_temp, self.pairwise = config.ncrops, config.teacher_temp, pairwise
        self.register_buffer("center", torch.zeros(1, config.out_dim))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of [S * B, K] and [2 * B, K] logits, and update the center."""
        loss, teacher_sum = self.pairwise(
            student.unflatten(0, (self.ncrops, -1)),
            teacher.unflatten(0, (2, -1)),
            self.center,
            STUDENT_TEMP,
            self.teacher_temp,
        )
        mean = teacher_sum / len(teacher)
        self.center = self.center * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM)
        return loss


class PaperStep(TrainingStep):
    """The paper's step; subclasses replace parts of it."""

    def __init__(self, setup: StepSetup):
        self.config, self.device = setup.config, setup.device
        self.precision = choose_precision(self.config, self.device).value
        self.loss: Any
        self.student, self.teacher, self.loss = self.build(setup)
        for network, weights in ((self.student, setup.student), (self.teacher, setup.teacher)):
            parameters = self.parameters(network)
            assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name])
            network.to(self.device)
        self.teacher.requires_grad_(False)
        self.loss.center.copy_(setup.center.expand_as(self.loss.center))
        self.loss.to(self.device)
        self.optimizer = self.build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.batch_size_per_gpu / 256  # as in the paper
        self.optimizer.param_groups[0]["weight_decay"] = self.config.weight_decay

    def build(self, setup: StepSetup) -> tuple[nn.Module, nn.Module, Any]:
        """Build student, teacher and a loss with a buffer `center`; weights are copied later."""
        config = setup.config
        teacher = Network(Backbone(config), config.out_dim, norm_last_layer=True)
        return plain_network(config), teacher, Loss(config)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Build PyTorch's default AdamW, which is not fused."""
        return torch.optim.AdamW(parameter_groups(self.student))

    @property
    def center(self) -> Tensor:
        center: Tensor = self.loss.center
        return center.flatten()

    def step(self, crops: Sequence[Tensor]) -> Tensor:
        with self.autocast():
            loss = self.forward(crops)
        if not math.isfinite(loss.item()):
            raise NonFiniteError(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            self.clip_gradients(self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.update_teacher(self.config.momentum_teacher)
        return loss.detach()

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST_DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Return the loss and update the center."""
        teacher = self.teacher(list(crops[:2]))
        student = self.student(list(crops))
        loss: Tensor = self.loss(student, teacher)
        return loss

    def clip_gradients(self, max_norm: float) -> None:
        """Clip each gradient by its own norm, which is read back to the host."""
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm(2)
                norm.item()  # the authors' code keeps these numbers
                factor = max_norm / (norm + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)

    def update_teacher(self, momentum: float) -> None:
        """Update the teacher's EMA, one parameter at a time."""
        for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            t.mul_(momentum).add_((1 - momentum) * s.detach())


class GlobalClipStep(PaperStep):
    """The paper's step with a global clip: the reference of steps that clip globally."""

    clip = "global"

    def clip_gradients(self, max_norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), max_norm)
