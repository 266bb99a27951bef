"""One training step of DINO: forward, loss, backward, clip, optimizer, EMA, in the paper's order.

Legend: S crops an image (2 global first), B images, K prototypes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from fastdino_kernels import DINOLoss, clip_grad_norms_, ema_update_
from torch import Tensor, nn

from fastdino import distributed
from fastdino.checkpoint import check_shapes, strip_prefix
from fastdino.config import TrainConfig
from fastdino.errors import CheckpointError, NonFiniteError
from fastdino.models.backbones import build_networks, choose_fast_path
from fastdino.models.head import MultiCropWrapper
from fastdino.optim import build_optimizer
from fastdino.schedules import cosine_schedule


@dataclass(frozen=True)
class Precision:
    """Type of the autocast regions (None: no autocast), and why: one phrase for the first line."""

    autocast: torch.dtype | None
    reason: str


def choose_precision(config: TrainConfig, device: torch.device) -> Precision:
    """Resolves --use_fp16 and --amp_dtype for a device."""
    if not config.use_fp16:
        return Precision(None, "fp32 (--use_fp16 false)")
    if config.amp_dtype == "bf16":
        return Precision(torch.bfloat16, "bf16 autocast, fp32 weights (asked for)")
    if config.amp_dtype == "fp16" or device.type == "cuda":
        return Precision(torch.float16, "fp16 autocast with loss scaling, fp32 weights")
    return Precision(None, "fp32 (fp16 is for GPUs)")


class Trainer:
    """The DINO training step with everything it carries from step to step.

    Args:
        config: the run's settings.
        steps_per_epoch: optimizer steps an epoch; the schedules depend on it.
        device: where to compute; default: what config.device says.

    Attributes:
        student, teacher: the networks; state_dict() has the paper's keys (backbone.*, head.*).
        loss: DINOLoss; its `center` is [1, K].
        iteration: optimizer steps done; the schedules are read at this index.
        entropy: mean entropy in nats of the teacher's output, this process's, measured every
            config.print_freq steps and at each epoch's first, None after every other step. 0: each
            image falls on one prototype; ln K: on all alike. Near either, the training collapses.
            The same step's loss less this is KL(teacher || student).
        optimizer, precision, fast_path: what the config resolved to.

    Where torch.distributed is initialised, this is one process of a data-parallel run.
    """

    def __init__(
        self, config: TrainConfig, steps_per_epoch: int, *, device: torch.device | None = None
    ):
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.device = device or distributed.choose_device(config.device)
        self.precision = choose_precision(config, self.device)
        self.iteration = 0
        self.entropy: Tensor | None = None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            student, teacher = build_networks(config)
        dtype = self.precision.autocast or torch.get_default_dtype()
        self.fast_path = choose_fast_path(config, student.backbone, self.device, dtype)
        self.student = self._place(student)
        self.teacher = self._place(teacher)
        self.loss = DINOLoss(
            config.out_dim,
            config.ncrops,
            config.warmup_teacher_temp,
            config.teacher_temp,
            config.warmup_teacher_temp_epochs,
            config.epochs,
            inplace_backward=True,  # nothing reads the student's logits after the backward pass
        ).to(self.device)
        self.optimizer = build_optimizer(config.optimizer, self.student)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision.autocast is torch.float16
        )
        self._forward_student: nn.Module = self.student
        if distributed.world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self._forward_student = nn.parallel.DistributedDataParallel(
                self.student, device_ids=ids
            )
        self._init_schedules()

    def _place(self, network: MultiCropWrapper) -> MultiCropWrapper:
        self.fast_path.apply_to(network)
        if distributed.world_size() > 1 and self.device.type == "cuda":  # gloo has no SyncBN
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network.to(self.device)

    def _init_schedules(self) -> None:
        config = self.config
        length = {"epochs": config.epochs, "steps_per_epoch": self.steps_per_epoch}
        global_batch = config.images_per_step * distributed.world_size()
        self.lr_schedule = cosine_schedule(
            config.lr * global_batch / 256,
            config.min_lr,
            warmup_epochs=config.warmup_epochs,
            **length,
        )
        self.weight_decay_schedule = cosine_schedule(
            config.weight_decay, config.weight_decay_end, **length
        )
        self.momentum_schedule = cosine_schedule(config.momentum_teacher, 1.0, **length)

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next step belongs to."""
        return self.iteration // self.steps_per_epoch

    def train_step(self, crops: Sequence[Tensor]) -> Tensor:
        """One optimizer step; returns the loss, averaged over all processes.

        Args:
            crops: 2 global crops and config.local_crops_number local ones, each [B, 3, H, W] of
                normalised pixels; B is split into config.grad_accum forward passes.

        Returns: fp32 0-d tensor, in nats (float64 where the networks are float64).

        Raises:
            ValueError: crops that do not fit the config, or a step beyond the last epoch.
            NonFiniteError: the loss or a gradient is NaN or infinite; parameters, moments, center
                and iteration are as they were before the step (a batch norm's statistics are not).
        """
        self._check(crops)
        self._set_schedules()
        loss, teacher_sum = self._forward_backward(crops)
        self._update_student(self._clip())
        self.loss.update_center(teacher_sum, 2 * crops[0].shape[0])
        ema_update_(
            list(self.teacher.parameters()),
            list(self.student.parameters()),
            self.momentum_schedule(self.iteration),
        )
        self.iteration += 1
        return loss

    def skip_step(self) -> None:
        """Passes over one iteration of the schedules: its batch is left out of the training."""
        self.iteration += 1

    def _check(self, crops: Sequence[Tensor]) -> None:
        if self.iteration >= self.config.epochs * self.steps_per_epoch:
            raise ValueError(
                f"the run is over: {self.config.epochs} epochs of {self.steps_per_epoch} steps"
            )
        if len(crops) != self.config.ncrops:
            raise ValueError(
                f"expected {self.config.ncrops} crops (2 global, {self.config.local_crops_number} "
                f"local), got {len(crops)}"
            )
        rows = crops[0].shape[0]
        for i, crop in enumerate(crops):
            if crop.ndim != 4 or crop.shape[:2] != (rows, 3):
                raise ValueError(f"crop {i} must be [{rows}, 3, H, W], got {tuple(crop.shape)}")
        if rows == 0 or rows % self.config.grad_accum:
            raise ValueError(
                f"a batch of {rows} cannot be split into grad_accum={self.config.grad_accum} parts"
            )

    def _set_schedules(self) -> None:
        lr = self.lr_schedule(self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Only the first group is decayed.
        self.optimizer.param_groups[0]["weight_decay"] = self.weight_decay_schedule(self.iteration)

    def _forward_backward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Leaves the gradients in .grad; returns the loss and the teacher's column sum [K]."""
        self.optimizer.zero_grad()
        parts = self.config.grad_accum
        rows = crops[0].shape[0] // parts
        step = self.iteration % self.steps_per_epoch
        measure = step == 0 or self.iteration % self.config.print_freq == 0
        losses, teacher_sums, entropies = [], [], []
        for part in range(parts):
            batch = [
                crop[part * rows : (part + 1) * rows].to(self.device, non_blocking=True)
                for crop in crops
            ]
            last = part == parts - 1
            with contextlib.nullcontext() if last else self._no_gradient_sync():
                with self._autocast():
                    with torch.no_grad():
                        teacher = self.teacher(batch[:2])
                    student = self._forward_student(batch)
                    loss, teacher_sum = self.loss.pairwise(student, teacher, self.epoch)
                losses.append(loss.detach())
                teacher_sums.append(teacher_sum)
                if measure:
                    entropies.append(self.loss.teacher_entropy(teacher, self.epoch))
                if last:
                    mean_loss = self._finite_mean(losses)
                self.scaler.scale(loss / parts).backward()
        self.entropy = torch.stack(entropies).mean() if measure else None
        return mean_loss, torch.stack(teacher_sums).sum(0)

    def _finite_mean(self, losses: list[Tensor]) -> Tensor:
        """The loss over all parts and processes; every process raises where it is not finite."""
        loss = distributed.mean(torch.stack(losses).mean())
        if not math.isfinite(loss.item()):
            self._refuse(f"the loss is {loss.item()}")
        return loss

    def _clip(self) -> Tensor:
        """Clips each parameter's gradient; returns the norms before, [parameters]."""
        self.scaler.unscale_(self.optimizer)
        return clip_grad_norms_(self.student.parameters(), self.config.clip_grad or math.inf)

    def _refuse(self, problem: str) -> NoReturn:
        self.optimizer.zero_grad()
        error = NonFiniteError(f"{problem} at iteration {self.iteration} (epoch {self.epoch + 1})")
        error.iteration = self.iteration
        raise error

    def _update_student(self, norms: Tensor) -> None:
        # With loss scaling such gradients are expected now and then: the scaler skips the update.
        if not self.scaler.is_enabled() and not bool(torch.isfinite(norms).all()):
            self._refuse("a gradient is not finite")
        if self.epoch < self.config.freeze_last_layer:
            # None, not 0: the optimizer then neither decays them nor moves their moments.
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _autocast(self) -> torch.autocast:
        dtype = self.precision.autocast
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def _no_gradient_sync(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self._forward_student, nn.parallel.DistributedDataParallel):
            return self._forward_student.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, under the paper's keys.

        In a run of many processes all of them must call it: it gathers their random generators.
        """
        state = {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "dino_loss": self.loss.state_dict(),
            "epoch": self.epoch,
            "iteration": self.iteration,
            "steps_per_epoch": self.steps_per_epoch,
            "generators": distributed.gather(self._generators()),
        }
        if self.scaler.is_enabled():
            state["fp16_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state_dict(), or a checkpoint of the paper's code (whole epochs).

        PyTorch's random generators go on where they were, if there were as many processes.

        Raises: CheckpointError: keys that are missing, tensors of other shapes (each is named),
            another optimizer, or another number of steps an epoch; nothing is taken up then.
        """
        for key in ("student", "teacher", "optimizer", "dino_loss", "epoch"):
            if key not in state:
                raise CheckpointError(f"the checkpoint has no {key!r}: it has {', '.join(state)}")
        steps = state.get("steps_per_epoch", self.steps_per_epoch)
        if steps != self.steps_per_epoch:
            raise CheckpointError(
                f"the checkpoint's run had {steps} steps an epoch, this one has "
                f"{self.steps_per_epoch}: resume with the same images and the same global batch "
                "(--batch_size_per_gpu * --grad_accum * processes); with another number of "
                "processes, --last_batch drop or pad can be what gives as many"
            )
        networks = {name: strip_prefix(state[name], "module.") for name in ("student", "teacher")}
        networks["dino_loss"] = state["dino_loss"]
        modules = {"student": self.student, "teacher": self.teacher, "dino_loss": self.loss}
        for name, module in modules.items():
            try:
                check_shapes(module, networks[name], name)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}; --arch, --patch_size, --out_dim, --use_bn_in_head and "
                    "--global_crops_size must be those of the checkpoint's run"
                ) from error
        check_optimizer(self.optimizer, state["optimizer"])
        for name, module in modules.items():
            module.load_state_dict(networks[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and "fp16_scaler" in state:
            self.scaler.load_state_dict(state["fp16_scaler"])
        self.iteration = state.get("iteration", state["epoch"] * self.steps_per_epoch)
        generators = state.get("generators", [])
        if len(generators) == distributed.world_size():
            torch.set_rng_state(generators[distributed.rank()]["cpu"])
            if self.device.type == "cuda" and "cuda" in generators[distributed.rank()]:
                torch.cuda.set_rng_state(generators[distributed.rank()]["cuda"], self.device)

    def _generators(self) -> dict[str, Tensor]:
        """The random generators that stochastic depth draws from, in this process."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises CheckpointError where `state` is of another optimizer, or of other parameters."""

    def describe(groups: list[dict[str, Any]]) -> str:
        kinds = {"betas": "adamw", "eta": "lars", "nesterov": "sgd"}
        kind = next((kinds[key] for key in kinds if key in groups[0]), "unknown")
        return f"{kind} over {' + '.join(str(len(group['params'])) for group in groups)} parameters"

    saved, own = describe(state["param_groups"]), describe(optimizer.param_groups)
    if saved != own:
        raise CheckpointError(
            f"the checkpoint's optimizer is {saved}, this run's is {own}: --optimizer and "
            "--norm_last_layer must be those of the checkpoint's run"
        )
