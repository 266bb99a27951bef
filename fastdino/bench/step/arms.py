"""The arms of the benchmark by name, and why one cannot run here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdino.bench.step.arm import Arm, Setting
from fastdino.bench.step.compiled import CompiledArm
from fastdino.bench.step.paper import PaperArm
from fastdino.bench.step.peers import DinoRepoArm, LightlyArm, lightly_problem
from fastdino.errors import ConfigError
from fastdino.models.compile import compile_problem
from fastdino.training.cuda_graph import WARMUP_STEPS
from fastdino.training.trainer import Trainer

# Enough for the schedules to stand still during a benchmark.
STEPS_PER_EPOCH = 10**6


class TrainerArm(Arm):
    """fastdino's own step; `changes` are settings of TrainConfig."""

    def __init__(self, setting: Setting, **changes: Any):
        config = dataclasses.replace(setting.config, **changes)
        self.trainer = Trainer(config, STEPS_PER_EPOCH, device=setting.device)
        state = self.trainer.state_dict()
        center = setting.center.reshape(state["dino_loss"]["center"].shape)
        state |= {"student": setting.student, "teacher": setting.teacher}
        self.trainer.load_state_dict(state | {"dino_loss": {"center": center}})
        self.student, self.teacher = self.trainer.student, self.trainer.teacher
        self.precision = self.trainer.runtime.precision.value
        if self.trainer.runtime.cuda_graph.on:  # steps that measure the entropy have another graph
            self.warm_up = config.print_freq * WARMUP_STEPS + 1

    def step(self, crops: Sequence[Tensor]) -> Tensor:
        return self.trainer.train_step(crops)

    @property
    def center(self) -> Tensor:
        return self.trainer.loss.center.flatten()


@dataclass(frozen=True)
class Entry:
    """An arm: what it is, what builds it, and why it cannot run (device, dino_repo) or None.

    one_size: why it can be gated on crops of one size only; "" where it needs not.
    """

    title: str
    build: Callable[[Setting], Arm]
    problem: Callable[[torch.device, Path | None], str | None] = lambda _device, _repo: None
    one_size: str = ""


ARMS = {
    "paper": Entry("the paper's step, written plainly in PyTorch", PaperArm),
    "dino": Entry(
        "the authors' own code, from --dino_repo",
        DinoRepoArm,
        lambda _, repo: None if repo else "no --dino_repo was given",
    ),
    "lightly": Entry(
        "lightly's networks, loss and EMA; its global clip",
        LightlyArm,
        lambda *_: lightly_problem(),
        one_size="it resizes the position embedding by another scale than the authors' code",
    ),
    "ours": Entry("fastdino, --mode parity", partial(TrainerArm, mode="parity")),
    "ours-fast": Entry("fastdino, --mode fast", partial(TrainerArm, mode="fast")),
    "ours-graph": Entry(
        "fastdino, --mode fast --cuda_graph true; its gate is a step before the recording",
        partial(TrainerArm, mode="fast", cuda_graph=True),
        lambda device, _: None if device.type == "cuda" else "CUDA graphs are for GPUs",
    ),
    "compiled": Entry(
        "SDPA, compiled blocks, einsum loss, fused AdamW, multi-tensor EMA",
        CompiledArm,
        lambda device, _: compile_problem(device),
    ),
}
OURS = [name for name in ARMS if name.startswith("ours")]


def choose_arms(
    asked: Sequence[str] | None, device: torch.device, dino_repo: Path | None
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The arms to run, in order, and those left out with the reason.

    Args:
        asked: names; "ours" asks for all of ours that can run. None: all that can run.

    Raises: ConfigError: an arm was asked for by name and is not known, or cannot run here.
    """
    named = set(asked or ())
    if unknown := named - ARMS.keys():
        raise ConfigError(
            f"--arms {', '.join(sorted(unknown))}: expected some of {', '.join(ARMS)}"
        )
    wanted = named.union(OURS if "ours" in named else ()) or ARMS.keys()
    chosen, missing = {}, {}
    for name, entry in ARMS.items():
        if name not in wanted:
            continue
        problem = entry.problem(device, dino_repo)
        if problem is None:
            chosen[name] = entry
        elif name in named:
            raise ConfigError(f"--arms {name} cannot run: {problem}")
        else:
            missing[name] = problem
    return chosen, missing
