"""Settings and flags that do not reach their effect."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINER = "fastdino/training/trainer.py"
LOOP = "fastdino/training/loop.py"
RUNTIME = "fastdino/runtime.py"
OPTIONS = "fastdino/evals/options.py"
DAVIS = "fastdino/evals/davis.py"


def setting(name: str) -> tuple[str, ...]:
    """Return the test of a setting of TrainConfig."""
    return (f"tests/test_settings_effect.py::test_setting_reaches_its_effect[{name}]",)


def flag(command: str, name: str) -> tuple[str, ...]:
    """Return the test of a flag."""
    file = (
        "test_flags_effect_maps"
        if command in ("attention", "davis", "video")
        else ("test_flags_effect")
    )
    return (f"tests/{file}.py::test_flag_reaches_its_effect[{command} {name}]",)


MUTANTS = (
    Mutant(TRAINER, "% self.config.print_freq == 0", "% 1 == 0", setting("print_freq")),
    Mutant(
        TRAINER, "config.teacher_temp,\n", "config.warmup_teacher_temp,\n", setting("teacher_temp")
    ),
    Mutant(
        TRAINER,
        "cosine_schedule(config.momentum_teacher, 1.0",
        "cosine_schedule(0.996, 1.0",
        setting("momentum_teacher-1"),
    ),
    Mutant(
        TRAINER,
        "optimizer=config.optimizer, clip_grad=config.clip_grad",
        "optimizer=config.optimizer, clip_grad=3.0",
        setting("clip_grad"),
    ),
    Mutant(
        LOOP,
        "config.exif_orientation, config.image_range)",
        "config.exif_orientation)",
        setting("image_range"),
    ),
    Mutant(RUNTIME, "network.packing = self.packing.on", "pass", setting("packing")),
    Mutant(RUNTIME, "block.recompute = self.recompute.on", "pass", setting("recompute")),
    Mutant(OPTIONS, "torch.manual_seed(args.seed)", "torch.manual_seed(0)", flag("knn", "seed")),
    Mutant(OPTIONS, "device if args.use_cuda else", "device if True else", flag("knn", "use_cuda")),
    Mutant(DAVIS, "topk=args.topk", "topk=5", flag("davis", "topk")),
    Mutant(
        DAVIS,
        "n_last_frames=args.n_last_frames,",
        "n_last_frames=7,",
        flag("davis", "n_last_frames"),
    ),
    Mutant(
        "fastdino/evals/copydays.py",
        '"distractors": args.distractors_path',
        '"distractors": ""',
        flag("copydays", "distractors_path"),
    ),
    Mutant(
        "fastdino/evals/linear.py",
        "epoch % args.val_freq == 0",
        "epoch % 1 == 0",
        flag("linear", "val_freq"),
    ),
)
