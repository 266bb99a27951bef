"""A whole pretraining run: data, epochs, logs, checkpoints, resuming, stopping."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from fastdino_kernels import chosen_impl as chosen_kernels
from torch import Tensor

import fastdino
from fastdino import checkpoint, distributed
from fastdino.config import TrainConfig, add_train_arguments, config_from_args
from fastdino.data import build_loader, scan_images
from fastdino.errors import CheckpointError, NonFiniteError, UserError
from fastdino.progress import Progress
from fastdino.step import Trainer

# Returns to the same checkpoint after which a run with --on_nonfinite rollback gives up.
MAX_ROLLBACKS = 5
# Skipped images named one by one; of more than that the number is said.
NAMED_AT_ONCE = 10

# EX_TEMPFAIL of sysexits.h: stopped by a signal, saved; the same command goes on.
EXIT_INTERRUPTED = 75

Status = Literal["finished", "interrupted"]


def train(config: TrainConfig) -> Status:
    """Pretrains as config says, resuming what output_dir holds.

    Writes to config.output_dir: checkpoint.pth and checkpoint<epoch>.pth (keys student, teacher,
    optimizer, epoch, args, dino_loss and this project's own), log.txt (one JSON object an epoch),
    TensorBoard events and config.json.

    Returns: "finished", or "interrupted" when SIGTERM or SIGINT came: the step was finished and
        the run saved, and the same call goes on with it.
    Raises: UserError: data, settings or checkpoint that cannot be, a loss that is not finite,
        memory that does not suffice; the message says what to do.
    """
    device = distributed.choose_device(config.device)
    with distributed.process_group(device, config.dist_url):
        return Run(config, device).run()


class Run:
    """One process's share of a run."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.checkpoint_path = self.output_dir / "checkpoint.pth"
        self.is_main = distributed.rank() == 0
        distributed.from_main(self._prepare_output)
        # One verdict for all processes: they must agree on which images there are.
        source = distributed.from_main(
            lambda: scan_images(
                config.data_path, max_bad_share=config.max_bad_share, workers=config.num_workers
            )
        )
        # Weights are seeded by the Trainer, crops by the loader; this is for stochastic depth.
        torch.manual_seed(config.seed + distributed.rank())
        self.loader = build_loader(
            config,
            source,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            device=device,
        )
        with memory_errors(config):
            self.trainer = Trainer(config, self.loader.steps_per_epoch, device=device)
        self.progress = Progress(
            self.output_dir,
            epochs=config.epochs,
            steps_per_epoch=self.loader.steps_per_epoch,
            images_per_step=config.images_per_step * distributed.world_size(),
            prototypes=config.out_dim,
            enabled=self.is_main,
        )
        self.left_out: list[int] = []  # iterations whose batch a rollback passed over
        self.named: set[str] = set()  # skipped images that were warned of
        self.rollbacks = 0  # to the checkpoint there is now

    def run(self) -> Status:
        """Trains to the end or to a signal."""
        self.progress.say(self.headline())
        self._name_skipped(self.loader.source.skipped)
        with self.progress, StopSignals() as signals:
            self._resume()
            self._write_config()
            while self.trainer.epoch < self.config.epochs:
                if self._run_epoch(signals) == "interrupted":
                    self.progress.say(
                        f"stopped by {signals.received} at iteration {self.trainer.iteration}, "
                        "saved; the same command goes on"
                    )
                    return "interrupted"
        self.loader.close()
        return "finished"

    def headline(self) -> str:
        """One line: what runs where, and why so."""
        config, trainer = self.config, self.trainer
        where = str(trainer.device)
        if trainer.device.type == "cuda":
            where += f" ({torch.cuda.get_device_name(trainer.device)})"
        source = self.loader.source
        parts = [
            f"fastdino {fastdino.__version__}: {config.arch} on {where}",
            f"{distributed.world_size()} process(es)",
            f"{len(source.paths)} images ({len(source.skipped)} skipped)",
            f"{trainer.steps_per_epoch} steps an epoch",
            f"attention: {trainer.attention.name} ({trainer.attention.reason})",
            f"kernels: {chosen_kernels()}",
            f"crops: {self.loader.description}",
            f"precision: {trainer.precision.reason}",
        ]
        return " | ".join(parts)

    def _run_epoch(self, signals: StopSignals) -> Status:
        """From where the trainer is to the epoch's end, or until a rollback or a signal."""
        trainer, epoch = self.trainer, self.trainer.epoch
        started, first = time.perf_counter(), trainer.iteration
        for crops in self.loader.epoch(epoch, start_step=first % trainer.steps_per_epoch):
            if trainer.iteration in self.left_out:
                trainer.skip_step()
            else:
                try:
                    self._step(crops)
                except NonFiniteError as error:
                    self._roll_back(error)
                    return "finished"
            if trainer.epoch > epoch:
                break
            every = self.config.saveckp_every_steps
            stop = signals.agreed()
            if stop or (every and trainer.iteration % every == 0):
                self._save()
            if stop:
                return "interrupted"
        seconds = time.perf_counter() - started
        images = (trainer.iteration - first) * self.progress.images_per_step
        skipped = len(self.loader.source.skipped) + len(self.loader.skipped)
        self.progress.end_epoch(epoch, images_per_second=images / seconds, skipped_images=skipped)
        self._name_skipped(self.loader.skipped)
        frequency = self.config.saveckp_freq
        keep = bool(frequency) and epoch % frequency == 0
        self._save(also=self.output_dir / f"checkpoint{epoch:04}.pth" if keep else None)
        if signals.agreed() and trainer.epoch < self.config.epochs:
            return "interrupted"
        return "finished"

    def _name_skipped(self, skipped: dict[str, str]) -> None:
        """Warns of the images left out, the first few by name, each once."""
        new = [path for path in skipped if path not in self.named]
        self.named.update(new)
        for path in new[:NAMED_AT_ONCE]:
            self.progress.warn(f"skipped {path}: {skipped[path]}")
        if len(new) > NAMED_AT_ONCE:
            self.progress.warn(f"skipped {len(new) - NAMED_AT_ONCE} more images")

    def _step(self, crops: list[Tensor]) -> None:
        trainer, iteration = self.trainer, self.trainer.iteration
        with memory_errors(self.config):
            loss = trainer.train_step(crops)
        entropy = None
        if iteration % self.config.print_freq == 0:
            assert trainer.entropy is not None
            entropy = distributed.mean(trainer.entropy).item()
        group = trainer.optimizer.param_groups[0]
        values = {"loss": loss.item(), "lr": group["lr"], "wd": group["weight_decay"]}
        self.progress.step(iteration, values, entropy=entropy)

    def _prepare_output(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            probe = self.output_dir / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"--output_dir {self.output_dir} cannot be written ({error}): name one that can"
            ) from error

    def _write_config(self) -> None:
        if not self.is_main:
            return
        resolved = {
            "device": str(self.trainer.device),
            "processes": distributed.world_size(),
            "attention": dataclasses.asdict(self.trainer.attention),
            "precision": self.trainer.precision.reason,
            "crops": self.loader.description,
            "kernels": chosen_kernels(),
            "fastdino": fastdino.__version__,
            "torch": torch.__version__,
        }
        text = json.dumps({"config": self.config.to_dict(), "resolved": resolved}, indent=2)
        path = self.output_dir / "config.json"
        with checkpoint.explained(path), checkpoint.replacing(path) as file:
            file.write(text.encode())

    def _save(self, also: Path | None = None) -> None:
        generators = distributed.gather(generator_state(self.trainer.device))
        if self.is_main:
            state = {
                **self.trainer.state_dict(),
                "args": self.config.to_dict(),
                "generators": generators,
                "progress": self.progress.state_dict(),
                "left_out": self.left_out,
            }
        distributed.from_main(lambda: checkpoint.save(state, self.checkpoint_path, also=also))
        self.rollbacks = 0

    def _resume(self) -> None:
        if distributed.from_main(self.checkpoint_path.exists):
            self._restore()
            self.progress.say(
                f"resumed {self.checkpoint_path} at iteration {self.trainer.iteration} "
                f"(epoch {self.trainer.epoch + 1} of {self.config.epochs})"
            )
        else:
            self.progress.restart(0, None)
            if self.config.on_nonfinite == "rollback":
                self._save()

    def _restore(self) -> None:
        state = checkpoint.load(self.checkpoint_path)
        try:
            self.trainer.load_state_dict(state)
        except CheckpointError as error:
            raise CheckpointError(
                f"cannot resume {self.checkpoint_path}: {error}; or name another --output_dir"
            ) from error
        self.left_out = list(state.get("left_out", []))
        generators = state.get("generators", [])
        if len(generators) == distributed.world_size():
            restore_generator(self.trainer.device, generators[distributed.rank()])
        self.progress.restart(self.trainer.iteration, state.get("progress"))

    def _roll_back(self, error: NonFiniteError) -> None:
        advice = (
            "try a lower --lr, a lower --clip_grad, a longer --warmup_epochs, --amp_dtype bf16 or "
            "--use_fp16 false"
        )
        last = f"the last good checkpoint is {self.checkpoint_path}"
        if not self.checkpoint_path.exists():
            last = "no checkpoint was written yet"
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{error}; {last}; {advice}, or --on_nonfinite rollback"
            ) from error
        if self.rollbacks == MAX_ROLLBACKS:
            raise NonFiniteError(
                f"{error}, after {MAX_ROLLBACKS} returns to the same checkpoint; {last}; {advice}"
            ) from error
        failed, self.rollbacks = self.trainer.iteration, self.rollbacks + 1
        left_out = [*self.left_out, failed]
        self._restore()
        self.left_out = left_out
        self.progress.warn(
            f"{error}: back to iteration {self.trainer.iteration}; the batch of iteration {failed} "
            "will be left out"
        )


class StopSignals:
    """Catches SIGTERM and SIGINT while the block runs; a second one acts as if none were caught."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether any process of the run was asked to stop; the same answer on every process."""
        if distributed.world_size() == 1:
            return self.received is not None
        names = [name for name in distributed.gather(self.received) if name]
        self.received = self.received or (names[0] if names else None)
        return bool(names)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


@contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Turns running out of memory into a UserError that names the flags to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory: lower --batch_size_per_gpu (now {config.batch_size_per_gpu}) and "
            f"raise --grad_accum ({config.grad_accum}) by the same factor, which gives the same "
            f"training; or lower --out_dim (now {config.out_dim}). {error}"
        ) from error


def generator_state(device: torch.device) -> dict[str, Tensor]:
    """The random generators of this process."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_generator(device: torch.device, state: dict[str, Tensor]) -> None:
    """The inverse of generator_state."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino train`."""
    add_train_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino train`; the exit status is 75 where a signal interrupted it."""
    return EXIT_INTERRUPTED if train(config_from_args(args)) == "interrupted" else 0
