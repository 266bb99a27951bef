"""The DINO loss of lists of crops: `lightly.loss.DINOLoss`.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_number, check_positive, check_range, check_temperature
from ..dino_loss import dino_loss
from ..dispatch import compute_dtype
from ..pairwise_arguments import pair_count
from ..soft_cross_entropy import soft_cross_entropy
from .lightly_arguments import check_center_mode, temperature_on_host
from .rank_mean import move_center_, start_rank_mean
from .stacking import stack_crops


class DINOLoss(nn.Module):
    """DINO loss with its center: lightly.loss.DINOLoss's constructor, forward and state_dict.

    L = mean_{q != v} mean_b -sum_k softmax((t_q - c)/tau_t)_k log softmax(s_v/tau_s)_k

    (Caron et al. 2021, arXiv 2104.14294, Eq. 3; https://docs.lightly.ai.)

    Args:
        output_dim: K, the number of prototypes.
        warmup_teacher_temp: teacher temperature of epoch 0, if forward is given an epoch.
        teacher_temp: teacher temperature after the warm-up, and if forward is given neither a
            temperature nor an epoch.
        warmup_teacher_temp_epochs: epochs of linear warm-up, both ends included.
        student_temp: the student's temperature.
        center_momentum: in [0, 1]; the weight of the old center in an update.
        center_mode: must be "mean".

    Buffer `center` [1, 1, K]. `teacher_temp_schedule` [warmup_teacher_temp_epochs] is a CPU tensor
    but not a buffer, as in lightly. Attributes may be changed between calls.

    Raises: ValueError: a number out of its range, or an unknown center_mode.

    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
    ) -> None:
        super().__init__()
        if output_dim < 1:
            raise ValueError(f"output_dim must be >= 1, got {output_dim}")
        warmup_teacher_temp = check_positive("warmup_teacher_temp", warmup_teacher_temp)
        teacher_temp = check_positive("teacher_temp", teacher_temp)
        student_temp = check_positive("student_temp", student_temp)
        if warmup_teacher_temp_epochs < 0:
            raise ValueError(
                f"warmup_teacher_temp_epochs must be >= 0, got {warmup_teacher_temp_epochs}"
            )
        center_momentum = check_number("center_momentum", center_momentum)
        check_range("center_momentum", center_momentum, most=1)
        check_center_mode(center_mode)
        self.teacher_temp = teacher_temp
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, device="cpu"
        )
        self.register_buffer("center", torch.zeros(1, 1, output_dim))

    def forward(
        self,
        teacher_out: Sequence[Tensor] | Tensor,
        student_out: Sequence[Tensor] | Tensor,
        teacher_temp: float | Tensor | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """Compute the loss of one batch, then update the center.

        Lists are stacked, which copies them, unless they are the pieces of one tensor
        (`out.chunk(S)`): see stacking.stack_crops.

        Args:
            teacher_out: T tensors [B, K], logits, or one [T, B, K]; receives no gradient.
            student_out: S tensors [B, K], logits, or one [S, B, K]; receives the gradient. Crop i
                of the student and crop i of the teacher are the same crop; this pair is left out.
            teacher_temp: > 0; a float, or a 0-d tensor on the CPU or the logits' device, whose
                value is not checked. It overrides epoch.
            epoch: from 0; selects the teacher temperature.

        Returns: the loss, a fp32 scalar in nats (fp64 if logits are).

        Raises:
            ValueError: S = T = 1, which leaves no pairs (the center is unchanged); shapes or
                devices that do not match; a temperature or an epoch out of range. The message has
                the expected and the actual value.
            TypeError: logits that are not floating-point tensors.

        """
        teacher = stack_crops("teacher_out", teacher_out)
        student = stack_crops("student_out", student_out)
        self._check(teacher, student)
        loss, teacher_sum = self._pairwise(
            student, teacher.detach(), self._temperature(teacher_temp, epoch)
        )
        self._move_center(teacher_sum, teacher.shape[0] * teacher.shape[1])
        return loss

    @torch.no_grad()
    def update_center(self, teacher_out: Sequence[Tensor] | Tensor) -> None:
        """Update the center to m*center + (1 - m)*mean of the logits over all ranks (Eq. 4).

        forward already does this, with a sum that the loss's kernel computes.

        Args:
            teacher_out: [T, B, K] logits, or T tensors [B, K]. An empty batch changes nothing. With
                one tensor [B, K] the mean is over both dimensions, as in lightly, so that all
                prototypes move by the same number: pass teacher_out[None] for the mean over B.

        Raises: ValueError, TypeError: as forward.

        """
        one_crop = isinstance(teacher_out, Tensor) and teacher_out.dim() == 2
        if isinstance(teacher_out, Tensor) and one_crop:
            teacher_out = [teacher_out]
        teacher = stack_crops("teacher_out", teacher_out)
        self._check_prototypes(teacher)
        total = teacher.sum(dim=(0, 1), dtype=compute_dtype(teacher))
        if one_crop:
            total = total.mean().expand_as(total)
        self._move_center(total, teacher.shape[0] * teacher.shape[1])

    def extra_repr(self) -> str:
        """Return the text that print(module) shows between the parentheses."""
        return (
            f"output_dim={self.center.shape[-1]}, teacher_temp={self.teacher_temp}, "
            f"student_temp={self.student_temp}, center_momentum={self.center_momentum}"
        )

    def _pairwise(
        self, student: Tensor, teacher: Tensor, teacher_temp: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (loss [], teacher_sum [K]) over the pairs of different crops."""
        center = self.center.reshape(-1)
        if len(teacher) <= len(student):
            return dino_loss(
                student, teacher, center, student_temp=self.student_temp, teacher_temp=teacher_temp
            )
        # More teacher than student crops: rare, and not supported by dino_loss.
        dtype = compute_dtype(student, teacher)
        teacher_temp = check_temperature("teacher_temp", teacher_temp, dtype, teacher.device)
        probs = torch.softmax((teacher.to(dtype) - center) / teacher_temp, dim=-1)
        rows = soft_cross_entropy(
            student, probs, student_temp=self.student_temp, ignore_diagonal=True
        )
        pairs = pair_count(len(student), len(teacher), ignore_diagonal=True)
        return rows.sum() / (pairs * max(rows.shape[1], 1)), teacher.sum(dim=(0, 1), dtype=dtype)

    @torch.no_grad()
    def _move_center(self, teacher_sum: Tensor, rows: int) -> None:
        """Update the center from the sum [K] of `rows` rows of logits on this rank."""
        mean, ranks = start_rank_mean(teacher_sum, rows).wait()
        move_center_(self.center, mean, ranks, self.center_momentum)

    def _temperature(
        self, teacher_temp: float | Tensor | None, epoch: int | None
    ) -> float | Tensor:
        temp: float | Tensor = self.teacher_temp
        if teacher_temp is not None:
            temp = teacher_temp
        elif epoch is not None:
            epoch = operator.index(epoch)
            if epoch < 0:
                raise ValueError(f"epoch must be >= 0, got {epoch}")
            if epoch < self.warmup_teacher_temp_epochs:
                temp = self.teacher_temp_schedule[epoch]
        return temperature_on_host(temp)

    def _check(self, teacher: Tensor, student: Tensor) -> None:
        self._check_prototypes(teacher)
        if teacher.shape[1:] != student.shape[1:]:
            raise ValueError(
                "teacher_out and student_out must have the same B and K, "
                f"got [T, B, K] = {tuple(teacher.shape)} and [S, B, K] = {tuple(student.shape)}"
            )
        if len(teacher) == len(student) == 1:
            raise ValueError(
                "S = T = 1 leaves no pairs of different crops to compute the loss from: "
                "expected at least two views in total, in teacher_out or in student_out"
            )

    def _check_prototypes(self, teacher: Tensor) -> None:
        if teacher.shape[-1] != self.center.shape[-1]:
            raise ValueError(
                f"teacher_out must have K = {self.center.shape[-1]} prototypes (output_dim), "
                f"got {teacher.shape[-1]}"
            )
        if teacher.device != self.center.device:
            raise ValueError(
                f"teacher_out must be on the center's device {self.center.device}, "
                f"got {teacher.device}; move the loss with .to(device)"
            )
