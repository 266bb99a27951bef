"""From gradients to the next student and teacher: clip, optimizer, EMA.

Two ways of the same maths: one operation after the other, as the paper's code does, and one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from fastdino_kernels import clip_grad_norms_, ema_update_
from torch import nn

from fastdino.guard import FiniteGuard
from fastdino.models.head import MultiCropWrapper


class Update(Protocol):
    """Applies the gradients in .grad; `frozen`: those of the head's last layer are left out."""

    defers: bool
    """A step that is not finite is kept out on the device: nothing waits for the verdict."""

    def set_schedules(self, lr: float, weight_decay: float, momentum: float) -> None:
        """The values of the next step."""
        ...

    def __call__(self, *, frozen: bool) -> None: ...


class SeparateUpdate:
    """Clips each gradient by its norm, then the optimizer, then the EMA; waits for the norms.

    Args:
        max_norm: the largest norm of a gradient; 0: no clipping.
        verify: raises where the guard has seen what is not finite.
    """

    defers = False

    def __init__(
        self,
        student: MultiCropWrapper,
        teacher: MultiCropWrapper,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        guard: FiniteGuard,
        *,
        max_norm: float,
        verify: Callable[[], None],
    ):
        self._student, self._teacher = student, teacher
        self._optimizer, self._scaler = optimizer, scaler
        self._guard, self._verify = guard, verify
        self._max_norm = max_norm or math.inf
        self._momentum = 1.0

    def set_schedules(self, lr: float, weight_decay: float, momentum: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # Only the first group is decayed.
        self._optimizer.param_groups[0]["weight_decay"] = weight_decay
        self._momentum = momentum

    def __call__(self, *, frozen: bool) -> None:
        self._scaler.unscale_(self._optimizer)
        norms = clip_grad_norms_(self._student.parameters(), self._max_norm)
        if not self._scaler.is_enabled():
            # With loss scaling such gradients are expected now and then: the scaler then skips.
            self._guard.watch_norms(norms)
            self._verify()
        if frozen:
            drop_gradients(self._student.head.last_layer)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        ema_update_(
            list(self._teacher.parameters()), list(self._student.parameters()), self._momentum
        )


def drop_gradients(module: nn.Module) -> None:
    """None, not 0: the optimizer then neither decays these parameters nor moves their moments."""
    for parameter in module.parameters():
        parameter.grad = None
