"""`fastdino bench`: images/s of the training step against baselines, and the parts of its time.

Every baseline is checked for correctness first. Those that pass are measured in interleaved rounds
in one process; then one step of each is profiled.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fastdino import cpu_speed
from fastdino.bench.baselines.loaders import training_loader
from fastdino.bench.baselines.steps import BASELINES, OURS, StepBaseline
from fastdino.bench.baselines.training_step import (
    TOLERANCE,
    TrainingStep,
    initial_setup,
    synthetic_crops,
    vit_sizes,
)
from fastdino.bench.correctness import CorrectnessCheck, Verdict
from fastdino.bench.flops import executed_flops, model_flops, peak_of
from fastdino.bench.harness import Harness, Sample, choose_baselines
from fastdino.bench.measurement import free_memory, host_seconds, saved_bytes, synchronize
from fastdino.bench.report import log, write_report
from fastdino.bench.scaling import Scaling, StepTime, model_scaling
from fastdino.bench.step_profile import profile_step
from fastdino.bench.step_report import DiskFeed, StepReport, StepResult
from fastdino.config import TrainConfig, add_arguments, check_at_least, parse_bool, user_path
from fastdino.data import scan_images
from fastdino.environment import environment
from fastdino.errors import ConfigError
from fastdino.runtime import choose_device
from fastdino.training.allocator import keep_freed_memory

# The settings of a run that a step depends on.
SETTINGS = (
    "arch", "patch_size", "out_dim", "batch_size_per_gpu", "global_crops_size", "local_crops_size",
    "local_crops_number", "drop_path_rate", "use_fp16", "amp_dtype", "recompute", "num_workers",
    "seed", "device",
)  # fmt: skip
DEFAULTS = {
    "cuda": {"arch": "vit_small", "batch_size_per_gpu": 64},
    "cpu": {"arch": "vit_tiny", "batch_size_per_gpu": 8},
}
PACKAGES = ("torch", "triton", "torchvision", "timm", "lightly", "xformers", "fastdino")
TOO_LATE = "not ready after two thirds of --time_limit"
WARMUP_STEPS = {"cuda": 5, "cpu": 1}  # after the first


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    group = parser.add_argument_group("the training step")
    group.add_argument(
        "--arch",
        help=f"backbone, a vit_* (default: {DEFAULTS['cuda']['arch']} on a GPU, "
        f"{DEFAULTS['cpu']['arch']} on a CPU)",
    )
    names = ("patch_size", "out_dim", "drop_path_rate", "use_fp16", "amp_dtype", "recompute")
    add_arguments(group, names)
    group.add_argument("--steps", type=int, help="steps per round, instead of --seconds")
    group.add_argument(
        "--time_limit",
        type=float,
        help="seconds of the whole benchmark; baselines that are not ready after two thirds of "
        "them are left out (default: none)",
    )
    group.add_argument(
        "--dino_repo",
        type=lambda text: Path(user_path(text)),
        help="checkout of facebookresearch/dino, added as a baseline",
    )
    group.add_argument(
        "--keep_memory",
        type=parse_bool,
        default=True,
        help="on a CPU, for every baseline: keep freed memory for the next step, as `fastdino "
        "train` does, instead of the C library's default (default: true)",
    )
    group.add_argument("--threads", type=int, help="PyTorch's threads (default: PyTorch's choice)")
    group.add_argument(
        "--scaling",
        action="store_true",
        help="also model the efficiency on 8 to 1024 GPUs from the measured step",
    )
    group.add_argument("--step_ms", type=float, help="step time for --scaling, instead of measured")
    group.add_argument("--backward_ms", type=float, help="backward time for --scaling")


def main(args: argparse.Namespace) -> int:
    """Measure and report; return 1 if a baseline failed its check or raised."""
    check_at_least(args, 1, "rounds", "steps", "threads")
    _check_scaling(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    config = config_of(args, device)
    if args.step_ms is not None:
        given = StepTime(1e-3 * args.step_ms, 1e-3 * args.backward_ms)
        print(model_scaling(config, given, "given", on_cpu=False).markdown())
        return 0
    args.keep_memory = args.keep_memory and device.type == "cpu" and keep_freed_memory()
    problems = {name: one.problem(device, args.dino_repo) for name, one in BASELINES.items()}
    names, missing = choose_baselines(args.baselines, problems, OURS)
    baselines = {name: BASELINES[name] for name in names}
    report = StepBenchmark(config, device, args).run(baselines, missing)
    print(report.markdown())
    if args.output:
        write_report(Path(args.output), "step", report.markdown() + "\n", report.as_json())
    print(f"\n{report.summary()}")
    return int(report.failed)


def _check_scaling(args: argparse.Namespace) -> None:
    """Raise ConfigError for an inconsistent --scaling, --step_ms or --backward_ms."""
    given = [args.step_ms is not None, args.backward_ms is not None]
    if any(given) and not (all(given) and args.scaling):
        raise ConfigError("--step_ms and --backward_ms must be given together, with --scaling")
    if all(given) and args.backward_ms > args.step_ms:
        raise ConfigError(
            f"--backward_ms {args.backward_ms:g} is longer than the step, "
            f"--step_ms {args.step_ms:g}"
        )


def config_of(args: argparse.Namespace, device: torch.device) -> TrainConfig:
    """Return the config of an ordinary step: trained last layer, peak learning rate."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    for name, value in DEFAULTS[device.type].items():
        if settings[name] is None:
            settings[name] = value
    if args.data_path:
        settings["data_path"] = args.data_path
    config = TrainConfig(**settings, freeze_last_layer=0, warmup_epochs=0)
    vit_sizes(config)  # raises ConfigError for an unsupported --arch
    return config


class StepBenchmark:
    """One run: correctness checks, interleaved rounds, profiles.

    A baseline that fails its check or raises is left out from then on.
    """

    def __init__(self, config: TrainConfig, device: torch.device, args: argparse.Namespace):
        self.config, self.device, self.args = config, device, args
        self.crops = synthetic_crops(config, device)
        self.ready_by = math.inf
        self.results: dict[str, StepResult] = {}
        self.steps: dict[str, TrainingStep] = {}
        self.harness = Harness([])

    def run(self, baselines: dict[str, StepBaseline], missing: dict[str, str]) -> StepReport:
        """Run all phases and return the report; an interrupted run reports what is measured."""
        self.harness = Harness(baselines, log, self._drop)
        problem = ""
        if self.args.time_limit:
            self.ready_by = time.perf_counter() + self.args.time_limit * 2 / 3
        facts = self.environment()
        try:
            self.prepare(baselines)
            self.measure()
            facts = self.environment()  # with the GPU's clocks under load
            self.profile()
        except KeyboardInterrupt:
            problem = "interrupted: the missing values were not measured"
        settings = {name: getattr(self.config, name) for name in SETTINGS}
        timed = {result.precision for result in self.results.values() if result.seconds}
        return StepReport(
            facts,
            settings | {"rounds": self.args.rounds, "device": str(self.device)},
            self.device.type,
            list(self.results.values()),
            missing,
            model_flops(self.config),
            {precision: peak_of(self.device, precision) for precision in sorted(timed)},
            problem,
            feed=self.feed() if self.args.data_path and not problem else None,
            scaling=self.scaling() if self.args.scaling and not problem else None,
        )

    def prepare(self, baselines: dict[str, StepBaseline]) -> None:
        """Check and warm up the baselines, one after the other, as long as there is time."""
        checker = CorrectnessCheck(self.config, self.device, self.args.dino_repo)
        setup = initial_setup(self.config, self.device, self.args.dino_repo)
        for name, baseline in baselines.items():
            if time.perf_counter() > self.ready_by:
                self._add_result(name, baseline, Verdict({}, TOO_LATE))
                self.harness.fail(name, TOO_LATE, skipped=True)
                continue
            verdict = checker.check(baseline.build, one_size=bool(baseline.one_size))
            self._add_result(name, baseline, verdict)
            log(f"{name}: {verdict}")
            free_memory(self.device)
            if not verdict.passed:
                self.harness.fail(name, "incorrect: not timed")
                continue
            with self.harness.guard(name):
                self._warm_up(name, partial(baseline.build, setup))

    def _add_result(self, name: str, baseline: StepBaseline, verdict: Verdict) -> None:
        notes = []
        if baseline.one_size:
            notes.append(f"on crops of one size: {baseline.one_size}")
        if verdict.loss_tolerance > TOLERANCE:
            notes.append(f"the loss, one long fp32 sum, to {verdict.loss_tolerance:g}")
        if verdict.choices:
            values = ", ".join(f"{name} {value}" for name, value in verdict.choices.items())
            notes.append(f"checked in fp32 with {values}")
        self.results[name] = StepResult(
            name,
            baseline.title,
            verdict,
            self.harness.outcomes[name],
            images=self.config.batch_size_per_gpu,
            note="; ".join(notes),
            first_steps=verdict.seconds,
        )

    def _warm_up(self, name: str, build: Callable[[], TrainingStep]) -> None:
        """Build a step, run its first steps, and measure the memory of one."""
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if on_gpu else 0
        step = self.steps[name] = build()
        result = self.results[name]
        result.precision = step.precision
        choices = (f"{name}: {choice}" for name, choice in step.choices.items())
        result.note = "; ".join(filter(None, (result.note, *choices)))
        result.first_steps += self._seconds(name, 1)
        self._seconds(name, WARMUP_STEPS[self.device.type] + step.warmup_steps)
        result.memory = self._memory(name, before)

    def measure(self) -> None:
        """Measure the interleaved rounds."""
        measures: dict[str, Callable[[], Sample]] = {}
        for name in self.harness.active:
            with self.harness.guard(name):
                once = self._seconds(name, 1)
                steps = self.args.steps or max(1, round(self.args.seconds / once))
                measures[name] = partial(self._sample, name, steps)
                log(f"{name}: {self.config.batch_size_per_gpu / once:.3g} images/s at first")
        self.harness.run(measures, self.args.rounds)

    def profile(self) -> None:
        """Profile one step of each baseline and count its FLOPs."""
        for name in self.harness.active:
            with self.harness.guard(name):
                step, result = self.steps[name], self.results[name]
                result.breakdown = profile_step(step, self.crops, self.device)
                result.executed = executed_flops(partial(step.step, self.crops)) / result.images

    def feed(self) -> DiskFeed | None:
        """Measure our fastest step on images from the disk."""
        name = self._fastest(OURS)
        if name is None:
            return None
        seconds = self._median_seconds(name)
        steps = max(2, round(self.args.rounds * self.args.seconds / seconds))
        return feed_from_disk(self.steps[name], name, self.config, self.device, steps, seconds)

    def scaling(self) -> Scaling | None:
        """Model many GPUs from our fastest step whose backward pass is known."""
        profiles = {name: self.results[name].breakdown for name in OURS if name in self.steps}
        shares = {  # a CUDA graph has no separate backward pass
            name: profile.backward / sum(profile.parts.values())
            for name, profile in profiles.items()
            if profile is not None and profile.backward
        }
        name = self._fastest(list(shares))
        if name is None:
            return None
        step = self._median_seconds(name)
        time = StepTime(step, step * shares[name])
        on_cpu = self.device.type == "cpu"
        return model_scaling(self.config, time, f"baseline {name}", on_cpu=on_cpu)

    def environment(self) -> dict[str, str]:
        """Return the hardware, versions and settings of the measurement."""
        memory = "kept" if self.args.keep_memory else "C library's default"
        facts = {}
        if self.device.type == "cpu":
            faster = f"{cpu_speed.bf16_speedup():.2g} times as fast as in fp32"
            facts = {"freed memory": memory, "large product in bf16": faster}
        return environment(self.device, PACKAGES, facts)

    def _fastest(self, names: Sequence[str]) -> str | None:
        timed = [name for name in names if name in self.steps and self.results[name].seconds]
        return min(timed, key=self._median_seconds, default=None)

    def _median_seconds(self, name: str) -> float:
        return statistics.median(self.results[name].seconds)

    def _seconds(self, name: str, steps: int) -> float:
        """Return the mean seconds of consecutive steps, synchronized at the ends only."""
        return host_seconds([partial(self.steps[name].step, self.crops)] * steps, self.device)

    def _sample(self, name: str, steps: int) -> Sample:
        seconds = self._seconds(name, steps) * steps
        return Sample(steps * self.config.batch_size_per_gpu, seconds)

    def _memory(self, name: str, before: int) -> int:
        """Return bytes as step_report.MEMORY defines them; before: allocated before building."""
        step = self.steps[name]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._seconds(name, 1)
            return torch.cuda.max_memory_allocated(self.device) - before
        excluded = [*step.student.parameters(), *self.crops]
        return saved_bytes(partial(step.step, self.crops), excluded)

    def _drop(self, name: str) -> None:
        self.results[name].breakdown = None
        self.steps.pop(name, None)
        free_memory(self.device)


def feed_from_disk(
    step: TrainingStep,
    name: str,
    config: TrainConfig,
    device: torch.device,
    steps: int,
    synthetic: float,
) -> DiskFeed:
    """Time steps on the loader's crops; synthetic: seconds per step with crops in memory."""
    loader = training_loader(config, scan_images(config.data_path), device)
    wait = 0.0
    try:
        batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
        step.step(next(batches))  # starts the workers
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            requested = time.perf_counter()
            crops = next(batches)
            wait += time.perf_counter() - requested
            step.step(crops)
        synchronize(device)
        seconds = (time.perf_counter() - start) / steps
        rate = config.batch_size_per_gpu / seconds
        return DiskFeed(name, loader.description, rate, wait / steps, synthetic / seconds)
    finally:
        loader.close()
