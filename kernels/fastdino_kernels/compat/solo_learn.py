"""Drop-in for solo-learn's `solo.losses.DINOLoss`."""

from __future__ import annotations

from torch import Tensor

from ..dino_module import DINOLoss as _DINOLoss


class DINOLoss(_DINOLoss):
    """fastdino_kernels.DINOLoss with solo-learn's constructor, and the epoch as an attribute.

    Set `epoch` before a forward pass, as solo.methods.DINO.on_train_epoch_start does.

    Args:
        num_prototypes: K.
        warmup_teacher_temp: teacher temperature of epoch 0.
        teacher_temp: teacher temperature after the warm-up.
        warmup_teacher_temp_epochs: epochs of linear warm-up, both ends included.
        num_epochs: total number of epochs, at least warmup_teacher_temp_epochs.
        student_temp: the student's temperature.
        num_large_crops: S >= 2, the student's crops; the first two are the teacher's.
        center_momentum: in [0, 1]; the weight of the old center in an update.

    Buffer `center` [1, K]. `update_center` takes the sum of the teacher's logits, not the logits:
    see fastdino_kernels.DINOLoss.

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
            epoch: overrides `self.epoch` for this call.

        Returns: the loss, a fp32 scalar in nats (fp64 for fp64 logits).

        Raises: ValueError, TypeError: as fastdino_kernels.DINOLoss.

        """
        return super().forward(
            student_output, teacher_output, self.epoch if epoch is None else epoch
        )
