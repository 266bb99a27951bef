"""One DINO training step: forward, loss, backward, clip, optimizer, EMA, in the paper's order.

Legend: S crops per image (2 global crops first), B images, K prototypes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from fastdino_kernels import DINOLoss, koleo_loss
from torch import Tensor, nn

from fastdino import distributed
from fastdino.checkpoint import add_prefix, check_count, check_shapes, strip_prefix
from fastdino.config import TrainConfig
from fastdino.errors import CheckpointError
from fastdino.models.backbones import build_networks
from fastdino.models.batch_norm import has_batch_norm, synchronize_batch_norm
from fastdino.models.compile import compile_network
from fastdino.models.drop_path import StepDraws
from fastdino.models.head import MultiCropWrapper
from fastdino.models.vit import VisionTransformer
from fastdino.optimizer_state import check_optimizer
from fastdino.runtime import Runtime, resolve_runtime
from fastdino.training import sharding
from fastdino.training.cuda_graph import GraphedStep
from fastdino.training.gradient_buckets import data_parallel
from fastdino.training.nonfinite import FiniteGuard
from fastdino.training.schedules import cosine_schedule
from fastdino.training.update import FusedUpdate, SeparateUpdate

TERMS = ("dino", "koleo")  # of the loss


class StepOutputs(NamedTuple):
    """Results of a step or of one of its forward passes.

    Attributes:
        loss: [], the DINO loss + config.koleo_weight * KoLeo.
        entropy: [], entropy of the targets; None if it is not measured.
        terms: [2], the DINO loss and KoLeo; None with koleo_weight 0.
    """

    loss: Tensor
    entropy: Tensor | None
    terms: Tensor | None


class Trainer:
    """The DINO training step and all state carried from step to step.

    If torch.distributed is initialised, it is one rank of a data-parallel run.

    Args:
        config: settings of the run.
        steps_per_epoch: optimizer steps per epoch, for the schedules.
        device: device to compute on; default: resolved from config.device.
        runtime: the resolved `auto` settings; default: resolved here, for this device.

    Attributes:
        batch: this process's images per forward pass, and forward passes per step.
        student, teacher: the networks; state_dict() has the paper's keys (backbone.*, head.*).
        loss: DINOLoss; its `center` is [1, K].
        iteration: number of optimizer steps done; the schedules are evaluated at this index.
        entropy: mean entropy of the targets on this rank, in nats, measured every
            config.print_freq steps and in the first step of each epoch; None after other steps.
            At 0 each image maps to one prototype, at ln K to all equally; close to either, the
            training collapses. DINO loss minus entropy is KL(teacher || student).
        terms: terms of the last step's loss, averaged over all ranks: loss = terms["dino"] +
            config.koleo_weight * terms["koleo"]. Empty with koleo_weight 0.
        runtime: the resolved `auto` settings.
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
        config.check_world_size(distributed.world_size())
        self.config = config
        self.batch = config.split_batch(distributed.world_size())
        self.steps_per_epoch = steps_per_epoch
        self.runtime = runtime or resolve_runtime(config, device, make_crops=False)
        self.device = torch.device(self.runtime.device.value)
        self.iteration = 0
        self.entropy: Tensor | None = None
        self.terms: dict[str, Tensor] = {}
        self._init_networks()
        self.loss = DINOLoss(
            config.out_dim,
            config.ncrops,
            config.warmup_teacher_temp,
            config.teacher_temp,
            config.warmup_teacher_temp_epochs,
            config.epochs,
            centering=config.centering,
            inplace_backward=True,  # the student's logits are not used after the backward pass
        ).to(self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.runtime.autocast is torch.float16
        )
        self._init_update()
        self._init_schedules()

    def _init_networks(self) -> None:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            student, teacher = build_networks(config)
        self._draws: StepDraws | None = None
        if config.depth_follows_images:
            assert isinstance(student.backbone, VisionTransformer)
            self._draws = student.backbone.draw_scales = StepDraws(config.seed)
        if config.fsdp:
            sharding.check_sharding(student)
        self.student = self._prepare(student)
        self.teacher = self._prepare(teacher)
        self._forward_student: nn.Module = self.student
        if distributed.world_size() > 1 and not config.fsdp:
            static = self.batch.passes == 1  # not compatible with no_sync
            self._forward_student = data_parallel(self.student, self.device, static=static)

    def _prepare(self, network: MultiCropWrapper) -> MultiCropWrapper:
        """Apply the runtime's choices to a network and move it to the device."""
        self.runtime.apply_to(network)
        if distributed.world_size() > 1:
            network = synchronize_batch_norm(network, self.device)
        network = network.to(self.device)
        if self.runtime.compile.on:
            compile_network(network)
        if self.config.fsdp:
            sharding.shard(network, self.device)
        return network

    def _init_update(self) -> None:
        config, graphed = self.config, self.runtime.cuda_graph.on
        fused = config.mode == "fast" and config.optimizer == "adamw"
        self._guard = FiniteGuard(self.device, self.steps_per_epoch, immediate=not fused)
        parts = (self.student, self.teacher, self.scaler, self._guard)
        if fused:
            if self.runtime.autocast and config.norm_last_layer and not config.fsdp:
                self.teacher.head.last_layer.cache_weight(self.runtime.autocast)
            self._update: FusedUpdate | SeparateUpdate = FusedUpdate(
                *parts, clip_grad=config.clip_grad, graphed=graphed
            )
        else:
            self._update = SeparateUpdate(
                *parts, optimizer=config.optimizer, clip_grad=config.clip_grad
            )
        self.optimizer: torch.optim.Optimizer = self._update.optimizer
        self._run_step: Callable[..., tuple[Tensor | None, ...]] = self._step
        self._device_epoch: Tensor | None = None  # a CUDA graph reads the epoch from here
        if graphed:
            self._run_step = GraphedStep(self._step, self.device)
            self._device_epoch = torch.zeros((), dtype=torch.int64, device=self.device)

    def _init_schedules(self) -> None:
        config = self.config
        length = {"epochs": config.epochs, "steps_per_epoch": self.steps_per_epoch}
        global_batch = self.batch.images_per_step * distributed.world_size()
        lr = config.lr * global_batch / 256
        self.lr_schedule = cosine_schedule(
            lr, config.min_lr, warmup_epochs=config.warmup_epochs, **length
        )
        self.weight_decay_schedule = cosine_schedule(
            config.weight_decay, config.weight_decay_end, **length
        )
        self.momentum_schedule = cosine_schedule(config.momentum_teacher, 1.0, **length)

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0."""
        return self.iteration // self.steps_per_epoch

    def train_step(self, crops: Sequence[Tensor]) -> Tensor:
        """Run one optimizer step; return the loss, averaged over all ranks.

        Args:
            crops: 2 global crops and config.local_crops_number local crops, each [B, 3, H, W] of
                normalised pixels; B is split into batch.passes forward passes.

        Returns: fp32 0-d tensor, in nats (float64 if the networks are float64): the DINO loss, with
            config.koleo_weight the weighted sum of `terms`.

        Raises:
            ValueError: crops that do not match the config, or a step after the last epoch.
            NonFiniteError: see `verify`, which --mode parity calls in every step.
        """
        self._check_crops(crops)
        self._set_schedules(self.iteration)
        if self._device_epoch is not None:
            self._device_epoch.fill_(self.epoch)
        loss, self.entropy, terms = self._run_step(
            crops,
            frozen=self.epoch < self.config.freeze_last_layer,
            measure=self.iteration % self.steps_per_epoch == 0
            or self.iteration % self.config.print_freq == 0,
        )
        self.terms = {} if terms is None else dict(zip(TERMS, terms.unbind(), strict=True))
        self.iteration += 1
        assert loss is not None
        return loss

    def _set_schedules(self, iteration: int) -> None:
        self._update.set_schedules(
            self.lr_schedule(iteration),
            self.weight_decay_schedule(iteration),
            self.momentum_schedule(iteration),
        )

    def verify(self) -> None:
        """Wait for the device; raise NonFiniteError if a loss or gradient was NaN or infinite.

        Parameters, moments, center and iteration are then as before the first such step; batch
        norm statistics are not.
        """
        try:
            self._guard.check()
        finally:
            self.iteration = self._guard.iteration

    def skip_step(self) -> None:
        """Advance the schedules by one iteration without training.

        Raises: NonFiniteError: see `verify`.
        """
        self.verify()
        self.iteration += 1
        self._guard.restart(self.iteration)

    def _check_crops(self, crops: Sequence[Tensor]) -> None:
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
        if rows == 0 or rows % self.batch.passes:
            raise ValueError(
                f"a batch of {rows} cannot be split into grad_accum={self.batch.passes} parts"
            )
        if self.config.koleo_weight and rows == self.batch.passes:
            raise ValueError(
                f"koleo_weight={self.config.koleo_weight} compares the images of a forward pass: "
                f"expected 2 or more, got a batch of {rows} in grad_accum={rows} parts"
            )

    def _step(self, crops: Sequence[Tensor], *, frozen: bool, measure: bool) -> StepOutputs:
        """Run one step; measure the entropy if `measure` is true."""
        outputs, finish_center = self._forward_backward(crops, measure)
        self._update(frozen=frozen)
        finish_center(skip=self._guard.bad)
        self._guard.end_step()
        return outputs

    def _forward_backward(
        self, crops: Sequence[Tensor], measure: bool
    ) -> tuple[StepOutputs, Callable[..., None]]:
        """Compute the gradients; return the results and the function that updates the center."""
        self.optimizer.zero_grad()
        parts = self.batch.passes
        rows = crops[0].shape[0] // parts
        dtype = self.runtime.autocast
        outputs, teacher_sums = [], []
        for part in range(parts):
            batch = [
                crop[part * rows : (part + 1) * rows].to(self.device, non_blocking=True)
                for crop in crops
            ]
            if self._draws is not None:
                self._start_draws(self._draws, part, rows)
            last = part == parts - 1
            with contextlib.nullcontext() if last else self._no_gradient_sync():
                with torch.autocast(self.device.type, dtype or torch.bfloat16, dtype is not None):
                    loss, output, teacher_sum = self._forward(batch, measure)
                outputs.append(output)
                teacher_sums.append(teacher_sum)
                if last:
                    means = _mean_outputs(outputs)
                    self._guard.watch_loss(means.loss)
                    # The all-reduce overlaps with the backward pass.
                    finish_center = self.loss.start_center_update(
                        torch.stack(teacher_sums).sum(0), 2 * rows * parts
                    )
                self.scaler.scale(loss / parts).backward()
        return means, finish_center

    def _start_draws(self, draws: StepDraws, part: int, rows: int) -> None:
        """Select the images of a forward pass, which EpochPlan deals to the ranks one by one."""
        ranks = distributed.world_size()
        first, after = part * rows * ranks, (part + 1) * rows * ranks
        places = slice(first + distributed.rank(), after, ranks)
        draws.start_pass(self.iteration, places, rows * self.batch.passes * ranks)

    def _forward(
        self, crops: Sequence[Tensor], measure: bool
    ) -> tuple[Tensor, StepOutputs, Tensor]:
        """Return the loss with its graph, all results, and the sum [K] of the teacher's logits."""
        epoch = self.epoch if self._device_epoch is None else self._device_epoch
        with torch.no_grad():
            teacher = self.teacher(crops[:2])
        center = self.loss.target_center(teacher, epoch)
        weight, features, terms = self.config.koleo_weight, None, None
        if weight:
            student, features = self._forward_student(crops, with_features=True)
        else:
            student = self._forward_student(crops)
        loss, teacher_sum = self.loss.pairwise(student, teacher, epoch, center)
        if features is not None:
            first, second = features[: len(teacher)].chunk(2)
            koleo = koleo_loss(first) + koleo_loss(second)
            terms = torch.stack([loss, koleo]).detach()
            loss = loss + weight * koleo
        entropy = self.loss.teacher_entropy(teacher, epoch, center) if measure else None
        return loss, StepOutputs(loss.detach(), entropy, terms), teacher_sum

    def _no_gradient_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for the backward pass of every part of the batch but the last."""
        if isinstance(self._forward_student, nn.parallel.DistributedDataParallel):
            return self._forward_student.no_sync()
        if self.config.fsdp:
            return sharding.no_gradient_sync(self.student)
        return contextlib.nullcontext()

    def state_dict(self, *, gathered: bool = True) -> dict[str, Any]:
        """Return everything needed to resume, with the keys and tensor names of the paper's code.

        All ranks must call it: it gathers their random generators.

        Args: gathered: gather sharded tensors on the CPU; False: they stay sharded.

        Raises: NonFiniteError: see `verify`.
        """
        self.verify()
        gather = sharding.full_tensors if gathered else lambda state: state
        optimizer = gather(self.optimizer.state_dict())
        for group in optimizer["param_groups"]:  # with a CUDA graph, lr and decay are tensors
            group.update({k: v.item() for k, v in group.items() if isinstance(v, Tensor)})
        student, teacher = gather(self.student.state_dict()), gather(self.teacher.state_dict())
        state = {
            # The paper's code wraps the student, and with batch norm the teacher, for DDP.
            "student": add_prefix(student, "module."),
            "teacher": add_prefix(teacher, "module.") if has_batch_norm(self.teacher) else teacher,
            "optimizer": optimizer,
            "dino_loss": self.loss.state_dict(),
            "epoch": self.epoch,
            "iteration": self.iteration,
            "steps_per_epoch": self.steps_per_epoch,
            "generators": distributed.gather(_generator_states(self.device)),
        }
        if self.scaler.is_enabled():
            state["fp16_scaler"] = self.scaler.state_dict()
        return state

    def empty_parts(self) -> Callable[[tuple[Any, ...], torch.Size, torch.dtype], Tensor]:
        """Return a function that makes the tensor to read a part of a state_dict() into."""
        student = add_prefix(self.student.state_dict(), "module.")
        states = {"student": student, "teacher": self.teacher.state_dict()}
        return sharding.empty_like_own(states, self.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state_dict(), or a checkpoint of the paper's code (whole epochs).

        PyTorch's random generators are restored if the world size is that of the checkpoint, else
        seeded anew.

        Raises: CheckpointError: missing keys, tensors of other shapes (each is listed), another
            optimizer, or a different number of steps per epoch; nothing is loaded then.
        """
        for key in ("student", "teacher", "optimizer", "dino_loss", "epoch"):
            if key not in state:
                raise CheckpointError(f"the checkpoint has no {key!r}: it has {', '.join(state)}")
        steps = state.get("steps_per_epoch", self.steps_per_epoch)
        if steps != self.steps_per_epoch:
            raise CheckpointError(
                f"the checkpoint's run had {steps} steps per epoch, this one has "
                f"{self.steps_per_epoch}: resume with the same images and the same global batch "
                "(--batch_size_per_gpu * --grad_accum * world size, or --global_batch_size); with "
                "another world size, --last_batch drop or pad may give the same number"
            )
        iteration = check_count(
            state, "iteration", check_count(state, "epoch") * self.steps_per_epoch
        )
        modules = {"student": self.student, "teacher": self.teacher, "dino_loss": self.loss}
        tensors = {name: strip_prefix(state[name], "module.") for name in modules}
        for name, module in modules.items():
            try:
                check_shapes(module, tensors[name], name)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}; use the --arch, --patch_size, --out_dim, --use_bn_in_head and "
                    "--global_crops_size of the checkpoint's run"
                ) from error
        check_optimizer(self.optimizer, state["optimizer"])
        for name, module in modules.items():
            sharding.load_module(module, tensors[name])
        sharding.load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and "fp16_scaler" in state:
            self.scaler.load_state_dict(_scaler_state(self.scaler, state["fp16_scaler"]))
        self.iteration = iteration
        if 0 < iteration <= self.config.epochs * self.steps_per_epoch:
            # Of the last step: a run that was killed between two files of a save writes it again.
            self._set_schedules(iteration - 1)
        generators = state.get("generators", [])
        if len(generators) == distributed.world_size():
            _set_generator_states(generators[distributed.rank()], self.device)
        elif generators:  # the numbers must not be those of the run's start
            entropy = self.config.seed, iteration, distributed.rank()
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        self._after_load()

    def start_from(self, backbone: dict[str, Tensor]) -> None:
        """Load backbone weights into student and teacher, before the first step.

        Args: backbone: names and shapes of student.backbone; the heads are unchanged.
        Raises: CheckpointError: other names or shapes (each is listed).
        """
        named = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
        for network in (self.student, self.teacher):
            state = {k: v for k, v in network.state_dict().items() if not k.startswith("backbone.")}
            state = {**sharding.full_tensors(state), **named}
            check_shapes(network, state, "the backbone to start from")
            sharding.load_module(network, state)
        self._after_load()

    def _after_load(self) -> None:
        if isinstance(self._update, FusedUpdate):
            self._update.refresh_cache()
        if self.runtime.cuda_graph.on:  # the recorded graph reads optimizer state that is replaced
            self._run_step = GraphedStep(self._step, self.device)
        self._guard.restart(self.iteration)


def _scaler_state(scaler: torch.amp.GradScaler, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state of a GradScaler with values of the types of its own."""
    own = scaler.state_dict()
    for name in own:
        if name not in saved:
            raise CheckpointError(f"the checkpoint's fp16_scaler has no {name}")
    return {name: type(value)(saved[name]) for name, value in own.items()}


def _mean_outputs(parts: Sequence[StepOutputs]) -> StepOutputs:
    """Average over forward passes, and all but the entropy over ranks."""
    entropies = [part.entropy for part in parts if part.entropy is not None]
    terms = [part.terms for part in parts if part.terms is not None]
    return StepOutputs(
        distributed.mean(torch.stack([part.loss for part in parts]).mean()),
        torch.stack(entropies).mean() if entropies else None,
        distributed.mean(torch.stack(terms).mean(0)) if terms else None,
    )


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return this rank's random generator states, which stochastic depth draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_generator_states(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
