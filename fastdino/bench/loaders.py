"""`fastdino bench --loader`: images/s of the loaders, of others' and ours, and cores used.

Every arm delivers whole batches of crops (the decoders: pictures) of the same images, in a process
of its own that is kept to the same processors. They take turns, in rounds: what counts is their
ratio within a round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdino.bench import photos, telling
from fastdino.bench.arms import ARMS, GPU_ARMS, Task, start_arm
from fastdino.bench.isolated import Isolated, WorkerError
from fastdino.bench.report import Report
from fastdino.bench.stages import StageTimes, time_stages
from fastdino.bench.timing import Effort, Outcome, take_turns
from fastdino.config import TrainConfig, add_arguments, check_at_least
from fastdino.data import scan_images
from fastdino.data.image_dataset import ImageDataset
from fastdino.environment import cpu_count
from fastdino.errors import ConfigError, DataError
from fastdino.runtime import choose_device

# Of a run's settings, those that a loader depends on.
SETTINGS = (
    "batch_size_per_gpu", "num_workers", "global_crops_size", "local_crops_size",
    "local_crops_number", "global_crops_scale", "local_crops_scale", "seed", "device",
)  # fmt: skip
BATCH = TrainConfig.batch_size_per_gpu  # images, unless --batch_size_per_gpu says otherwise
PACKAGES = (
    "torch", "torchvision", "pillow", "numpy", "numba", "lightly", "nvidia-dali-cuda130",
    "nvidia-dali-cuda120", "triton",
)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    group = parser.add_argument_group("--loader")
    group.add_argument(
        "--images",
        type=int,
        default=200,
        help="how many images, of those at --data_path evenly chosen ones (default: 200); "
        f"generated ones have {photos.SIZE[0]} x {photos.SIZE[1]} pixels, quality {photos.QUALITY}",
    )
    group.add_argument(
        "--stages",
        action="store_true",
        help="also time each stage of an image's crops on one thread, by Pillow and fused",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="seconds after which an arm that does not answer is given up (default: 120)",
    )
    add_arguments(group, ("global_crops_scale", "local_crops_scale"))


def main(args: argparse.Namespace) -> int:
    """Measures and reports; the exit status is 1 where an arm failed or did not answer."""
    check_at_least(args, 1, "images", "rounds", "num_workers")
    telling.check_above_zero(args, "seconds", "timeout")
    load = os.getloadavg()[0]
    device = choose_device(args.device)
    names = chosen_arms(args.arms, on_gpu=device.type == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        source, about = _images(args, Path(folder))
        task = Task(source, _config(args, len(source)), str(device))
        arms = measure(names, task, args)
        stages = _stages(task, args) if args.stages else None
    report = Report(environment(task, load), _settings(args, task), about, arms, stages)
    print(report.markdown())
    if args.output:
        report.write(Path(args.output))
    return int(any(outcome.status == "failed" for outcome in arms.values()))


def chosen_arms(text: str | None, *, on_gpu: bool) -> list[str]:
    """The arms that --arms names, in the table's order; raises ConfigError."""
    if text is None:
        return [name for name in ARMS if on_gpu or name not in GPU_ARMS]
    wanted = [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in ARMS:
            raise ConfigError(f"--arms: there is no arm {name!r}; there are {', '.join(ARMS)}")
        if name in GPU_ARMS and not on_gpu:
            raise ConfigError(f"--arms: {name} needs a GPU, and this runs on the CPU")
    return [name for name in ARMS if name in wanted]


def measure(names: list[str], task: Task, args: argparse.Namespace) -> dict[str, Outcome]:
    """The rounds of these arms."""
    processors = task.config.num_workers
    competitors = {
        name: partial(Isolated, partial(start_arm, name, task), processors=processors)
        for name in names
    }
    effort = Effort(args.rounds, args.seconds, limit=args.timeout, step=processors)
    return take_turns(competitors, effort, telling.say)


def environment(task: Task, load: float) -> dict[str, str]:
    """What the figures were measured on; load: processes that wanted to run before."""
    facts = {"load average": f"{load:.1f} before"}
    if task.on_gpu:
        facts["GPU"] = f"{torch.cuda.get_device_name(task.device)}, CUDA {torch.version.cuda}"
    cores = f"{cpu_count()}, of which each arm had {task.config.num_workers}"
    return telling.environment(cores, facts, PACKAGES)


def _config(args: argparse.Namespace, images: int) -> TrainConfig:
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.batch_size_per_gpu is None:
        settings["batch_size_per_gpu"] = BATCH
    settings["num_workers"] = min(args.num_workers, cpu_count())
    # No network looks at these crops: they need not be as large as its patches.
    config = TrainConfig(**settings, patch_size=1)
    if images < config.batch_size_per_gpu:
        raise DataError(
            f"{images} images are fewer than a batch of {config.batch_size_per_gpu}: lower "
            "--batch_size_per_gpu, or give more --images"
        )
    return config


def _images(args: argparse.Namespace, folder: Path) -> tuple[ImageDataset, dict[str, Any]]:
    """The images, and what the report says of them; without --data_path they go to `folder`."""
    kind = photos.ABOUT
    if args.data_path is None:
        telling.say(f"generating {args.images} images")
        photos.write_photos(folder, args.images, args.seed)
    source = scan_images(folder if args.data_path is None else args.data_path)
    if args.data_path is not None:
        kind = source.kind
    count = min(args.images, len(source))
    source = source.subset(np.linspace(0, len(source) - 1, count).round().astype(np.int64))
    height, width = np.median(source.sizes, axis=0).astype(int).tolist()
    size = sum(len(source.read_bytes(i)) for i in range(count)) / count
    about = {"number": count, "width": width, "height": height, "mean_bytes": round(size)}
    return source, about | {"kind": kind}


def _settings(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    chosen = {name: getattr(task.config, name) for name in SETTINGS}
    chosen |= {"device": task.device, "rounds": args.rounds, "seconds": args.seconds}
    return chosen


def _stages(task: Task, args: argparse.Namespace) -> StageTimes | str:
    """The times, or why there are none."""
    telling.say("stages, one thread")
    try:
        return time_stages(task, args.rounds, args.timeout + 10 * args.seconds)
    except WorkerError as error:
        return str(error)
