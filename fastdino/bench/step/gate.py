"""Before a time: whether an arm computes what the paper's step computes.

One step in fp32 without stochastic depth, from equal weights and crops: the loss, every gradient,
the student, the center and the teacher must lie within 1e-5 of the reference, relative to the norm
of each tensor. The weights are drawn: no bias is 0 and the teacher is another network, so that the
EMA moves it. The clip is small enough to act.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdino.bench.step.arm import TOLERANCE, Arm, Setting, synthetic_crops
from fastdino.bench.step.paper import GlobalClipArm, PaperArm, plain_network
from fastdino.config import TrainConfig

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """worst: quantity -> (relative error, name of the tensor); error: what the arm raised, or "".

    seconds: of the step, an arm's first.
    """

    worst: dict[str, tuple[float, str]]
    error: str = ""
    seconds: float = 0.0
    loss_tolerance: float = TOLERANCE

    @property
    def green(self) -> bool:
        """Whether the arm may be timed; an error that is NaN is not below the tolerance."""
        return not self.error and all(
            error <= (self.loss_tolerance if quantity == "loss" else TOLERANCE)
            for quantity, (error, _) in self.worst.items()
        )

    def __str__(self) -> str:
        if self.error:
            return f"red: {self.error}"
        if not self.worst:
            return "the reference"
        quantity, (error, name) = max(self.worst.items(), key=lambda item: _order(item[1][0]))
        where = f"{quantity} {name}".strip()
        return f"{'green' if self.green else 'red'}, {error:.1e} at most ({where})"


class Gate:
    """Checks arms against the paper's step; each reference's step is run once."""

    def __init__(self, config: TrainConfig, device: torch.device, dino_repo: Path | None = None):
        self._config, self._device, self._dino_repo = config, device, dino_repo
        self._settings: dict[bool, Setting] = {}
        self._references: dict[tuple[str, bool], tuple[dict[str, Tensors], float]] = {}

    def check(self, build: Callable[[Setting], Arm], *, one_size: bool = False) -> Verdict:
        """Runs one step of a new arm, on crops of one_size; what it raises is a verdict, too."""
        if build is PaperArm:
            return Verdict({}, seconds=self._reference(PaperArm.clip, one_size)[1])
        try:
            arm, found, seconds = self._run(build, one_size)
        except Exception as error:  # whatever the code of others raises: the other arms go on
            return Verdict({}, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        wanted, _ = self._reference(arm.clip, one_size)
        worst = {quantity: _worst(found[quantity], wanted[quantity]) for quantity in wanted}
        return Verdict(worst, seconds=seconds, loss_tolerance=arm.loss_tolerance)

    def _reference(self, clip: str, one_size: bool) -> tuple[dict[str, Tensors], float]:
        """What the step of the reference made, and its seconds."""
        key = clip, one_size
        if key not in self._references:
            build = {"parameter": PaperArm, "global": GlobalClipArm}[clip]
            self._references[key] = self._run(build, one_size)[1:]
        return self._references[key]

    def _run(
        self, build: Callable[[Setting], Arm], one_size: bool
    ) -> tuple[Arm, dict[str, Tensors], float]:
        """An arm, what its step made, and the seconds of the step."""
        if one_size not in self._settings:
            config = gate_config(self._config, one_size=one_size)
            self._settings[one_size] = drawn_setting(config, self._device, self._dino_repo)
        setting = self._settings[one_size]
        crops = synthetic_crops(setting.config, self._device)
        with exact_fp32():
            arm = build(setting)
            start = time.perf_counter()
            found = run_step(arm, crops)
            found["loss"][""].item()  # waits for the device
            return arm, found, time.perf_counter() - start


def gate_config(config: TrainConfig, *, one_size: bool) -> TrainConfig:
    """The gate's settings: fp32, no stochastic depth, at most 8 images, a clip that acts.

    AdamW makes a step of +-lr of a gradient next to 0, whose sign rounding may decide. Clipped so
    far, such gradients lie below its eps. lr and weight decay are such that a mistake in the
    optimizer shows beside the weights.
    """
    images = min(config.batch_size_per_gpu, 8)
    locals_ = config.local_crops_number
    return dataclasses.replace(
        config,
        use_fp16=False,
        amp_dtype="auto",
        drop_path_rate=0.0,
        batch_size_per_gpu=images,
        local_crops_number=min(locals_, 1) if one_size else locals_,
        local_crops_size=config.global_crops_size if one_size else config.local_crops_size,
        clip_grad=1e-4,
        lr=1e-4 * 256 / images,
        weight_decay=0.4,
    )


def drawn_setting(
    config: TrainConfig, device: torch.device, dino_repo: Path | None = None
) -> Setting:
    """A setting in which nothing is 0 and the teacher is another network: there, mistakes show."""
    with torch.device("meta"):
        like = plain_network(config).state_dict()
    student, teacher = (
        {name: _drawn(f"{who} {name}", tensor.shape) for name, tensor in like.items()}
        for who in ("student", "teacher")
    )
    center = 0.1 * _normal("center", torch.Size([config.out_dim]))
    return Setting(config, device, student, teacher, center, dino_repo)


def _drawn(name: str, shape: torch.Size) -> Tensor:
    if name.endswith("weight_g"):
        return torch.ones(shape)
    noise = 0.02 * _normal(name, shape)
    return 1 + noise if "norm" in name and name.endswith("weight") else noise


def _normal(name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def run_step(arm: Arm, crops: Sequence[Tensor]) -> dict[str, Tensors]:
    """One step: quantity -> name -> tensor. The gradients are those before the clip."""
    gradients: Tensors = {}

    def keep(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradients[name] = parameter.grad.detach().clone()

    student = arm.parameters(arm.student)
    hooks = [
        parameter.register_post_accumulate_grad_hook(functools.partial(keep, name))
        for name, parameter in student.items()
        if parameter.requires_grad
    ]
    loss = arm.step(crops).detach().float()
    for hook in hooks:
        hook.remove()
    return {
        "loss": {"": loss},
        "gradient": gradients,
        "center": {"": arm.center.detach()},
        "student": {name: without_keys_bias(name, p.detach()) for name, p in student.items()},
        "teacher": {n: p.detach() for n, p in arm.parameters(arm.teacher).items()},
    }


def without_keys_bias(name: str, parameter: Tensor) -> Tensor:
    """A qkv bias without the keys' third.

    No softmax sees that one: its gradient is rounding, of which AdamW makes a step.
    """
    if not name.endswith("qkv.bias"):
        return parameter
    query, _, value = parameter.chunk(3)
    return torch.cat([query, value])


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Products and convolutions in fp32, not in TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def _worst(found: Tensors, wanted: Tensors) -> tuple[float, str]:
    """The largest ||found - wanted|| / ||wanted|| and its name; infinite where one is missing."""
    if found.keys() != wanted.keys():
        return math.inf, min(found.keys() ^ wanted.keys())
    errors = {
        name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted
    }
    name = max(errors, key=lambda name: _order(errors[name]))
    return errors[name], name


def _order(error: float) -> float:
    return math.inf if math.isnan(error) else error
