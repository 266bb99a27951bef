"""Drop-ins for `stable_pretraining.losses`: the DINO and iBOT losses, and Sinkhorn-Knopp.

They take the teacher's probabilities, which softmax_center_teacher or sinkhorn_knopp_teacher makes
from its logits. The results are those of stable-pretraining, except in these cases:

- Half-precision logits are computed in fp32, and probabilities and the center are fp32 (fp64 for
  fp64 logits).
- The teacher gets no gradient.
- Logits of any size: Sinkhorn-Knopp does not overflow.
- An empty batch has loss 0 and does not change the center. With several ranks, the center moves to
  the mean over the ranks that have rows.
- One student and one teacher view, which leave no pairs, are an error instead of NaN.

Legend: S views of the student, T views of the teacher, B images, N patches, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_float_tensor, check_number, check_positive, check_range
from ..dispatch import compute_dtype
from ..sinkhorn import sinkhorn_knopp as _sinkhorn_knopp
from .dinov2 import cross_entropy, dino_cross_entropy
from .rank_mean import RankMean, move_center_, start_rank_mean
from .soft_targets import centered_softmax


def cross_entropy_loss(t: Tensor, s: Tensor, temp: float | Tensor) -> Tensor:
    """Compute -sum_k t_k log softmax(s/temp)_k of every row.

    Args:
        t: [.., K] teacher probabilities; receives no gradient.
        s: logits of the same shape, fp16/bf16/fp32/fp64; receives the gradient.
        temp: the student's temperature, > 0.

    Returns: [..], in nats, fp32 (fp64 for fp64 logits).

    Raises: ValueError, TypeError: as compat.dinov2.cross_entropy.

    """
    return cross_entropy(s, t, temp)


def sinkhorn_knopp(
    teacher_output: Tensor,
    teacher_temp: float | Tensor,
    num_samples: int | Tensor | None = None,
    n_iterations: int = 3,
) -> Tensor:
    """Compute Sinkhorn-Knopp targets over the rows of all ranks: see fastdino_kernels.

    Args:
        teacher_output: [.., K] logits. Ranks may have different numbers of rows, or none.
        teacher_temp: > 0.
        num_samples: not used: the number of samples cancels in the last normalization.
        n_iterations: >= 1.

    Returns: probabilities of the same shape, fp32 (fp64 for fp64 logits).

    Raises: ValueError, TypeError: as fastdino_kernels.sinkhorn_knopp.

    """
    _check_logits("teacher_output", teacher_output)
    flat = teacher_output.flatten(0, -2)
    return _sinkhorn_knopp(flat, teacher_temp, n_iterations).view(teacher_output.shape)


class DINOv1Loss(nn.Module):
    """Cross-entropy between the views of student and teacher, with a center for the teacher.

    Args:
        temperature_student: > 0.
        center_momentum: in [0, 1]; the weight of the old center in an update.

    Attribute `center` [1, K], None before the first update, which sets it to the batch's mean. It
    is not in the state_dict, as in stable-pretraining.

    Raises: ValueError: a number out of its range.

    """

    def __init__(self, temperature_student: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.temperature_student = check_positive("temperature_student", temperature_student)
        self.center_momentum = check_number("center_momentum", center_momentum)
        check_range("center_momentum", self.center_momentum, most=1)
        self.center: Tensor | None = None
        self._pending: RankMean | None = None

    @property
    def updated(self) -> bool:
        """True unless an update of the center waits to be applied."""
        return self._pending is None

    def forward(self, student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
        """Compute the mean cross-entropy over the pairs of different views and over the batch.

        Args:
            student_logits: [S, B, K], fp16/bf16/fp32/fp64; receives the gradient.
            teacher_probs: [T, B, K]; receives none.

        Returns: a fp32 scalar in nats (fp64 for fp64 logits).

        Raises: ValueError, TypeError: as compat.dinov2.dino_cross_entropy.

        """
        return dino_cross_entropy(
            student_logits,
            teacher_probs,
            student_temp=self.temperature_student,
            ignore_diagonal=True,
        )

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_logits: Tensor,
        teacher_temp: float | Tensor,
        num_samples: int | Tensor | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """Compute Sinkhorn-Knopp targets: see sinkhorn_knopp."""
        return sinkhorn_knopp(teacher_logits, teacher_temp, num_samples, n_iterations)

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_logits: Tensor, teacher_temp: float | Tensor, update_centers: bool = True
    ) -> Tensor:
        """Compute softmax((logits - center)/teacher_temp), after the pending center update.

        Args:
            teacher_logits: [.., K].
            teacher_temp: > 0.
            update_centers: call apply_center_update first.

        Returns: probabilities of the same shape, fp32 (fp64 for fp64 logits).

        Raises: ValueError, TypeError: a shape, a dtype or a temperature that is not as above.

        """
        _check_logits("teacher_logits", teacher_logits)
        if update_centers:
            self.apply_center_update()
        center, prototypes = self.center, teacher_logits.shape[-1]
        if center is not None and center.shape[-1] != prototypes:
            raise ValueError(
                f"teacher_logits must have the center's K = {center.shape[-1]}, got {prototypes}"
            )
        if center is None:
            center = teacher_logits.new_zeros(prototypes)
        return centered_softmax(teacher_logits, center.reshape(-1), teacher_temp)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Start the all-reduce of the mean of the logits; apply_center_update finishes it.

        Args:
            teacher_output: [T, B, K] logits.

        Raises: ValueError, TypeError: another shape, or logits that are no floating-point tensor.

        """
        check_float_tensor("teacher_output", teacher_output)
        if teacher_output.dim() != 3:
            raise ValueError(
                f"teacher_output must be [T, B, K], got shape {tuple(teacher_output.shape)}"
            )
        total = teacher_output.sum(dim=(0, 1), dtype=compute_dtype(teacher_output))
        self._pending = start_rank_mean(total[None], teacher_output[..., 0].numel())

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Apply the update that update_center has started, if any."""
        if self._pending is None:
            return
        mean, ranks = self._pending.wait()
        self._pending = None
        if self.center is not None:
            # A new tensor: one that a validation in inference mode made cannot be changed.
            self.center = self.center.clone()
            move_center_(self.center, mean, ranks, self.center_momentum)
        elif isinstance(ranks, Tensor) or ranks > 0:
            self.center = mean


class iBOTPatchLoss(nn.Module):  # noqa: N801
    """Mean cross-entropy of masked patches with the teacher's probabilities.

    Args:
        student_temp: > 0.

    Raises: ValueError: a temperature that is not > 0.

    """

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        self.student_temp = check_positive("student_temp", student_temp)

    def forward(self, student_patch_logits: Tensor, teacher_patch_probs: Tensor) -> Tensor:
        """Compute the mean over all masked patches.

        Args:
            student_patch_logits: [N, K], fp16/bf16/fp32/fp64; receives the gradient.
            teacher_patch_probs: [N, K]; receives none.

        Returns: a fp32 scalar in nats (fp64 for fp64 logits); 0 without patches.

        Raises: ValueError, TypeError: as compat.dinov2.cross_entropy.

        """
        rows = cross_entropy_loss(teacher_patch_probs, student_patch_logits, self.student_temp)
        return rows.sum() / max(rows.numel(), 1)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_patch_tokens: Tensor,
        teacher_temp: float | Tensor,
        num_samples: int | Tensor | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """Compute Sinkhorn-Knopp targets: see sinkhorn_knopp."""
        return sinkhorn_knopp(teacher_patch_tokens, teacher_temp, num_samples, n_iterations)


class DINOv2Loss(nn.Module):
    """Weighted sum of DINOv1Loss and iBOTPatchLoss, its submodules dino_loss and ibot_loss.

    Args:
        dino_loss_weight: weight of the views' loss.
        ibot_loss_weight: weight of the patches' loss.
        temperature_student: the student's temperature for the views.
        center_momentum: of dino_loss.
        student_temp: the student's temperature for the patches.

    Raises: ValueError, TypeError: a number out of its range.

    """

    def __init__(
        self,
        dino_loss_weight: float = 1.0,
        ibot_loss_weight: float = 1.0,
        temperature_student: float = 0.1,
        center_momentum: float = 0.9,
        student_temp: float = 0.1,
    ) -> None:
        super().__init__()
        self.dino_loss_weight = check_number("dino_loss_weight", dino_loss_weight)
        self.ibot_loss_weight = check_number("ibot_loss_weight", ibot_loss_weight)
        self.dino_loss = DINOv1Loss(temperature_student, center_momentum)
        self.ibot_loss = iBOTPatchLoss(student_temp)

    def forward(
        self,
        student_cls_logits: Tensor,
        teacher_cls_probs: Tensor,
        student_patch_logits: Tensor | None = None,
        teacher_patch_probs: Tensor | None = None,
    ) -> Tensor:
        """Compute the weighted sum; without patches, the views' part alone.

        Args:
            student_cls_logits: [S, B, K]; receives the gradient.
            teacher_cls_probs: [T, B, K]; receives none.
            student_patch_logits: [N, K]; receives the gradient.
            teacher_patch_probs: [N, K]; receives none.

        Returns: a fp32 scalar in nats (fp64 for fp64 logits).

        Raises: ValueError, TypeError: as the two losses.

        """
        loss = self.dino_loss_weight * self.dino_loss(student_cls_logits, teacher_cls_probs)
        if student_patch_logits is None or teacher_patch_probs is None:
            return loss
        return loss + self.ibot_loss_weight * self.ibot_loss(
            student_patch_logits, teacher_patch_probs
        )


def _check_logits(name: str, logits: Tensor) -> None:
    check_float_tensor(name, logits)
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must be [.., K] with K >= 1, got shape {tuple(logits.shape)}")
