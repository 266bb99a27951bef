"""Train 200 steps by --mode fast in bf16 and by --mode parity in fp32: losses, k-NN accuracy.

    python -m benchmarks.compare_modes --write benchmarks/results/cpu

All runs get the same images, order and crops: they take their steps in turn on the batches of one
loader. Another parity run with other initial weights shows how much chance alone changes. On a GPU
there is also --mode fast with the kernels' PyTorch implementation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastdino_kernels.dispatch import ENVIRONMENT_VARIABLE
from torch.utils._python_dispatch import TorchDispatchMode

from fastdino import TrainConfig, Trainer, checkpoint, cli
from fastdino.bench.baselines.loaders import training_loader
from fastdino.bench.measurement import synchronize
from fastdino.bench.report import table, wrap, write_report
from fastdino.data import scan_images
from fastdino.data.shapes import write_shapes
from fastdino.environment import environment
from fastdino.errors import UserError
from fastdino.runtime import choose_device
from fastdino.training.allocator import keep_freed_memory

CONFIG = TrainConfig(
    arch="vit_nano",
    patch_size=8,
    global_crops_size=48,
    local_crops_size=24,
    local_crops_number=2,
    out_dim=256,
    use_bn_in_head=True,
    momentum_teacher=0.99,
    warmup_teacher_temp=0.03,
    teacher_temp=0.03,
    batch_size_per_gpu=32,
    epochs=3,
    warmup_epochs=1,
    lr=0.004,
    min_lr=1e-5,
    weight_decay_end=0.1,
    drop_path_rate=0.1,
    num_workers=2,
)
SETTINGS = ("arch", "batch_size_per_gpu", "epochs", "device")  # those with a flag
IMAGES = 178  # per class: 66 steps per epoch
VAL_IMAGES = 200  # per class
SMOOTH = 10  # steps in a moving average


@dataclasses.dataclass(frozen=True)
class Run:
    """One training; kernels: FASTDINO_KERNELS during its steps."""

    config: TrainConfig
    kernels: str = "auto"


@dataclasses.dataclass(frozen=True)
class Result:
    """The losses of one run per step, in nats, and its teacher's k-NN accuracy in percent.

    images_per_second: of the steps after the first epoch.
    """

    name: str
    losses: list[float]
    top1: float
    images_per_second: float


class Bf16Products(TorchDispatchMode):
    """Compute products of bf16 matrices in fp32 and round them once to bf16.

    A GPU computes the same. So does a CPU, but more slowly without bf16 instructions.
    """

    PRODUCTS = frozenset(
        getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")
    )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in self.PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **(kwargs or {}))
        return function(*(tensor.float() for tensor in args), **(kwargs or {})).bfloat16()


def train_in_turn(runs: Mapping[str, Run], data: TrainConfig, folder: Path) -> list[Result]:
    """Train all runs on the crops of `data` and measure each teacher's 20-NN accuracy.

    folder/shapes contains the validation set.
    """
    device = choose_device(data.device)
    loader = training_loader(data, scan_images(data.data_path), device)
    trainers = {
        name: Trainer(run.config, loader.steps_per_epoch, device=device)
        for name, run in runs.items()
    }
    # On a CPU without bf16 instructions, bf16 products take ten times as long as fp32 ones.
    products = Bf16Products() if device.type == "cpu" else contextlib.nullcontext()
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in runs}
    seconds = dict.fromkeys(runs, 0.0)
    for epoch in range(data.epochs):
        for crops in loader.epoch(epoch):
            for name, trainer in trainers.items():
                torch.manual_seed(trainer.iteration)  # for stochastic depth
                synchronize(device)
                started = time.perf_counter()
                kernels = {ENVIRONMENT_VARIABLE: runs[name].kernels}
                with mock.patch.dict(os.environ, kernels), products:
                    losses[name].append(trainer.train_step(crops))
                synchronize(device)
                seconds[name] += (time.perf_counter() - started) * (epoch > 0)
    loader.close()
    timed = (data.epochs - 1) * loader.steps_per_epoch * data.batch_size_per_gpu
    results: list[Result] = []
    for name, trainer in trainers.items():
        path = folder / f"{len(results)}.pth"
        checkpoint.save(trainer.state_dict() | {"args": runs[name].config.to_dict()}, path)
        values = [loss.item() for loss in losses[name]]
        speed = timed / seconds[name] if timed else 0.0
        results.append(Result(name, values, knn_accuracy(path, folder), speed))
    return results


def knn_accuracy(path: Path, folder: Path) -> float:
    """Return the 20-NN top-1 accuracy of a checkpoint on folder/shapes/val, in percent."""
    output = folder / "knn.json"
    words = f"knn --resize 48 --crop 48 --nb_knn 20 --data_path {folder / 'shapes'}"
    status = cli.main([*words.split(), "--pretrained_weights", str(path), "--output", str(output)])
    if status:
        raise UserError(f"fastdino knn ended with status {status}")
    return float(json.loads(output.read_text())["20"]["top1"])


def smoothed(losses: Sequence[float]) -> list[float]:
    """Average each step with up to SMOOTH - 1 steps before it."""
    return [statistics.fmean(losses[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(losses))]


def distance(one: Result, other: Result) -> tuple[float, float]:
    """Return the mean and largest absolute difference of two smoothed loss curves, in nats."""
    pairs = zip(smoothed(one.losses), smoothed(other.losses), strict=True)
    differences = [abs(a - b) for a, b in pairs]
    return statistics.fmean(differences), max(differences)


def markdown(results: Sequence[Result], config: TrainConfig, facts: dict[str, str]) -> str:
    """Return modes.md."""
    base = results[0]
    on_cpu = facts["device"] == "cpu"
    device = f"{facts['threads']} threads of {facts['processor']}" if on_cpu else facts["device"]
    about = (
        f"{len(base.losses)} steps on the shapes set, {config.arch}/{config.patch_size}, "
        f"B = {config.batch_size_per_gpu}, the same images, order and crops in each run. By "
        f"`python -m benchmarks.compare_modes`, torch {facts['torch']}, {device}. "
        f"Distances of loss curves smoothed over {SMOOTH} steps, in nats."
    )
    heads = ["run", "last loss", "20-NN top-1, %", "mean distance from the first", "largest"]
    rows = []
    for result in results:
        last, distances = smoothed(result.losses)[-1], distance(result, base)
        rows.append([result.name, f"{last:.3f}", f"{result.top1:.1f}"])
        rows[-1] += [f"{value:.4f}" for value in distances]
    if on_cpu:
        about += " Products in bf16 are computed in fp32 and rounded once to bf16."
    else:
        heads.append("images/s")
        for row, result in zip(rows, results, strict=True):
            row.append(f"{result.images_per_second:.0f}")
    return "\n\n".join(["# --mode fast and --mode parity", wrap(about), table(heads, rows)]) + "\n"


def draw(results: Sequence[Result], path: Path) -> None:
    """Plot the smoothed losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for result, style in zip(results, ("-", "--", ":", "-."), strict=False):
        label = f"{result.name}: 20-NN {result.top1:.1f} %"
        axis.plot(smoothed(result.losses), style, label=label, linewidth=1.5)
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss, nats, mean of {SMOOTH} steps")
    axis.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, default=Path("runs/modes"), help="folder")
    parser.add_argument("--images", type=int, default=IMAGES, help="per class")
    parser.add_argument("--val_images", type=int, default=VAL_IMAGES, help="per class")
    for name in SETTINGS:
        kind = type(getattr(CONFIG, name))
        parser.add_argument(f"--{name}", type=kind, default=getattr(CONFIG, name))
    options = parser.parse_args(arguments)
    keep_freed_memory()
    settings = {name: getattr(options, name) for name in SETTINGS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shapes = folder / "shapes"
        numbers = {"train_per_class": options.images, "val_per_class": options.val_images}
        write_shapes(shapes, **numbers, size=96, clips=0)
        parity = dataclasses.replace(CONFIG, **settings, data_path=str(shapes / "train"))
        parity = dataclasses.replace(parity, use_fp16=False)
        fast = dataclasses.replace(parity, mode="fast", use_fp16=True, amp_dtype="bf16")
        runs = {
            "parity, fp32": Run(parity),
            "fast, bf16": Run(fast),
            "parity, fp32, other weights": Run(dataclasses.replace(parity, seed=1)),
        }
        device = choose_device(parity.device)
        if device.type == "cuda":
            runs["fast, bf16, kernels by PyTorch"] = Run(fast, "torch")
        results = train_in_turn(runs, parity, folder)
    facts = environment(device, ("torch", "triton"))
    text = markdown(results, parity, facts)
    record = {"environment": facts, "runs": [dataclasses.asdict(result) for result in results]}
    options.write.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(results, options.write / "modes.png")
        text += "\n![losses](modes.png)\n"
    write_report(options.write, "modes", text, record)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
