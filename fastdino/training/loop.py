"""A whole pretraining run: data, epochs, logs, checkpoints, resuming, stopping."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fastdino
from fastdino import checkpoint, distributed
from fastdino.config import TrainConfig, add_train_arguments, config_from_args
from fastdino.data import build_loader, scan_images
from fastdino.errors import CheckpointError, NonFiniteError, UserError
from fastdino.files import file_lock, write_json
from fastdino.models.weights import initial_weights
from fastdino.runtime import Runtime, choose_device, resolve_runtime
from fastdino.signals import EXIT_INTERRUPTED, StopSignals
from fastdino.training.allocator import keep_freed_memory
from fastdino.training.logging import Progress
from fastdino.training.trainer import Trainer

# Returns to the same checkpoint after which a run with --on_nonfinite rollback gives up.
MAX_ROLLBACKS = 5
# Settings that say where things are, not what is computed.
PLACES = ("data_path", "output_dir", "dist_url", "device", "num_workers", "init_from")
# Skipped images named one by one; of more than that the number is said.
NAMED_AT_ONCE = 10

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
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    with distributed.process_group(device, config.dist_url), contextlib.ExitStack() as stack:
        distributed.from_main(lambda: stack.enter_context(claimed(Path(config.output_dir))))
        return Run(config, resolve_runtime(config)).run()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create an output folder and lock it against other runs during the block.

    Raises: CheckpointError: the folder cannot be written, or another run holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(folder / ".lock", wait=False))
        except BlockingIOError:
            raise CheckpointError(
                f"--output_dir {folder}: another run is writing there; use another folder"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"--output_dir {folder} cannot be written ({error}): use another folder"
            ) from error
        yield


class StepValues(NamedTuple):
    """What a step leaves to be told: tensors, as its values may not be there yet."""

    iteration: int
    loss: Tensor
    entropy: Tensor | None


class Run:
    """One process's share of a run."""

    def __init__(self, config: TrainConfig, runtime: Runtime):
        self.config, self.runtime = config, runtime
        self.output_dir = Path(config.output_dir)
        self.checkpoint_path = self.output_dir / "checkpoint.pth"
        self.is_main = distributed.rank() == 0
        # One verdict for all processes: they must agree on which images there are.
        source = distributed.from_main(
            lambda: scan_images(
                config.data_path,
                max_bad_share=config.max_bad_share,
                workers=config.num_workers,
                exif=config.exif_orientation,
                cache=self.output_dir / "images.npz",
            )
        )
        # Weights are seeded by the Trainer, crops by the loader; this is for stochastic depth.
        torch.manual_seed(config.seed + distributed.rank())
        assert runtime.crops
        assert runtime.decode
        self.loader = build_loader(
            config,
            source,
            crops=runtime.crops.value,
            decode=runtime.decode.value,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            device=runtime.device.value,
        )
        with explained_failures(config):
            self.trainer = Trainer(config, self.loader.steps_per_epoch, runtime=runtime)
        self.progress = Progress(
            self.output_dir,
            epochs=config.epochs,
            steps_per_epoch=self.loader.steps_per_epoch,
            images_per_step=config.images_per_step * distributed.world_size(),
            prototypes=config.out_dim,
            enabled=self.is_main,
        )
        self.steps: list[StepValues] = []  # done, and not yet told
        self.left_out: list[int] = []  # iterations whose batch a rollback passed over
        self.named: set[str] = set()  # skipped images that were warned of
        self.rollbacks = 0  # to the checkpoint there is now

    def run(self) -> Status:
        """Train until the last epoch or a signal."""
        self.progress.say(self.headline())
        for note in self.loader.source.notes:
            self.progress.say(note)
        self._name_skipped(self.loader.source.skipped)
        if not self._synchronises_batch_norm():
            self.progress.warn(
                "batch norm takes its statistics from each process alone: SyncBN needs GPUs"
            )
        with contextlib.closing(self.loader), self.progress, StopSignals() as signals:
            self._resume()
            distributed.from_main(self._write_config)
            while self.trainer.epoch < self.config.epochs:
                with explained_failures(self.config):
                    status = self._run_epoch(signals)
                if status == "interrupted":
                    self.progress.say(
                        f"stopped by {signals.received} at iteration {self.trainer.iteration}, "
                        "saved; the same command goes on"
                    )
                    return "interrupted"
        return "finished"

    def headline(self) -> str:
        """One line: what runs where, and why so."""
        where = self.runtime.device.value
        if self.trainer.device.type == "cuda":
            where += f" ({torch.cuda.get_device_name(self.trainer.device)})"
        source = self.loader.source
        parts = [
            f"fastdino {fastdino.__version__}: {self.config.arch} on {where}",
            f"--mode {self.config.mode}",
            f"{distributed.world_size()} process(es)",
            f"{len(source)} images ({len(source.skipped)} skipped), {source.kind}",
            f"{self.trainer.steps_per_epoch} steps per epoch",
            *(f"{name}: {choice}" for name, choice in self.runtime.choices().items()),
            f"loader: {self.loader.description}",
        ]
        return " | ".join(parts)

    def _run_epoch(self, signals: StopSignals) -> Status:
        """From where the trainer is to the epoch's end, or until a rollback or a signal."""
        try:
            return self._train_epoch(signals)
        except NonFiniteError as error:
            self._roll_back(error)
            return "finished"

    def _train_epoch(self, signals: StopSignals) -> Status:
        trainer, epoch = self.trainer, self.trainer.epoch
        started, first = time.perf_counter(), trainer.iteration
        for crops in self.loader.epoch(epoch, start_step=first % trainer.steps_per_epoch):
            if trainer.iteration in self.left_out:
                trainer.skip_step()
            else:
                self._step(crops)
            if trainer.epoch > epoch:
                break
            every = self.config.saveckp_every_steps
            stop = signals.agreed_after_step()
            if stop or (every and trainer.iteration % every == 0):
                self._save()
            if stop:
                return "interrupted"
        self._tell_steps()
        seconds = time.perf_counter() - started
        images = (trainer.iteration - first) * self.progress.images_per_step
        skipped = {
            k: v for part in distributed.gather(self.loader.skipped) for k, v in part.items()
        }
        self._name_skipped(skipped)
        self.progress.end_epoch(
            epoch,
            images_per_second=images / seconds,
            skipped_images=len(self.loader.source.skipped) + len(skipped),
        )
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
        loss = trainer.train_step(crops)
        self.steps.append(StepValues(iteration, loss, trainer.entropy))
        if trainer.entropy is not None:
            self._tell_steps()

    def _tell_steps(self) -> None:
        """Reports the steps done: between two calls nothing waits for the device."""
        self.trainer.verify()
        steps, self.steps = self.steps, []
        for step in steps:
            entropy = None if step.entropy is None else distributed.mean(step.entropy).item()
            values = {
                "loss": step.loss.item(),
                "lr": self.trainer.lr_schedule(step.iteration),
                "wd": self.trainer.weight_decay_schedule(step.iteration),
            }
            self.progress.step(step.iteration, values, entropy=entropy)

    def _write_config(self) -> None:
        resolved = {
            **self.runtime.to_dict(),
            "loader": self.loader.description,
            "processes": distributed.world_size(),
            "fastdino": fastdino.__version__,
            "torch": torch.__version__,
        }
        write_json(
            {"config": self.config.to_dict(), "resolved": resolved},
            self.output_dir / "config.json",
        )

    def _save(self, also: Path | None = None) -> None:
        self._tell_steps()
        state = {
            **self.trainer.state_dict(),
            "args": self.config.to_dict(),
            "progress": self.progress.state_dict(),
            "left_out": self.left_out,
            "images": self._images(),
        }
        self.progress.flush()
        distributed.from_main(lambda: checkpoint.save(state, self.checkpoint_path, also=also))
        self.rollbacks = 0

    def _resume(self) -> None:
        if distributed.from_main(self.checkpoint_path.exists):
            self._restore()
            done = self.trainer.epoch >= self.config.epochs
            where = "the run is finished" if done else f"epoch {self.trainer.epoch + 1}"
            self.progress.say(
                f"resumed {self.checkpoint_path} at iteration {self.trainer.iteration}: {where}"
            )
            if self.config.init_from:
                self.progress.say("--init_from is passed over: it is for the start of a run")
        else:
            if self.config.init_from:
                self._start_from_weights()
            self.progress.restart(0, None)
            if self.config.on_nonfinite == "rollback":
                self._save()

    def _start_from_weights(self) -> None:
        config = self.config
        with distributed.together():
            weights, key = initial_weights(
                config.init_from,
                arch=config.arch,
                patch_size=config.patch_size,
                img_size=config.global_crops_size,
            )
        self.trainer.start_from(weights)
        whose = f" ({key})" if key else ""
        self.progress.say(
            f"backbone of {config.init_from}{whose} in student and teacher; new heads"
        )

    def _restore(self) -> None:
        state = checkpoint.load(self.checkpoint_path)
        try:
            self.trainer.load_state_dict(state)
        except CheckpointError as error:
            raise CheckpointError(
                f"cannot resume {self.checkpoint_path}: {error}; or name another --output_dir"
            ) from error
        self._compare_settings(state.get("args"))
        self._compare_images(state.get("images"))
        self.left_out = list(state.get("left_out", []))
        self.steps.clear()
        self.progress.restart(self.trainer.iteration, state.get("progress"))

    def _compare_settings(self, saved: Any) -> None:
        """Says which settings are not those that the checkpoint's run had."""
        if not isinstance(saved, dict):  # the paper's Namespace
            return
        changed = [
            f"--{name} {value} (was {saved[name]})"
            for name, value in self.config.to_dict().items()
            if name not in PLACES and name in saved and saved[name] != value
        ]
        if changed:
            self.progress.warn(f"resuming with other settings: {', '.join(changed)}")

    def _images(self) -> dict[str, Any]:
        """What tells this run's images from others in a checkpoint."""
        source = self.loader.source
        return {"number": len(source), "fingerprint": source.fingerprint}

    def _compare_images(self, saved: Any) -> None:
        """Says so where the images are not those that the checkpoint's run had."""
        now = self._images()
        if not isinstance(saved, dict) or saved == now:
            return
        step = self.trainer.iteration % self.trainer.steps_per_epoch
        rest = "the rest of this epoch is not the rest of the one begun, and " if step else ""
        self.progress.warn(
            f"resuming with other images: {now['number']} with fingerprint {now['fingerprint']} "
            f"(was {saved['number']} with {saved['fingerprint']}: other names, sizes or broken "
            f"ones): {rest}order and crops are not those that the run would have had"
        )

    def _synchronises_batch_norm(self) -> bool:
        alone = distributed.world_size() == 1 or self.trainer.device.type == "cuda"
        return alone or not any(
            isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
            for module in self.trainer.student.modules()
        )

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
        # Weights found poisoned when they were to be saved: by the step just done.
        failed = self.trainer.iteration - 1 if error.iteration is None else error.iteration
        self.rollbacks += 1
        left_out = [*self.left_out, failed]
        self._restore()
        self.left_out = left_out
        self.progress.warn(
            f"{error}: back to iteration {self.trainer.iteration}; the batch of iteration {failed} "
            "will be left out"
        )


@contextlib.contextmanager
def explained_failures(config: TrainConfig) -> Iterator[None]:
    """Turns running out of memory, and a killed worker, into UserErrors that name the flags."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error):
            raise UserError(
                f"a data loading worker died ({error}): where memory or /dev/shm is short, lower "
                f"--num_workers (now {config.num_workers}) or --batch_size_per_gpu"
            ) from error
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory: lower --batch_size_per_gpu (now {config.batch_size_per_gpu}) and "
            f"raise --grad_accum ({config.grad_accum}) by the same factor, which gives the same "
            f"training; or lower --out_dim (now {config.out_dim}). {error}"
        ) from error


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino train`."""
    add_train_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino train`; the exit status is 75 where a signal interrupted it."""
    return EXIT_INTERRUPTED if train(config_from_args(args)) == "interrupted" else 0
