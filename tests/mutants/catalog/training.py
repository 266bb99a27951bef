"""Step, update, schedules, checkpoint, rollback and order of the data."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINER = "fastdino/training/trainer.py"
UPDATE = "fastdino/training/update.py"
NONFINITE = "fastdino/training/nonfinite.py"
RESUME = "fastdino/training/resume.py"
LOOP = "fastdino/training/loop.py"
CHECKPOINT = "fastdino/checkpoint.py"
SAMPLER = "fastdino/data/sampler.py"
SCHEDULES = "fastdino/training/schedules.py"
STEP_TESTS = ("tests/test_trainer.py", "tests/test_nonfinite.py")
RUN_TESTS = ("tests/test_rollback.py", "tests/test_resume.py", "tests/test_loop.py")

MUTANTS = (
    Mutant(
        TRAINER,
        "self.iteration += 1\n        self._guard.restart(self.iteration)",
        "self.iteration += 1",
        STEP_TESTS,
    ),
    Mutant(
        TRAINER,
        "return self._forward_student.no_sync()",
        "return contextlib.nullcontext()",
        STEP_TESTS,
    ),
    Mutant(TRAINER, "self._after_load()\n\n    def start_from", "\n    def start_from", STEP_TESTS),
    Mutant(TRAINER, "finish_center(skip=self._guard.bad)", "finish_center()", STEP_TESTS),
    Mutant(TRAINER, "(loss / parts).backward()", "(loss).backward()", STEP_TESTS),
    Mutant(TRAINER, "2 * rows * parts", "2 * rows", STEP_TESTS),
    Mutant(TRAINER, "frozen=self.epoch < self", "frozen=self.epoch <= self", STEP_TESTS),
    Mutant(TRAINER, "static_graph=config.grad_accum == 1", "static_graph=True", STEP_TESTS),
    Mutant(TRAINER, "lr = config.lr * global_batch / 256", "lr = config.lr", STEP_TESTS),
    Mutant(
        TRAINER,
        "global_batch = config.images_per_step * distributed.world_size()",
        "global_batch = config.images_per_step",
        STEP_TESTS,
    ),
    Mutant(
        TRAINER,
        "self.scaler.load_state_dict(scaler)",
        "pass",
        (*STEP_TESTS, "tests/test_cuda_path.py"),
    ),
    Mutant(
        TRAINER,
        'if device.type == "cuda" and "cuda" in state:',
        'if device.type == "cuda" and "cuda" not in state:',
        (*STEP_TESTS, "tests/test_cuda_path.py"),
    ),
    Mutant(TRAINER, "generators[distributed.rank()]", "generators[0]", STEP_TESTS),
    Mutant(UPDATE, "if not self._scaler.is_enabled():  # with", "if True:  # with", STEP_TESTS),
    Mutant(UPDATE, "skip=self._guard.bad)", "skip=None)", STEP_TESTS),
    Mutant(UPDATE, "skip_nonfinite=not scaler.is_enabled()", "skip_nonfinite=True", STEP_TESTS),
    Mutant(UPDATE, 'groups[0]["weight_decay"]', 'groups[-1]["weight_decay"]', STEP_TESTS),
    Mutant(UPDATE, "parameter.grad = None", "parameter.grad.zero_()", STEP_TESTS),
    Mutant(NONFINITE, "torch.where(self.bad > 0, self._loss, loss)", "loss"),
    Mutant(NONFINITE, "1 - self.bad.clamp(max=1)", "1 - self.bad", STEP_TESTS),
    Mutant(
        NONFINITE,
        "self._good_steps.zero_()\n        self.iteration += int",
        "self.iteration += int",
    ),
    Mutant(NONFINITE, "norms.isfinite().all()", "norms.isfinite().any()", STEP_TESTS),
    Mutant(SCHEDULES, "max(warmup - 1, 1)", "max(warmup, 1)"),
    Mutant(SCHEDULES, "(iteration - warmup) / cosine", "iteration / cosine"),
    Mutant(
        RESUME, 'self.left_out = list(state.get("left_out", []))', "self.left_out = []", RUN_TESTS
    ),
    Mutant(RESUME, "left_out = [*self.left_out, failed]", "left_out = [failed]", RUN_TESTS),
    Mutant(RESUME, "self._rollbacks += 1", "self._rollbacks = 1", RUN_TESTS),
    Mutant(
        RESUME, "self._restore()\n        self.left_out = left_out", "self._restore()", RUN_TESTS
    ),
    Mutant(RESUME, "self.trainer.iteration - 1 if", "self.trainer.iteration if", RUN_TESTS),
    Mutant(
        LOOP,
        "torch.manual_seed(config.seed + distributed.rank())",
        "torch.manual_seed(config.seed)",
        ("tests/test_run_ranks.py",),
    ),
    Mutant(LOOP, "if iteration in self.checkpoint.left_out:", "if False:", RUN_TESTS),
    Mutant(LOOP, "start_step=first % trainer.steps_per_epoch", "start_step=0", RUN_TESTS),
    Mutant(LOOP, "keep = bool(frequency) and epoch % frequency == 0", "keep = bool(frequency)"),
    Mutant(LOOP, "self.unreported.clear()", "pass", RUN_TESTS),
    Mutant(
        CHECKPOINT,
        '("student", "teacher", "optimizer", "dino_loss")',
        '("student", "teacher", "optimizer")',
    ),
    Mutant(
        CHECKPOINT,
        '("student", "teacher", "optimizer", "dino_loss")',
        '("student", "teacher", "dino_loss")',
    ),
    Mutant(CHECKPOINT, "torch.isfinite(tensor).all()", "torch.isfinite(tensor).any()"),
    Mutant(CHECKPOINT, "first = also or path", "first = path"),
    Mutant(SAMPLER, "seed + epoch", "seed"),
    Mutant(SAMPLER, "[rank::world_size]", "[::world_size]"),
    Mutant(SAMPLER, "[start_step * self.batch :]", "[start_step :]"),
    Mutant(
        SAMPLER, 'n // world if last_batch == "drop" else', 'n // world if last_batch != "pad" else'
    ),
)
