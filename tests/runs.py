"""Helpers for tests of whole runs: what they wrote, and faults during their steps."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino import TrainConfig, Trainer, checkpoint, distributed
from fastdino.data import build_loader, scan_images
from fastdino.training.loop import train
from tests.small_networks import shrink_networks

STEPS = 4  # per epoch of the fixture `pictures`, with 4 images per step


def train_small(settings: dict[str, Any]) -> None:
    """Call train() with small networks, in a process that the test started."""
    shrink_networks(pytest.MonkeyPatch())
    train(TrainConfig.from_dict(settings))


def train_by_hand(
    config: TrainConfig, left_out: Container[int]
) -> tuple[dict[str, Any], list[float]]:
    """Train in a plain loop without some batches; return the state and each epoch's mean loss."""
    rank, world_size = distributed.rank(), distributed.world_size()
    loader = build_loader(
        config, scan_images(config.data_path), crops="torchvision", decode="pillow", rank=rank,
        world_size=world_size,
    )  # fmt: skip
    trainer = Trainer(config, loader.steps_per_epoch)
    torch.manual_seed(config.seed + rank)
    means = []
    for epoch in range(config.epochs):
        losses = []
        for crops in loader.epoch(epoch):
            if trainer.iteration in left_out:
                state = trainer.state_dict()
                trainer.load_state_dict(state | {"iteration": state["iteration"] + 1})
            else:
                losses.append(trainer.train_step(crops).item())
        means.append(sum(losses) / len(losses))
    loader.close()
    return trainer.state_dict(), means


def weights_of(run: Path) -> dict[str, Any]:
    """Load checkpoint.pth."""
    return checkpoint.load(run / "checkpoint.pth")


def losses_of(run: Path) -> list[float]:
    """Return the mean loss of each epoch in log.txt."""
    return [line["train_loss"] for line in log_of(run)]


def log_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of log.txt without the speed."""
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def differences(actual: Any, expected: Any, name: str = "") -> list[str]:
    """Return the names of values that are not equal to the bit, in nested dicts and lists."""
    if isinstance(expected, Tensor):
        same = actual.dtype == expected.dtype and torch.equal(actual, expected)
        return [] if same else [name]
    if isinstance(expected, dict):
        if list(actual) != list(expected):
            return [f"{name}: {list(actual)}"]
        pairs = ((f"{name}.{key}", actual[key], value) for key, value in expected.items())
        return [path for key, ours, value in pairs for path in differences(ours, value, key)]
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        return differences(dict(enumerate(actual)), dict(enumerate(expected)), name)
    return [] if actual == expected else [name]


def assert_same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare two checkpoints bit for bit: networks, center, moments and random generators."""
    for key in ("student", "teacher", "dino_loss", "optimizer", "generators"):
        torch.testing.assert_close(
            _comparable(ours[key]), _comparable(theirs[key]), rtol=0, atol=0, msg=_naming(key)
        )
    for key in ("epoch", "iteration", "steps_per_epoch"):
        assert ours[key] == theirs[key], key
    assert ours.get("fp16_scaler") == theirs.get("fp16_scaler")


def _comparable(value: Any) -> Any:
    """Return the tensors and numbers of nested dicts and lists; the rest is not of the state."""
    if isinstance(value, dict):
        return {k: _comparable(v) for k, v in value.items() if isinstance(v, (dict, list, Tensor))}
    if isinstance(value, list):
        return [_comparable(v) for v in value]
    return value


def _naming(key: str) -> Callable[[str], str]:
    return lambda message: f"{key}: {message}"


def assert_same_run(run: Path, other: Path) -> None:
    """Compare the checkpoints and the logged losses of two runs bit for bit."""
    assert_same_state(weights_of(run), weights_of(other))
    assert losses_of(run) == losses_of(other)


def before_step(
    patch: pytest.MonkeyPatch, iteration: int, action: Callable[[], object], *, visit: int = 1
) -> None:
    """Call `action` before the step with this iteration, on its first or a later visit."""
    step, visits = Trainer.train_step, [0]

    def acting(self: Trainer, crops: list[Tensor]) -> Tensor:
        visits[0] += self.iteration == iteration
        if self.iteration == iteration and visits[0] == visit:
            action()
        return step(self, crops)

    patch.setattr(Trainer, "train_step", acting)


def record_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the iteration of each step."""
    step, iterations = Trainer.train_step, []

    def recorded(self: Trainer, crops: list[Tensor]) -> Tensor:
        iterations.append(self.iteration)
        return step(self, crops)

    patch.setattr(Trainer, "train_step", recorded)
    return iterations


def interrupt(
    patch: pytest.MonkeyPatch,
    iteration: int,
    number: int = signal.SIGTERM,
    *,
    times: int = 1,
    visit: int = 1,
) -> None:
    """Send a signal to this process during the step of an iteration."""

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    before_step(patch, iteration, send, visit=visit)


class Once(set[int]):
    """Iterations that are found on their first visit only."""

    def __contains__(self, iteration: object) -> bool:
        found = super().__contains__(iteration)
        self.discard(iteration)  # type: ignore[arg-type]
        return found


def fail(patch: pytest.MonkeyPatch, iterations: Container[int], kind: str) -> None:
    """Make steps non-finite: NaN `crops`, or `weights` that the step makes infinite."""
    step = Trainer.train_step

    def failing(self: Trainer, crops: list[Tensor]) -> Tensor:
        if self.iteration not in iterations:
            return step(self, crops)
        if kind == "crops":
            return step(self, [crop * math.nan for crop in crops])
        loss = step(self, crops)
        next(self.student.parameters()).data.fill_(math.inf)
        return loss

    patch.setattr(Trainer, "train_step", failing)
