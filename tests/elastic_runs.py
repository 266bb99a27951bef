"""Runs that record the images and the loss of each step; as a script, a worker of torchrun."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastdino import Trainer, cli, distributed
from fastdino.data.sampler import EpochPlan
from tests.small_networks import shrink_networks

# Environment variables: the folder of the records, and a file with the seconds between steps.
RECORDS, PAUSE = "ELASTIC_RECORDS", "ELASTIC_PAUSE"


def record_steps(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Append a line per step to steps<rank>.jsonl, until the patch is undone."""
    folder.mkdir(parents=True, exist_ok=True)
    plan, step = EpochPlan.batches, Trainer.train_step
    planned: dict[int, list[int]] = {}

    def remember(self: EpochPlan, epoch: int, start_step: int) -> list[list[int]]:
        batches = plan(self, epoch, start_step)
        planned.update(enumerate(batches, epoch * self.steps + start_step))
        return batches

    def recorded(self: Trainer, crops: Sequence[Tensor]) -> Tensor:
        iteration = self.iteration
        loss = step(self, crops)
        line = {"iteration": iteration, "loss": loss.item(), "images": planned[iteration],
                "rank": distributed.rank(), "ranks": distributed.world_size(),
                "pid": os.getpid()}  # fmt: skip
        with open(folder / f"steps{distributed.rank()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if PAUSE in os.environ:
            time.sleep(float(Path(os.environ[PAUSE]).read_text() or 0))
        return loss

    patch.setattr(EpochPlan, "batches", remember)
    patch.setattr(Trainer, "train_step", recorded)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Return the recorded lines of all ranks."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("steps*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def last_attempts(lines: list[dict[str, Any]]) -> dict[int, tuple[list[int], float]]:
    """Map each iteration to its images in the order of the epoch, and its loss.

    If the iteration was repeated, they are those of the last attempt, which the weights contain.
    """
    by_step: dict[int, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_step.setdefault(line["iteration"], {})[line["rank"]] = line
    steps = {}
    for iteration, ranks in sorted(by_step.items()):
        last = [ranks[rank] for rank in range(ranks[0]["ranks"])]
        dealt = zip(*(line["images"] for line in last), strict=True)
        steps[iteration] = [image for group in dealt for image in group], last[0]["loss"]
    return steps


if __name__ == "__main__":
    shrink_networks(pytest.MonkeyPatch())
    record_steps(pytest.MonkeyPatch(), Path(os.environ[RECORDS]))
    sys.exit(cli.main())
