"""Drop-in for solo-learn's `solo.losses.DINOLoss`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_float_tensor
from ..dino_module import DINOLoss as _DINOLoss
from ..dispatch import compute_dtype


class DINOLoss(_DINOLoss):
    """fastdino_kernels.DINOLoss with solo-learn's constructor, and the epoch as an attribute.

    Set `epoch` before a forward pass, as solo.methods.DINO.on_train_epoch_start does. Negative
    epochs count from the last one, as in the original: -1 has the final temperature.

    Args:
        num_prototypes: K.
        warmup_teacher_temp: teacher temperature of epoch 0.
        teacher_temp: teacher temperature after the warm-up.
        warmup_teacher_temp_epochs: epochs of linear warm-up, both ends included.
        num_epochs: total number of epochs, at least warmup_teacher_temp_epochs.
        student_temp: the student's temperature.
        num_large_crops: S >= 2, the student's crops; the first two are the teacher's.
        center_momentum: in [0, 1]; the weight of the old center in an update.

    Buffer `center` [1, K].

    Raises: ValueError: a number out of its range. The message states what to change.

    """

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__(
            num_prototypes,
            num_large_crops,
            warmup_teacher_temp,
            teacher_temp,
            warmup_teacher_temp_epochs,
            num_epochs,
            student_temp,
            center_momentum,
        )
        self.num_large_crops = num_large_crops
        self.epoch = 0

    def forward(
        self, student_output: Tensor, teacher_output: Tensor, epoch: int | Tensor | None = None
    ) -> Tensor:
        """Compute the loss of one batch at `self.epoch`, then update the center.

        Args:
            student_output: [S*B, K] logits, crop after crop; receives the gradient.
            teacher_output: [2*B, K] logits of the first two crops; receives no gradient.
            epoch: overrides `self.epoch` for this call; see fastdino_kernels.DINOLoss.

        Returns: the loss, a fp32 scalar in nats (fp64 for fp64 logits).

        Raises: ValueError, TypeError: as fastdino_kernels.DINOLoss.

        """
        loss, teacher_sum = self.pairwise(
            student_output, teacher_output, self.epoch if epoch is None else epoch
        )
        self.start_center_update(teacher_sum, len(teacher_output))()
        return loss

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:  # type: ignore[override]
        """Update the center to m*center + (1 - m)*mean of the logits over all ranks (Eq. 4).

        forward already does this, with a sum that the loss's kernel computes.

        Args:
            teacher_output: [N, K] logits, fp16/bf16/fp32/fp64, the same N on every rank. With N = 0
                and one rank the center is unchanged.

        Raises:
            ValueError: another shape, or N = 0 with several ranks.
            TypeError: logits that are not a floating-point tensor.

        """
        check_float_tensor("teacher_output", teacher_output)
        prototypes = self.center.shape[-1]
        if teacher_output.dim() != 2 or teacher_output.shape[1] != prototypes:
            raise ValueError(
                f"teacher_output must be [N, K] with K = {prototypes}, "
                f"got shape {tuple(teacher_output.shape)}"
            )
        total = teacher_output.sum(dim=0, dtype=compute_dtype(teacher_output))
        self.start_center_update(total, len(teacher_output))()

    def _teacher_temp(self, epoch: int | Tensor) -> float | Tensor:
        epochs = len(self.teacher_temp_schedule)
        if not isinstance(epoch, Tensor) and -epochs <= epoch < 0:
            epoch += epochs
        return super()._teacher_temp(epoch)
