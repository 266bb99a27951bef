"""The center of the teacher's logits in DINOv2's losses, all-reduced while the step goes on.

    center <- m * center + (1 - m) * mean over the ranks of their logits' means

A step's logits move the center at the start of the next step's softmax_center_teacher, so that the
all-reduce overlaps with the student's forward and backward passes.

Legend: K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_float_tensor, check_number, check_positive, check_range
from ..dispatch import compute_dtype
from .rank_mean import RankMean, move_center_, start_rank_mean
from .soft_targets import centered_softmax


class TeacherCenter(nn.Module):
    """Base of DINOv2's losses: the center, its delayed update, and the centered softmax.

    Args:
        shape: the center's, (1, .., K).
        student_temp: the student's temperature, > 0.
        center_momentum: m, in [0, 1].

    Buffer `center`. `updated` is False while an update is pending, `async_batch_center` is the mean
    that it consists of (see RankMean), and `reduce_handle` its all-reduce.

    """

    center: Tensor

    def __init__(self, shape: tuple[int, ...], student_temp: float, center_momentum: float) -> None:
        super().__init__()
        if shape[-1] < 1:
            raise ValueError(f"the number of prototypes must be >= 1, got {shape[-1]}")
        self.student_temp = check_positive("student_temp", student_temp)
        self.center_momentum = check_number("center_momentum", center_momentum)
        check_range("center_momentum", self.center_momentum, most=1)
        self.register_buffer("center", torch.zeros(shape))
        self.updated = True
        self.reduce_handle: Any = None
        self.async_batch_center: Tensor | None = None
        self._pending: RankMean | None = None

    @torch.no_grad()
    def start_update(self, logits: Tensor) -> None:
        """Start the all-reduce of an update by logits [n, K]. A rank with n = 0 does not count."""
        total = logits.sum(dim=0, dtype=compute_dtype(logits))
        self._pending = start_rank_mean(total, len(logits))
        self.async_batch_center, self.reduce_handle = self._pending.mean, self._pending.work
        self.updated = False

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Wait for the pending update, if there is one, and apply it to the center in place."""
        if self.updated:
            return
        assert self._pending is not None
        move_center_(self.center, *self._pending.wait(), self.center_momentum)
        self._pending = self.reduce_handle = None
        self.updated = True

    @torch.no_grad()
    def centered_softmax(self, name: str, teacher: Tensor, temp: float | Tensor) -> Tensor:
        """Return softmax((teacher - center)/temp) of logits [.., K], in one pass over them."""
        self.check_logits(name, teacher)
        if self.center.dtype == torch.float64:
            teacher = teacher.double()
        probs = centered_softmax(teacher, self.center.reshape(-1), temp)
        return probs.view(torch.broadcast_shapes(teacher.shape, self.center.shape))

    def check_logits(self, name: str, logits: Tensor, dim: int | None = None) -> None:
        """Raise ValueError or TypeError unless logits [.., K] match the center."""
        check_float_tensor(name, logits)
        prototypes = self.center.shape[-1]
        shapes = {None: "[.., K]", 2: "[B, K]", 3: "[B, N, K]"}
        if (
            logits.dim() < 1
            or logits.dim() != (dim or logits.dim())
            or logits.shape[-1] != prototypes
        ):
            raise ValueError(
                f"{name} must be {shapes[dim]} with K = {prototypes}, "
                f"got shape {tuple(logits.shape)}"
            )
        if logits.device != self.center.device:
            raise ValueError(
                f"{name} must be on the center's device {self.center.device}, "
                f"got {logits.device}; move the loss with .to(device)"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Finish the all-reduce, whose handle cannot be copied or saved."""
        if self._pending is not None:
            self._pending.wait()
        return {**self.__dict__, "reduce_handle": None}

    def extra_repr(self) -> str:
        """Return the text that print(module) shows between the parentheses."""
        return (
            f"out_dim={self.center.shape[-1]}, student_temp={self.student_temp}, "
            f"center_momentum={self.center_momentum}"
        )
