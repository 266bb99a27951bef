"""Settings and flags that do not reach their effect."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINER = "fastdino/training/trainer.py"
LOOP = "fastdino/training/loop.py"
BACKBONES = "fastdino/models/backbones.py"
RUNTIME = "fastdino/runtime.py"
OPTIONS = "fastdino/evals/options.py"
DAVIS = "fastdino/evals/davis.py"


def setting(name: str) -> tuple[str, ...]:
    """Return the test of a setting of TrainConfig."""
    return (f"tests/test_settings_effect.py::test_setting_reaches_its_effect[{name}]",)


def flag(command: str, name: str) -> tuple[str, ...]:
    """Return the test of a flag."""
    return (f"tests/test_flags_effect.py::test_flag_reaches_its_effect[{command} {name}]",)


MUTANTS = (
    Mutant(TRAINER, "self.config.freeze_last_layer", "0", setting("freeze_last_layer")),
    Mutant(TRAINER, "% self.config.print_freq == 0", "% 1 == 0", setting("print_freq")),
    Mutant(TRAINER, "config.warmup_teacher_temp,", "0.04,", setting("warmup_teacher_temp")),
    Mutant(
        TRAINER, "config.teacher_temp,\n", "config.warmup_teacher_temp,\n", setting("teacher_temp")
    ),
    Mutant(
        TRAINER,
        "config.warmup_teacher_temp_epochs,",
        "1,",
        setting("warmup_teacher_temp_epochs"),
    ),
    Mutant(
        TRAINER,
        "cosine_schedule(config.momentum_teacher, 1.0",
        "cosine_schedule(0.996, 1.0",
        (*setting("momentum_teacher-0"), *setting("momentum_teacher-1")),
    ),
    Mutant(TRAINER, "lr, config.min_lr,", "lr, 1e-6,", setting("min_lr")),
    Mutant(
        TRAINER,
        "optimizer=config.optimizer, clip_grad=config.clip_grad",
        "optimizer=config.optimizer, clip_grad=3.0",
        setting("clip_grad"),
    ),
    Mutant(
        LOOP, "every = self.config.saveckp_every_steps", "every = 0", setting("saveckp_every_steps")
    ),
    Mutant(
        LOOP,
        "Conversion(config.exif_orientation,",
        "Conversion(False,",
        setting("exif_orientation"),
    ),
    Mutant(
        LOOP,
        "config.exif_orientation, config.image_range)",
        "config.exif_orientation)",
        setting("image_range"),
    ),
    Mutant(
        LOOP, "max_bad_share=config.max_bad_share", "max_bad_share=0.5", setting("max_bad_share")
    ),
    Mutant(
        BACKBONES,
        "(config.drop_path_rate, config.norm",
        "(0.0, config.norm",
        setting("drop_path_rate"),
    ),
    Mutant(RUNTIME, "network.packing = self.packing.on", "pass", setting("packing")),
    Mutant(RUNTIME, "block.recompute = self.recompute.on", "pass", setting("recompute")),
    Mutant(RUNTIME, 'self.last_block.value == "cls"', "True", setting("last_block")),
    Mutant(OPTIONS, "torch.manual_seed(args.seed)", "torch.manual_seed(0)", flag("knn", "seed")),
    Mutant(
        OPTIONS,
        "checkpoint_key=args.checkpoint_key",
        'checkpoint_key="teacher"',
        flag("davis", "checkpoint_key"),
    ),
    Mutant(
        OPTIONS,
        "device if args.use_cuda else",
        "device if True else",
        flag("retrieval", "use_cuda"),
    ),
    Mutant(DAVIS, "topk=args.topk", "topk=5", flag("davis", "topk")),
    Mutant(
        DAVIS,
        "radius=args.size_mask_neighborhood",
        "radius=12",
        flag("davis", "size_mask_neighborhood"),
    ),
    Mutant(
        DAVIS,
        "n_last_frames=args.n_last_frames,",
        "n_last_frames=7,",
        flag("davis", "n_last_frames"),
    ),
    Mutant(DAVIS, "args.bs, args.num_workers)", "6, args.num_workers)", flag("davis", "bs")),
    Mutant(
        "fastdino/evals/retrieval.py",
        "if args.multiscale else network",
        "if False else network",
        flag("retrieval", "multiscale"),
    ),
    Mutant(
        "fastdino/evals/copydays.py",
        '"distractors": args.distractors_path',
        '"distractors": ""',
        flag("copydays", "distractors_path"),
    ),
    Mutant(
        "fastdino/evals/video.py",
        "self.frames.timed(), self.args.batch_size_per_gpu",
        "self.frames.timed(), 4",
        flag("video", "batch_size_per_gpu"),
    ),
    Mutant(
        "fastdino/evals/linear.py",
        "epoch % args.val_freq == 0",
        "epoch % 1 == 0",
        flag("linear", "val_freq"),
    ),
    Mutant(
        "fastdino/evals/linear_data.py",
        "blocks=args.n_last_blocks",
        "blocks=1",
        flag("linear", "n_last_blocks"),
    ),
    Mutant(
        "fastdino/evals/attention_jaccard.py",
        "if args.baseline and",
        "if",
        flag("attention", "baseline"),
    ),
)
