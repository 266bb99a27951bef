"""Where the time of an image goes, on one thread: each stage of its crops by Pillow and by ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastdino.bench.arms import Task
from fastdino.bench.isolated import Isolated

if TYPE_CHECKING:
    from fastdino.bench.stage_clock import StageClock

STAGES = ("decode", "crop + resize", "hue", "other colour", "blur", "tensor + normalize")
# Milliseconds an image of Pillow and of a C function for the same crops, 2 x 224 + 8 x 96 of
# 500 x 375 pixels, which were measured beside each other once, on another machine.
RECORDED = {
    "decode": (1.8, 0.8),
    "crop + resize": (6.5, 1.4),
    "hue": (5.0, 1.3),
    "other colour": (2.2, 0.25),
    "blur": (3.3, 0.38),
    "tensor + normalize": (2.4, 0.24),
}


@dataclass
class StageTimes:
    """CPU milliseconds an image, medians of the rounds, by stage.

    whole: what crops_into takes for the crops, without clocks in between.
    """

    images: int
    rounds: int
    pillow: dict[str, float]
    fused: dict[str, float]
    whole: float

    def times(self, stage: str) -> float | None:
        """How many times faster than Pillow we are; None where no crop had that stage."""
        return self.pillow[stage] / self.fused[stage] if self.fused[stage] else None

    @staticmethod
    def recorded_times(stage: str) -> float:
        """How many times faster than Pillow the C function was."""
        pillow, c = RECORDED[stage]
        return pillow / c

    def of_c(self, stage: str) -> float | None:
        """Our time by what it would be with the C function's share of Pillow's time."""
        times = self.times(stage)
        return self.recorded_times(stage) / times if times else None

    def as_json(self) -> dict[str, Any]:
        """What was measured, and what it is compared with, by stage."""
        by_stage = {
            stage: {
                "pillow_ms": self.pillow[stage],
                "fused_ms": self.fused[stage],
                "times": self.times(stage),
                "recorded_times_c": self.recorded_times(stage),
                "of_c": self.of_c(stage),
            }
            for stage in STAGES
        }
        counts = {"images": self.images, "rounds": self.rounds, "fused_crops_ms": self.whole}
        return counts | {"by_stage": by_stage}


def time_stages(task: Task, rounds: int, limit: float) -> StageTimes:
    """The stages in a process of their own, on one processor; raises WorkerError."""
    isolated = Isolated(partial(_start_clock, task), processors=1)
    try:
        isolated.wait_until_made(limit)
        times: StageTimes = isolated.call(rounds, limit)
        return times
    finally:
        isolated.close()


def _start_clock(task: Task) -> StageClock:
    from fastdino.bench.stage_clock import StageClock  # needs Numba

    return StageClock(task)
