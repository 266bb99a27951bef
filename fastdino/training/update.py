"""Parameter updates: from gradients to the next student and teacher.

Two implementations of the same maths: SeparateUpdate runs clip, optimizer and EMA one after the
other, as the paper's code does; FusedUpdate runs them in one pass over memory. Calling one applies
the gradients in .grad; with `frozen`, the last layer of the head is not updated.
"""

from __future__ import annotations

import math

import torch
from fastdino_kernels import AdamWEMA, clip_grad_norms_, ema_update_
from torch import Tensor, nn

from fastdino.models.head import MultiCropWrapper
from fastdino.training.nonfinite import FiniteGuard
from fastdino.training.optimizers import build_optimizer, parameter_groups


class SeparateUpdate:
    """Clip each gradient by its norm, then optimizer, then EMA; waits for the norms.

    Args:
        optimizer: adamw, sgd or lars.
        clip_grad: maximum norm of a gradient; 0 disables clipping.
    """

    def __init__(
        self,
        student: MultiCropWrapper,
        teacher: MultiCropWrapper,
        scaler: torch.amp.GradScaler,
        guard: FiniteGuard,
        *,
        optimizer: str,
        clip_grad: float,
    ):
        self.optimizer = build_optimizer(optimizer, student)
        self._student, self._teacher = student, teacher
        self._scaler, self._guard = scaler, guard
        self._max_norm = clip_grad or math.inf
        self._momentum = 1.0

    def set_schedules(self, lr: float, weight_decay: float, momentum: float) -> None:
        """Set the values for the next step."""
        _set_rates(self.optimizer, lr, weight_decay)
        self._momentum = momentum

    def __call__(self, *, frozen: bool) -> None:
        self._scaler.unscale_(self.optimizer)
        norms = clip_grad_norms_(self._student.parameters(), self._max_norm)
        if not self._scaler.is_enabled():  # with loss scaling, the scaler skips such steps
            self._guard.watch_norms(norms)
        if frozen:
            drop_gradients(self._student.head.last_layer)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        ema_update_(
            list(self._teacher.parameters()), list(self._student.parameters()), self._momentum
        )


class FusedUpdate:
    """Clip, AdamW and EMA in one pass over memory without a host sync (AdamWEMA).

    It also writes the normalised last layer of the teacher, if the head keeps one
    (head.last_layer.cached_weight).

    Args:
        clip_grad: maximum norm of a gradient; 0 disables clipping.
        graphed: keep lr, weight decay and momentum on the device, where a CUDA graph reads them.
    """

    def __init__(
        self,
        student: MultiCropWrapper,
        teacher: MultiCropWrapper,
        scaler: torch.amp.GradScaler,
        guard: FiniteGuard,
        *,
        clip_grad: float,
        graphed: bool,
    ):
        prototypes, cached = student.head.last_layer.weight_v, teacher.head.last_layer.cached_weight
        self.optimizer = AdamWEMA(
            parameter_groups(student),
            lr=0.0,
            max_norm=clip_grad or math.inf,
            teacher=dict(zip(student.parameters(), teacher.parameters(), strict=True)),
            teacher_shadow=None if cached is None else {prototypes: cached},
            unit_rows=None if cached is None else prototypes,
            skip_nonfinite=not scaler.is_enabled(),
        )
        self._student, self._scaler, self._guard = student, scaler, guard
        self._cached: tuple[Tensor, Tensor, Tensor] | None = None
        if cached is not None:
            self._cached = prototypes, teacher.head.last_layer.weight_v, cached
            self.refresh_cache()
        self._schedules: list[Tensor] | None = None  # fp64 []: lr, weight decay, momentum
        if graphed:
            values = torch.zeros(3, dtype=torch.float64, device=prototypes.device)
            self._schedules = list(values.unbind())

    def refresh_cache(self) -> None:
        """Write the normalised last layer of loaded weights, with the bits that an update writes.

        Another implementation rounds some values differently, and a resumed run would differ.
        """
        if self._cached is None:
            return
        prototypes, teacher, cached = self._cached
        student = prototypes.detach()  # without a gradient
        AdamWEMA(
            [student], teacher=[teacher], teacher_shadow=[cached], unit_rows=student, momentum=1.0
        ).step()

    def set_schedules(self, lr: float, weight_decay: float, momentum: float) -> None:
        """Set the values for the next step."""
        values: list[float | Tensor] = [lr, weight_decay, momentum]
        if self._schedules is not None:
            # fill_ passes the value as a kernel argument, so the host does not wait.
            pairs = zip(self._schedules, (lr, weight_decay, momentum), strict=True)
            values = [scalar.fill_(value) for scalar, value in pairs]
        _set_rates(self.optimizer, values[0], values[1])
        self.optimizer.momentum = values[2]

    def __call__(self, *, frozen: bool) -> None:
        if frozen:
            drop_gradients(self._student.head.last_layer)
        # With loss scaling, the same pass divides the gradients by the scale.
        self._scaler.step(self.optimizer, skip=self._guard.bad)
        self._scaler.update()
        if not self._scaler.is_enabled():
            assert self.optimizer.norms is not None
            self._guard.watch_norms(self.optimizer.norms)


def _set_rates(
    optimizer: torch.optim.Optimizer, lr: float | Tensor, weight_decay: float | Tensor
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay  # the second group is not decayed


def drop_gradients(module: nn.Module) -> None:
    """Set .grad to None rather than 0, so that weight decay and moments skip the parameters."""
    for parameter in module.parameters():
        parameter.grad = None
