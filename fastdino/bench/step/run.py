"""`fastdino bench`: images/s of the training step, ours beside others', and where the time goes.

First every arm must pass the gate. Those that do take turns, in rounds, in one process; afterwards
one step of each is profiled.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastdino.bench import telling
from fastdino.bench.step.arm import TOLERANCE, Arm, initial_setting, synthetic_crops, vit_sizes
from fastdino.bench.step.arms import OURS, Entry, choose_arms
from fastdino.bench.step.breakdown import profile_step, saved_bytes
from fastdino.bench.step.flops import ModelFlops, executed_flops, model_flops, peak_of
from fastdino.bench.step.gate import Gate
from fastdino.bench.step.report import ArmResult, Fed, Report, Scaling
from fastdino.bench.step.scaling import StepTime, messages_of, scale
from fastdino.config import TrainConfig, add_arguments, check_at_least, parse_bool
from fastdino.data import scan_images
from fastdino.data.loader import build_loader
from fastdino.environment import cpu_count, output_of
from fastdino.errors import ConfigError
from fastdino.runtime import choose_device, resolve_crops
from fastdino.training.allocator import keep_freed_memory

# Of a run's settings, those that a step depends on.
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
WARM_UP = {"cuda": 5, "cpu": 1}  # steps, after the first
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    group = parser.add_argument_group("the training step")
    group.add_argument(
        "--arch",
        help=f"backbone, a vit_* (default: {DEFAULTS['cuda']['arch']} on a GPU, "
        f"{DEFAULTS['cpu']['arch']} on a CPU)",
    )
    names = ("patch_size", "out_dim", "drop_path_rate", "use_fp16", "amp_dtype", "recompute")
    add_arguments(group, names)
    group.add_argument(
        "--steps", type=int, help="steps of a round of an arm, in place of --seconds"
    )
    group.add_argument(
        "--dino_repo", type=Path, help="a checkout of facebookresearch/dino: its code is an arm"
    )
    group.add_argument(
        "--keep_memory",
        type=parse_bool,
        default=True,
        help="on a CPU, for every arm: keep freed memory for the next step, as `fastdino train` "
        "does, or give it back as the C library does by itself (default: true)",
    )
    group.add_argument("--threads", type=int, help="PyTorch's threads (default: as it chooses)")
    group.add_argument(
        "--scaling",
        action="store_true",
        help="also the modelled efficiency on 8 to 1024 GPUs, from the step measured here",
    )
    group.add_argument("--step_ms", type=float, help="for --scaling: a step's time, not measured")
    group.add_argument("--backward_ms", type=float, help="and that of its backward pass")


def main(args: argparse.Namespace) -> int:
    """Measures and reports; the exit status is 1 where an arm is red or broke."""
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    args.keep_memory = args.keep_memory and device.type == "cpu" and keep_freed_memory()
    config = config_of(args, device)
    if args.step_ms is not None:
        told = StepTime(1e-3 * args.step_ms, 1e-3 * args.backward_ms)
        scaling = model_scaling(config, told, "given", on_cpu=False)
        print(scaling.markdown())
        return 0
    names = [name.strip() for name in args.arms.split(",")] if args.arms else None
    entries, missing = choose_arms(names, device, args.dino_repo)
    found = Benchmark(config, device, args).run(entries, missing)
    print(found.markdown())
    if args.output:
        found.write(Path(args.output))
    print(f"\n{found.summary()}")
    return int(found.failed)


def config_of(args: argparse.Namespace, device: torch.device) -> TrainConfig:
    """The config of an ordinary step: the last layer is trained, lr is at its peak."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    for name, value in DEFAULTS[device.type].items():
        if settings[name] is None:
            settings[name] = value
    if args.data_path:
        settings["data_path"] = args.data_path
    config = TrainConfig(**settings, freeze_last_layer=0, warmup_epochs=0)
    vit_sizes(config)  # raises where the arms cannot be made
    return config


class Benchmark:
    """One run: gate, rounds, profiles. An arm that is red or breaks is left out from there on."""

    def __init__(self, config: TrainConfig, device: torch.device, args: argparse.Namespace):
        self.config, self.device, self.args = config, device, args
        self.crops = synthetic_crops(config, device)
        self.results: dict[str, ArmResult] = {}
        self.arms: dict[str, Arm] = {}

    def run(self, entries: dict[str, Entry], missing: dict[str, str]) -> Report:
        """The whole of it."""
        problem = ""
        environment = self.environment()
        try:
            self.check(entries)
            self.prepare(entries)
            self.take_rounds()
            environment = self.environment()  # with the clocks of a GPU that has just worked
            self.profile()
        except KeyboardInterrupt:
            problem = "interrupted: what is missing was not measured"
        settings = {name: getattr(self.config, name) for name in SETTINGS}
        return Report(
            environment=environment,
            settings=settings | {"rounds": self.args.rounds, "device": str(self.device)},
            kind=self.device.type,
            arms=list(self.results.values()),
            missing=missing,
            flops=flops_of(self.config),
            peak=peak_of(self.device),
            problem=problem,
            fed=self.feed() if self.args.data_path and not problem else None,
            scaling=self.scaling() if self.args.scaling and not problem else None,
        )

    def check(self, entries: dict[str, Entry]) -> None:
        """The gate."""
        gate = Gate(self.config, self.device, self.args.dino_repo)
        for name, entry in entries.items():
            verdict = gate.check(entry.build, one_size=bool(entry.one_size))
            notes = []
            if entry.one_size:
                notes.append(f"on crops of one size: {entry.one_size}")
            if verdict.loss_tolerance > TOLERANCE:
                notes.append(f"the loss, one long fp32 sum, to {verdict.loss_tolerance:g}")
            result = ArmResult(name, entry.title, verdict, "; ".join(notes))
            result.first_steps = verdict.seconds
            if not verdict.green:
                result.problem = "red: not timed"
            self.results[name] = result
            telling.say(f"{name}: {verdict}")
            self._free()

    def prepare(self, entries: dict[str, Entry]) -> None:
        """Builds the green arms, warms them up, and takes the memory of a step."""
        setting = initial_setting(self.config, self.device, self.args.dino_repo)
        for name, result in self.results.items():
            if result.problem:
                continue
            with self._told(name):
                before = self._allocated()
                arm = self.arms[name] = entries[name].build(setting)
                result.precision = arm.precision
                result.images = self.config.batch_size_per_gpu
                result.first_steps += self._seconds(arm, 1)
                self._seconds(arm, WARM_UP[self.device.type] + arm.warm_up)
                result.memory = self._memory(arm, before)

    def take_rounds(self) -> None:
        """Rounds in turn, there and back, so that none always follows the same one."""
        steps: dict[str, int] = {}
        for name in list(self.arms):
            with self._told(name):
                once = self._seconds(self.arms[name], 1)
                steps[name] = self.args.steps or max(1, round(self.args.seconds / once))
                telling.say(
                    f"{name}: {self.config.batch_size_per_gpu / once:.3g} images/s at first"
                )
        for done in range(self.args.rounds):
            for name in list(self.arms)[:: 1 if done % 2 == 0 else -1]:
                with self._told(name):
                    seconds = self._seconds(self.arms[name], steps[name])
                    self.results[name].seconds.append(seconds)
            telling.say(f"round {done + 1} of {self.args.rounds}")

    def profile(self) -> None:
        """The parts of a step, and the FLOPs that it executes."""
        for name, arm in list(self.arms.items()):
            with self._told(name):
                result = self.results[name]
                result.breakdown = profile_step(arm, self.crops, self.device)
                flops = executed_flops(lambda arm=arm: arm.step(self.crops))  # type: ignore[misc]
                result.executed = flops / result.images

    def feed(self) -> Fed | None:
        """Our fastest arm on images from the disk."""
        name = self._fastest(OURS)
        if name is None:
            return None
        seconds = statistics.median(self.results[name].seconds)
        steps = max(2, round(self.args.rounds * self.args.seconds / seconds))
        return feed(self.arms[name], name, self.config, self.device, steps, seconds)

    def scaling(self) -> Scaling | None:
        """The model of many GPUs, from our fastest arm whose backward pass is known."""
        found = {name: self.results[name].breakdown for name in OURS if name in self.arms}
        shares = {  # a graph's kernels are not known apart
            name: parts.backward / sum(parts.parts.values())
            for name, parts in found.items()
            if parts is not None and parts.backward
        }
        name = self._fastest(list(shares))
        if name is None:
            return None
        step = statistics.median(self.results[name].seconds)
        backward = step * shares[name]
        on_cpu = self.device.type == "cpu"
        return model_scaling(self.config, StepTime(step, backward), f"arm {name}", on_cpu=on_cpu)

    def environment(self) -> dict[str, str]:
        """What the figures are measured on."""
        device, facts = "cpu", {}
        if self.device.type == "cpu":
            facts["freed memory"] = "kept" if self.args.keep_memory else "as the C library does"
        else:
            device = torch.cuda.get_device_name(self.device)
            facts["CUDA"] = torch.version.cuda or "unknown"
            query = ("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
            facts[CLOCKS] = output_of(*query).replace("\n", "; ")
        cores = f"{cpu_count()}, {torch.get_num_threads()} threads"
        return {"device": device, **telling.environment(cores, facts, PACKAGES)}

    def _fastest(self, names: Sequence[str]) -> str | None:
        """The fastest of these arms, of those that were timed."""
        timed = [name for name in names if name in self.arms]
        return min(
            timed, key=lambda name: statistics.median(self.results[name].seconds), default=None
        )

    def _seconds(self, arm: Arm, steps: int) -> float:
        """Of a step: the mean of some in a row, synchronised at the two ends."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            arm.step(self.crops)
        synchronize(self.device)
        return (time.perf_counter() - start) / steps

    def _memory(self, arm: Arm, before: int) -> int:
        """Bytes; see report.MEMORY. before: what was allocated before the arm was built."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._seconds(arm, 1)
            return torch.cuda.max_memory_allocated(self.device) - before
        own = [*arm.student.parameters(), *self.crops]
        return saved_bytes(lambda: arm.step(self.crops), own)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Turns what an arm raises into its result, and takes it out of those that run."""
        try:
            yield
        except Exception as error:  # whatever the code of others raises: the other arms go on
            result = self.results[name]
            result.problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            result.seconds, result.breakdown = [], None
            self.arms.pop(name, None)
            telling.say(f"{name}: {result.problem}")
            self._free()


def feed(
    arm: Arm, name: str, config: TrainConfig, device: torch.device, steps: int, synthetic: float
) -> Fed:
    """Some steps on the loader's crops; `synthetic`: seconds of a step with crops in memory."""
    backend, decoder = resolve_crops(config, device)
    loader = build_loader(
        config,
        scan_images(config.data_path),
        crops=backend.value,
        decode=decoder.value,
        device=device,
    )
    waited = 0.0
    try:
        batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
        arm.step(next(batches))  # starts the workers
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            crops = next(batches)
            waited += time.perf_counter() - asked
            arm.step(crops)
        synchronize(device)
        seconds = (time.perf_counter() - start) / steps
        images = config.batch_size_per_gpu
        return Fed(name, loader.description, images / seconds, waited / steps, synthetic / seconds)
    finally:
        loader.close()


def model_scaling(config: TrainConfig, of: StepTime, source: str, *, on_cpu: bool) -> Scaling:
    """The model of many GPUs for a step of this config."""
    messages = messages_of(config)
    return Scaling(
        scale(of, messages, 4 * config.out_dim),
        of.step,
        of.backward,
        source,
        len(messages),
        sum(message.size for message in messages),
        on_cpu,
    )


def flops_of(config: TrainConfig) -> ModelFlops:
    """The model's FLOPs an image."""
    arch = vit_sizes(config)
    return model_flops(
        arch["embed_dim"],
        arch["depth"],
        config.patch_size,
        global_size=config.global_crops_size,
        local_size=config.local_crops_size,
        local_number=config.local_crops_number,
        K=config.out_dim,
    )


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that cannot be; TrainConfig checks its own."""
    check_at_least(args, 1, "rounds", "steps", "threads")
    telling.check_above_zero(args, "seconds", "step_ms", "backward_ms")
    given = [args.step_ms is not None, args.backward_ms is not None]
    if any(given) and not (all(given) and args.scaling):
        raise ConfigError("--step_ms and --backward_ms go together, and with --scaling")
    if all(given) and args.backward_ms > args.step_ms:
        raise ConfigError(
            f"--backward_ms {args.backward_ms:g} is longer than the step, "
            f"--step_ms {args.step_ms:g}"
        )
