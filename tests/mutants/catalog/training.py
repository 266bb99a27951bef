"""Step, update, schedules, checkpoint, rollback, ranks, settings and the gate of the benchmark."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINER = "fastdino/training/trainer.py"
UPDATE = "fastdino/training/update.py"
NONFINITE = "fastdino/training/nonfinite.py"
OPTIMIZERS = "fastdino/training/optimizers.py"
RESUME = "fastdino/training/resume.py"
LOOP = "fastdino/training/loop.py"
LOGGING = "fastdino/training/logging.py"
CHECKPOINT = "fastdino/checkpoint.py"
SAMPLER = "fastdino/data/sampler.py"
SCHEDULES = "fastdino/training/schedules.py"
DISTRIBUTED = "fastdino/distributed.py"
LAUNCH = "fastdino/launch.py"
RUNTIME = "fastdino/runtime.py"
CONFIG = "fastdino/config.py"
PICKLES = "fastdino/numpy_pickles.py"
CORRECTNESS = "fastdino/bench/correctness.py"
FLOPS = "fastdino/bench/flops.py"

# Narrow selections: a mutant costs the time of its tests.
NONFINITE_STEP = "tests/test_nonfinite_step.py"
STATE = tuple(
    f"{NONFINITE_STEP}::test_nonfinite_step_leaves_the_state_unchanged[{case}]"
    for case in ("fast-off-loss", "fast-off-gradient inf", "parity-gradient nan")
)
SKIPPED = (f"{NONFINITE_STEP}::test_skipped_step_advances_the_schedules_and_nothing_else",)
SCALED = (
    f"{NONFINITE_STEP}::test_overflow_with_loss_scaling_skips_the_update_and_halves_the_scale",
    f"{NONFINITE_STEP}::test_nonfinite_loss_with_loss_scaling_is_a_failure",
)
_UPDATE = "tests/test_update.py::test_"
FROZEN = tuple(
    f"{_UPDATE}last_layer_and_its_moments_start_after_the_freeze[{case}]"
    for case in ("parity", "fast-off")
)
SCHEDULED = (f"{_UPDATE}every_step_has_the_papers_schedules[parity]",)
CLIPPED = (f"{_UPDATE}each_gradient_is_clipped_by_its_own_norm[0.0]",)
ACCUMULATED = (f"{_UPDATE}accumulated_gradients_are_those_of_the_whole_batch[parity-sgd-2]",)
_EXACT = "tests/test_exact_resume.py::test_"
_BITS = f"{_EXACT}resumed_trainer_has_the_bits_of_an_uninterrupted_one"
BITS, SCALER = (f"{_BITS}[default]",), (f"{_BITS}[fp16]",)
REFUSED = (
    f"{_EXACT}a_checkpoint_without_a_part_is_refused_by_name_and_loads_nothing",
    f"{_EXACT}a_checkpoint_without_a_tensor_is_refused_by_name",
    f"{_EXACT}a_checkpoint_without_moments_of_a_parameter_is_refused_by_name",
    f"{_EXACT}a_scaler_without_a_field_is_refused",
)
_ROLLBACKS = "tests/test_rollback.py::test_"
TWO_INCIDENTS = (f"{_ROLLBACKS}two_incidents_leave_two_batches_out[fast]",)
REMEMBERED = (f"{_ROLLBACKS}a_rollback_is_remembered_across_a_resume",)
LIMITED = (f"{_ROLLBACKS}the_number_of_rollbacks_is_limited_per_checkpoint[parity]",)
BROKEN_SAVE = (f"{_ROLLBACKS}weights_that_a_save_finds_broken_leave_the_last_batch_out[parity]",)
PARTS = ("tests/test_missing_parts.py::test_missing_parts_are_explained",)
LOGGED = ("tests/test_run_log.py::test_log_has_the_means_of_each_epoch[parity]",)
KEPT = ("tests/test_run_log.py::test_checkpoints_are_saved_and_kept_at_the_requested_times",)
RANKS = tuple(
    f"tests/test_ranks.py::test_{name}"
    for name in (
        "accumulation_sends_gradients_once_per_step",
        "learning_rate_grows_with_the_global_batch",
        "means_are_of_all_ranks",
    )
)
STREAMS = ("tests/test_run_ranks.py::test_two_ranks_in_fast_mode_resume_and_roll_back_together",)
ENVIRONMENT = (
    "tests/test_launch_environment.py::test_the_environment_states_the_place_of_this_process",
    "tests/test_launch_environment.py::test_contradictory_variables_are_one_line",
)
CHOICES = tuple(
    f"tests/test_runtime.py::test_{name}"
    for name in (
        "a_missing_gpu_is_an_error",
        "precision",
        "auto_depends_on_the_machine_and_working_backends",
        "vit_settings",
    )
)
BOUNDS = (
    "tests/test_config.py::test_values_at_their_bounds_are_valid",
    "tests/test_config.py::test_values_beyond_their_bounds_are_errors",
)
GROUPS = tuple(
    "tests/test_optimizers.py::test_biases_and_norms_have_no_weight_decay_and_frozen_weights_no_"
    f"update[{{}}-{norm_last_layer}]"
    for norm_last_layer in (True, False)
)
EQUATIONS = (
    "tests/test_optimizers.py::test_lars_follows_its_equations",
    "tests/test_optimizers.py::test_optimizers_have_the_papers_settings",
)
GATE = ("tests/test_bench_correctness.py",)
VERDICT = (f"{GATE[0]}::test_each_quantity_has_to_be_within_the_tolerance",)
CENTER = (f"{GATE[0]}::test_a_non_finite_value_in_any_result_fails_the_check[center-nan]",)
FLOP = ("tests/test_bench_flops.py",)

MUTANTS = (
    Mutant(
        TRAINER,
        "self.iteration += 1\n        self._guard.restart(self.iteration)",
        "self.iteration += 1",
        SKIPPED,
    ),
    Mutant(
        TRAINER,
        "return self._forward_student.no_sync()",
        "return contextlib.nullcontext()",
        RANKS,
        reported=True,
    ),
    Mutant(
        TRAINER,
        "return sharding.no_gradient_sync(self.student)",
        "return contextlib.nullcontext()",
        RANKS,
    ),
    Mutant(TRAINER, "self._after_load()\n\n    def start_from", "\n    def start_from", BITS),
    Mutant(TRAINER, "finish_center(skip=self._guard.bad)", "finish_center()", STATE),
    Mutant(TRAINER, "self._guard.watch_loss(means.loss)", "pass", STATE),
    Mutant(TRAINER, "(loss / parts).backward()", "(loss).backward()", ACCUMULATED),
    Mutant(TRAINER, "2 * rows * parts", "2 * rows", ACCUMULATED),
    Mutant(TRAINER, "self.optimizer.zero_grad()", "pass", BITS),
    Mutant(TRAINER, "frozen=self.epoch < self", "frozen=self.epoch <= self", FROZEN),
    Mutant(
        TRAINER,
        "static = self.batch.passes == 1",
        "static = True",
        ("tests/test_ranks.py::test_other_networks_than_vits_accumulate_gradients_too",),
    ),
    Mutant(TRAINER, "lr = config.lr * global_batch / 256", "lr = config.lr", SCHEDULED),
    Mutant(
        TRAINER,
        "global_batch = self.batch.images_per_step * distributed.world_size()",
        "global_batch = self.batch.images_per_step",
        RANKS,
    ),
    Mutant(
        TRAINER,
        "cosine_schedule(config.momentum_teacher, 1.0, **length)",
        "cosine_schedule(config.momentum_teacher, 0.999, **length)",
        SCHEDULED,
    ),
    Mutant(
        TRAINER,
        "config.weight_decay, config.weight_decay_end, **length",
        "config.weight_decay, config.weight_decay, **length",
        SCHEDULED,
    ),
    Mutant(TRAINER, 'state["fp16_scaler"] = self.scaler.state_dict()', "pass", SCALER),
    Mutant(TRAINER, "self.scaler.load_state_dict(_scaler_state(", "print(_scaler_state(", SCALER),
    Mutant(TRAINER, "if name not in saved:", "if False:", REFUSED),
    Mutant(
        TRAINER,
        'if device.type == "cuda" and "cuda" in state:',
        'if device.type == "cuda" and "cuda" not in state:',
        ("tests/test_cuda_resume.py",),
    ),
    Mutant(
        TRAINER,
        "if len(generators) == distributed.world_size():",
        "if len(generators) > distributed.world_size():",
        BITS,
    ),
    Mutant(TRAINER, "generators[distributed.rank()]", "generators[0]", STREAMS),
    Mutant(
        TRAINER,
        '("student", "teacher", "optimizer", "dino_loss", "epoch"):',
        '("student", "teacher", "optimizer", "dino_loss"):',
        REFUSED,
    ),
    Mutant(
        TRAINER,
        "measure=self.iteration % self.steps_per_epoch == 0\n            or",
        "measure=",
        (
            "tests/test_trainer.py::test_entropy_is_measured_every_print_freq_steps_and_at_epoch_starts",
        ),
    ),
    Mutant(UPDATE, "if not self._scaler.is_enabled():  # with", "if True:  # with", SCALED),
    Mutant(UPDATE, "skip=self._guard.bad)", "skip=None)", STATE),
    Mutant(
        UPDATE,
        "skip_nonfinite=not scaler.is_enabled()",
        "skip_nonfinite=True",
        SCALED,
        equivalent="with a loss scale, steps with an overflow are not counted",
    ),
    Mutant(UPDATE, 'groups[0]["weight_decay"]', 'groups[-1]["weight_decay"]', SCHEDULED),
    Mutant(UPDATE, "parameter.grad = None", "parameter.grad.zero_()", FROZEN),
    Mutant(UPDATE, "self._scaler.update()\n        ema_update_(", "ema_update_(", SCALED),
    Mutant(UPDATE, "self._scaler.unscale_(self.optimizer)", "pass", ("tests/test_loss_scale.py",)),
    Mutant(UPDATE, "self._max_norm = clip_grad or math.inf", "self._max_norm = clip_grad", CLIPPED),
    Mutant(UPDATE, "self._momentum = momentum", "self._momentum = 0.996", SCHEDULED),
    Mutant(
        UPDATE,
        "if frozen:\n            drop_gradients(self._student.head.last_layer)\n        # With",
        "# With",
        FROZEN,
    ),
    Mutant(NONFINITE, "torch.where(self.bad > 0, self._loss, loss)", "loss"),
    Mutant(NONFINITE, "add_(1 - self.bad)", "add_(1)"),
    Mutant(
        NONFINITE,
        "self._good_steps.zero_()\n        self.iteration += int",
        "self.iteration += int",
    ),
    Mutant(NONFINITE, "self.iteration += int(good_steps)", "self.iteration = int(good_steps)"),
    Mutant(
        NONFINITE,
        "self._good_steps.zero_()\n        self.iteration = iteration",
        "self._good_steps.zero_()",
        reported=True,
    ),
    Mutant(
        NONFINITE,
        "self.bad.zero_()\n        self._good_steps.zero_()\n        self.iteration = iteration",
        "self._good_steps.zero_()\n        self.iteration = iteration",
    ),
    Mutant(
        NONFINITE,
        "self._good_steps.zero_()\n        self.iteration = iteration",
        "self.iteration = iteration",
    ),
    Mutant(
        TRAINER,
        "GraphedStep(self._step, self.device)\n        self._guard.restart(self.iteration)",
        "GraphedStep(self._step, self.device)",
        BITS,
        reported=True,
    ),
    Mutant(NONFINITE, "norms.isfinite().all()", "norms.isfinite().any()", STATE),
    Mutant(NONFINITE, "self.bad.zero_()\n        problem", "problem"),
    Mutant(NONFINITE, "torch.maximum(self.bad, (~finite)", "torch.minimum(self.bad, (~finite)"),
    Mutant(
        OPTIMIZERS,
        'exempt = name.endswith(".bias") or parameter.ndim == 1',
        'exempt = name.endswith(".bias")',
        GROUPS,
    ),
    Mutant(
        OPTIMIZERS,
        '"params": not_decayed, "weight_decay": 0.0',
        '"params": not_decayed, "weight_decay": 0.1',
        GROUPS,
    ),
    Mutant(OPTIMIZERS, "if parameter.requires_grad:", "if True:", GROUPS),
    Mutant(
        OPTIMIZERS,
        "(parameter_norm > 0) & (update_norm > 0)",
        "(parameter_norm >= 0) & (update_norm > 0)",
        EQUATIONS,
    ),
    Mutant(
        OPTIMIZERS, "(parameter_norm > 0) & (update_norm > 0)", "(parameter_norm > 0)", EQUATIONS
    ),
    Mutant(OPTIMIZERS, "if parameter.ndim != 1:", "if parameter.ndim == 2:", EQUATIONS),
    Mutant(
        OPTIMIZERS,
        "torch.optim.SGD(groups, lr=0.0, momentum=0.9)",
        "torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)",
        EQUATIONS,
    ),
    Mutant("fastdino/optimizer_state.py", "if name not in values:", "if False:", REFUSED),
    Mutant(SCHEDULES, "max(warmup - 1, 1)", "max(warmup, 1)"),
    Mutant(SCHEDULES, "(iteration - warmup) / cosine", "iteration / cosine"),
    Mutant(
        RESUME,
        'self.left_out = list(state.get("left_out", []))',
        "self.left_out = []",
        REMEMBERED,
        reported=True,
    ),
    Mutant(RESUME, '"left_out": self.left_out,', '"left_out": [],', REMEMBERED),
    Mutant(RESUME, "left_out = [*self.left_out, failed]", "left_out = [failed]", TWO_INCIDENTS),
    Mutant(RESUME, "self._rollbacks += 1", "self._rollbacks = 1", LIMITED),
    Mutant(RESUME, "self._rollbacks = 0\n\n    def wait", "\n    def wait", LIMITED),
    Mutant(
        RESUME, "self._restore()\n        self.left_out = left_out", "self._restore()", REMEMBERED
    ),
    Mutant(RESUME, "self.trainer.iteration - 1 if", "self.trainer.iteration if", BROKEN_SAVE),
    Mutant(
        RESUME,
        'if config.on_nonfinite == "rollback":\n            self.save()',
        "if False:\n            self.save()",
        REMEMBERED,
    ),
    Mutant(
        RESUME,
        'self.progress.restart(self.trainer.iteration, state.get("progress"))',
        "self.progress.restart(self.trainer.iteration, None)",
        REMEMBERED,
    ),
    Mutant(RESUME, "if part not in state and (part", "if part in state and (part", PARTS),
    Mutant(
        LOOP,
        "torch.manual_seed(config.seed + distributed.rank())",
        "torch.manual_seed(config.seed)",
        STREAMS,
        reported=True,
    ),
    Mutant(LOOP, "if iteration in self.checkpoint.left_out:", "if False:", TWO_INCIDENTS),
    Mutant(LOOP, "start_step=first % trainer.steps_per_epoch", "start_step=0", REMEMBERED),
    Mutant(
        LOOP, "keep = bool(frequency) and epoch % frequency == 0", "keep = bool(frequency)", KEPT
    ),
    Mutant(LOOP, "trainer.iteration % every == 0", "trainer.iteration % every == 1", KEPT),
    Mutant(LOOP, "self.unreported.clear()", "pass", TWO_INCIDENTS),
    Mutant(
        LOOP,
        "self.trainer.lr_schedule(step.iteration)",
        "self.trainer.lr_schedule(self.trainer.iteration)",
        LOGGED,
    ),
    Mutant(
        LOOP,
        "self.trainer.weight_decay_schedule(step.iteration)",
        "self.trainer.weight_decay_schedule(self.trainer.iteration)",
        LOGGED,
    ),
    Mutant(LOOP, "enabled=distributed.rank() == 0", "enabled=True", STREAMS),
    Mutant(
        "fastdino/epoch_log.py",
        "elif of < epoch:",
        "elif of <= epoch:",
        ("tests/test_logging.py",),
    ),
    Mutant(
        LOGGING,
        "[iteration // self.steps_per_epoch, self.open_epoch",
        "[1 + iteration // self.steps_per_epoch, self.open_epoch",
    ),
    Mutant(LOGGING, "self._unwritten.clear()", "pass"),
    Mutant(LOGGING, 'values.get("dino", values["loss"]) - entropy', 'values["loss"] - entropy'),
    Mutant(
        LOGGING, "self._sums[name] / self._counts[name]", "self._sums[name] / self.steps_per_epoch"
    ),
    Mutant(LOGGING, "COLLAPSED_TO_UNIFORM = 0.01, 0.995", "COLLAPSED_TO_UNIFORM = 0.01, 0.999"),
    Mutant(LOGGING, "self._sums.clear()\n        self._counts.clear()", "self._counts.clear()"),
    Mutant(
        CHECKPOINT,
        '("student", "teacher", "optimizer", "dino_loss")',
        '("student", "teacher", "optimizer")',
        reported=True,
    ),
    Mutant(
        CHECKPOINT,
        '("student", "teacher", "optimizer", "dino_loss")',
        '("student", "teacher", "dino_loss")',
    ),
    Mutant(
        CHECKPOINT,
        '("student", "teacher", "optimizer", "dino_loss")',
        '("student", "optimizer", "dino_loss")',
    ),
    Mutant(CHECKPOINT, "torch.isfinite(extremes).all()", "torch.isfinite(extremes).any()"),
    Mutant(CHECKPOINT, "if tensor.is_floating_point() and", "if tensor.dtype is torch.float32 and"),
    Mutant(CHECKPOINT, "first = also or path", "first = path"),
    Mutant(
        CHECKPOINT,
        "if value.untyped_storage().nbytes() < value.numel() * value.element_size():",
        "if False:",
    ),
    Mutant(
        CHECKPOINT,
        '[f"{name} is missing" for name in own if name not in state]',
        "list[str]()",
        REFUSED,
    ),
    Mutant(SAMPLER, "seed + epoch", "seed"),
    Mutant(SAMPLER, "[rank::world_size]", "[::world_size]"),
    Mutant(SAMPLER, "[start_step * self.batch :]", "[start_step :]"),
    Mutant(
        SAMPLER, 'n // world if last_batch == "drop" else', 'n // world if last_batch != "pad" else'
    ),
    Mutant(
        DISTRIBUTED,
        "values = values.clone()\n    dist.all_reduce(values)",
        "dist.all_reduce(values)",
        RANKS,
    ),
    Mutant(DISTRIBUTED, "return values / world_size()", "return values", RANKS),
    Mutant(LAUNCH, "if port > 65535:", "if port >= 65535:", ENVIRONMENT),
    Mutant(LAUNCH, "_PORTS[job % len(_PORTS)]", "_PORTS[0]", ENVIRONMENT),
    Mutant(
        LAUNCH,
        'if not rank < world_size:\n        raise ConfigError(\n            f"RANK',
        'if not rank <= world_size:\n        raise ConfigError(\n            f"RANK',
        ENVIRONMENT,
    ),
    Mutant(
        LAUNCH,
        'if not rank < world_size:\n        raise ConfigError(\n            "SLURM',
        'if not rank <= world_size:\n        raise ConfigError(\n            "SLURM',
        ENVIRONMENT,
    ),
    Mutant(
        LAUNCH,
        "default=1) > 1:\n        return _of_slurm",
        "default=1) > 0:\n        return _of_slurm",
        ENVIRONMENT,
    ),
    Mutant(RUNTIME, "if local_rank >= count:", "if local_rank > count:", CHOICES, reported=True),
    Mutant(
        RUNTIME,
        'config.amp_dtype == "auto" and config.mode == "fast" and device',
        'config.amp_dtype == "auto" and config.mode == "FAST" and device',
        CHOICES,
        reported=True,
    ),
    Mutant(
        RUNTIME,
        'config.amp_dtype == "fp16" or device.type == "cuda"',
        'config.amp_dtype == "fp16" and device.type == "cuda"',
        CHOICES,
    ),
    Mutant(
        RUNTIME,
        '"on" if config.mode == "fast" and on_gpu else "off"',
        '"on" if on_gpu else "off"',
        CHOICES,
    ),
    Mutant(
        RUNTIME,
        'if wanted == "auto" and device.type == "cpu":',
        'if device.type == "cpu":',
        CHOICES,
    ),
    Mutant(CONFIG, "not 0 <= value <= 1", "not 0 < value <= 1", BOUNDS),
    Mutant(CONFIG, "not 0 < value < math.inf", "not 0 <= value < math.inf", BOUNDS),
    Mutant(CONFIG, "value > LARGEST_SIZE", "value >= LARGEST_SIZE", BOUNDS),
    Mutant(CONFIG, "self.seed >= 2**63", "self.seed > 2**63", BOUNDS),
    Mutant(
        CONFIG, "getattr(self, name) > self.epochs", "getattr(self, name) >= self.epochs", BOUNDS
    ),
    Mutant(CONFIG, "not 0 < value[0] <= value[1] <= 1", "not 0 < value[0] < value[1] <= 1", BOUNDS),
    Mutant(
        CONFIG,
        "getattr(self, name) < self.patch_size",
        "getattr(self, name) <= self.patch_size",
        BOUNDS,
    ),
    Mutant(PICKLES, "_CODE.fullmatch(code)", "_CODE.match(code)"),
    Mutant(PICKLES, "structure != [None, None, None] or len(state) > 8", "len(state) > 8"),
    Mutant(PICKLES, "np.dtype(self._code).newbyteorder(self._order)", "np.dtype(self._code)"),
    Mutant(CORRECTNESS, "return math.inf if math.isnan(error) else error", "return error", GATE),
    Mutant(
        CORRECTNESS,
        "key=lambda name: _order(errors[name])",
        "key=lambda name: errors[name]",
        GATE,
        reported=True,
    ),
    Mutant(CORRECTNESS, "if actual.keys() != expected.keys():", "if False:", GATE),
    Mutant(CORRECTNESS, "error <= (self.loss_tolerance", "not error > (self.loss_tolerance", GATE),
    Mutant(
        CORRECTNESS,
        "torch.cat([query, 0 * key, value])",
        "torch.cat([query, torch.zeros_like(key), value])",
        GATE,
    ),
    Mutant(
        CORRECTNESS,
        '"center": {"": step.center.detach()},',
        '"center": {"": torch.ones(1)},',
        CENTER,
    ),
    Mutant(CORRECTNESS, 'loss" else TOLERANCE)', 'loss" else self.loss_tolerance)', VERDICT),
    Mutant(FLOPS, '"H100 PCIe": 756e12', '"H100 PCIe": 989e12', FLOP),
    Mutant(
        FLOPS,
        '"H200 NVL": 835e12,\n    "H200": 989e12,',
        '"H200": 989e12,\n    "H200 NVL": 835e12,',
        FLOP,
    ),
    Mutant(FLOPS, ' and "MIG" not in name', "", FLOP),
    Mutant(FLOPS, "(2 * student + teacher) * 2", "(3 * student + teacher) * 2", FLOP),
    Mutant(FLOPS, "(12 * D * D + 2 * N * D)", "(12 * D * D + N * D)", FLOP),
    Mutant(FLOPS, "seconds = min(", "seconds = max(", FLOP),
    Mutant(
        "fastdino/training/gradient_buckets.py",
        "range(2)",
        "range(1)",
        ("tests/test_run_ranks.py::test_three_ranks_resume_with_the_same_bits",),
    ),
)
