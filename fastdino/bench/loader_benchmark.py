"""`fastdino bench --loader`: images/s of the data loaders and the cores that they use.

Every baseline delivers whole batches of crops (the decoders: images) of the same files, in its own
process on the same processors. Baselines are compared within each round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdino.bench import generated_photos
from fastdino.bench.baselines.loaders import BASE, BASELINES, GPU_ONLY, LoaderTask, start_loader
from fastdino.bench.harness import Outcome, choose_baselines, measure_workers
from fastdino.bench.report import cell, facts_table, log, median, table, write_report
from fastdino.bench.worker_process import WorkerProcess
from fastdino.config import TrainConfig, add_arguments, check_at_least
from fastdino.data import scan_images
from fastdino.data.image_dataset import ImageDataset
from fastdino.environment import cpu_count, environment
from fastdino.errors import DataError
from fastdino.runtime import choose_device

# The settings of a run that a loader depends on.
SETTINGS = (
    "batch_size_per_gpu", "num_workers", "global_crops_size", "local_crops_size",
    "local_crops_number", "global_crops_scale", "local_crops_scale", "seed", "device",
)  # fmt: skip
BATCH = TrainConfig.batch_size_per_gpu
PACKAGES = (
    "torch", "torchvision", "pillow", "numpy", "numba", "lightly", "nvidia-dali-cuda130",
    "nvidia-dali-cuda120", "triton",
)  # fmt: skip
EXPLANATION = """\
Medians of interleaved rounds. Every baseline has its own process on the same processors and
delivers whole batches. `x paper`: images/s relative to the paper's loader in the same round. Cores
used: CPU seconds of all processes per wall second. CPU ms: CPU time per image; `x paper, CPU`: CPU
time of the paper's loader divided by it, which is also valid on a busy machine. Crops: equal to the
paper's bit for bit for the same draws, or near."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    group = parser.add_argument_group("--loader")
    group.add_argument(
        "--images",
        type=int,
        default=200,
        help="number of images, spread evenly over those at --data_path (default: 200); generated "
        f"ones have {generated_photos.SIZE[0]} x {generated_photos.SIZE[1]} pixels, quality "
        f"{generated_photos.QUALITY}",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="seconds without an answer after which a baseline fails (default: 120)",
    )
    add_arguments(group, ("global_crops_scale", "local_crops_scale"))


def main(args: argparse.Namespace) -> int:
    """Measure and report; return 1 if a baseline failed or did not answer."""
    check_at_least(args, 1, "images", "rounds", "num_workers")
    load = os.getloadavg()[0]
    device = choose_device(args.device)
    unavailable = () if device.type == "cuda" else GPU_ONLY
    problems = {name: "it needs a GPU" if name in unavailable else None for name in BASELINES}
    names, _ = choose_baselines(args.baselines, problems)
    with tempfile.TemporaryDirectory() as folder:
        dataset, images = load_images(args, Path(folder))
        task = LoaderTask(dataset, _config(args, len(dataset)), str(device))
        outcomes = measure(names, task, args)
    facts = environment(device, PACKAGES, {"load average": f"{load:.1f} before"})
    settings = {name: getattr(task.config, name) for name in SETTINGS}
    settings |= {"device": task.device, "rounds": args.rounds, "seconds": args.seconds}
    report = LoaderReport(facts, settings, images, outcomes)
    print(report.markdown())
    if args.output:
        write_report(Path(args.output), "loader", report.markdown(), report.as_json())
    return int(any(outcome.status == "failed" for outcome in outcomes.values()))


def measure(names: Sequence[str], task: LoaderTask, args: argparse.Namespace) -> dict[str, Outcome]:
    """Measure the baselines in interleaved rounds."""
    processors = task.config.num_workers
    start = {
        name: partial(WorkerProcess, partial(start_loader, name, task), processors=processors)
        for name in names
    }
    effort = {"rounds": args.rounds, "seconds": args.seconds, "limit": args.timeout}
    return measure_workers(start, **effort, multiple=processors, log=log)


def _config(args: argparse.Namespace, images: int) -> TrainConfig:
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.batch_size_per_gpu is None:
        settings["batch_size_per_gpu"] = BATCH
    settings["num_workers"] = min(args.num_workers, cpu_count())
    # Crops may be smaller than a patch: no network uses them.
    config = TrainConfig(**settings, patch_size=1)
    if images < config.batch_size_per_gpu:
        raise DataError(
            f"{images} images are fewer than a batch of {config.batch_size_per_gpu}: lower "
            "--batch_size_per_gpu or raise --images"
        )
    return config


def load_images(args: argparse.Namespace, folder: Path) -> tuple[ImageDataset, dict[str, Any]]:
    """Return the images and their description; generated ones are written to `folder`."""
    if args.data_path is None:
        log(f"generating {args.images} images")
        generated_photos.write_photos(folder, args.images, args.seed)
    dataset = scan_images(folder if args.data_path is None else args.data_path)
    kind = generated_photos.DESCRIPTION if args.data_path is None else dataset.kind
    count = min(args.images, len(dataset))
    dataset = dataset.subset(np.linspace(0, len(dataset) - 1, count).round().astype(np.int64))
    height, width = np.median(dataset.sizes, axis=0).astype(int).tolist()
    size = sum(len(dataset.read_bytes(i)) for i in range(count)) / count
    about = {"number": count, "width": width, "height": height, "mean_bytes": round(size)}
    return dataset, about | {"kind": kind}


@dataclass(frozen=True)
class LoaderReport:
    """The results of the loader benchmark."""

    environment: dict[str, str]
    settings: dict[str, Any]
    images: dict[str, Any]
    outcomes: dict[str, Outcome]

    @property
    def base(self) -> Outcome:
        """Return the outcome of the paper's loader; one without samples if it was left out."""
        return self.outcomes.get(BASE, Outcome())

    def markdown(self) -> str:
        """Return loader.md."""
        images, s = self.images, self.settings
        about = (
            f"{images['number']} images, {images['width']} x {images['height']} px (median), "
            f"{images['mean_bytes'] / 1e3:.0f} KB (mean); {images['kind']}."
        )
        crops = (
            f"2 crops of {s['global_crops_size']} px and {s['local_crops_number']} of "
            f"{s['local_crops_size']} px per image, batches of {s['batch_size_per_gpu']}, "
            f"{s['num_workers']} workers or threads, delivered on {s['device']}; {s['rounds']} "
            f"rounds of {s['seconds']:g} s."
        )
        heads = (
            "baseline", "images/s", "range", "x paper", "cores used", "CPU ms", "x paper, CPU",
            "crops", "what",
        )  # fmt: skip
        rows = [self._row(name, outcome) for name, outcome in self.outcomes.items()]
        parts = ["# Loaders", "Written by `fastdino bench --loader`."]
        parts += [facts_table(self.environment), about, crops, EXPLANATION, table(heads, rows)]
        return "\n\n".join(parts) + "\n"

    def _row(self, name: str, outcome: Outcome) -> list[str]:
        baseline = BASELINES[name]
        if outcome.status != "measured":
            return [name, outcome.status, *["-"] * 6, f"{baseline.title}: {outcome.reason}"]
        return [
            name,
            f"{statistics.median(outcome.rates):.4g}",
            f"{min(outcome.rates):.4g} - {max(outcome.rates):.4g}",
            cell("{:.2f}", median(outcome.speedups(self.base))),
            cell("{:.2f}", outcome.cores),
            cell("{:.2f}", outcome.cpu_ms),
            cell("{:.2f}", outcome.cpu_saving(self.base)),
            baseline.pixels or "-",
            baseline.title,
        ]

    def as_json(self) -> dict[str, Any]:
        """Return loader.json: the same with the samples of every round."""
        return {
            "environment": self.environment,
            "settings": self.settings,
            "images": self.images,
            "arms": {name: self._record(name, outcome) for name, outcome in self.outcomes.items()},
        }

    def _record(self, name: str, outcome: Outcome) -> dict[str, Any]:
        baseline = BASELINES[name]
        about = {"what": baseline.title, "crops": baseline.pixels, "status": outcome.status}
        if outcome.status != "measured":
            return about | {"reason": outcome.reason}
        return about | {
            "images_per_second": statistics.median(outcome.rates),
            "range": (min(outcome.rates), max(outcome.rates)),
            "times_paper": median(outcome.speedups(self.base)),
            "times_less_cpu_than_paper": outcome.cpu_saving(self.base),
            "cores_used": outcome.cores,
            "cpu_ms_an_image": outcome.cpu_ms,
            "rounds": [
                {"images": s.count, "seconds": s.seconds, "cpu_seconds": s.cpu_seconds}
                for s in outcome.samples
            ],
        }
