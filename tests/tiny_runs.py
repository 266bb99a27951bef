"""Tiny pretraining runs that record what each step received, computed and changed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdino import TrainConfig, checkpoint
from fastdino.checkpoint import strip_prefix
from fastdino.models.head import DINOHead
from fastdino.models.vit import VIT_ARCHS
from fastdino.training import loop
from fastdino.training.trainer import Trainer

SMALL = {
    "arch": "vit_nano", "patch_size": 8, "out_dim": 64, "drop_path_rate": 0.0,
    "global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2,
    "batch_size_per_gpu": 4, "epochs": 2, "warmup_epochs": 1, "lr": 0.5, "freeze_last_layer": 0,
    "device": "cpu", "crops": "torchvision", "num_workers": 0, "print_freq": 1, "saveckp_freq": 0,
}  # fmt: skip


@dataclass
class Step:
    """A training step.

    Attributes:
        crops: what the trainer received.
        student, teacher: their tensors after the step.
        measured: the entropy was measured.
        saved: bytes that the autograd graph kept for the backward pass.
        first_rows, last_rows: tokens into the first and out of the last block of the student, per
            call.
        dtype: of the student's logits.
    """

    crops: list[Tensor]
    loss: float = 0.0
    student: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    measured: bool = False
    saved: int = 0
    first_rows: list[int] = field(default_factory=list)
    last_rows: list[int] = field(default_factory=list)
    dtype: torch.dtype | None = None


class RecordedTrainer(Trainer):
    """A Trainer that keeps a record of its steps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[Step] = []
        self.initial = copied(self.student)
        blocks = self.student.backbone.blocks
        blocks[0].register_forward_pre_hook(
            lambda _, args: self.steps[-1].first_rows.append(len(args[0]))
        )
        blocks[-1].register_forward_hook(
            lambda _, args, out: self.steps[-1].last_rows.append(len(out))
        )
        self.student.head.register_forward_hook(self._keep_dtype)

    def _keep_dtype(self, _: Any, args: Any, out: Tensor) -> None:
        self.steps[-1].dtype = out.dtype

    def train_step(self, crops: Any) -> Tensor:
        step = Step([crop.clone() for crop in crops])
        self.steps.append(step)

        def pack(tensor: Tensor) -> Tensor:
            step.saved += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().train_step(crops)
        step.loss, step.measured = loss.item(), self.entropy is not None
        step.student, step.teacher = copied(self.student), copied(self.teacher)
        return loss


def copied(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@dataclass
class TinyRun:
    """A finished run.

    Attributes:
        saves: iterations at which checkpoint.pth was written.
        stopped_for: those that the training waited for.
        error: what ended it, if an exception did.
    """

    config: TrainConfig
    trainer: RecordedTrainer | None
    saves: list[int]
    stopped_for: list[int]
    printed: str
    error: Exception | None

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def steps(self) -> list[Step]:
        assert self.error is None, self.error
        assert self.trainer is not None
        return self.trainer.steps

    @property
    def log(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "log.txt").read_text().splitlines()]

    @property
    def resolved(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())["resolved"]

    @property
    def optimizer(self) -> dict[str, Any]:
        return checkpoint.load(self.folder / "checkpoint.pth")["optimizer"]

    @property
    def weights(self) -> dict[str, Tensor]:
        state = checkpoint.load(self.folder / "checkpoint.pth")
        return strip_prefix(state["student"], "module.")

    def rate(self, name: str) -> list[float]:
        """Return lr or wd of each epoch's mean."""
        return [line[f"train_{name}"] for line in self.log]


def write_pictures(folder: Path, number: int = 9, seed: int = 0) -> Path:
    """Write pictures of smooth colors."""
    folder.mkdir(parents=True)
    for i in range(number):
        coarse = np.random.default_rng([seed, i]).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60, 48), Image.Resampling.BICUBIC).save(
            folder / f"{i}.jpg", quality=95
        )
    return folder


def train_tiny(
    patch: pytest.MonkeyPatch, data: Path, output: Path, settings: dict[str, Any],
    before_step: Callable[[RecordedTrainer, Any], Any] = lambda trainer, crops: crops,
) -> TinyRun:  # fmt: skip
    """Run train() with narrow networks.

    before_step: returns the crops that a step gets instead.
    """
    config = TrainConfig(
        **SMALL | {"data_path": str(data), "output_dir": str(output)} | settings  # type: ignore
    )
    for name, heads in (("vit_nano", 2), ("vit_tiny", 3)):
        shape = {"embed_dim": 16 * heads, "depth": 2, "num_heads": heads}
        patch.setitem(VIT_ARCHS, name, shape)
    narrow = {"hidden_dim": 32, "bottleneck_dim": 16}
    patch.setattr(DINOHead.__init__, "__kwdefaults__", narrow)
    made: list[RecordedTrainer] = []

    class ThisTrainer(RecordedTrainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

        def train_step(self, crops: Any) -> Tensor:
            return super().train_step(before_step(self, crops))

    saves: list[int] = []
    stopped_for: list[int] = []
    save = checkpoint.write

    def save_and_count(state: dict[str, Any], path: Path, **options: Any) -> None:
        saves.append(state["iteration"])
        if threading.current_thread() is threading.main_thread():
            stopped_for.append(state["iteration"])
        save(state, path, **options)

    patch.setattr(loop, "Trainer", ThisTrainer)
    patch.setattr(checkpoint, "write", save_and_count)
    error: Exception | None = None
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            loop.train(config)
        except Exception as raised:
            error = raised
    trainer = made[0] if made else None
    return TinyRun(config, trainer, saves, stopped_for, printed.getvalue(), error)
