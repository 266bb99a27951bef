"""Check that a baseline computes what the paper's step computes, before it is timed.

One fp32 step without stochastic depth, from equal weights and crops: the loss, every gradient, the
student, the center and the teacher must be within 1e-5 of the paper's step, relative to the norm of
each tensor. The weights are random: no bias is 0, and the teacher differs from the student, so that
the EMA changes it. The clip is small enough to take effect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastdino_kernels.norms import norm
from torch import Tensor

from fastdino.bench.baselines.paper_step import GlobalClipStep, PaperStep, plain_network
from fastdino.bench.baselines.training_step import (
    TOLERANCE,
    StepSetup,
    TrainingStep,
    synthetic_crops,
)
from fastdino.bench.worker_process import failure_reason
from fastdino.config import TrainConfig

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Result of a check.

    worst: quantity -> (largest relative error, name of the tensor).
    error: the exception that the baseline raised, or "".
    seconds: duration of the step, the first of the baseline.
    choices: values of the choices of the step, without the precision, which is fp32.
    """

    worst: dict[str, tuple[float, str]]
    error: str = ""
    seconds: float = 0.0
    loss_tolerance: float = TOLERANCE
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Return True if the baseline may be timed; a NaN error fails."""
        return not self.error and all(
            error <= (self.loss_tolerance if quantity == "loss" else TOLERANCE)
            for quantity, (error, _) in self.worst.items()
        )

    def __str__(self) -> str:
        if self.error:
            return f"failed: {self.error}"
        if not self.worst:
            return "the reference"
        quantity, (error, name) = max(self.worst.items(), key=lambda item: _order(item[1][0]))
        tensor = f"{quantity} {name}".strip()
        return f"{'passed' if self.passed else 'failed'}, {error:.1e} at most ({tensor})"


class CorrectnessCheck:
    """Compare training steps with the paper's step, which runs once per setup."""

    def __init__(self, config: TrainConfig, device: torch.device, dino_repo: Path | None = None):
        self._config, self._device, self._dino_repo = config, device, dino_repo
        self._setups: dict[bool, StepSetup] = {}
        self._references: dict[tuple[str, bool], tuple[dict[str, Tensors], float]] = {}

    def check(
        self, build: Callable[[StepSetup], TrainingStep], *, one_size: bool = False
    ) -> Verdict:
        """Run one step of a new baseline; exceptions become part of the verdict.

        one_size: use crops of one size only.
        """
        if build is PaperStep:
            return Verdict({}, seconds=self._reference(PaperStep.clip, one_size)[1])
        try:
            step, actual, seconds = self._run(build, one_size)
        except Exception as error:  # third-party code may raise anything
            return Verdict({}, failure_reason(error))
        expected, _ = self._reference(step.clip, one_size)
        worst = {name: _worst(actual[name], expected[name]) for name in expected}
        choices = {n: choice.value for n, choice in step.choices.items() if n != "precision"}
        return Verdict(worst, seconds=seconds, loss_tolerance=step.loss_tolerance, choices=choices)

    def _reference(self, clip: str, one_size: bool) -> tuple[dict[str, Tensors], float]:
        key = clip, one_size
        if key not in self._references:
            build = {"parameter": PaperStep, "global": GlobalClipStep}[clip]
            self._references[key] = self._run(build, one_size)[1:]
        return self._references[key]

    def _run(
        self, build: Callable[[StepSetup], TrainingStep], one_size: bool
    ) -> tuple[TrainingStep, dict[str, Tensors], float]:
        """Return a new training step, the results of running it, and its duration."""
        if one_size not in self._setups:
            config = check_config(self._config, one_size=one_size)
            setup = random_setup(config, self._device, self._dino_repo)
            self._setups[one_size] = dataclasses.replace(setup, timed=self._config)
        setup = self._setups[one_size]
        crops = synthetic_crops(setup.config, self._device)
        with exact_fp32():
            step = build(setup)
            start = time.perf_counter()
            results = run_step(step, crops)
            results["loss"][""].item()  # waits for the device
            return step, results, time.perf_counter() - start


def check_config(config: TrainConfig, *, one_size: bool) -> TrainConfig:
    """Return the settings of the check: fp32, no stochastic depth, at most 8 images, a small clip.

    AdamW moves a weight by +-lr even if its gradient is close to 0, where rounding decides the
    sign. With a clip this small such gradients are below its eps. lr and weight decay are large
    enough to reveal an error of the optimizer.
    """
    images = min(config.batch_size_per_gpu, 8)
    local_crops = config.local_crops_number
    return dataclasses.replace(
        config,
        use_fp16=False,
        amp_dtype="auto",
        drop_path_rate=0.0,
        batch_size_per_gpu=images,
        local_crops_number=min(local_crops, 1) if one_size else local_crops,
        local_crops_size=config.global_crops_size if one_size else config.local_crops_size,
        clip_grad=1e-4,
        lr=1e-4 * 256 / images,
        weight_decay=0.4,
    )


def random_setup(
    config: TrainConfig, device: torch.device, dino_repo: Path | None = None
) -> StepSetup:
    """Return a setup without zeros, whose teacher differs from the student."""
    with torch.device("meta"):
        like = plain_network(config).state_dict()
    student, teacher = (
        {name: _random_weight(f"{network} {name}", tensor.shape) for name, tensor in like.items()}
        for network in ("student", "teacher")
    )
    center = 0.1 * _normal("center", torch.Size([config.out_dim]))
    return StepSetup(config, device, student, teacher, center, dino_repo)


def _random_weight(name: str, shape: torch.Size) -> Tensor:
    if name.endswith("weight_g"):
        return torch.ones(shape)
    noise = 0.02 * _normal(name, shape)
    return 1 + noise if "norm" in name and name.endswith("weight") else noise


def _normal(name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def run_step(step: TrainingStep, crops: Sequence[Tensor]) -> dict[str, Tensors]:
    """Run one step; returns quantity -> name -> tensor, with the gradients before the clip."""
    gradients: Tensors = {}

    def keep(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradients[name] = parameter.grad.detach().clone()

    student = step.parameters(step.student)
    hooks = [
        parameter.register_post_accumulate_grad_hook(functools.partial(keep, name))
        for name, parameter in student.items()
        if parameter.requires_grad
    ]
    loss = step.step(crops).detach().float()
    for hook in hooks:
        hook.remove()
    return {
        "loss": {"": loss},
        "gradient": gradients,
        "center": {"": step.center.detach()},
        "student": {name: _without_key_bias(name, p.detach()) for name, p in student.items()},
        "teacher": {n: p.detach() for n, p in step.parameters(step.teacher).items()},
    }


def _without_key_bias(name: str, parameter: Tensor) -> Tensor:
    """Replace the keys' third of a qkv bias by 0, or by NaN where it is not finite.

    The softmax does not depend on it: its gradient is rounding noise, which AdamW amplifies.
    """
    if not name.endswith("qkv.bias"):
        return parameter
    query, key, value = parameter.chunk(3)
    return torch.cat([query, 0 * key, value])


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute products and convolutions in fp32 instead of TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def _worst(actual: Tensors, expected: Tensors) -> tuple[float, str]:
    """Return the largest ||actual - expected|| / ||expected||, infinite for a missing tensor."""
    if actual.keys() != expected.keys():
        return math.inf, min(actual.keys() ^ expected.keys())
    errors = {
        name: (norm(actual[name] - tensor) / norm(tensor)).item()
        for name, tensor in expected.items()
    }
    name = max(errors, key=lambda name: _order(errors[name]))
    return errors[name], name


def _order(error: float) -> float:
    return math.inf if math.isnan(error) else error
