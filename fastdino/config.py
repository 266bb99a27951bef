"""Every setting of a run: one typed dataclass, the flags made from it, one validation.

The first groups are the flags of the paper's main_dino.py, under their own names and with their own
defaults; the last group is this project's.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdino.errors import ConfigError


def _flag(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a pretraining run; raises ConfigError where a value cannot be.

    Sizes are in pixels, scales are shares of the image's area, schedules are in epochs.
    """

    # Model
    arch: str = _flag(
        "vit_small",
        "Backbone: vit_nano, vit_tiny, vit_small, vit_base, vit_large (or deit_*), xcit_*, a "
        "torchvision model with an fc layer such as resnet50, or any timm model by name.",
    )
    patch_size: int = _flag(16, "Side of a square patch, in pixels (vit_* only).")
    out_dim: int = _flag(65536, "Number of prototypes K: the width of the head's output.")
    norm_last_layer: bool = _flag(
        True,
        "Keep the norm of the last layer's prototypes at 1 (false can be better, less stable).",
    )
    momentum_teacher: float = _flag(
        0.996,
        "EMA momentum of the teacher at the start, 1 at the end. Higher for small batches.",
    )
    use_bn_in_head: bool = _flag(False, "Batch norm after the head's hidden layers.")

    # Temperatures
    warmup_teacher_temp: float = _flag(0.04, "Teacher temperature in the first epoch.")
    teacher_temp: float = _flag(0.04, "Teacher temperature after the linear warm-up.")
    warmup_teacher_temp_epochs: int = _flag(0, "Epochs of the teacher temperature's warm-up.")

    # Optimization
    use_fp16: bool = _flag(True, "Mixed precision on GPUs; what exactly, --amp_dtype says.")
    weight_decay: float = _flag(0.04, "Weight decay at the start.")
    weight_decay_end: float = _flag(0.4, "Weight decay at the end, reached by a cosine.")
    clip_grad: float = _flag(
        3.0, "Largest gradient norm, of each parameter by itself; 0: no clipping."
    )
    batch_size_per_gpu: int = _flag(64, "Images in one forward pass of one process.")
    epochs: int = _flag(100, "Passes over the data.")
    freeze_last_layer: int = _flag(1, "Epochs during which the head's last layer is not trained.")
    lr: float = _flag(
        0.0005,
        "Peak learning rate for a global batch of 256; scaled linearly with the global batch.",
    )
    warmup_epochs: int = _flag(10, "Epochs of the learning rate's linear warm-up.")
    min_lr: float = _flag(1e-6, "Learning rate at the end of the cosine; not scaled.")
    optimizer: str = _flag("adamw", "Optimizer.", choices=("adamw", "sgd", "lars"))
    drop_path_rate: float = _flag(0.1, "Stochastic depth of the student.")

    # Crops
    global_crops_scale: tuple[float, float] = _flag(
        (0.4, 1.0), "Smallest and largest share of the image's area in a global crop."
    )
    local_crops_number: int = _flag(8, "Local crops an image; 0: no multi-crop.")
    local_crops_scale: tuple[float, float] = _flag(
        (0.05, 0.4), "Smallest and largest share of the image's area in a local crop."
    )

    # Run
    data_path: str = _flag(
        "/path/to/imagenet/train/",
        "Images: a folder (one folder a class, or flat), a folder of .tar or .zip files (class "
        "tars, webdataset shards), one of them, a pattern such as 'train-{000..146}.tar', a text "
        "file with a path a line, DAVIS, YFCC100M with its metadata, torchvision:NAME, hf:NAME or "
        "hf:FOLDER; '?split=NAME' after it picks a split.",
    )
    output_dir: str = _flag(".", "Where checkpoints and logs go; a run found there is resumed.")
    saveckp_freq: int = _flag(20, "Keep a checkpoint of its own every so many epochs; 0: never.")
    seed: int = _flag(0, "Seed of the weights, the order of the images and the crops.")
    num_workers: int = _flag(
        10, "Data loading workers a process, at most (never above the CPU count)."
    )
    dist_url: str = _flag("env://", "How the processes of a distributed run find each other.")

    # This project's own
    global_crops_size: int = _flag(224, "Side of a global crop, in pixels.")
    local_crops_size: int = _flag(96, "Side of a local crop, in pixels.")
    init_from: str = _flag(
        "",
        "Weights to start the backbone of student and teacher from: a checkpoint (its teacher, or "
        "its student where it has that alone), a .pth or .safetensors of the paper's, timm's or "
        "Hugging Face's names, a folder of the latter's, a URL, or the paper's own by name "
        "(dino_vits16, ...). The head starts anew. A run found in output_dir is resumed instead.",
    )
    grad_accum: int = _flag(
        1,
        "Forward passes a step: a step sees batch_size_per_gpu * grad_accum images a process, with "
        "the loss, center, EMA and schedules of one batch of that size.",
    )
    device: str = _flag("auto", "Where to compute.", choices=("auto", "cuda", "cpu"))
    mode: str = _flag(
        "parity",
        "parity: the paper's operations one by one, in its precision. fast: the same maths with "
        "bf16 on a GPU, compiled blocks, one optimizer pass, and no waiting for the device.",
        choices=("parity", "fast"),
    )
    compile: str = _flag(
        "auto",
        "torch.compile over blocks and head. auto: in --mode fast on a GPU, where it works.",
        choices=("auto", "on", "off"),
    )
    recompute: str = _flag(
        "auto",
        "The results of a vit_*'s norms and GELU: made again by the backward pass, not kept, in "
        "little more than half the memory. auto: in --mode fast on a GPU.",
        choices=("auto", "on", "off"),
    )
    fsdp: bool = _flag(
        False, "Shard parameters, gradients and moments over the processes, for large networks."
    )
    cuda_graph: bool = _flag(
        False,
        "Replay the whole step as one CUDA graph (--mode fast, one process, batches of a size).",
    )
    amp_dtype: str = _flag(
        "auto",
        "Mixed precision. auto: on a GPU fp16 with loss scaling, as the paper, or bf16 in --mode "
        "fast; none on a CPU.",
        choices=("auto", "fp16", "bf16"),
    )
    attention: str = _flag(
        "auto",
        "Attention of the vit_* backbones: xformers, varlen (torch.nn.attention.varlen), sdpa "
        "(PyTorch's, one call a crop size). auto: the first of them that works here.",
        choices=("auto", "xformers", "varlen", "sdpa"),
    )
    packing: str = _flag(
        "auto",
        "Crops of all sizes as one sequence through a vit_* student, attention within each crop. "
        "The result is the same. auto: on; other architectures take one size at a time.",
        choices=("auto", "on", "off"),
    )
    last_block: str = _flag(
        "cls",
        "What the last block of a vit_* computes in training: cls, the CLS token, which is all the "
        "head takes; all, every token. The result is the same.",
        choices=("cls", "all"),
    )
    crops: str = _flag(
        "auto",
        "Who makes the crops: fused (exact and fast), dali (DALI's own operators, near PIL), or "
        "torchvision (the paper's PIL chain). auto: the first of them that works here.",
        choices=("auto", "fused", "dali", "torchvision"),
    )
    decode: str = _flag(
        "auto",
        "Who decodes for --crops fused: pillow or cpu (DALI's CPU decoder), with the same pixels, "
        "or gpu (nvJPEG, near ones; for hosts with few cores). auto: cpu, or pillow without DALI.",
        choices=("auto", "pillow", "cpu", "gpu"),
    )
    hw_decoder_load: float = _flag(
        0.65,
        "Share of the images that --decode gpu gives to the GPU's JPEG engine, where it has one.",
    )
    exif_orientation: bool = _flag(
        False,
        "Turn images as their EXIF orientation says, which the paper's loader does not.",
    )
    last_batch: str = _flag(
        "paper",
        "An epoch's last, incomplete batch: dropped after repeating images until the processes "
        "divide them (paper), dropped with no image repeated (drop), filled with images of the "
        "epoch's beginning (pad).",
        choices=("paper", "drop", "pad"),
    )
    max_bad_share: float = _flag(0.05, "Share of unreadable images above which the run stops.")
    on_nonfinite: str = _flag(
        "stop",
        "When the loss is not finite: stop, or go back to the last checkpoint and skip that batch.",
        choices=("stop", "rollback"),
    )
    saveckp_every_steps: int = _flag(
        0, "Also save checkpoint.pth every so many steps; 0: only each epoch."
    )
    print_freq: int = _flag(
        10,
        "Steps between two measurements of the entropy, and two updates of what is shown.",
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check_values()

    def _check_types(self) -> None:
        for name, kind in _field_types().items():
            value = getattr(self, name)
            if typing.get_origin(kind) is tuple:
                fits = (
                    isinstance(value, (tuple, list))
                    and len(value) == 2
                    and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
                )
                if fits:
                    object.__setattr__(self, name, tuple(float(v) for v in value))
            elif kind is float:
                fits = isinstance(value, (int, float)) and not isinstance(value, bool)
                if fits:
                    object.__setattr__(self, name, float(value))
            elif kind is str and isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
                fits = True
            else:
                fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
            if not fits:
                wanted = "two numbers" if typing.get_origin(kind) is tuple else kind.__name__
                raise _error(name, value, wanted)

    def _check_values(self) -> None:
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices and getattr(self, field.name) not in choices:
                raise _error(field.name, getattr(self, field.name), "one of " + ", ".join(choices))
        for low, names in _AT_LEAST.items():
            for name in names:
                if not low <= getattr(self, name) < float("inf"):
                    raise _error(name, getattr(self, name), f"a finite number of at least {low}")
        for name in _ABOVE_ZERO:
            if not 0 < getattr(self, name) < float("inf"):
                raise _error(name, getattr(self, name), "a finite number above 0")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise _error(name, getattr(self, name), "a number from 0 to 1")
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise _error(name, getattr(self, name), "0 < smallest <= largest <= 1")
        if self.seed >= 2**63:
            raise _error("seed", self.seed, "below 2**63")
        if self.drop_path_rate == 1:
            raise _error("drop_path_rate", 1.0, "a number from 0 to below 1")
        self._check_together()

    def _check_together(self) -> None:
        for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
            if getattr(self, name) > self.epochs:
                raise ConfigError(
                    f"--{name} {getattr(self, name)} is beyond --epochs {self.epochs}: "
                    f"set --{name} to {self.epochs} or less, or raise --epochs"
                )
        if not self.use_fp16 and self.amp_dtype != "auto":
            raise ConfigError(
                f"--use_fp16 false contradicts --amp_dtype {self.amp_dtype}: leave out one"
            )
        if self.arch in PATCHED_ARCHS:
            sizes = ("global_crops_size", "local_crops_size")[: 2 if self.local_crops_number else 1]
            for name in sizes:
                if getattr(self, name) < self.patch_size:
                    raise ConfigError(
                        f"--{name} {getattr(self, name)} is smaller than a patch, "
                        f"--patch_size {self.patch_size}"
                    )

    @property
    def ncrops(self) -> int:
        """Crops an image: two global ones and the local ones."""
        return 2 + self.local_crops_number

    @property
    def images_per_step(self) -> int:
        """Images that one process sees in one optimizer step."""
        return self.batch_size_per_gpu * self.grad_accum

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and for a checkpoint's `args`."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of to_dict; raises ConfigError for a name that is no setting."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"no setting is called {name!r}{hint}")
        return cls(**values)


# The architectures that --patch_size is for.
PATCHED_ARCHS = tuple(
    f"{kind}_{size}"
    for kind in ("vit", "deit")
    for size in ("nano", "tiny", "small", "base", "large")
)
_AT_LEAST: dict[float, tuple[str, ...]] = {
    0: (
        "local_crops_number", "warmup_teacher_temp_epochs", "warmup_epochs", "freeze_last_layer",
        "weight_decay", "weight_decay_end", "clip_grad", "lr", "min_lr", "saveckp_freq", "seed",
        "num_workers", "saveckp_every_steps",
    ),
    1: (
        "patch_size", "out_dim", "batch_size_per_gpu", "epochs", "global_crops_size",
        "local_crops_size", "grad_accum", "print_freq",
    ),
}  # fmt: skip
_ABOVE_ZERO = ("warmup_teacher_temp", "teacher_temp")
_SHARES = ("momentum_teacher", "drop_path_rate", "max_bad_share", "hw_decoder_load")


def _field_types() -> dict[str, Any]:
    return {
        name: kind
        for name, kind in typing.get_type_hints(TrainConfig).items()
        if name in TrainConfig.__dataclass_fields__
    }


def _error(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"--{name} must be {wanted}, got {value!r}")


def parse_bool(text: str) -> bool:
    """The paper's spelling of booleans: on/off, true/false, 1/0, in any case."""
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be one of on, off, true, false, 1, 0, got {text!r}")


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raises ConfigError where one of these flags is below `least`; one that is None passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting of TrainConfig, and the two that old launchers pass."""
    add_arguments(parser, [field.name for field in dataclasses.fields(TrainConfig)])
    # torch.distributed.launch passes it; torchrun says the same in the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_arguments(parser: argparse._ActionsContainer, names: Sequence[str]) -> None:
    """Adds the flags of some settings of TrainConfig, for commands that share them."""
    kinds = _field_types()
    for field in dataclasses.fields(TrainConfig):
        if field.name not in names:
            continue
        kind = kinds[field.name]
        is_pair = typing.get_origin(kind) is tuple
        default: Any = field.default
        shown = " ".join(map(str, default)) if is_pair else default
        parser.add_argument(
            f"--{field.name}",
            type=parse_bool if kind is bool else float if is_pair else kind,
            nargs="+" if is_pair else None,
            choices=field.metadata["choices"],
            default=default,
            metavar=None if field.metadata["choices"] else "BOOL" if kind is bool else "VALUE",
            help=f"{field.metadata['help']} (default: {shown})",
        )


def config_from_args(args: argparse.Namespace) -> TrainConfig:
    """The validated config of a parsed command line; raises ConfigError."""
    return TrainConfig(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)}
    )
