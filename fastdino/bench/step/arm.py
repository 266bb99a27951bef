"""What every arm of the benchmark has in common: the setting it gets, and what it must show.

An arm is one implementation of the training step. All arms of a run get equal weights and crops.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastdino.config import TrainConfig
from fastdino.errors import ConfigError
from fastdino.models.backbones import build_networks
from fastdino.models.vit import VIT_ARCHS

STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9
TOLERANCE = 1e-5  # of the gate, relative
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What an arm is built from.

    config: the sizes and hyperparameters; the arms hold lr, weight decay and momentum at the values
        that its schedules begin with.
    student, teacher: weights under the paper's names (backbone.*, head.*); to be copied.
    center: [K].
    dino_repo: a checkout of the authors' code, for the arm that runs it.
    """

    config: TrainConfig
    device: torch.device
    student: Weights
    teacher: Weights
    center: Tensor
    dino_repo: Path | None = None

    @property
    def lr(self) -> float:
        """The learning rate, scaled by the batch as the paper does."""
        return self.config.lr * self.config.batch_size_per_gpu / 256


class Arm(abc.ABC):
    """One implementation of the step, with networks of its own.

    Attributes:
        clip: whether each parameter's gradient is clipped by its own norm, or all by that of all.
        loss_tolerance: how far its fp32 loss may be off, relative.
        student, teacher: its networks; the heads are modules called `head`.
        precision: of the forward pass: fp32, bf16 or fp16.
        warm_up: steps that it needs before its time is that of all later ones, beyond a few.
    """

    clip: ClassVar[str] = "parameter"
    loss_tolerance: ClassVar[float] = TOLERANCE
    student: nn.Module
    teacher: nn.Module
    precision: str
    warm_up: int = 0

    @abc.abstractmethod
    def __init__(self, setting: Setting): ...

    @abc.abstractmethod
    def step(self, crops: Sequence[Tensor]) -> Tensor:
        """One training step on 2 + N tensors [B, 3, H, W]; returns the loss, 0-d."""

    @property
    @abc.abstractmethod
    def center(self) -> Tensor:
        """[K]."""

    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of its student or teacher, under the paper's names."""
        return dict(network.named_parameters())


def initial_setting(
    config: TrainConfig, device: torch.device, dino_repo: Path | None = None
) -> Setting:
    """The setting at a run's beginning: the paper's initialisation, teacher = student."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        student = build_networks(config)[0].state_dict()
    return Setting(config, device, student, student, torch.zeros(config.out_dim), dino_repo)


def vit_sizes(config: TrainConfig) -> dict[str, int]:
    """embed_dim, depth, num_heads; raises ConfigError for an arch that no arm is made for."""
    name = config.arch.replace("deit_", "vit_", 1)
    if name not in VIT_ARCHS:
        raise ConfigError(f"--arch {config.arch}: the arms are made of {', '.join(VIT_ARCHS)}")
    return VIT_ARCHS[name]


def synthetic_crops(config: TrainConfig, device: torch.device) -> list[Tensor]:
    """Normal noise in the shapes of the config's crops: what normalised pixels are about."""
    generator = torch.Generator().manual_seed(config.seed)
    sizes = [config.global_crops_size] * 2 + [config.local_crops_size] * config.local_crops_number
    shapes = [(config.batch_size_per_gpu, 3, size, size) for size in sizes]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]
