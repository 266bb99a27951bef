"""Drop-ins for the losses of DINOv2, `dinov2.loss`, and for the cross-entropy that they import.

DINOv2's training code (train/ssl_meta_arch.py) passes probabilities from softmax_center_teacher or
sinkhorn_knopp_teacher to the losses, and so do these classes. dino_loss and patch_loss take the
teacher's logits and a center instead, and need no tensor of targets: the section "DINOv2 from
logits" of ../../README.md has the calls. (Oquab et al. 2023, arXiv 2304.07193.)

Legend: S crops of the student, T crops of the teacher, B images, N tokens, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_float_tensor, check_integer
from ..koleo import koleo_loss
from ..operators import ops
from ..sinkhorn import sinkhorn_knopp
from .soft_targets import cross_entropy, dino_clstoken_loss, dino_cross_entropy
from .teacher_center import TeacherCenter

__all__ = [
    "DINOLoss",
    "KoLeoLoss",
    "cross_entropy",
    "dino_clstoken_loss",
    "dino_cross_entropy",
    "iBOTPatchLoss",
]


class DINOLoss(TeacherCenter):
    """Loss of the class tokens: dinov2.loss.DINOLoss's methods, attributes and state_dict.

    The results differ from the original's only in these cases:

    - Half precision is computed in fp32, and fp64 in fp64, Sinkhorn-Knopp included.
    - No teacher logits overflow in Sinkhorn-Knopp.
    - Ranks with different numbers of rows have the same center, the mean of their means. Ranks
      without rows do not count. No rows: loss 0, and the center is unchanged.
    - The center is updated in place and keeps its dtype.
    - Shapes that match only by broadcasting, and temperatures <= 0, are errors.

    Args:
        out_dim: K, the number of prototypes.
        student_temp: the student's temperature, > 0.
        center_momentum: in [0, 1]; the weight of the old center in an update.

    Buffer `center` [1, K].

    Raises: ValueError, TypeError: a number out of its range, or of another type.

    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__((1, check_integer("out_dim", out_dim)), student_temp, center_momentum)
        self.len_teacher_output: int | None = None

    def forward(
        self,
        student_output_list: Sequence[Tensor] | Tensor,
        teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor,
    ) -> Tensor:
        """Compute the sum over all pairs of crops of their mean cross-entropy.

        Args:
            student_output_list: S tensors [B, K], logits, or one [S, B, K]; receives the gradient.
            teacher_out_softmaxed_centered_list: T tensors [B, K], probabilities, or one [T, B, K].

        Returns, raises: as dino_clstoken_loss.

        """
        return dino_clstoken_loss(
            student_output_list, teacher_out_softmaxed_centered_list, self.student_temp
        )

    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float | Tensor
    ) -> Tensor:
        """Apply the last update of the center, and return softmax((teacher - center)/temp).

        Args:
            teacher_output: [.., K] logits.
            teacher_temp: > 0; a float, or a 0-d tensor on the logits' device.

        Returns: probabilities of the same shape, fp32 (fp64 for fp64 logits).

        Raises: ValueError, TypeError: another K, a temperature that is not > 0, or no floats.

        """
        self.apply_center_update()
        return self.centered_softmax("teacher_output", teacher_output, teacher_temp)

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float | Tensor, n_iterations: int = 3
    ) -> Tensor:
        """Compute Sinkhorn-Knopp targets over the rows of all ranks: see sinkhorn_knopp.

        Args:
            teacher_output: [B, K] logits.
            teacher_temp: > 0; a float, or a 0-d tensor on the logits' device.
            n_iterations: >= 1.

        Returns: probabilities [B, K], fp32 (fp64 for fp64 logits).

        Raises: ValueError, TypeError: as sinkhorn_knopp.

        """
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def update_center(self, teacher_output: Tensor) -> None:
        """Call reduce_center_update, as the original does."""
        self.reduce_center_update(teacher_output)

    def reduce_center_update(self, teacher_output: Tensor) -> None:
        """Start the all-reduce of the mean of [B, K] logits, which the next step's center includes.

        Raises: ValueError, TypeError: another shape, or no floats.
        """
        self.check_logits("teacher_output", teacher_output, 2)
        self.len_teacher_output = len(teacher_output)
        self.start_update(teacher_output)


class iBOTPatchLoss(TeacherCenter):  # noqa: N801
    """Loss of the masked patch tokens: dinov2.loss.iBOTPatchLoss's methods and state_dict.

    With the teacher's logits instead of probabilities, the same loss without a tensor of targets is

        center = sinkhorn_center(teacher, teacher_temp)    # or loss.center.view(-1)
        patch_loss(student, teacher, center, student_temp=0.1, teacher_temp=teacher_temp,
                   weights=masks_weight, denominator=len(student_masks_flat))

    The results differ from the original's as those of DINOLoss do, and in these cases:

    - Without xformers' cross_entropy, the original computes in the logits' dtype; with it, it
      overwrites fp32 logits, which this class does only with inplace_backward.
    - A rank without masked tokens makes all centers NaN in the original.
    - sinkhorn_knopp_teacher needs no process group, and does not change n_masked_patches_tensor.

    Args:
        patch_out_dim: K, the number of prototypes.
        student_temp: the student's temperature, > 0.
        center_momentum: in [0, 1]; the weight of the old center in an update.
        inplace_backward: write the gradient over the student's logits: see soft_cross_entropy.

    Buffer `center` [1, 1, K].

    Raises: ValueError, TypeError: a number out of its range, or of another type.

    """

    def __init__(
        self,
        patch_out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        inplace_backward: bool = False,
    ) -> None:
        shape = (1, 1, check_integer("patch_out_dim", patch_out_dim))
        super().__init__(shape, student_temp, center_momentum)
        self.inplace_backward = inplace_backward
        self.len_teacher_patch_tokens: int | None = None

    def forward(
        self,
        student_patch_tokens: Tensor,
        teacher_patch_tokens: Tensor,
        student_masks_flat: Tensor,
    ) -> Tensor:
        """Compute the mean over images of the mean cross-entropy of an image's masked tokens.

        Args:
            student_patch_tokens: [B, N, K] logits; receives the gradient.
            teacher_patch_tokens: [B, N, K] probabilities.
            student_masks_flat: [B, N], bool, or numbers that multiply the tokens' losses.

        Returns: a fp32 scalar in nats (fp64 for fp64 logits); 0 without images.

        Raises: ValueError, TypeError: as cross_entropy, and masks of another shape.

        """
        _check_masks(student_masks_flat)
        rows = self._rows(student_patch_tokens, teacher_patch_tokens)
        if rows.dim() != 2 or student_masks_flat.shape != rows.shape:
            raise ValueError(
                "student_patch_tokens must be [B, N, K] and student_masks_flat [B, N], "
                f"got {tuple(student_patch_tokens.shape)} and {tuple(student_masks_flat.shape)}"
            )
        counts = student_masks_flat.sum(dim=-1).clamp(min=1.0)
        images = (rows * student_masks_flat).sum(dim=-1) / counts
        return images.sum() / max(len(images), 1)

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Compute sum_i weight_i * CE_i / B over the masked tokens i, B images masked or not.

        Args:
            student_patch_tokens_masked: [N, K] logits; receives the gradient.
            teacher_patch_tokens_masked: [N, K] probabilities of the same tokens, or [1, N, K].
            student_masks_flat: [B, tokens of an image]; only its length is used if masks_weight is
                given, otherwise bool with n <= N masked tokens.
            n_masked_patches: n, to leave out rows of padding at the end; all rows by default.
            masks_weight: [n], by default 1/(masked tokens of the token's image). Computing the
                default waits for the device.

        Returns: a fp32 scalar in nats (fp64 for fp64 logits); 0 without masked tokens.

        Raises: ValueError, TypeError: as cross_entropy, and weights of another shape.

        """
        _check_masks(student_masks_flat)
        used = slice(n_masked_patches)
        rows = self._rows(
            student_patch_tokens_masked[..., used, :], teacher_patch_tokens_masked[..., used, :]
        )
        if masks_weight is None:
            masks_weight = _weights(student_masks_flat)
        if check_float_tensor("masks_weight", masks_weight).shape != rows.shape[-1:]:
            raise ValueError(
                f"masks_weight must have one weight for each of {rows.shape[-1]} masked tokens, "
                f"got shape {tuple(masks_weight.shape)}"
            )
        return (rows * masks_weight).sum() / max(len(student_masks_flat), 1)

    def softmax_center_teacher(
        self, teacher_patch_tokens: Tensor, teacher_temp: float | Tensor
    ) -> Tensor:
        """Apply the last update of the center, and return softmax((teacher - center)/temp).

        Args:
            teacher_patch_tokens: [B, N, K] logits, in DINOv2 [1, n, K] of the masked tokens. [N, K]
                become [1, N, K], as in the original.
            teacher_temp: > 0; a float, or a 0-d tensor on the logits' device.

        Returns: probabilities of the same shape, fp32 (fp64 for fp64 logits).

        Raises: ValueError, TypeError: another K, a temperature that is not > 0, or no floats.

        """
        self.apply_center_update()
        return self.centered_softmax("teacher_patch_tokens", teacher_patch_tokens, teacher_temp)

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float | Tensor,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """Compute Sinkhorn-Knopp targets over the rows of all ranks: see sinkhorn_knopp.

        Args:
            teacher_output: [N, K] logits of the masked tokens, N may differ between ranks.
            teacher_temp: > 0; a float, or a 0-d tensor on the logits' device.
            n_masked_patches_tensor: not used: the targets do not depend on the number of rows.
            n_iterations: >= 1.

        Returns: probabilities [N, K], fp32 (fp64 for fp64 logits).

        Raises: ValueError, TypeError: as sinkhorn_knopp.

        """
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def update_center(self, teacher_patch_tokens: Tensor) -> None:
        """Call reduce_center_update, as the original does."""
        self.reduce_center_update(teacher_patch_tokens)

    def reduce_center_update(self, teacher_patch_tokens: Tensor) -> None:
        """Start the all-reduce of the mean over tokens, which the next step's center includes.

        Args:
            teacher_patch_tokens: [B, N, K] logits, in DINOv2 [1, n, K] of the masked tokens; or
                [n, K], which count as one image.

        Raises: ValueError, TypeError: another shape, or no floats.

        """
        if isinstance(teacher_patch_tokens, Tensor) and teacher_patch_tokens.dim() == 2:
            teacher_patch_tokens = teacher_patch_tokens[None]
        self.check_logits("teacher_patch_tokens", teacher_patch_tokens, 3)
        self.len_teacher_patch_tokens = len(teacher_patch_tokens)
        self.start_update(teacher_patch_tokens.flatten(0, 1))

    def _rows(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cross_entropy(student, teacher, self.student_temp, self.inplace_backward)


def _check_masks(masks: object) -> None:
    if not isinstance(masks, Tensor):
        raise TypeError(f"student_masks_flat must be a torch.Tensor, got {type(masks).__name__}")


def _weights(masks: Tensor) -> Tensor:
    """Return 1/(masked tokens of the image) of each masked token, in the order of the masks."""
    if masks.dtype != torch.bool or masks.dim() != 2:
        raise ValueError(
            "student_masks_flat must be a bool tensor [B, N] if masks_weight is None, "
            f"got {masks.dtype} of shape {tuple(masks.shape)}"
        )
    counts = masks.sum(dim=-1, keepdim=True).clamp(min=1)
    return counts.reciprocal().expand_as(masks)[masks]


class KoLeoLoss(nn.Module):
    """KoLeo regularizer: dinov2.loss.KoLeoLoss, computed in fp32 (fp64 for fp64 features)."""

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Compute -mean_i log(||x_i - x_nn(i) + eps|| + eps) over normalised rows of this rank.

        Args:
            student_output: [B, D] features of one crop; receives the gradient.
            eps: > 0; also the least norm of a row. Added to differences the original has 1e-8,
                whatever eps is.

        Returns: a fp32 scalar (fp64 for fp64 features); 0 without rows.

        Raises: ValueError, TypeError: as koleo_loss.

        """
        return koleo_loss(student_output, eps=eps)

    def pairwise_NNs_inner(self, x: Tensor) -> Tensor:  # noqa: N802
        """Return the index [B] of the other row of x [B, D] with the largest dot product."""
        check_float_tensor("x", x)
        nearest: Tensor = ops.nearest_rows(x.detach(), x.detach(), 0, 1)
        return nearest[:, 0]
