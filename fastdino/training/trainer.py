"""One training step of DINO: forward, loss, backward, clip, optimizer, EMA, in the paper's order.

Legend: S crops an image (2 global first), B images, K prototypes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastdino_kernels import DINOLoss
from torch import Tensor, nn

from fastdino import distributed
from fastdino.config import TrainConfig
from fastdino.errors import NonFiniteError
from fastdino.models.backbones import build_networks
from fastdino.models.compile import compile_network
from fastdino.models.head import MultiCropWrapper
from fastdino.runtime import Runtime, resolve_runtime
from fastdino.training.cuda_graph import GraphedStep
from fastdino.training.nonfinite import FiniteGuard
from fastdino.training.optimizers import build_fused_adamw, build_optimizer
from fastdino.training.resume import restore, start_from, state_of
from fastdino.training.schedules import cosine_schedule
from fastdino.training.sharding import check_sharding, gradients_unreduced, shard
from fastdino.training.update import FusedUpdate, SeparateUpdate, Update


class Trainer:
    """The DINO training step with everything it carries from step to step.

    Args:
        config: the run's settings.
        steps_per_epoch: optimizer steps an epoch; the schedules depend on it.
        device: where to compute; default: resolved from config.device.
        runtime: the resolved `auto` settings; default: resolved here, for this device.

    Attributes:
        student, teacher: the networks; state_dict() has the paper's keys (backbone.*, head.*).
        loss: DINOLoss; its `center` is [1, K].
        iteration: optimizer steps done; the schedules are read at this index.
        entropy: mean entropy in nats of the teacher's output, this process's, measured every
            config.print_freq steps and at each epoch's first, None after every other step. 0: each
            image falls on one prototype; ln K: on all alike. Near either, the training collapses.
            The same step's loss less this is KL(teacher || student).
        runtime: the resolved `auto` settings.

    Where torch.distributed is initialised, this is one process of a data-parallel run.
    """

    def __init__(
        self,
        config: TrainConfig,
        steps_per_epoch: int,
        *,
        device: torch.device | None = None,
        runtime: Runtime | None = None,
    ):
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.runtime = runtime or resolve_runtime(config, device, make_crops=False)
        self.device = torch.device(self.runtime.device.value)
        self.iteration = 0
        self._verified = 0  # the iterations before it are known to be finite
        self.entropy: Tensor | None = None
        self._init_networks()
        self.loss = DINOLoss(
            config.out_dim,
            config.ncrops,
            config.warmup_teacher_temp,
            config.teacher_temp,
            config.warmup_teacher_temp_epochs,
            config.epochs,
            inplace_backward=True,  # nothing reads the student's logits after the backward pass
        ).to(self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.runtime.autocast is torch.float16
        )
        self._guard = FiniteGuard(self.device)
        self._init_update()
        self._init_schedules()

    def _init_networks(self) -> None:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            student, teacher = build_networks(config)
        if config.fsdp:
            check_sharding(student)
        self.student = self._place(student)
        self.teacher = self._place(teacher)
        self._forward_student: nn.Module = self.student
        if distributed.world_size() > 1 and not config.fsdp:
            self._forward_student = nn.parallel.DistributedDataParallel(
                self.student,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,  # no copy from the messages back
                static_graph=config.grad_accum == 1,  # it does not go with no_sync
            )

    def _place(self, network: MultiCropWrapper) -> MultiCropWrapper:
        self.runtime.apply_to(network)
        if distributed.world_size() > 1 and self.device.type == "cuda":  # gloo has no SyncBN
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = network.to(self.device)
        if self.runtime.compile.on:
            compile_network(network)
        if self.config.fsdp:
            shard(network, self.device)
        return network

    def _init_update(self) -> None:
        config = self.config
        if config.mode == "fast" and config.optimizer == "adamw":
            if self.runtime.autocast and config.norm_last_layer and not config.fsdp:
                self.teacher.head.last_layer.cache_weight(self.runtime.autocast)
            fused = build_fused_adamw(
                self.student,
                self.teacher,
                clip_grad=config.clip_grad,
                skip_nonfinite=not self.scaler.is_enabled(),
            )
            self.optimizer: torch.optim.Optimizer = fused
            scalars = None
            if self.runtime.cuda_graph.on:
                scalars = torch.zeros(3, dtype=torch.float64, device=self.device)
            self._update: Update = FusedUpdate(
                self.student, fused, self.scaler, self._guard, scalars=scalars
            )
        else:
            self.optimizer = build_optimizer(config.optimizer, self.student)
            self._update = SeparateUpdate(
                self.student,
                self.teacher,
                self.optimizer,
                self.scaler,
                self._guard,
                max_norm=config.clip_grad,
                verify=self.verify,
            )
        # What _step is called by, and the epoch where a graph can see it change.
        self._call_step: Callable[..., tuple[Tensor | None, ...]] = self._step
        self._epoch: Tensor | None = None
        if self.runtime.cuda_graph.on:
            self._call_step = GraphedStep(self._step, self.device)
            self._epoch = torch.zeros((), dtype=torch.int64, device=self.device)

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
            NonFiniteError: as verify, which is called in each step, except in --mode fast.
        """
        self._check(crops)
        self._update.set_schedules(
            self.lr_schedule(self.iteration),
            self.weight_decay_schedule(self.iteration),
            self.momentum_schedule(self.iteration),
        )
        if self._epoch is not None:
            self._epoch.fill_(self.epoch)
        loss, self.entropy = self._call_step(
            crops,
            frozen=self.epoch < self.config.freeze_last_layer,
            measure=self.iteration % self.steps_per_epoch == 0
            or self.iteration % self.config.print_freq == 0,
        )
        self.iteration += 1
        assert loss is not None
        return loss

    def verify(self) -> None:
        """Waits for the device; raises NonFiniteError where a step was not finite.

        The loss or a gradient was NaN or infinite: parameters, moments, center and iteration are as
        they were before the first such step (a batch norm's statistics are not).
        """
        failure = self._guard.read()
        if failure is None:
            self._verified = self.iteration
            return
        self.optimizer.zero_grad()
        self.iteration = self._verified = self._verified + failure.step
        error = NonFiniteError(
            f"{failure.problem} at iteration {self.iteration} (epoch {self.epoch + 1})"
        )
        error.iteration = self.iteration
        raise error

    def skip_step(self) -> None:
        """Passes over one iteration of the schedules: its batch is left out of the training.

        Raises: NonFiniteError: as verify.
        """
        self.verify()
        self.iteration = self._verified = self.iteration + 1

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

    def _step(
        self, crops: Sequence[Tensor], *, frozen: bool, measure: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The step itself: the loss, and the teacher's entropy where it is to be measured."""
        loss, entropy, finish_center = self._forward_backward(crops, measure)
        self._update(frozen=frozen)
        center = self.loss.center.clone() if self._update.defers else None
        finish_center()
        if center is not None:  # else a step that is not finite has been refused by now
            self.loss.center.copy_(torch.where(self._guard.bad > 0, center, self.loss.center))
        self._guard.end_step()
        return loss, entropy

    def _forward_backward(
        self, crops: Sequence[Tensor], measure: bool
    ) -> tuple[Tensor, Tensor | None, Callable[[], None]]:
        """Leaves the gradients in .grad; returns loss, entropy, and what moves the center."""
        self.optimizer.zero_grad()
        parts = self.config.grad_accum
        rows = crops[0].shape[0] // parts
        epoch = self.epoch if self._epoch is None else self._epoch
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
                    loss, teacher_sum = self.loss.pairwise(student, teacher, epoch)
                losses.append(loss.detach())
                teacher_sums.append(teacher_sum)
                if measure:
                    entropies.append(self.loss.teacher_entropy(teacher, epoch))
                if last:
                    mean_loss = self._watched_mean(losses)
                    # Summed over the processes while the backward pass runs.
                    finish_center = self.loss.start_center_update(
                        torch.stack(teacher_sums).sum(0), 2 * rows * parts
                    )
                self.scaler.scale(loss / parts).backward()
        entropy = torch.stack(entropies).mean() if measure else None
        return mean_loss, entropy, finish_center

    def _watched_mean(self, losses: list[Tensor]) -> Tensor:
        """The loss over all parts and processes, each of which sees whether it is finite."""
        loss = distributed.mean(torch.stack(losses).mean())
        self._guard.watch_loss(loss)
        if not self._update.defers:
            self.verify()
        return loss

    def _autocast(self) -> torch.autocast:
        dtype = self.runtime.autocast
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def _no_gradient_sync(self) -> contextlib.AbstractContextManager[Any]:
        """While a part of the batch that is not the last goes backward."""
        if isinstance(self._forward_student, nn.parallel.DistributedDataParallel):
            return self._forward_student.no_sync()
        if self.config.fsdp:
            return gradients_unreduced(self.student)
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, under the paper's keys.

        In a run of many processes all of them must call it: it gathers their random generators.

        Raises: NonFiniteError: as verify.
        """
        self.verify()
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state_dict(), or a checkpoint of the paper's code (whole epochs).

        PyTorch's random generators go on where they were, if there were as many processes.

        Raises: CheckpointError: keys that are missing, tensors of other shapes (each is named),
            another optimizer, or another number of steps an epoch; nothing is taken up then.
        """
        restore(self, state)
        self._after_load()

    def start_from(self, backbone: dict[str, Tensor]) -> None:
        """Takes up a backbone's weights in student and teacher, before the first step.

        Args: backbone: of the names and shapes of student.backbone; the heads stay as they are.
        Raises: CheckpointError: other names or shapes (each is named).
        """
        start_from(self, backbone)
        self._after_load()

    def _after_load(self) -> None:
        if self.runtime.cuda_graph.on:  # what was recorded reads memory that is no longer ours
            self._call_step = GraphedStep(self._step, self.device)
        self._guard.read()  # what was seen before counts no more
        self._verified = self.iteration
