"""DINOLoss: the DINO loss as a module with its center and its teacher temperature schedule.

The center is the paper's moving average, or that of Sinkhorn-Knopp targets (sinkhorn.py).

Legend: S crops of the student, 2 of the teacher, B images, K prototypes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_float_tensor, check_number, check_positive, check_range
from .dino_loss import dino_loss, teacher_entropy
from .sinkhorn import sinkhorn_center

CENTERINGS = ("centering", "sinkhorn")
PAPER_MOMENTUM = 0.9


class DINOLoss(nn.Module):
    """DINO loss with its center and its teacher temperature, a drop-in for facebookresearch/dino's.

    Constructor, forward, state_dict and results are the same, with one rank or many; the center is
    all-reduced only if torch.distributed is initialised. For gradient accumulation, call `pairwise`
    for each part of the batch, add up the teacher sums, and call `update_center` once.

    Args:
        out_dim: K, the number of prototypes.
        ncrops: S >= 2, the student's crops; the first two are the teacher's.
        warmup_teacher_temp: teacher temperature of epoch 0.
        teacher_temp: teacher temperature after the warm-up.
        warmup_teacher_temp_epochs: epochs of linear warm-up, both ends included.
        nepochs: total number of epochs, at least warmup_teacher_temp_epochs.
        student_temp: the student's temperature.
        center_momentum: in [0, 1]; the weight of the old center in an update.
        centering: "centering", the paper's moving average of the teacher's logits; or "sinkhorn",
            Sinkhorn-Knopp targets over the 2*B rows of all ranks (3 iterations), as in DINOv2.
            Nothing then reads or updates the buffer `center`.
        inplace_backward: write the gradient over the student's logits (see dino_loss).

    Buffer `center` [1, K]: torch's default dtype at construction; `.double()` makes it fp64.
    `teacher_temp_schedule` has the teacher temperature of each epoch.

    Raises: ValueError: a number out of its range, another centering, or a center_momentum for
        Sinkhorn-Knopp. The message states what to change.

    """

    center: Tensor
    _teacher_temps: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = PAPER_MOMENTUM,
        *,
        centering: str = "centering",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        if out_dim < 1:
            raise ValueError(f"out_dim must be >= 1, got {out_dim}")
        if ncrops < 2:
            raise ValueError(
                f"ncrops must be >= 2, as the first two crops are the teacher's, got {ncrops}"
            )
        self.student_temp = check_positive("student_temp", student_temp)
        self.center_momentum = check_number("center_momentum", center_momentum)
        check_range("center_momentum", self.center_momentum, most=1)
        if centering not in CENTERINGS:
            raise ValueError(f"centering must be one of {', '.join(CENTERINGS)}, got {centering!r}")
        if centering == "sinkhorn" and self.center_momentum != PAPER_MOMENTUM:
            raise ValueError(
                "centering='sinkhorn' has no moving average: expected the default center_momentum, "
                f"got {self.center_momentum}; remove center_momentum"
            )
        self.centering = centering
        self.ncrops = ncrops
        self.inplace_backward = inplace_backward
        self.teacher_temp_schedule = temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        self.register_buffer("center", torch.zeros(1, out_dim))
        # For torch.compile, which would recompile for each epoch's float.
        temps = torch.tensor(self.teacher_temp_schedule)
        self.register_buffer("_teacher_temps", temps, persistent=False)

    def forward(
        self, student_output: Tensor, teacher_output: Tensor, epoch: int | Tensor
    ) -> Tensor:
        """Compute the loss of one batch, then update the center.

        Args:
            student_output: [S*B, K] logits, crop after crop; receives the gradient.
            teacher_output: [2*B, K] logits of the first two crops; receives no gradient.
            epoch: from 0; selects the teacher temperature. An int, or an int64 tensor [] on the
                center's device, which a captured CUDA graph reads anew; its value is not checked.

        Returns: the loss, a fp32 scalar in nats (fp64 for fp64 logits).

        Raises: ValueError, TypeError: as `pairwise`, and as `update_center` for an empty batch.

        """
        loss, teacher_sum = self.pairwise(student_output, teacher_output, epoch)
        self.update_center(teacher_sum, len(teacher_output))
        return loss

    @torch.no_grad()
    def target_center(self, teacher_output: Tensor, epoch: int | Tensor) -> Tensor:
        """Return the center of the targets of [2*B, K] teacher logits: [1, K] or [K].

        It is the buffer `center`, or for Sinkhorn-Knopp that of these logits. All ranks must then
        call this, also with different B.

        Raises: ValueError, TypeError: as sinkhorn_center, or an epoch outside 0..nepochs - 1.

        """
        if self.centering == "centering":
            return self.center
        return sinkhorn_center(teacher_output, self._teacher_temp(epoch))

    def pairwise(
        self,
        student_output: Tensor,
        teacher_output: Tensor,
        epoch: int | Tensor,
        center: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, teacher_sum [K]) of one batch, without updating the center.

        Args:
            student_output, teacher_output, epoch: as for forward.
            center: the result of `target_center` for these teacher logits; default: computed here.

        Raises:
            ValueError: shapes that do not match ncrops, K and each other, or an epoch outside
                0..nepochs - 1. The message has the expected and the actual value.
            TypeError: logits that are not floating-point tensors.

        """
        check_float_tensor("student_output", student_output)
        check_float_tensor("teacher_output", teacher_output)
        own_center = self.center  # looked up once: a module searches several dictionaries
        rows, prototypes = len(teacher_output) // 2, own_center.shape[-1]
        expected = ((self.ncrops * rows, prototypes), (2 * rows, prototypes))
        if (tuple(student_output.shape), tuple(teacher_output.shape)) != expected:
            raise ValueError(
                f"student_output [S*B, K] and teacher_output [2*B, K] must match S = {self.ncrops} "
                f"and K = {prototypes}, got {tuple(student_output.shape)} "
                f"and {tuple(teacher_output.shape)}"
            )
        if center is None:
            sinkhorn = self.centering == "sinkhorn"
            center = self.target_center(teacher_output, epoch) if sinkhorn else own_center
        return dino_loss(
            student_output.reshape(self.ncrops, rows, prototypes),
            teacher_output.reshape(2, rows, prototypes),
            center,
            student_temp=self.student_temp,
            teacher_temp=self._teacher_temp(epoch),
            inplace_backward=self.inplace_backward,
        )

    def update_center(self, teacher_sum: Tensor, rows: int) -> None:
        """Update the center to m*center + (1 - m)*mean over the teacher rows of all ranks (Eq. 4).

        With Sinkhorn-Knopp the center is unchanged. This is start_center_update, finished at once.
        """
        self.start_center_update(teacher_sum, rows)()

    def start_center_update(self, teacher_sum: Tensor, rows: int) -> Callable[..., None]:
        """Start the all-reduce and return a function that waits for it and updates the center.

        The backward pass can run in between: the next use of the center is the next batch's loss.
        The returned function takes `skip`, a 0-d tensor on the center's device, by keyword: if it
        is greater than 0, the center is unchanged.

        Args:
            teacher_sum: [K] (or [1, K]), the sum of this rank's teacher logits over `rows` rows;
                not modified.
            rows: teacher rows in that sum (2*B per batch), the same number on every rank. With
                0 rows and one rank the center is unchanged.

        Raises: ValueError: a number of elements other than K, negative rows, or 0 rows with
            several ranks.

        """
        center = self.center
        if teacher_sum.numel() != center.numel():
            raise ValueError(
                f"teacher_sum must be [K] with K = {center.numel()}, "
                f"got shape {tuple(teacher_sum.shape)}"
            )
        world = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
        if rows < 0 or (rows == 0 and world > 1):
            raise ValueError(f"rows must be >= {int(world > 1)}, got {rows}")
        if self.centering == "sinkhorn":
            return _keep_center
        total = teacher_sum.detach().reshape(center.shape)
        work = None
        if world > 1:
            total = total.clone()
            work = torch.distributed.all_reduce(total, async_op=True)
        return functools.partial(self._finish_center_update, total, rows * world, work)

    @torch.no_grad()
    def _finish_center_update(
        self, total: Tensor, rows: int, work: Any, *, skip: Tensor | None = None
    ) -> None:
        if rows == 0:
            return
        if work is not None:
            work.wait()
        center = self.center if skip is None else self.center.clone()
        weight = (1 - self.center_momentum) / rows
        center.mul_(self.center_momentum).add_(total, alpha=weight)
        if skip is not None:
            self.center.copy_(torch.where(skip > 0, self.center, center))

    @torch.no_grad()
    def teacher_entropy(
        self, teacher_output: Tensor, epoch: int | Tensor, center: Tensor | None = None
    ) -> Tensor:
        """Compute the mean entropy in nats of the targets of [2*B, K] teacher logits.

        Args: as for `pairwise`.
        """
        if center is None:
            center = self.target_center(teacher_output, epoch)
        return teacher_entropy(teacher_output[None], center, self._teacher_temp(epoch))

    def extra_repr(self) -> str:
        """Return the text that print(module) shows between the parentheses."""
        return (
            f"out_dim={self.center.shape[-1]}, ncrops={self.ncrops}, "
            f"student_temp={self.student_temp}, center_momentum={self.center_momentum}"
            + (f", centering={self.centering!r}" if self.centering != "centering" else "")
        )

    def _teacher_temp(self, epoch: int | Tensor) -> float | Tensor:
        if isinstance(epoch, Tensor):
            return self._teacher_temps.index_select(0, epoch.reshape(1)).squeeze(0)
        if not torch.compiler.is_compiling():  # which would specialise on the epoch
            epoch = operator.index(epoch)
        if not 0 <= epoch < len(self.teacher_temp_schedule):
            raise ValueError(
                f"epoch must be in 0..{len(self.teacher_temp_schedule) - 1} (nepochs - 1), "
                f"got {epoch}"
            )
        if torch.compiler.is_compiling():
            return self._teacher_temps[epoch]
        return self.teacher_temp_schedule[epoch]


def _keep_center(*, skip: Tensor | None = None) -> None:
    """Finish the center update of Sinkhorn-Knopp, which has none."""


def temperature_schedule(
    warmup: float, final: float, warmup_epochs: int, epochs: int
) -> tuple[float, ...]:
    """Return linspace(warmup, final, warmup_epochs), then `final` for the remaining epochs."""
    warmup = check_positive("warmup_teacher_temp", warmup)
    final = check_positive("teacher_temp", final)
    if warmup_epochs < 0:
        raise ValueError(f"warmup_teacher_temp_epochs must be >= 0, got {warmup_epochs}")
    if warmup_epochs > epochs:
        raise ValueError(
            f"warmup_teacher_temp_epochs ({warmup_epochs}) must not exceed nepochs ({epochs}): "
            "lower warmup_teacher_temp_epochs or raise nepochs"
        )
    step = (final - warmup) / max(warmup_epochs - 1, 1)
    ramp = [warmup + step * epoch for epoch in range(warmup_epochs)]
    if warmup_epochs > 1:
        ramp[-1] = final
    return (*ramp, *[final] * (epochs - warmup_epochs))
