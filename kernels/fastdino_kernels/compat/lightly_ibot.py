"""Patch losses of masked image modeling: `lightly.loss.IBOTPatchLoss` and `IBOTPlusPlusPatchLoss`.

Legend: B images, N patch tokens, K prototypes, H and W the height and width in tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import (
    check_float_tensor,
    check_number,
    check_positive,
    check_range,
    check_same_device,
)
from ..dispatch import compute_dtype
from ..patch_loss import patch_loss
from .lightly_arguments import temperature_on_host
from .lightly_center import Center


class IBOTPatchLoss(nn.Module):
    """Masked patch loss with its center: lightly.loss.IBOTPatchLoss.

    L = 1/B sum_i 1/n(i) * -sum_k softmax((t_i - c)/tau_t)_k log softmax(s_i/tau_s)_k

    over the masked tokens i, of which the image of i has n(i) (Zhou et al. 2021, arXiv 2111.07832;
    Oquab et al. 2023, arXiv 2304.07193). B counts images without masked tokens too.

    Args:
        output_dim: K, the number of prototypes.
        teacher_temp: teacher temperature, if forward is given none.
        student_temp: the student's temperature.
        center_mode: must be "mean".
        center_momentum: in [0, 1]; the weight of the old center in an update.

    Submodule `center`, whose buffer `center` is [1, K]. Attributes may be changed between calls.

    Raises: ValueError: a number out of its range, or an unknown center_mode.

    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if output_dim < 1:
            raise ValueError(f"output_dim must be >= 1, got {output_dim}")
        self.teacher_temp = check_positive("teacher_temp", teacher_temp)
        self.student_temp = check_positive("student_temp", student_temp)
        self.center = Center((1, output_dim), center_mode, center_momentum)

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of the masked tokens, then update the center.

        Args:
            teacher_out: [M, K] logits of the M masked tokens, image after image; fp16, bf16, fp32
                or fp64; receives no gradient.
            student_out: [M, K] logits of the same tokens; receives the gradient.
            mask: [B, H, W] bool, True for the masked tokens, M in all.
            teacher_temp: > 0; a float, or a 0-d tensor on the CPU or the logits' device, whose
                value is not checked. It overrides the constructor's.

        Returns: the loss, a fp32 scalar in nats (fp64 if logits are); 0 if M = 0. On a GPU, where
            a check would wait for the device, it is NaN if the mask has another number of True.

        Raises:
            ValueError: shapes or devices that do not match, a temperature that is not > 0, or, on
                a CPU, a mask with another number of True.
            TypeError: logits that are not floating-point tensors, or a mask that is not bool.

        """
        self._check_logits(teacher_out, student_out)
        _check_mask(mask, teacher_out)
        if mask.dim() != 3 or teacher_out.dim() != 2:
            raise ValueError(
                "mask must be [B, H, W] and teacher_out [M, K], "
                f"got {tuple(mask.shape)} and {tuple(teacher_out.shape)}"
            )
        weights = _masked_weights(mask, teacher_out)
        return self._loss(teacher_out, student_out, weights, len(mask), teacher_temp)

    def extra_repr(self) -> str:
        """Return the text that print(module) shows between the parentheses."""
        return f"teacher_temp={self.teacher_temp}, student_temp={self.student_temp}"

    def _check_logits(self, teacher: Tensor, student: Tensor) -> None:
        check_float_tensor("teacher_out", teacher)
        check_float_tensor("student_out", student)
        if teacher.shape != student.shape:
            raise ValueError(
                "teacher_out and student_out must have the same shape, "
                f"got {tuple(teacher.shape)} and {tuple(student.shape)}"
            )
        center = self.center.value
        if teacher.dim() < 1 or teacher.shape[-1] != center.shape[-1]:
            raise ValueError(
                f"teacher_out must have K = {center.shape[-1]} prototypes (output_dim), "
                f"got shape {tuple(teacher.shape)}"
            )
        if teacher.device != center.device:
            raise ValueError(
                f"teacher_out must be on the center's device {center.device}, "
                f"got {teacher.device}; move the loss with .to(device)"
            )

    def _loss(
        self,
        teacher: Tensor,
        student: Tensor,
        weights: Tensor | None,
        denominator: int,
        teacher_temp: float | Tensor | None,
    ) -> Tensor:
        """Return sum(weights * rows)/denominator of logits [N, K], and update the center."""
        loss, teacher_sum = patch_loss(
            student,
            teacher.detach(),
            self.center.value.reshape(-1),
            student_temp=self.student_temp,
            teacher_temp=temperature_on_host(
                self.teacher_temp if teacher_temp is None else teacher_temp
            ),
            weights=weights,
            denominator=max(denominator, 1),
        )
        self.center.update_from_sum(teacher_sum, len(teacher))
        return loss


class IBOTPlusPlusPatchLoss(IBOTPatchLoss):
    """Patch loss of all tokens, visible ones too: lightly.loss.IBOTPlusPlusPatchLoss.

    Without a mask it is the mean over all tokens. With one it is, averaged over the images, the
    mean over the masked tokens plus visible_loss_weight times the mean over the visible ones
    (TIPSv2, 2026, arXiv 2604.12012). The center moves to the mean over all tokens.

    Args: as IBOTPatchLoss.

    """

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor | None = None,
        teacher_temp: float | Tensor | None = None,
        visible_loss_weight: float = 1.0,
    ) -> Tensor:
        """Compute the loss of all tokens, then update the center.

        Args:
            teacher_out: [B, N, K] logits, or [B*N, K] with a mask; receives no gradient.
            student_out: logits of the same shape; receives the gradient.
            mask: [B, H, W] or [B, N] bool, True for the masked tokens.
            teacher_temp: as in IBOTPatchLoss.
            visible_loss_weight: >= 0; not used without a mask.

        Returns: the loss, a fp32 scalar in nats (fp64 if logits are); 0 without tokens.

        Raises:
            ValueError: shapes or devices that do not match, a number out of its range, or logits
                [B*N, K] without a mask.
            TypeError: logits that are not floating-point tensors, or a mask that is not bool.

        """
        self._check_logits(teacher_out, student_out)
        images = _count_images(teacher_out, mask)
        teacher, student = teacher_out, student_out
        if teacher.dim() == 3:
            teacher, student = teacher.flatten(0, 1), student.flatten(0, 1)
        if mask is None:
            return self._loss(teacher, student, None, len(teacher), teacher_temp)
        visible = check_number("visible_loss_weight", visible_loss_weight)
        check_range("visible_loss_weight", visible)
        _check_mask(mask, teacher_out)
        if len(mask) != images or mask.numel() != len(teacher):
            raise ValueError(
                f"mask must be [B, H, W] or [B, N] with B*N = {len(teacher)} elements for "
                f"B = {images} images, got shape {tuple(mask.shape)}"
            )
        weights = _all_weights(mask.flatten(1), visible, compute_dtype(teacher, student))
        return self._loss(teacher, student, weights.reshape(-1), images, teacher_temp)


def _check_mask(mask: Tensor, logits: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of torch.bool, got {got}")
    if mask.dim() < 2:
        raise ValueError(f"mask must be [B, H, W], got shape {tuple(mask.shape)}")
    check_same_device("mask", mask, "teacher_out", logits)


def _masked_weights(mask: Tensor, logits: Tensor) -> Tensor:
    """Return 1/n(i) for each of the masked tokens [M], image after image, without a host sync."""
    counts = mask.flatten(1).sum(dim=1)
    ends = counts.cumsum(0)
    images, rows = len(mask), len(logits)
    dtype = compute_dtype(logits)
    total = ends[-1] if images else counts.sum()
    if not torch.compiler.is_compiling() and mask.device.type == "cpu" and total != rows:
        raise ValueError(
            f"mask must have as many True as teacher_out has rows, got {int(total)} and {rows}"
        )
    if rows == 0 or images == 0:
        return torch.zeros(rows, dtype=dtype, device=mask.device)
    image = torch.searchsorted(ends, torch.arange(rows, device=mask.device), right=True)
    weights = counts.to(dtype).clamp_min(1).reciprocal()[image.clamp_max(images - 1)]
    return torch.where(total == rows, weights, torch.nan)


def _all_weights(mask: Tensor, visible: float, dtype: torch.dtype) -> Tensor:
    """Return the weights [B, N] of all tokens from the mask [B, N]."""
    counts = mask.sum(dim=1, keepdim=True).to(dtype)
    masked = counts.clamp_min(1).reciprocal()
    unmasked = (mask.shape[1] - counts).clamp_min(1).reciprocal()
    return torch.where(mask, masked, visible * unmasked)


def _count_images(teacher: Tensor, mask: Tensor | None) -> int:
    """Return B of logits [B, N, K], or of [B*N, K] with a mask."""
    if teacher.dim() == 3:
        return len(teacher)
    if teacher.dim() != 2:
        raise ValueError(
            f"teacher_out must be rank 2 or 3, [B*N, K] or [B, N, K], got rank {teacher.dim()}"
        )
    if mask is None:
        raise ValueError(
            "mask is required for logits [B*N, K], whose number of images it gives, got None"
        )
    images = len(mask)
    if images < 1 or len(teacher) % images:
        raise ValueError(
            f"teacher_out has {len(teacher)} rows, not divisible by the mask's B = {images}"
        )
    return images
