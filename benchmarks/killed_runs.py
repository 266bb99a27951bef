"""Training runs in forked processes: start, kill at a given moment, compare with another run.

A fork takes milliseconds, because the modules are imported once. The parent must not start threads.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import random
import select
import signal
import struct
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.local_ranks import free_port, rank_variables
from fastdino import Trainer, checkpoint, cli
from fastdino.augmentation.cpu import fused_crops
from fastdino.augmentation.params import draw_crops
from fastdino.config import TrainConfig
from fastdino.errors import CheckpointError
from fastdino.files import PART
from fastdino.models import backbones
from fastdino.models.head import DINOHead
from fastdino.models.vit import VIT_ARCHS
from fastdino.training import shard_files

FOLDER = "checkpoint"  # of the shards of a sharded run
RUN = "run"  # the output folder of a run, in the folder where its command is started
EPOCHS, STEPS = 4, 2
COMMAND = (
    "train --device cpu --arch vit_nano --patch_size 8 --out_dim 16 --global_crops_size 16 "
    f"--local_crops_size 8 --local_crops_number 1 --batch_size_per_gpu 4 --epochs {EPOCHS} "
    "--warmup_epochs 1 --lr 0.05 --drop_path_rate 0.2 --saveckp_freq 1 --print_freq 1 "
    f"--data_path ../data --output_dir {RUN}"
).split()
IMAGES = 4 * STEPS + 1
# Smaller than vit_nano and its head, so that a checkpoint has 4 MB instead of 74.
BLOCKS = 2
small_head = partial(DINOHead, hidden_dim=32, bottleneck_dim=16)

# Shares of the kills at a uniform moment, in a save, and in a write of another file.
AIMS = {"moment": 0.5, "save": 0.4, "write": 0.1}
POLL_SECONDS = 0.001
WRITE_SECONDS = 0.004  # of a small file
# A launcher gives the other ranks this time after SIGTERM.
GRACE_SECONDS = 10.0
STUCK_SECONDS = 120.0


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        flags: in addition to COMMAND.
        ranks: number of processes; one of them is killed, and the others get SIGTERM.
        nonfinite_at: the iteration whose crops are NaN; -1: none.
    """

    flags: str
    ranks: int = 1
    nonfinite_at: int = -1


KINDS = {
    "torchvision crops": Kind("--crops torchvision --num_workers 0"),
    "fused crops": Kind(
        "--crops fused --decode pillow --num_workers 1 --saveckp_every_steps 1 --saveckp_freq 2"
    ),
    "mode fast": Kind("--mode fast --use_fp16 false --crops fused --decode pillow --num_workers 1"),
    "grad accum": Kind(
        "--crops torchvision --num_workers 0 --grad_accum 2 --batch_size_per_gpu 2 "
        "--use_bn_in_head true"
    ),
    "two processes": Kind(
        "--crops torchvision --num_workers 0 --batch_size_per_gpu 2 --last_batch drop", ranks=2
    ),
    "sharded": Kind(
        "--crops torchvision --num_workers 0 --batch_size_per_gpu 2 --last_batch drop --fsdp true "
        "--saveckp_every_steps 1",
        ranks=2,
    ),
    "sinkhorn": Kind(
        "--crops torchvision --num_workers 0 --centering sinkhorn --koleo_weight 0.1 "
        "--saveckp_every_steps 1 --saveckp_freq 0"
    ),
    "rollback": Kind(
        "--crops torchvision --num_workers 0 --on_nonfinite rollback", nonfinite_at=STEPS + 1
    ),
}


def prepare() -> None:
    """Load what every run needs, so that forked processes share it."""
    for name in ("loader_torchvision", "loader_fused"):
        __import__(f"fastdino.data.{name}")
    with contextlib.suppress(ImportError):
        __import__("torch.utils.tensorboard")
    config = TrainConfig(patch_size=8, local_crops_number=1)
    image = np.zeros((24, 24, 3), np.uint8)
    drawn = draw_crops(config, 0, [0], [(24, 24)])
    fused_crops([image], [(drawn[0], 16), (drawn[1], 8)])  # Numba compiles
    gc.freeze()  # so that collections in the forks do not visit what is imported


def write_images(folder: Path) -> None:
    """Write small JPEGs of noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")


class Counter:
    """Reports of the processes of a run to the parent, in shared memory.

    Attributes:
        reached: iterations done since the start of the first process.
        first_step: time.monotonic() at the first step.
        save_seconds: duration of the longest save.
    """

    _STEPS, _SAVE = struct.Struct("qd"), struct.Struct("d")  # written by two threads

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._STEPS.size + self._SAVE.size)

    def write_steps(self, reached: int, first_step: float) -> None:
        self._STEPS.pack_into(self._memory, 0, reached, first_step)

    def write_save(self, seconds: float) -> None:
        self._SAVE.pack_into(self._memory, self._STEPS.size, seconds)

    def read(self) -> tuple[int, float, float]:
        (save_seconds,) = self._SAVE.unpack_from(self._memory, self._STEPS.size)
        reached, first_step = self._STEPS.unpack_from(self._memory, 0)
        return reached, first_step, save_seconds


class Processes:
    """The processes of one start of a run.

    Args:
        kind: kind of run.
        folder: where the command is started.
    """

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.folder, self.counter = kind, folder, Counter()
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.started = time.monotonic()
        self.pids = [self._fork(rank, port) for rank in range(kind.ranks)]
        self.statuses: dict[int, int] = {}
        self.killed = False

    def _fork(self, rank: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.chdir(self.folder)
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if self.kind.ranks > 1:
                os.environ |= rank_variables(rank, self.kind.ranks, port)
            # After a fork torch renews its threads; several threads must not do that at once.
            torch.set_num_threads(1)
            with _instrumented(self.kind, self.counter if rank == 0 else Counter()):
                status = cli.main([*COMMAND, *self.kind.flags.split()])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def running(self) -> bool:
        """Return True until the first process has ended."""
        for pid in self.pids:
            if pid not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return not self.statuses

    def wait(self, seconds: float) -> bool:
        """Wait until one more process has ended, at most `seconds`; return True if any has."""
        descriptors = [os.pidfd_open(pid) for pid in self.pids if pid not in self.statuses]
        if not descriptors:
            return True
        try:
            select.select(descriptors, [], [], max(seconds, 0))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return not self.running()

    def wait_for_part(self, *, of_save: bool) -> bool:
        """Wait until a save, or another write, begins; return False if a process ended before."""
        run, old = self.folder / RUN, parts_of(self.folder / RUN)
        while self.running():
            new = parts_of(run) - old
            if any(name.startswith("checkpoint") == of_save for name, _ in new):
                return True
            time.sleep(POLL_SECONDS)
        return False

    def kill(self, rank: int) -> None:
        """Kill one rank, and end the others as a launcher does."""
        os.kill(self.pids[rank], signal.SIGKILL)
        self.killed = True
        self.end()

    def end(self) -> None:
        """Send SIGTERM to the remaining processes, later SIGKILL; wait for all."""
        limit = time.monotonic() + GRACE_SECONDS
        self.running()
        for pid in self.pids:
            if pid not in self.statuses and len(self.pids) > 1:
                os.kill(pid, signal.SIGTERM)
        while len(self.statuses) < len(self.pids):
            self.wait(max(limit - time.monotonic(), 0.01))
            if time.monotonic() > limit:
                for pid in set(self.pids) - set(self.statuses):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _instrumented(kind: Kind, counter: Counter) -> Iterator[None]:
    """Report the steps and saves to the counter; make the crops of an iteration NaN."""
    step, save = Trainer.train_step, checkpoint.write

    def counted_step(self: Trainer, crops: Sequence[Tensor]) -> Tensor:
        reached, first_step, _ = counter.read()
        first_step = first_step or time.monotonic()
        if self.iteration == kind.nonfinite_at:
            crops = [crop * float("nan") for crop in crops]
        loss = step(self, crops)
        counter.write_steps(max(reached, self.iteration), first_step)
        return loss

    def timed_save(*args: Any, **options: Any) -> None:
        started = time.monotonic()
        save(*args, **options)
        counter.write_save(max(counter.read()[2], time.monotonic() - started))

    with (
        mock.patch.object(backbones, "DINOHead", small_head),
        mock.patch.dict(VIT_ARCHS["vit_nano"], depth=BLOCKS),
        mock.patch.object(Trainer, "train_step", counted_step),
        mock.patch.object(checkpoint, "write", timed_save),
    ):
        yield


@dataclass
class Timing:
    """Seconds of an uninterrupted run: until its first step, from there on, and of a save."""

    start: float
    steps: float
    save: float

    def of_rest(self, run: Path) -> float:
        """Return the expected duration of the rest of a run."""
        return self.start + (1 - iteration_of(run) / (EPOCHS * STEPS)) * self.steps

    def correct(self, expected: float, seconds: float) -> None:
        """Follow the speed of the machine, after the rest of a run took `seconds`."""
        factor = 0.5 + 0.5 * seconds / expected
        self.start, self.steps, self.save = (
            value * factor for value in (self.start, self.steps, self.save)
        )


def run_to_end(kind: Kind, folder: Path) -> Timing:
    """Run a kind without interruption.

    Raises: RuntimeError: it failed; the message has the last line of its output.
    """
    started = time.monotonic()
    processes = Processes(kind, folder)
    processes.wait(STUCK_SECONDS)
    ended = time.monotonic()
    processes.end()
    if any(processes.statuses.values()):
        raise RuntimeError(f"the uninterrupted run failed: {last_line(folder)}")
    _, first_step, save = processes.counter.read()
    return Timing(first_step - started, ended - first_step, save)


def kill_at_random(kind: Kind, folder: Path, timing: Timing, rng: random.Random) -> Processes:
    """Start a run and kill it at a random moment; it may end before.

    The moment is uniform over the run, or in the first save or other write after such a moment.

    Args: timing: of the uninterrupted run.
    """
    (aim,) = rng.choices([*AIMS], [*AIMS.values()])
    expected = timing.of_rest(folder / RUN)
    moment = rng.uniform(0, expected)
    delay = rng.uniform(0, timing.save if aim == "save" else WRITE_SECONDS)
    rank = rng.randrange(kind.ranks)
    processes = Processes(kind, folder)
    ended = processes.wait(moment if aim == "moment" else max(moment - timing.save, 0))
    if aim != "moment" and not ended:
        ended = not processes.wait_for_part(of_save=aim == "save") or processes.wait(delay)
    if ended:
        processes.wait(STUCK_SECONDS)
        timing.correct(expected, time.monotonic() - processes.started)
        processes.end()
    else:
        processes.kill(rank)
    return processes


def parts_of(run: Path) -> set[tuple[str, int]]:
    """Return name and inode of the temporary files in a folder."""
    found = set()
    for folder, prefix in ((run, ""), (run / FOLDER, "checkpoint/")):
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(PART):
                    found.add((prefix + entry.name, entry.inode()))
    return found


def iteration_of(run: Path) -> int:
    """Return the iteration of a run's checkpoint; 0 without one, -1 if it cannot be read."""
    shards = shard_files.newest(run / FOLDER)
    path = shards / shard_files.REST if shards else run / "checkpoint.pth"
    if not path.exists():
        return 0
    status = path.stat()
    return _iteration_in(path, status.st_ino, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def _iteration_in(path: Path, *_version: int) -> int:
    try:
        return int(checkpoint.load(path)["iteration"])
    except CheckpointError:
        return -1


def last_line(folder: Path) -> str:
    """Return the last line that a run printed."""
    path = folder / "output.txt"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1] if lines else "no output"


def files_of(run: Path) -> set[str]:
    """Return the names in a run's folder."""
    return set(os.listdir(run)) if run.exists() else set()


def differences(run: Path, expected: Path) -> list[str]:
    """Compare the checkpoints, log.txt and config.json of two runs bit for bit.

    Only the images per second in log.txt may differ.
    """
    problems = [f"{name} is missing" for name in sorted(files_of(expected) - files_of(run))]
    for path in sorted(expected.glob("checkpoint*.pth")):
        if not (run / path.name).exists():
            continue
        try:
            problems += list(_unequal(checkpoint.load(run / path.name), checkpoint.load(path)))[:1]
        except CheckpointError as error:
            problems.append(str(error))
    if _log_of(run) != _log_of(expected):
        problems.append("log.txt differs")
    texts = [folder / "config.json" for folder in (run, expected)]
    if len({path.read_bytes() if path.exists() else b"" for path in texts}) > 1:
        problems.append("config.json differs")
    return problems


def _unequal(value: Any, expected: Any, name: str = "checkpoint") -> Iterator[str]:
    """Yield the names of the values that are not equal bit for bit."""
    if isinstance(expected, Tensor):
        same = (
            isinstance(value, Tensor)
            and value.dtype == expected.dtype
            and value.shape == expected.shape
            and value.numpy().tobytes() == expected.numpy().tobytes()
        )
        if not same:
            yield f"{name} differs"
    elif isinstance(expected, dict):
        if not isinstance(value, dict) or value.keys() != expected.keys():
            yield f"{name} has other keys"
            return
        for key, item in expected.items():
            yield from _unequal(value[key], item, f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(expected):
            yield f"{name} has another length"
            return
        for i, (own, item) in enumerate(zip(value, expected, strict=True)):
            yield from _unequal(own, item, f"{name}.{i}")
    elif type(value) is not type(expected) or value != expected:
        yield f"{name} differs"


def _log_of(run: Path) -> list[dict[str, Any]] | str:
    """Return the lines of log.txt without the images per second, or why it cannot be read."""
    try:
        lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    except (OSError, ValueError) as error:
        return f"{run}: {error}"
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
