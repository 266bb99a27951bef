"""The DINO loss: a function, and a module that replaces the paper code's DINOLoss.

With n_v the number of teacher crops other than v, P_q the teacher's probabilities, p_v the
student's, and pairs = T*S - T:

    loss   = 1/(pairs*B) * sum_v -<sum_{q != v} P_q, log p_v>
    d s_v  = g/(student_temp*pairs*B) * [ n_v * p_v - sum_{q != v} P_q ]

So each student crop meets the sum of its targets once, the gradient needs nothing saved but the
logits themselves, and both passes read every logit once.

Legend: S crops of the student, T crops of the teacher (the first T of the student's), B images,
K prototypes. In the torch implementation b is a block of images that fits the CPU's caches.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .dispatch import check_float_tensor, choose_impl, compute_dtype, is_number

# Elements of one temporary per CPU thread: 256 KB in fp32, so that a few stay in a core's L2.
_BLOCK_ELEMENTS = 1 << 16


def _blocks(batch: int, prototypes: int, device: torch.device) -> Iterator[slice]:
    """Slices of the batch: on a CPU in pieces that fit its caches, elsewhere in one."""
    step = batch
    if device.type == "cpu":
        step = torch.get_num_threads() * max(1, _BLOCK_ELEMENTS // prototypes)
    for start in range(0, batch, max(step, 1)):
        yield slice(start, min(start + step, batch))


def _teacher_probs(teacher: Tensor, center: Tensor, teacher_temp: Tensor) -> list[Tensor]:
    """T tensors [b, K], softmax((t - c)/tau_t), in the dtype of `center`."""
    probs = []
    for crop in teacher:
        logits = torch.sub(crop, center).div_(teacher_temp)
        probs.append(torch.softmax(logits, dim=-1))
    return probs


def _student_logits(crop: Tensor, student_temp: Tensor) -> Tensor:
    """[b, K], s/tau_s, contiguous, in the dtype of `student_temp`."""
    if crop.dtype == student_temp.dtype:
        return torch.div(crop, student_temp)
    return crop.to(student_temp.dtype).div_(student_temp)


def _sum_of_others(probs: Sequence[Tensor], crop: int) -> Tensor:
    """sum_{q != crop} P_q."""
    others = [p for q, p in enumerate(probs) if q != crop]
    return sum(others[1:], others[0])


def _torch_forward(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> tuple[Tensor, Tensor]:
    crops, batch, prototypes = student.shape
    row_loss = center.new_zeros(crops, batch)
    teacher_sum = torch.zeros_like(center)
    for block in _blocks(batch, prototypes, student.device):
        for crop in teacher[:, block]:
            teacher_sum += crop.sum(dim=0, dtype=center.dtype)
        probs = _teacher_probs(teacher[:, block], center, teacher_temp)
        all_crops = _sum_of_others(probs, -1)
        for v in range(crops):
            if v == 0 and len(probs) == 1:
                continue
            target = _sum_of_others(probs, v) if v < len(probs) else all_crops
            log_probs = torch.log_softmax(_student_logits(student[v, block], student_temp), -1)
            torch.sum(log_probs.mul_(target), dim=-1, out=row_loss[v, block])
    pairs = len(teacher) * (crops - 1)
    return row_loss.sum().div_(-pairs * max(batch, 1)), teacher_sum


def _torch_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
) -> Tensor:
    crops, batch, prototypes = student.shape
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    pairs = len(teacher) * (crops - 1)
    scale = grad_loss / (student_temp * (pairs * max(batch, 1)))
    for block in _blocks(batch, prototypes, student.device):
        probs = _teacher_probs(teacher[:, block], center, teacher_temp)
        probs = [p.mul_(-scale) for p in probs]
        all_crops = _sum_of_others(probs, -1)
        for v in range(crops):
            if v == 0 and len(probs) == 1:
                grad[v, block] = 0
                continue
            target = _sum_of_others(probs, v) if v < len(probs) else all_crops
            count = len(probs) - 1 if v < len(probs) else len(probs)
            p = torch.softmax(_student_logits(student[v, block], student_temp), dim=-1)
            # The incoming scale is already inside: the one rounding to half is this write.
            torch.addcmul(target, p, scale, value=count, out=grad[v, block])
    return grad


_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"torch": _torch_forward}
_BACKWARD: dict[str, Callable[..., Tensor]] = {"torch": _torch_backward}


@torch.library.custom_op("fastdino_kernels::dino_loss", mutates_args=())
def _dino_loss_op(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(loss [], teacher_sum [K]); center [K] and both temperatures [] in the compute dtype."""
    return _FORWARD[impl](student, teacher, center, student_temp, teacher_temp)


@torch.library.custom_op("fastdino_kernels::dino_loss_backward", mutates_args=())
def _dino_loss_backward_op(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    impl: str,
) -> Tensor:
    """[S, B, K], the gradient of the student's logits, in their dtype; not differentiable."""
    return _BACKWARD[impl](grad_loss, student, teacher, center, student_temp, teacher_temp)


@_dino_loss_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return center.new_empty(()), torch.empty_like(center)


@_dino_loss_backward_op.register_fake
def _(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    impl: str,
) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(
    ctx: Any, grad_loss: Tensor, _grad_teacher_sum: Tensor
) -> tuple[Tensor | None, ...]:
    grad = _dino_loss_backward_op(grad_loss, *ctx.saved_tensors, ctx.impl)
    return grad, None, None, None, None, None


_dino_loss_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """DINO loss, averaged over the pairs of different crops and over the batch.

    L = mean_{q != v} mean_b -sum_k softmax((t_q - c)/tau_t)_k log softmax(s_v/tau_s)_k

    (Caron et al. 2021, arXiv 2104.14294, Eq. 3 and Algorithm 1.) Half-precision logits are computed
    in fp32 and the gradient is rounded once; where either is fp64, everything is. An empty batch
    has loss 0. The gradient of the gradient is not implemented.

    Args:
        student: [S, B, K] logits, fp16/bf16/fp32/fp64, any strides; receives the gradient.
            Its first T crops are the teacher's T crops.
        teacher: [T, B, K] logits, S >= T >= 1; receives no gradient.
        center: [K] or [1, K]; not modified, and free to be updated before the backward pass.
        student_temp: > 0; a float, or a 0-d tensor on the logits' device, whose value is not
            checked (a captured CUDA graph sees it change).
        teacher_temp: as student_temp.
        impl: "torch" (vectorised, one pass), "reference" (the equation as it stands), or "auto".

    Returns: (loss, teacher_sum): a fp32 scalar, nats, and the [K] fp32 sum of the raw teacher
        logits over T and B, for the center's update; both fp64 where the logits are.

    Raises:
        ValueError: shapes or devices that do not fit, temperatures that are not > 0, or S = T = 1,
            which leaves no pairs; the message says what was expected and got.
        TypeError: logits or center that are not floating-point tensors.

    """
    _check_logits(student, teacher, center)
    chosen = choose_impl(impl, (student, teacher))
    dtype = compute_dtype(student, teacher)
    student_temp = _temperature("student_temp", student_temp, dtype, student.device)
    teacher_temp = _temperature("teacher_temp", teacher_temp, dtype, student.device)
    teacher = teacher.detach()
    # A copy: the caller's next act is often to update the center in place, before the backward.
    center = center.detach().reshape(-1).to(dtype, copy=True)
    if chosen == "reference":
        return reference.dino_loss(
            student.to(dtype), teacher.to(dtype), center, student_temp, teacher_temp
        )
    loss, teacher_sum = _dino_loss_op(student, teacher, center, student_temp, teacher_temp, chosen)
    return loss, teacher_sum


@torch.no_grad()
def teacher_entropy(teacher: Tensor, center: Tensor, teacher_temp: float | Tensor) -> Tensor:
    """Mean entropy of the teacher's centered and sharpened distributions.

    The loss is this entropy plus KL(teacher || student), so it tells a collapsed teacher (towards
    0, or towards log K) from one that the student follows (Caron et al. 2021, section 5.3).

    Args:
        teacher: [T, B, K] logits, B >= 1.
        center: [K] or [1, K].
        teacher_temp: > 0; a float, or a 0-d tensor.

    Returns: a fp32 scalar, nats: the mean over T and B (fp64 for fp64 logits).

    Raises: ValueError, TypeError: as dino_loss; ValueError also for an empty batch.

    """
    _check_teacher(teacher, center)
    if teacher.shape[1] == 0:
        raise ValueError(f"teacher must have B >= 1 rows, got shape {tuple(teacher.shape)}")
    dtype = compute_dtype(teacher)
    temp = _temperature("teacher_temp", teacher_temp, dtype, teacher.device)
    center = center.reshape(-1).to(dtype)
    row_entropy = center.new_zeros(teacher.shape[:2])
    for block in _blocks(teacher.shape[1], teacher.shape[2], teacher.device):
        for q, crop in enumerate(teacher[:, block]):
            log_probs = torch.log_softmax(torch.sub(crop, center).div_(temp), dim=-1)
            row_entropy[q, block] = (log_probs.exp() * log_probs).sum(dim=-1)
    return row_entropy.mean().neg_()


def _check_logits(student: Tensor, teacher: Tensor, center: Tensor) -> None:
    check_float_tensor("student", student)
    if student.dim() != 3:
        raise ValueError(f"student must be [S, B, K], got shape {tuple(student.shape)}")
    _check_teacher(teacher, center)
    if student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            "student [S, B, K] and teacher [T, B, K] must have the same B and K, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.shape[0] < teacher.shape[0]:
        raise ValueError(
            "student must hold the teacher's T crops and maybe more, so S >= T, "
            f"got S = {student.shape[0]} and T = {teacher.shape[0]}"
        )
    if student.shape[0] == 1:
        raise ValueError(
            "S = T = 1 leaves no pairs of different crops to compute the loss from: "
            "expected S >= 2 student crops"
        )
    if student.device != teacher.device:
        raise ValueError(
            "student and teacher must be on the same device, "
            f"got {student.device} and {teacher.device}"
        )


def _check_teacher(teacher: Tensor, center: Tensor) -> None:
    check_float_tensor("teacher", teacher)
    check_float_tensor("center", center)
    if teacher.dim() != 3 or teacher.shape[0] < 1 or teacher.shape[2] < 1:
        raise ValueError(
            f"teacher must be [T, B, K] with T, K >= 1, got shape {tuple(teacher.shape)}"
        )
    prototypes = teacher.shape[2]
    if tuple(center.shape) not in ((prototypes,), (1, prototypes)):
        raise ValueError(
            f"center must be [K] or [1, K] with K = {prototypes}, got shape {tuple(center.shape)}"
        )
    if center.device != teacher.device:
        raise ValueError(
            "center and teacher must be on the same device, "
            f"got {center.device} and {teacher.device}"
        )


def _temperature(name: str, value: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The temperature as a 0-d tensor on `device`, without waiting for the device."""
    if isinstance(value, Tensor):
        check_float_tensor(name, value)
        if value.dim() != 0:
            raise ValueError(
                f"{name} must be a float or a 0-d tensor, got shape {tuple(value.shape)}"
            )
        if value.device != device:
            raise ValueError(f"{name} must be on {device} like the logits, got {value.device}")
        return value.detach().to(dtype)
    if not is_number(value):
        raise TypeError(f"{name} must be a float or a 0-d tensor, got {type(value).__name__}")
    assert isinstance(value, (int, float))
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {value}")
    return torch.full((), value, dtype=dtype, device=device)


class DINOLoss(nn.Module):
    """The loss, its center and its teacher temperature: facebookresearch/dino's DINOLoss.

    The same constructor, forward, state_dict and result, in one process or many; the all-reduce
    happens only where torch.distributed is initialised. For gradient accumulation, call
    `pairwise` for each part of the batch, add up its teacher sums, and `update_center` once.

    Args:
        out_dim: K, the number of prototypes.
        ncrops: S >= 2, the student's crops; the first two are the teacher's.
        warmup_teacher_temp: teacher temperature of epoch 0.
        teacher_temp: teacher temperature after the warm-up.
        warmup_teacher_temp_epochs: epochs of linear warm-up, both ends included.
        nepochs: epochs in all; at least warmup_teacher_temp_epochs.
        student_temp: the student's temperature.
        center_momentum: in [0, 1]; the share of the center that an update keeps.

    Buffer `center` [1, K]: torch's default dtype at construction; `.double()` makes it fp64.
    `teacher_temp_schedule` is the teacher's temperature of each epoch.

    Raises: ValueError: a number out of its range; the message says what to change.

    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if out_dim < 1:
            raise ValueError(f"out_dim must be >= 1, got {out_dim}")
        if ncrops < 2:
            raise ValueError(
                f"ncrops must be >= 2, as the first two crops are the teacher's, got {ncrops}"
            )
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum must be in [0, 1], got {center_momentum}")
        if not 0 < student_temp < math.inf:
            raise ValueError(f"student_temp must be > 0 and finite, got {student_temp}")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.teacher_temp_schedule = _temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """Loss of one batch; the center is updated after its use.

        Args:
            student_output: [S*B, K] logits, crop after crop; receives the gradient.
            teacher_output: [2*B, K] logits of the first two crops; receives no gradient.
            epoch: from 0; chooses the teacher's temperature.

        Returns: the loss, a fp32 scalar in nats (fp64 for fp64 logits).

        Raises: ValueError, TypeError: as `pairwise`, and as `update_center` for an empty batch.

        """
        loss, teacher_sum = self.pairwise(student_output, teacher_output, epoch)
        self.update_center(teacher_sum, len(teacher_output))
        return loss

    def pairwise(
        self, student_output: Tensor, teacher_output: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """(loss, teacher_sum [K]) of one batch, as forward, without touching the center.

        Raises:
            ValueError: shapes that do not fit ncrops, K and each other, or an epoch outside
                0..nepochs - 1; the message says what was expected and got.
            TypeError: logits that are not floating-point tensors.

        """
        check_float_tensor("student_output", student_output)
        check_float_tensor("teacher_output", teacher_output)
        rows, prototypes = len(teacher_output) // 2, self.center.shape[-1]
        expected = ((self.ncrops * rows, prototypes), (2 * rows, prototypes))
        if (tuple(student_output.shape), tuple(teacher_output.shape)) != expected:
            raise ValueError(
                f"student_output [S*B, K] and teacher_output [2*B, K] must fit S = {self.ncrops} "
                f"and K = {prototypes}, got {tuple(student_output.shape)} "
                f"and {tuple(teacher_output.shape)}"
            )
        return dino_loss(
            student_output.reshape(self.ncrops, rows, prototypes),
            teacher_output.reshape(2, rows, prototypes),
            self.center,
            student_temp=self.student_temp,
            teacher_temp=self._teacher_temp(epoch),
        )

    @torch.no_grad()
    def update_center(self, teacher_sum: Tensor, rows: int) -> None:
        """Center <- m*center + (1 - m)*mean, over the teacher rows of all processes (Eq. 4).

        Args:
            teacher_sum: [K] (or [1, K]), the sum of this process's teacher logits over `rows`
                rows; not modified.
            rows: teacher rows in that sum (2*B a batch), the same number in every process. With
                0 rows in a single process the center stays.

        Raises: ValueError: another number of elements than K, negative rows, or 0 rows in one of
            several processes.

        """
        if teacher_sum.numel() != self.center.numel():
            raise ValueError(
                f"teacher_sum must be [K] with K = {self.center.numel()}, "
                f"got shape {tuple(teacher_sum.shape)}"
            )
        world = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
        if rows < 0 or (rows == 0 and world > 1):
            raise ValueError(f"rows must be >= {int(world > 1)}, got {rows}")
        if rows == 0:
            return
        total = teacher_sum.detach().reshape(self.center.shape)
        if world > 1:
            total = total.clone()
            torch.distributed.all_reduce(total)
        mean = (total / (rows * world)).to(self.center.dtype)
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)

    @torch.no_grad()
    def teacher_entropy(self, teacher_output: Tensor, epoch: int) -> Tensor:
        """Mean entropy, nats, of [2*B, K] teacher logits under this center and temperature."""
        return teacher_entropy(teacher_output[None], self.center, self._teacher_temp(epoch))

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return (
            f"out_dim={self.center.shape[-1]}, ncrops={self.ncrops}, "
            f"student_temp={self.student_temp}, center_momentum={self.center_momentum}"
        )

    def _teacher_temp(self, epoch: int) -> float:
        epoch = operator.index(epoch)
        if not 0 <= epoch < len(self.teacher_temp_schedule):
            raise ValueError(
                f"epoch must be in 0..{len(self.teacher_temp_schedule) - 1} (nepochs - 1), "
                f"got {epoch}"
            )
        return self.teacher_temp_schedule[epoch]


def _temperature_schedule(
    warmup: float, final: float, warmup_epochs: int, epochs: int
) -> tuple[float, ...]:
    """linspace(warmup, final, warmup_epochs), both ends included, then `final` to the end."""
    for name, temp in (("warmup_teacher_temp", warmup), ("teacher_temp", final)):
        if not 0 < temp < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {temp}")
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
