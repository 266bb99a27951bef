"""Losses with the signatures of DINOv3's `dinov3.loss`, written from its equations.

DINOv3's code, whose license is restrictive, was neither copied nor used for tests. Each class
states what it computes; options that it does not compute are errors. (Simeoni et al. 2025, arXiv
2508.10104.)

Legend: S crops of the student, T crops of the teacher, B images, N and P tokens, D features, K
prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_float_tensor, check_integer
from ..collectives import Group, world_size
from ..gram import gram_loss
from ..koleo import koleo_loss
from . import dinov2
from .dinov2 import KoLeoLoss
from .soft_targets import dino_cross_entropy
from .teacher_center import TeacherCenter

__all__ = ["DINOLoss", "GramLoss", "KoLeoLoss", "KoLeoLossDistributed", "iBOTPatchLoss"]


class _CenterOptions(TeacherCenter):
    """Extend DINOv2's centers by the methods of DINOv3's losses."""

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the center to zeros, for a module that was created on the meta device."""
        self.center.zero_()

    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float | Tensor, update_centers: bool = True
    ) -> Tensor:
        """Return softmax((teacher - center)/temp), after the pending update of the center.

        Args:
            teacher_output: [.., K] logits.
            teacher_temp: > 0; a float, or a 0-d tensor on the logits' device.
            update_centers: False leaves the update pending.

        Returns, raises: as compat.dinov2's method.

        """
        if update_centers:
            self.apply_center_update()
        return self.centered_softmax("teacher_output", teacher_output, teacher_temp)


class DINOLoss(_CenterOptions, dinov2.DINOLoss):
    """Loss of the class tokens, averaged over pairs of crops.

    Arguments, center, softmax_center_teacher and sinkhorn_knopp_teacher are those of
    compat.dinov2.DINOLoss. dino_loss takes the teacher's logits and a center instead, and needs no
    tensor of targets.
    """

    def forward(  # type: ignore[override]  # DINOv2's takes lists
        self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False
    ) -> Tensor:
        """Compute the mean cross-entropy over pairs of crops and images.

        The sum over pairs and images is divided by B*S*T, or by B*(S*T - min(S, T)).

        Args:
            student_logits: [S, B, K]; receives the gradient. Computed in fp32, or fp64.
            teacher_probs: [T, B, K] probabilities.
            ignore_diagonal: leave out the pairs of crop i with crop i.

        Returns, raises: as dino_cross_entropy.

        """
        return dino_cross_entropy(
            student_logits,
            teacher_probs,
            student_temp=self.student_temp,
            ignore_diagonal=ignore_diagonal,
        )


class iBOTPatchLoss(_CenterOptions, dinov2.iBOTPatchLoss):  # noqa: N801
    """Loss of the masked patch tokens: compat.dinov2.iBOTPatchLoss, with DINOv3's options.

    forward_masked divides the weighted sum by the number of all images, masked or not.
    """


class KoLeoLossDistributed(nn.Module):
    """KoLeo regularizer whose neighbours are among the rows of several ranks.

    Neighbours on other ranks receive their gradient. All ranks must have the same B.

    Args:
        topk: number of neighbours, whose terms are averaged.
        loss_group_size: rows that are compared with each other: those of loss_group_size/B
            consecutive ranks. None compares the rows of all ranks.

    Raises: ValueError, TypeError: an argument that is not an int >= 1.

    """

    def __init__(self, topk: int = 1, loss_group_size: int | None = None) -> None:
        super().__init__()
        sizes = {"topk": topk, "loss_group_size": 1 if loss_group_size is None else loss_group_size}
        for name, size in sizes.items():
            if check_integer(name, size) < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        self.topk, self.loss_group_size = topk, loss_group_size
        self._groups: dict[int, Group | None] = {}  # by number of ranks

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Compute the loss of this rank's rows: see koleo_loss.

        Args:
            student_output: [B, D] features of one crop; receives the gradient.
            eps: as in compat.dinov2.KoLeoLoss.

        Returns: a fp32 scalar (fp64 for fp64 features).

        Raises: ValueError, TypeError: as koleo_loss, or a loss_group_size that is not that of a
            number of ranks that divides the world size.

        """
        check_float_tensor("student_output", student_output)
        return koleo_loss(
            student_output, group=self._group(len(student_output)), topk=self.topk, eps=eps
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the process groups, which cannot be copied; the copy creates its own."""
        return {**self.__dict__, "_groups": {}}

    def _group(self, rows: int) -> Group | None:
        """Return the group of this rank's neighbours; None for this rank alone."""
        world = world_size(None)
        ranks, rest = world, 0
        if self.loss_group_size is not None:
            ranks, rest = divmod(self.loss_group_size, max(rows, 1))
        if rest or ranks < 1 or world % ranks:
            raise ValueError(
                "loss_group_size must be the rows of a number of ranks that divides the world size "
                f"{world}, with {rows} rows on each rank, got {self.loss_group_size}"
            )
        if ranks not in self._groups:
            self._groups[ranks] = _consecutive_ranks(ranks, world)
        return self._groups[ranks]


def _consecutive_ranks(ranks: int, world: int) -> Group | None:
    if ranks == 1:
        return None
    if ranks == world:
        return torch.distributed.group.WORLD
    return torch.distributed.new_subgroups(ranks)[0]


class GramLoss(nn.Module):
    """Mean squared difference between the similarities of patch tokens of student and Gram teacher.

    L = mean_ij (x_i . x_j - y_i . y_j)^2    with normalised tokens, in fp32: see gram_loss

    Args:
        apply_norm: must be True: tokens are normalised.
        img_level: compare the tokens within each image; False: within the whole batch.
        remove_neg: must be False: negative similarities count as they are.
        remove_only_teacher_neg: must be False.

    Raises: ValueError: an option that is not supported.

    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = False,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        for name, value, expected in (
            ("apply_norm", apply_norm, True),
            ("remove_neg", remove_neg, False),
            ("remove_only_teacher_neg", remove_only_teacher_neg, False),
        ):
            if bool(value) != expected:
                raise ValueError(f"{name} must be {expected}: {value} is not supported")
        self.img_level = img_level

    def forward(
        self, output_feats: Tensor, target_feats: Tensor, img_level: bool | None = None
    ) -> Tensor:
        """Compute the loss: see gram_loss.

        Args:
            output_feats: [B, P, D] tokens of the student, or [P, D]; receives the gradient.
            target_feats: [B, P, D'] tokens of the Gram teacher, which may have other features.
            img_level: overrides the constructor's for this call.

        Returns: a fp32 scalar (fp64 if either input is).

        Raises: ValueError, TypeError: as gram_loss.

        """
        per_image = self.img_level if img_level is None else img_level
        return gram_loss(output_feats, target_feats, per_image=per_image)
