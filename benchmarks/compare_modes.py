"""200 steps of --mode fast in bf16 beside --mode parity in fp32: losses, k-NN of what is learned.

    python -m benchmarks.compare_modes --write benchmarks/results/cpu

All runs see the same images, order and crops: they take their steps in turn, on one loader's
batches. The third run, parity with other weights, shows how far two trainings are apart that differ
in nothing but chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.environment import environment
from fastdino import TrainConfig, Trainer, checkpoint, cli
from fastdino.data import build_loader, scan_images
from fastdino.data.shapes import write_shapes
from fastdino.errors import UserError
from fastdino.heap import keep_freed_memory

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
IMAGES = 178  # a class: 66 steps an epoch
VAL_IMAGES = 200  # a class
SMOOTH = 10  # steps in a moving average


@dataclasses.dataclass(frozen=True)
class Result:
    """One run: its losses in nats, step by step, the k-NN accuracy of its teacher in percent."""

    name: str
    losses: list[float]
    top1: float
    seconds: float


class Bf16Products(TorchDispatchMode):
    """Products of bf16 matrices as fp32 products of the same numbers, rounded once to bf16.

    This is what a GPU computes, and a CPU too, only slower where it has no instructions for it.
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


def train_in_turn(runs: Mapping[str, TrainConfig], data: TrainConfig, folder: Path) -> list[Result]:
    """Trains all on the images and crops of `data`, and measures each teacher's 20-NN accuracy.

    A run's seed is that of its weights; folder/shapes has the val set.
    """
    loader = build_loader(data, scan_images(data.data_path))
    trainers = {name: Trainer(config, loader.steps_per_epoch) for name, config in runs.items()}
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in runs}
    seconds = dict.fromkeys(runs, 0.0)
    for epoch in range(data.epochs):
        for crops in loader.epoch(epoch):
            for name, trainer in trainers.items():
                torch.manual_seed(trainer.iteration)  # for stochastic depth
                started = time.perf_counter()
                with Bf16Products():
                    losses[name].append(trainer.train_step(crops))
                seconds[name] += time.perf_counter() - started
    loader.close()
    results = []
    for name, trainer in trainers.items():
        path = folder / f"{name}.pth"
        checkpoint.save(trainer.state_dict() | {"args": runs[name].to_dict()}, path)
        values = [loss.item() for loss in losses[name]]
        results.append(Result(name, values, accuracy(path, folder), seconds[name]))
    return results


def accuracy(path: Path, folder: Path) -> float:
    """20-NN top-1 of a checkpoint on folder/shapes/val, percent."""
    output = folder / "knn.json"
    words = f"knn --resize 48 --crop 48 --nb_knn 20 --data_path {folder / 'shapes'}"
    status = cli.main([*words.split(), "--pretrained_weights", str(path), "--output", str(output)])
    if status:
        raise UserError(f"fastdino knn ended with status {status}")
    return float(json.loads(output.read_text())["20"]["top1"])


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each step and up to SMOOTH - 1 before it."""
    return [statistics.fmean(losses[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(losses))]


def distance(one: Result, other: Result) -> tuple[float, float]:
    """Mean and largest absolute difference of two smoothed loss curves, nats."""
    pairs = zip(smoothed(one.losses), smoothed(other.losses), strict=True)
    differences = [abs(a - b) for a, b in pairs]
    return statistics.fmean(differences), max(differences)


def markdown(results: Sequence[Result], facts: dict[str, str]) -> str:
    base = results[0]
    lines = [
        "# --mode fast beside --mode parity",
        "",
        f"{len(base.losses)} steps on the shapes set, {CONFIG.arch}/{CONFIG.patch_size}, the same "
        "images, order and crops in each run. By",
        f"`python -m benchmarks.compare_modes --write ...`, torch {facts['torch']}, "
        f"{facts['threads']} threads of {facts['processor']}.",
        f"Distances of loss curves smoothed over {SMOOTH} steps, in nats. Products in bf16 are "
        "fp32 ones of bf16",
        "numbers, rounded once to bf16.",
        "",
        "| run | last loss | 20-NN top-1, % | mean distance from the first | largest |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        mean, largest = distance(result, base)
        lines.append(
            f"| {result.name} | {smoothed(result.losses)[-1]:.3f} | {result.top1:.1f} "
            f"| {mean:.4f} | {largest:.4f} |"
        )
    return "\n".join([*lines, "", "![losses](modes.png)", ""])


def draw(results: Sequence[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for result, style in zip(results, ("-", "--", ":"), strict=True):
        label = f"{result.name}: 20-NN {result.top1:.1f} %"
        axis.plot(smoothed(result.losses), style, label=label, linewidth=1.5)
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss, nats, mean of {SMOOTH} steps")
    axis.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, default=Path("runs/modes"), help="folder")
    parser.add_argument("--images", type=int, default=IMAGES, help="of each class")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shapes = folder / "shapes"
        write_shapes(
            shapes, train_per_class=options.images, val_per_class=VAL_IMAGES, size=96, clips=0
        )
        config = dataclasses.replace(CONFIG, data_path=str(shapes / "train"))
        runs = {
            "parity, fp32": config,
            "fast, bf16": dataclasses.replace(config, mode="fast", amp_dtype="bf16"),
            "parity, fp32, other weights": dataclasses.replace(config, seed=1),
        }
        results = train_in_turn(runs, config, folder)
    options.write.mkdir(parents=True, exist_ok=True)
    facts = environment()
    draw(results, options.write / "modes.png")
    (options.write / "modes.md").write_text(markdown(results, facts), encoding="utf-8")
    record = {"environment": facts, "runs": [dataclasses.asdict(result) for result in results]}
    (options.write / "modes.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(markdown(results, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
