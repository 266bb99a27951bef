"""The interface of a training step in the benchmark, and what each one is built from."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastdino.config import TrainConfig
from fastdino.errors import ConfigError
from fastdino.models.backbones import build_networks
from fastdino.models.vit import VIT_ARCHS
from fastdino.runtime import Choice

STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9
TOLERANCE = 1e-5  # relative error allowed by correctness.py
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class StepSetup:
    """Inputs of a training step; equal for all baselines.

    config: sizes and hyperparameters. Baselines keep lr, weight decay and momentum constant at the
        first values of the schedules.
    student, teacher: weights under the paper's names (backbone.*, head.*), to be copied.
    center: [K].
    dino_repo: checkout of the authors' code, for the baseline that runs it.
    timed: in a correctness check, the settings of the timed run.
    """

    config: TrainConfig
    device: torch.device
    student: Weights
    teacher: Weights
    center: Tensor
    dino_repo: Path | None = None
    timed: TrainConfig | None = None


class TrainingStep(abc.ABC):
    """One implementation of the training step, with its own networks.

    Attributes:
        clip: "parameter" clips each gradient by its own norm, "global" all by their joint norm.
        loss_tolerance: relative error allowed for the fp32 loss.
        student, teacher: networks; their heads are modules named `head`.
        precision: of the forward pass: fp32, bf16 or fp16.
        warmup_steps: steps needed before timing, in addition to the usual few.
        choices: by name, what was measured on this machine or would be with other settings.
    """

    clip: ClassVar[str] = "parameter"
    loss_tolerance: ClassVar[float] = TOLERANCE
    student: nn.Module
    teacher: nn.Module
    precision: str
    warmup_steps: int = 0
    choices: Mapping[str, Choice] = MappingProxyType({})

    @abc.abstractmethod
    def __init__(self, setup: StepSetup): ...

    @abc.abstractmethod
    def step(self, crops: Sequence[Tensor]) -> Tensor:
        """Train on 2 + N crops [B, 3, H, W] and return the loss, a scalar."""

    @property
    @abc.abstractmethod
    def center(self) -> Tensor:
        """Return the center, [K]."""

    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of the student or the teacher under the paper's names."""
        return dict(network.named_parameters())


def initial_setup(
    config: TrainConfig, device: torch.device, dino_repo: Path | None = None
) -> StepSetup:
    """Return the setup at the start of a run: the paper's initialization, teacher = student."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        student = build_networks(config)[0].state_dict()
    return StepSetup(config, device, student, student, torch.zeros(config.out_dim), dino_repo)


def vit_sizes(config: TrainConfig) -> dict[str, int]:
    """Return embed_dim, depth and num_heads; raises ConfigError for an unsupported --arch."""
    name = config.arch.replace("deit_", "vit_", 1)
    if name not in VIT_ARCHS:
        raise ConfigError(f"--arch {config.arch}: expected one of {', '.join(VIT_ARCHS)}")
    return VIT_ARCHS[name]


def synthetic_crops(config: TrainConfig, device: torch.device) -> list[Tensor]:
    """Return normal noise in the shapes of the crops, similar to normalized pixels."""
    generator = torch.Generator().manual_seed(config.seed)
    sizes = [config.global_crops_size] * 2 + [config.local_crops_size] * config.local_crops_number
    shapes = [(config.batch_size_per_gpu, 3, size, size) for size in sizes]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]
