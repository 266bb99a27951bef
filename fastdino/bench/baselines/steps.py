"""The training steps by name, and the reasons why some cannot run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdino.bench.baselines.compiled_step import CompiledStep
from fastdino.bench.baselines.dino_repository import DinoRepositoryStep
from fastdino.bench.baselines.lightly_step import LightlyStep
from fastdino.bench.baselines.paper_step import PaperStep
from fastdino.bench.baselines.training_step import StepSetup, TrainingStep
from fastdino.config import TrainConfig
from fastdino.errors import ConfigError
from fastdino.models.compile import compile_problem
from fastdino.runtime import MEASURED, Runtime, resolve_runtime
from fastdino.training.cuda_graph import WARMUP_STEPS
from fastdino.training.trainer import Trainer

LIGHTLY_MISSING = 'lightly is not installed: pip install "lightly>=1.6,<1.7"'
ONLY_CPU = "it shows both precisions of a CPU; ours-fast is bf16 on a GPU"
# Long enough for the schedules to stay constant during a benchmark.
STEPS_PER_EPOCH = 10**6


class TrainerStep(TrainingStep):
    """The step of fastdino's Trainer; `changes` are settings of TrainConfig."""

    def __init__(self, setup: StepSetup, **changes: Any):
        config, runtime = _resolve(setup, changes)
        self.trainer = Trainer(config, STEPS_PER_EPOCH, runtime=runtime)
        state = self.trainer.state_dict()
        center = setup.center.reshape(state["dino_loss"]["center"].shape)
        state |= {"student": setup.student, "teacher": setup.teacher}
        self.trainer.load_state_dict(state | {"dino_loss": {"center": center}})
        self.student, self.teacher = self.trainer.student, self.trainer.teacher
        self.precision = runtime.precision.value
        self.choices = {name: runtime.choices()[name] for name in MEASURED}
        if runtime.cuda_graph.on:  # steps that measure the entropy have another graph
            self.warmup_steps = config.print_freq * WARMUP_STEPS + 1

    def step(self, crops: Sequence[Tensor]) -> Tensor:
        return self.trainer.train_step(crops)

    @property
    def center(self) -> Tensor:
        return self.trainer.loss.center.flatten()


def _resolve(setup: StepSetup, changes: dict[str, Any]) -> tuple[TrainConfig, Runtime]:
    """Return the settings and choices of a step.

    A check has the choices that are timed, except for the precision: they could differ in fp32 and
    for fewer images. An attention backend that does not support fp32 is not checked.
    """
    config = _changed(setup.config, changes)
    resolve = partial(resolve_runtime, device=setup.device, make_crops=False)
    if setup.timed is None:
        return config, resolve(config)
    timed = resolve(_changed(setup.timed, changes))
    choices = timed.choices()
    values: dict[str, Any] = {name: choices[name].value for name in MEASURED if name != "precision"}
    same = dataclasses.replace(config, **values)
    with contextlib.suppress(ConfigError):
        return same, resolve(same)
    other = dataclasses.replace(same, attention=config.attention)
    return other, resolve(other)


def _changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Return changed settings; those in fp32 stay without a dtype of mixed precision."""
    if not config.use_fp16:
        changes = changes | {"amp_dtype": "auto"}
    return dataclasses.replace(config, **changes)


@dataclass(frozen=True)
class StepBaseline:
    """A training step of the benchmark.

    problem: why it cannot run for (device, dino_repo), or None.
    one_size: why its check needs crops of one size; "" if it does not.
    """

    title: str
    build: Callable[[StepSetup], TrainingStep]
    problem: Callable[[torch.device, Path | None], str | None] = lambda _device, _repo: None
    one_size: str = ""


BASELINES = {
    "paper": StepBaseline("the paper's step, written plainly in PyTorch", PaperStep),
    "dino": StepBaseline(
        "the authors' own code, from --dino_repo",
        DinoRepositoryStep,
        lambda _, repo: None if repo else "no --dino_repo was given",
    ),
    "lightly": StepBaseline(
        "lightly's networks, loss and EMA; its global clip",
        LightlyStep,
        lambda *_: None if find_spec("lightly") else LIGHTLY_MISSING,
        one_size="it resizes the position embedding by another scale than the authors' code",
    ),
    "ours": StepBaseline("fastdino, --mode parity", partial(TrainerStep, mode="parity")),
    "ours-fast": StepBaseline("fastdino, --mode fast", partial(TrainerStep, mode="fast")),
    "ours-fp32": StepBaseline(
        "fastdino, --mode fast --use_fp16 false",
        partial(TrainerStep, mode="fast", use_fp16=False, amp_dtype="auto"),
        lambda device, _: ONLY_CPU if device.type == "cuda" else None,
    ),
    "ours-bf16": StepBaseline(
        "fastdino, --mode fast --amp_dtype bf16",
        partial(TrainerStep, mode="fast", amp_dtype="bf16"),
        lambda device, _: ONLY_CPU if device.type == "cuda" else None,
    ),
    "ours-graph": StepBaseline(
        "fastdino, --mode fast --cuda_graph true; checked on a step before the capture",
        partial(TrainerStep, mode="fast", cuda_graph=True),
        lambda device, _: None if device.type == "cuda" else "CUDA graphs need a GPU",
    ),
    "compiled": StepBaseline(
        "SDPA, compiled blocks, einsum loss, fused AdamW, multi-tensor EMA",
        CompiledStep,
        lambda device, _: compile_problem(device),
    ),
}
OURS = [name for name in BASELINES if name.startswith("ours")]
