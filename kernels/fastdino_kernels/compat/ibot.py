"""Drop-in for iBOT's `iBOTLoss` (main_ibot.py): class tokens and masked patch tokens.

(Zhou et al. 2021, arXiv 2111.07832.) Legend: S crops of the student, of which the first G are
global and those of the teacher; B images, N patch tokens of a global crop, K prototypes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_float_tensor, check_integer, check_number, check_positive, check_range
from ..dino_loss import dino_loss
from ..dino_module import temperature_schedule
from ..dispatch import compute_dtype, without_autocast
from ..patch_loss import patch_loss
from .rank_mean import move_center_, start_rank_mean


class iBOTLoss(nn.Module):  # noqa: N801
    """Both terms of iBOT's loss, with a center each: constructor, forward and state_dict of iBOT's.

    The results differ from the original's only in these cases:

    - Half precision is computed in fp32.
    - Patch tokens that are not masked are not read by the loss, so NaN there does not reach it.
    - No process group is needed. Ranks with different numbers of images have the same centers, the
      means of their means. Ranks without images do not count.
    - The centers are updated in place and keep their dtypes. The schedules are tuples.
    - Shapes that do not match, an epoch outside of 0..nepochs - 1 and temperatures <= 0 are errors.

    Args:
        out_dim: K of the class tokens.
        patch_out_dim: K of the patch tokens.
        ngcrops: G >= 1, global crops.
        nlcrops: S - G, local crops; 0 for none.
        warmup_teacher_temp: teacher temperature of epoch 0.
        teacher_temp: teacher temperature after the warm-up.
        warmup_teacher_temp2: the same for patch tokens, until mim_start_epoch.
        teacher_temp2: the same for patch tokens.
        warmup_teacher_temp_epochs: epochs of linear warm-up, both ends included.
        nepochs: total number of epochs.
        student_temp: the student's temperature.
        center_momentum: in [0, 1]; the weight of the old center of the class tokens in an update.
        center_momentum2: the same for patch tokens.
        lambda1: weight of the class tokens' loss.
        lambda2: weight of the patch tokens' loss.
        mim_start_epoch: epoch at which the warm-up of the patch tokens' temperature starts.

    Buffers `center` [1, K] and `center2` [1, 1, K]. `teacher_temp_schedule` and
    `teacher_temp2_schedule` have the temperatures of each epoch.

    Raises: ValueError, TypeError: a number out of its range, or of another type.

    """

    center: Tensor
    center2: Tensor

    def __init__(
        self,
        out_dim: int,
        patch_out_dim: int,
        ngcrops: int,
        nlcrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp2: float,
        teacher_temp2: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_momentum2: float = 0.9,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        mim_start_epoch: int = 0,
    ) -> None:
        super().__init__()
        integers = {
            "out_dim": (out_dim, 1),
            "patch_out_dim": (patch_out_dim, 1),
            "ngcrops": (ngcrops, 1),
            "nlcrops": (nlcrops, 0),
            "mim_start_epoch": (mim_start_epoch, 0),
        }
        for name, (value, least) in integers.items():
            if check_integer(name, value) < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.student_temp = check_positive("student_temp", student_temp)
        self.center_momentum = check_number("center_momentum", center_momentum)
        self.center_momentum2 = check_number("center_momentum2", center_momentum2)
        for name in ("center_momentum", "center_momentum2"):
            check_range(name, getattr(self, name), most=1)
        self.ngcrops, self.nlcrops, self.ncrops = ngcrops, nlcrops, ngcrops + nlcrops
        self.lambda1 = check_number("lambda1", lambda1)
        self.lambda2 = check_number("lambda2", lambda2)
        self.teacher_temp_schedule = temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        before = (check_positive("warmup_teacher_temp2", warmup_teacher_temp2),) * mim_start_epoch
        self.teacher_temp2_schedule = before + temperature_schedule(
            warmup_teacher_temp2,
            teacher_temp2,
            warmup_teacher_temp_epochs,
            nepochs - mim_start_epoch,
        )
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))

    def forward(
        self,
        student_output: Sequence[Tensor],
        teacher_output: Sequence[Tensor],
        student_local_cls: Tensor | None,
        student_mask: Sequence[Tensor],
        epoch: int,
    ) -> dict[str, Tensor]:
        """Compute both losses of one batch, then update the centers.

        cls:   lambda1 * mean over pairs of different crops and images of the cross-entropy
        patch: lambda2 * mean over global crops and images of the mean over masked tokens

        Reading the masks waits for the device.

        Args:
            student_output: logits [G*B, K] of the class tokens and [G*B, N, K] of the patch tokens
                of the global crops, crop after crop; both receive gradients.
            teacher_output: the same of the teacher; they receive no gradient.
            student_local_cls: [(S - G)*B, K] logits of the local crops; None without local crops.
            student_mask: G masks [B, h, w] with h*w = N, True for a masked token.
            epoch: from 0; selects the teacher temperatures.

        Returns: {"cls": ..., "patch": ..., "loss": their sum}, fp32 scalars in nats (fp64 for fp64
            logits).

        Raises: ValueError, TypeError: shapes, devices, dtypes or an epoch that do not match. The
            message has the expected and the actual value.

        """
        student_cls, student_patch = student_output
        teacher_cls, teacher_patch = teacher_output
        if student_local_cls is not None:
            check_float_tensor("student_local_cls", student_local_cls)
            with without_autocast(student_cls.device):
                student_cls = torch.cat([student_cls, student_local_cls])
        masks = self._masks(student_mask)
        crops, tokens = masks.shape
        images = crops // self.ngcrops
        dim, dim2 = self.center.shape[-1], self.center2.shape[-1]
        for name, logits, shape in (
            ("student_output[0] and student_local_cls", student_cls, (images * self.ncrops, dim)),
            ("teacher_output[0]", teacher_cls, (crops, dim)),
            ("student_output[1]", student_patch, (crops, tokens, dim2)),
            ("teacher_output[1]", teacher_patch, (crops, tokens, dim2)),
        ):
            _check_logits(name, logits, shape)
        cls, cls_sum = dino_loss(
            student_cls.reshape(self.ncrops, images, dim),
            teacher_cls.reshape(self.ngcrops, images, dim),
            self.center,
            student_temp=self.student_temp,
            teacher_temp=_temperature(self.teacher_temp_schedule, epoch),
        )
        temp2 = _temperature(self.teacher_temp2_schedule, epoch)
        patch = self._patch_loss(student_patch, teacher_patch, masks, temp2)
        cls, patch = cls * self.lambda1, patch * self.lambda2
        self._move_centers(cls_sum, crops, teacher_patch)
        return {"cls": cls, "patch": patch, "loss": cls + patch}

    @torch.no_grad()
    def update_center(self, teacher_cls: Tensor, teacher_patch: Tensor) -> None:
        """Update both centers to m*center + (1 - m)*mean of the logits; forward already does this.

        Args:
            teacher_cls: [n, K] logits of class tokens. No rows change nothing.
            teacher_patch: [n, N, K] logits of patch tokens.

        Raises: ValueError, TypeError: another shape, or no floats.

        """
        dim, dim2 = self.center.shape[-1], self.center2.shape[-1]
        _check_logits("teacher_cls", teacher_cls, (-1, dim))
        _check_logits("teacher_patch", teacher_patch, (-1, -1, dim2))
        cls_sum = teacher_cls.sum(dim=0, dtype=compute_dtype(teacher_cls))
        self._move_centers(cls_sum, len(teacher_cls), teacher_patch)

    @torch.no_grad()
    def _move_centers(self, cls_sum: Tensor, cls_rows: int, teacher_patch: Tensor) -> None:
        """Update the centers from the sum [K] of class tokens and all patch tokens [n, N, K]."""
        tokens = teacher_patch.flatten(0, 1)
        patch_sum = tokens.sum(dim=0, dtype=compute_dtype(tokens))
        pending = [start_rank_mean(cls_sum, cls_rows), start_rank_mean(patch_sum, len(tokens))]
        move_center_(self.center, *pending[0].wait(), self.center_momentum)
        move_center_(self.center2, *pending[1].wait(), self.center_momentum2)

    def extra_repr(self) -> str:
        """Return the text that print(module) shows between the parentheses."""
        return (
            f"out_dim={self.center.shape[-1]}, patch_out_dim={self.center2.shape[-1]}, "
            f"ngcrops={self.ngcrops}, nlcrops={self.nlcrops}, student_temp={self.student_temp}"
        )

    def _masks(self, student_mask: Sequence[Tensor]) -> Tensor:
        """Return the masks of the global crops, [B, h, w] each, as [G*B, N]."""
        masks = list(student_mask)[: self.ngcrops]
        for mask in masks:
            if not isinstance(mask, Tensor):
                raise TypeError(f"student_mask must hold tensors, got {type(mask).__name__}")
        shapes = [tuple(mask.shape) for mask in masks]
        if len(masks) < self.ngcrops or any(x != shapes[0] for x in shapes) or len(shapes[0]) != 3:
            raise ValueError(
                f"student_mask must hold {self.ngcrops} masks [B, h, w] of one shape, one for each "
                f"global crop, got {shapes}"
            )
        return torch.cat(masks).flatten(1)

    def _patch_loss(
        self, student: Tensor, teacher: Tensor, masks: Tensor, teacher_temp: float
    ) -> Tensor:
        """Compute the mean over crops of their masked tokens' mean; other tokens are not read."""
        weights = masks.to(compute_dtype(student, teacher))
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        index = masks.flatten().nonzero().squeeze(1)
        student, teacher = (
            logits.flatten(0, 1).index_select(0, index) for logits in (student, teacher)
        )
        loss, _ = patch_loss(
            student,
            teacher,
            self.center2.reshape(-1),
            student_temp=self.student_temp,
            teacher_temp=teacher_temp,
            weights=weights.flatten()[index],
            denominator=max(len(masks), 1),
            inplace_backward=True,  # the rows are copies
        )
        return loss


def _check_logits(name: str, logits: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError or TypeError unless logits have the shape; -1 is any size."""
    check_float_tensor(name, logits)
    sizes = zip(logits.shape, shape)
    if logits.dim() != len(shape) or any(want not in (-1, got) for got, want in sizes):
        expected = ", ".join("n" if size < 0 else str(size) for size in shape)
        raise ValueError(f"{name} must be [{expected}], got shape {tuple(logits.shape)}")


def _temperature(schedule: tuple[float, ...], epoch: int) -> float:
    epoch = operator.index(epoch)
    if not 0 <= epoch < len(schedule):
        raise ValueError(f"epoch must be in 0..{len(schedule) - 1} (nepochs - 1), got {epoch}")
    return schedule[epoch]
