"""Settings of a pretraining run: one typed dataclass, its command-line flags and its validation.

The flags of the paper's main_dino.py keep their names and defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import math
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastdino.batch_split import BatchSplit, split_global_batch
from fastdino.errors import ConfigError


def _flag(group: str, default: Any, help: str) -> Any:
    """Declare a setting; a tuple of strings lists the allowed values, the default first."""
    choices = default if isinstance(default, tuple) and isinstance(default[0], str) else None
    metadata = {"group": group, "help": help, "choices": choices}
    return dataclasses.field(default=choices[0] if choices else default, metadata=metadata)


# One function per group of flags in `fastdino train --help`.
_model = partial(_flag, "Model")
_loss = partial(_flag, "Loss")
_optim = partial(_flag, "Optimization")
_crops = partial(_flag, "Crops")
_data = partial(_flag, "Data")
_speed = partial(_flag, "Speed and memory (results stay the same, up to rounding)")
_run = partial(_flag, "Run")
_monitor = partial(_flag, "Monitoring")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a pretraining run; raises ConfigError if a value is not allowed.

    Sizes are in pixels, scales are fractions of the image area, schedules are in epochs.
    """

    arch: str = _model(
        "vit_small",
        "Backbone: vit_nano, vit_tiny, vit_small, vit_base, vit_large (or deit_*), xcit_*, a "
        "torchvision model with an fc layer such as resnet50, or any timm model.",
    )
    patch_size: int = _model(16, "Side of a patch in pixels (vit_* only).")
    drop_path_rate: float = _model(0.1, "Stochastic depth rate of the student.")
    out_dim: int = _model(65536, "Number of prototypes K, the output width of the head.")
    use_bn_in_head: bool = _model(False, "Batch norm in the hidden layers of the head.")
    norm_last_layer: bool = _model(
        True, "Fix the norm of prototypes at 1 (false: less stable, can be better)."
    )
    init_from: str = _model(
        "",
        "Initial weights of both backbones: a checkpoint (the teacher, if it has one), a .pth or "
        ".safetensors file with the paper's, timm's or Hugging Face's names, a Hugging Face "
        "folder, a URL, or released weights by name (dino_vits16, ...). The heads are new. Ignored "
        "when output_dir has a checkpoint to resume.",
    )

    teacher_temp: float = _loss(0.04, "Teacher temperature after its linear warmup.")
    warmup_teacher_temp: float = _loss(0.04, "Teacher temperature in the first epoch.")
    warmup_teacher_temp_epochs: int = _loss(0, "Warmup epochs of the teacher temperature.")
    centering: str = _loss(
        ("centering", "sinkhorn"),
        "Balance of the targets: centering (a moving average of the teacher's logits, as in the "
        "paper) or sinkhorn (Sinkhorn-Knopp over the global crops of one forward pass on all "
        "processes, as in DINOv2).",
    )
    koleo_weight: float = _loss(
        0.0,
        "Weight of the KoLeo regularizer, which spreads the student's features of the global crops "
        "within a forward pass of one process; 0: none, as in the paper; DINOv2: 0.1.",
    )
    momentum_teacher: float = _loss(
        0.996, "Initial EMA momentum of the teacher, 1 at the end (small batch: higher)."
    )

    optimizer: str = _optim(("adamw", "sgd", "lars"), "Optimizer.")
    epochs: int = _optim(100, "Passes over the dataset.")
    batch_size_per_gpu: int = _optim(64, "Images per forward pass and process.")
    grad_accum: int = _optim(
        1,
        "Forward passes per step. A step has batch_size_per_gpu * grad_accum images per process, "
        "and the loss, center, EMA and schedules of one batch of that size.",
    )
    global_batch_size: int = _optim(
        0,
        "Images per step over all processes, for runs whose number of processes may change. The "
        "batches and forward passes of each process follow from it, with at most "
        "batch_size_per_gpu images per pass. 0: batch_size_per_gpu * grad_accum * processes.",
    )
    lr: float = _optim(0.0005, "Peak learning rate, multiplied by global batch / 256.")
    warmup_epochs: int = _optim(10, "Warmup epochs of the learning rate.")
    min_lr: float = _optim(1e-6, "Learning rate at the end of its cosine schedule.")
    weight_decay: float = _optim(0.04, "Weight decay at the start.")
    weight_decay_end: float = _optim(0.4, "Weight decay at the end of its cosine schedule.")
    clip_grad: float = _optim(3.0, "Largest gradient norm per parameter; 0: no clipping.")
    freeze_last_layer: int = _optim(1, "Epochs at the start with a frozen last layer.")
    on_nonfinite: str = _optim(
        ("stop", "rollback"),
        "If the loss is not finite: stop, or rollback to the last checkpoint and skip the batch.",
    )

    global_crops_size: int = _crops(224, "Side of a global crop in pixels.")
    global_crops_scale: tuple[float, float] = _crops(
        (0.4, 1.0), "Range of a global crop's fraction of the image area."
    )
    local_crops_number: int = _crops(8, "Local crops per image; 0 disables multi-crop.")
    local_crops_size: int = _crops(96, "Side of a local crop in pixels.")
    local_crops_scale: tuple[float, float] = _crops(
        (0.05, 0.4), "Range of a local crop's fraction of the image area."
    )
    crops: str = _crops(
        ("auto", "fused", "dali", "torchvision"),
        "Crop backend: fused (exact and fast), torchvision (exact, the paper's PIL chain), or dali "
        "(approximate, DALI's operators). auto: fused, or torchvision if fused is not supported.",
    )

    data_path: str = _data(
        "/path/to/imagenet/train/",
        "Images: a folder (one folder per class, or flat), a folder of .tar or .zip files (class "
        "tars, webdataset shards), one such file, a pattern such as 'train-{000..146}.tar', a text "
        "file with one path per line, DAVIS, YFCC100M with its metadata, torchvision:NAME, hf:NAME "
        "or hf:FOLDER. Append '?split=NAME' to select a split.",
    )
    num_workers: int = _data(10, "Data loading workers per process, at most the number of CPUs.")
    decode: str = _data(
        ("auto", "pillow", "cpu", "gpu"),
        "Decoder of --crops fused: cpu (DALI) or pillow, with the same pixels, or gpu (nvJPEG, "
        "similar pixels, for hosts with few cores). auto: cpu, or pillow without DALI.",
    )
    hw_decoder_load: float = _data(
        0.65, "Fraction of images decoded by a GPU's JPEG engine (--decode gpu)."
    )
    exif_orientation: bool = _data(False, "Apply the EXIF orientation, unlike the paper's code.")
    image_range: str = _data(
        ("clip", "scale"),
        "16-bit, 32-bit and float images: clip values to 0..255 (as the paper's code: most become "
        "white or black), or scale their range to it.",
    )
    last_batch: str = _data(
        ("paper", "drop", "pad"),
        "Incomplete last batch of an epoch: paper (repeat images until all ranks have the same "
        "number, then drop the batch; with --global_batch_size as in one process), drop (no "
        "repeats), pad (fill with the first images).",
    )
    max_bad_share: float = _data(0.05, "Fraction of unreadable images that stops the run.")

    mode: str = _speed(
        ("parity", "fast"),
        "parity: the paper's operations in their order and precision. fast: the same maths with "
        "bf16 (on a CPU: if its products are fast) and a fused optimizer, and on a GPU compiled "
        "blocks and no host sync.",
    )
    use_fp16: bool = _speed(True, "Mixed precision, in the dtype of --amp_dtype; false: fp32.")
    amp_dtype: str = _speed(
        ("auto", "fp16", "bf16"),
        "Mixed precision. auto: on a GPU fp16 with loss scaling, as in the paper, or bf16 in "
        "--mode fast; on a CPU fp32, or bf16 in --mode fast if a product measured at start is at "
        "least twice as fast in it.",
    )
    compile: str = _speed(
        ("auto", "on", "off"),
        "torch.compile for blocks and head. auto: on in --mode fast on a GPU, if supported.",
    )
    attention: str = _speed(
        ("auto", "xformers", "varlen", "sdpa", "matmul"),
        "Attention backend of vit_*: xformers, varlen (torch.nn.attention.varlen), sdpa (PyTorch, "
        "one call per crop size), or matmul (plain batched products, on a CPU). auto: on a GPU the "
        "first that works; on a CPU sdpa, or in --mode fast matmul if it is faster, measured at "
        "start, and its memory is available (not with --recompute on or --compile on).",
    )
    packing: str = _speed(
        ("auto", "on", "off"),
        "Process crops of all sizes as one sequence (vit_* only), with attention within each crop. "
        "auto: on.",
    )
    last_block: str = _speed(
        ("cls", "all"),
        "Tokens computed by the last block of a vit_*: cls (the head reads no other), or all.",
    )
    recompute: str = _speed(
        ("auto", "on", "off"),
        "Recompute norms and GELU of a vit_* in the backward pass, with little more than half the "
        "memory. auto: on in --mode fast on a GPU.",
    )
    onednn: str = _speed(
        ("auto", "on", "off"),
        "Linear layers of a vit_* in fp32 on a CPU by oneDNN instead of PyTorch's BLAS. auto: in "
        "--mode fast if it is faster, measured at start (not with --recompute on or --compile on).",
    )
    cuda_graph: bool = _speed(
        False, "Replay the step as one CUDA graph (--mode fast, one process, batches of one size)."
    )
    fsdp: bool = _speed(False, "Shard weights, gradients and moments of large networks (FSDP2).")

    output_dir: str = _run(".", "Folder of checkpoints and logs; a run in it is resumed.")
    saveckp_freq: int = _run(20, "Epochs between separately kept checkpoints; 0: keep none.")
    saveckp_every_steps: int = _run(0, "Steps between saves of checkpoint.pth; 0: every epoch.")
    saveckp_in_background: bool = _run(
        True,
        "Write checkpoints in a thread while the training goes on; needs host memory for one copy.",
    )
    saveckp_every_minutes: float = _run(
        0.0, "Also save checkpoint.pth when the last save was this many minutes ago; 0: no."
    )
    print_freq: int = _run(10, "Steps between entropy measurements and progress updates.")
    seed: int = _run(0, "Seed of the weights, the image order and the crops.")
    device: str = _run(("auto", "cuda", "cpu"), "Compute device.")
    dist_url: str = _run("env://", "Rendezvous URL of a distributed run.")
    dist_timeout_minutes: float = _run(
        10.0, "Minutes after which a rank that does not answer ends a distributed run."
    )

    knn_data: str = _monitor(
        "",
        "Labelled dataset with a train and a val split, as `fastdino knn --data_path` accepts it, "
        "for --knn_every.",
    )
    knn_every: int = _monitor(
        0, "Epochs between k-NN evaluations of the teacher on --knn_data; 0: none."
    )
    attention_every: int = _monitor(
        0,
        "Epochs between pictures of the teacher's attention maps (vit_* only), of images of "
        "--knn_data's val split or else of the training set; 0: none.",
    )
    logger: str = _monitor(
        "auto",
        "Loggers of the metrics, separated by commas: tensorboard, csv, wandb, mlflow. auto: "
        "tensorboard, if it is installed. none: no logger; log.txt is always written.",
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check_values()

    def _check_types(self) -> None:
        for name, kind in typing.get_type_hints(TrainConfig).items():
            value = _convert(getattr(self, name), kind)
            if value is None:
                is_pair = typing.get_origin(kind) is tuple
                raise _error(name, getattr(self, name), "two numbers" if is_pair else kind.__name__)
            object.__setattr__(self, name, user_path(value) if name in _PATHS else value)

    def _check_values(self) -> None:
        for field in dataclasses.fields(self):
            name, value, choices = field.name, getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise _error(name, value, "one of " + ", ".join(choices))
            if name in _FRACTIONS and not 0 <= value <= 1:
                raise _error(name, value, "a number from 0 to 1")
            if name in _POSITIVE and not 0 < value < math.inf:
                raise _error(name, value, "a finite number above 0")
            low = 1 if name in _AT_LEAST_1 else 0
            if isinstance(value, (int, float)) and not low <= value < math.inf:
                raise _error(name, value, f"a finite number of at least {low}")
            if name in _SIZES and value > LARGEST_SIZE:
                raise _error(name, value, f"at most {LARGEST_SIZE}")
            if isinstance(value, str) and "\0" in value:
                raise _error(name, value, "text without zero bytes")
            if isinstance(value, tuple) and not 0 < value[0] <= value[1] <= 1:
                raise _error(name, value, "0 < smallest <= largest <= 1")
        if self.seed >= 2**63:
            raise _error("seed", self.seed, "below 2**63")
        if self.drop_path_rate == 1:
            raise _error("drop_path_rate", 1.0, "a number from 0 to below 1")
        self._check_together()

    def _check_together(self) -> None:
        for name in ("warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer"):
            if getattr(self, name) > self.epochs:
                raise ConfigError(
                    f"--{name} {getattr(self, name)} exceeds --epochs {self.epochs}: "
                    f"use --{name} {self.epochs} or less, or raise --epochs"
                )
        if not self.use_fp16 and self.amp_dtype != "auto":
            raise ConfigError(
                f"--use_fp16 false contradicts --amp_dtype {self.amp_dtype}: remove one"
            )
        if self.koleo_weight and self.batch_size_per_gpu == 1:
            raise ConfigError(
                f"--koleo_weight {self.koleo_weight} compares the images of a forward pass, and "
                "--batch_size_per_gpu 1 has one: use 2 or more, or --koleo_weight 0"
            )
        if self.global_batch_size and self.grad_accum > 1:
            raise ConfigError(
                f"--grad_accum {self.grad_accum} contradicts --global_batch_size "
                f"{self.global_batch_size}, from which it follows: remove one"
            )
        self._check_monitoring()
        if self.arch in PATCHED_ARCHS:
            sizes = ("global_crops_size", "local_crops_size")[: 2 if self.local_crops_number else 1]
            for name in sizes:
                if getattr(self, name) < self.patch_size:
                    raise ConfigError(
                        f"--{name} {getattr(self, name)} is smaller than a patch, "
                        f"--patch_size {self.patch_size}"
                    )

    def _check_monitoring(self) -> None:
        if self.knn_every and not self.knn_data:
            raise ConfigError(
                f"--knn_every {self.knn_every} needs --knn_data: a labelled dataset with a train "
                "and a val split"
            )
        if self.knn_data and not (self.knn_every or self.attention_every):
            raise ConfigError(
                f"--knn_data {self.knn_data} has no effect without --knn_every N or "
                "--attention_every N"
            )
        if self.attention_every and self.arch not in PATCHED_ARCHS:
            raise ConfigError(
                f"--attention_every {self.attention_every}: --arch {self.arch} has no attention "
                "of a CLS token to show; use a vit_*, or --attention_every 0"
            )
        names = self.loggers
        unknown = [name for name in names if name not in LOGGERS]
        if self.logger not in ("auto", "none") and (unknown or len(set(names)) < len(names)):
            raise _error("logger", self.logger, f"auto, none, or some of {','.join(LOGGERS)}")

    @property
    def loggers(self) -> list[str]:
        """The names in `logger`."""
        return [name.strip() for name in self.logger.split(",")]

    @property
    def ncrops(self) -> int:
        """The number of crops per image: two global and the local ones."""
        return 2 + self.local_crops_number

    @property
    def depth_follows_images(self) -> bool:
        """True if stochastic depth does not depend on which process computes an image.

        A CUDA graph replays the draws of one generator, so it has no other for each step.
        """
        vit = self.arch in PATCHED_ARCHS
        return bool(self.global_batch_size) and vit and not self.cuda_graph

    def split_batch(self, world_size: int) -> BatchSplit:
        """Return how each of `world_size` processes computes its images of a step.

        Raises: ConfigError: --global_batch_size cannot be divided.
        """
        if not self.global_batch_size:
            return BatchSplit(self.batch_size_per_gpu, self.grad_accum)
        split = split_global_batch(self.global_batch_size, self.batch_size_per_gpu, world_size)
        if self.koleo_weight and split.images == 1:
            raise ConfigError(
                f"--koleo_weight {self.koleo_weight} compares the images of a forward pass, and "
                f"--global_batch_size {self.global_batch_size} gives passes of one image with "
                f"{world_size} process(es) and --batch_size_per_gpu {self.batch_size_per_gpu}: "
                "use another batch, or --koleo_weight 0"
            )
        return split

    def check_world_size(self, world_size: int) -> None:
        """Raise ConfigError unless a run of `world_size` processes is possible."""
        self.split_batch(world_size)
        if self.fsdp and world_size == 1:
            raise ConfigError(
                "--fsdp true needs several processes, and this run has one: start more of them, "
                "with torchrun, srun or fastdino submit"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON and for the `args` of a checkpoint."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build a config from to_dict(); raise ConfigError for an unknown name."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"unknown setting {name!r}{hint}")
        return cls(**values)


# The architectures to which --patch_size applies.
PATCHED_ARCHS = tuple(
    f"{kind}_{size}"
    for kind in ("vit", "deit")
    for size in ("nano", "tiny", "small", "base", "large")
)
LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")
# Sizes and numbers of things; products of two of them fit into 64 bits.
_SIZES = (
    "patch_size", "out_dim", "batch_size_per_gpu", "epochs", "global_crops_size",
    "local_crops_size", "local_crops_number", "grad_accum", "global_batch_size", "num_workers",
    "knn_every", "attention_every",
)  # fmt: skip
LARGEST_SIZE = 2**31 - 1
# All numbers are finite and at least 0; these have other bounds.
_AT_LEAST_1 = (
    "patch_size", "out_dim", "batch_size_per_gpu", "epochs", "global_crops_size",
    "local_crops_size", "grad_accum", "print_freq",
)  # fmt: skip
_PATHS = ("data_path", "output_dir", "init_from", "knn_data")
_POSITIVE = ("warmup_teacher_temp", "teacher_temp", "dist_timeout_minutes")
_FRACTIONS = ("momentum_teacher", "drop_path_rate", "max_bad_share", "hw_decoder_load")


def _convert(value: Any, kind: Any) -> Any:
    """Return `value` as a value of type `kind`; None if it is of another type."""
    if typing.get_origin(kind) is tuple:
        pair = isinstance(value, (tuple, list)) and len(value) == 2
        numbers = tuple(_convert(number, float) for number in value) if pair else (None,)
        return None if None in numbers else numbers
    if kind is str:
        return os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if isinstance(value, bool) != (kind is bool):
        return None
    if kind is float:
        return float(value) if isinstance(value, (int, float)) else None
    return value if isinstance(value, kind) else None


def _error(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"--{name} must be {wanted}, got {value!r}")


def parse_bool(text: str) -> bool:
    """Parse a boolean as the paper spells it: on/off, true/false, 1/0, in any case."""
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be one of on, off, true, false, 1, 0, got {text!r}")


def user_path(path: str) -> str:
    """Expand a leading ~ to the home folder, which a shell leaves as it is after `--flag=`."""
    return os.path.expanduser(path)


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raise ConfigError if one of these flags is below `least`; None is allowed."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")


def check_at_most(args: argparse.Namespace, largest: int, *names: str) -> None:
    """Raise ConfigError if one of these flags is above `largest`; None is allowed."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value > largest:
            raise ConfigError(f"--{name} must be at most {largest}, got {value}")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting, in groups, and the one that old launchers pass."""
    fields = dataclasses.fields(TrainConfig)
    for title, group in itertools.groupby(fields, key=lambda field: field.metadata["group"]):
        add_arguments(parser.add_argument_group(title), [field.name for field in group])
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_arguments(parser: argparse._ActionsContainer, names: Sequence[str]) -> None:
    """Add the flags of some settings, for commands that share them."""
    kinds = typing.get_type_hints(TrainConfig)
    metavars = {bool: "BOOL", int: "N", float: "X", str: "STR"}
    for field in dataclasses.fields(TrainConfig):
        if field.name not in names:
            continue
        kind, choices = kinds[field.name], field.metadata["choices"]
        default: Any = field.default
        shown = str(default).lower() if kind is bool else "none" if default == "" else default
        options: dict[str, Any] = {"type": parse_bool if kind is bool else kind}
        if typing.get_origin(kind) is tuple:
            shown = " ".join(map(str, default))
            options = {"type": float, "nargs": 2, "metavar": ("MIN", "MAX")}
        elif not choices:
            options["metavar"] = metavars[kind]
        parser.add_argument(
            f"--{field.name}",
            choices=choices,
            default=default,
            help=f"{field.metadata['help']} (default: {shown})",
            **options,
        )


def config_from_args(args: argparse.Namespace) -> TrainConfig:
    """Return the validated config of a parsed command line; raise ConfigError."""
    return TrainConfig(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)}
    )
