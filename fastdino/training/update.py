"""From gradients to the next student and teacher: clip, optimizer, EMA.

Two ways of the same maths: one operation after the other, as the paper's code does, and one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from fastdino_kernels import AdamWEMA, clip_grad_norms_, ema_update_
from torch import Tensor, nn

from fastdino.models.head import MultiCropWrapper
from fastdino.training.nonfinite import FiniteGuard


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
        _set_rates(self._optimizer, lr, weight_decay)
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


class FusedUpdate:
    """All in one pass over memory, with no waiting: fastdino_kernels.AdamWEMA.

    Args:
        optimizer: averages the teacher too.
        scalars: fp64 [3] on the device, to hold lr, weight decay and momentum where a CUDA graph
            is to see them change; None: they are floats.
    """

    defers = True

    def __init__(
        self,
        student: MultiCropWrapper,
        optimizer: AdamWEMA,
        scaler: torch.amp.GradScaler,
        guard: FiniteGuard,
        *,
        scalars: Tensor | None,
    ):
        self._student, self._optimizer = student, optimizer
        self._scaler, self._guard = scaler, guard
        self._scalars = None if scalars is None else list(scalars.unbind())

    def set_schedules(self, lr: float, weight_decay: float, momentum: float) -> None:
        values: list[float | Tensor] = [lr, weight_decay, momentum]
        if self._scalars is not None:
            # The value travels as an argument of the launch: nothing waits.
            values = [
                scalar.fill_(value) for scalar, value in zip(self._scalars, values, strict=True)
            ]
        _set_rates(self._optimizer, values[0], values[1])
        self._optimizer.momentum = values[2]

    def __call__(self, *, frozen: bool) -> None:
        if frozen:
            drop_gradients(self._student.head.last_layer)
        # With loss scaling the gradients are divided by the scale in the same pass.
        self._scaler.step(self._optimizer, skip=self._guard.bad)
        self._scaler.update()
        if not self._scaler.is_enabled():
            assert self._optimizer.norms is not None
            self._guard.watch_norms(self._optimizer.norms)


def _set_rates(
    optimizer: torch.optim.Optimizer, lr: float | Tensor, weight_decay: float | Tensor
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Only the first group is decayed.
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def drop_gradients(module: nn.Module) -> None:
    """None, not 0: the optimizer then neither decays these parameters nor moves their moments."""
    for parameter in module.parameters():
        parameter.grad = None
