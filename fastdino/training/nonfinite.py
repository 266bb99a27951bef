"""Keeps a loss or a gradient that is not finite out of a run's state, without waiting for it.

The device holds the verdict. From the first failure on every step changes nothing, so that whoever
reads it later, however late, finds the state as it was before that step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Failure:
    """The first step, counted from the last read, that was not finite, and what was wrong."""

    step: int
    problem: str


class FiniteGuard:
    """The verdict over the steps since the last read.

    Attributes:
        bad: fp32 [] on the device: not 0 once anything was not finite. Whoever changes the state
            leaves it alone then, and sets it where it finds a gradient that is not finite.
    """

    def __init__(self, device: torch.device):
        self.bad = torch.zeros((), device=device)
        self._good = torch.zeros((), device=device)
        self._loss = torch.zeros((), device=device)

    def watch_loss(self, loss: Tensor) -> None:
        """Takes in a step's loss []; the first that is not finite is remembered."""
        loss = loss.detach().to(self._loss.dtype)
        self._loss.copy_(torch.where(self.bad > 0, self._loss, loss))
        self.bad.copy_(torch.maximum(self.bad, (~loss.isfinite()).to(self.bad.dtype)))

    def watch_norms(self, norms: Tensor) -> None:
        """Takes in gradient norms [n]."""
        bad = (~norms.isfinite()).any().to(self.bad.dtype)
        self.bad.copy_(torch.maximum(self.bad, bad))

    def end_step(self) -> None:
        """Counts the step, if it was good."""
        self._good.add_(1 - self.bad.clamp(max=1))

    def read(self) -> Failure | None:
        """Waits for the device; None where all steps since the last read were finite.

        Counting starts anew, and after a failure all is good again.
        """
        bad, good, loss = torch.stack([self.bad, self._good, self._loss]).tolist()
        self._good.zero_()
        if not bad:
            return None
        self.bad.zero_()
        finite = math.isfinite(loss)
        return Failure(int(good), "a gradient is not finite" if finite else f"the loss is {loss}")
