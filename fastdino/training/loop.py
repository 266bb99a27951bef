"""The training loop: dataset, epochs, logs, checkpoints, and clean stops."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import fastdino
from fastdino import distributed
from fastdino.config import TrainConfig, add_train_arguments, config_from_args
from fastdino.data import build_loader, scan_images
from fastdino.data.image_files import Conversion
from fastdino.environment import commit
from fastdino.errors import NonFiniteError, UserError
from fastdino.evals.features import StoppedError
from fastdino.files import write_json
from fastdino.launch import shares_store
from fastdino.runtime import Runtime, choose_device, resolve_runtime, slow_precision
from fastdino.signals import EXIT_INTERRUPTED, StopSignals
from fastdino.training.allocator import is_out_of_memory, keep_freed_memory
from fastdino.training.loggers import Loggers, build_loggers, resolve_names
from fastdino.training.logging import Progress
from fastdino.training.metric_logger import Origin
from fastdino.training.monitor import TeacherMonitor
from fastdino.training.output_folder import OutputFolder
from fastdino.training.resume import RunCheckpoint, recorded_choices
from fastdino.training.trainer import Trainer

# Skipped images listed by path in a warning; the rest is counted.
LISTED_AT_ONCE = 10

Status = Literal["finished", "interrupted"]


def train(config: TrainConfig) -> Status:
    """Pretrain as `config` says; resume if output_dir has a checkpoint.

    Writes to config.output_dir: checkpoint.pth and checkpoint<epoch>.pth (keys student, teacher,
    optimizer, epoch, args, dino_loss and fastdino's own), log.txt (one JSON object per epoch),
    config.json and what the loggers write.

    Returns: "finished", or "interrupted" after one of signals.STOP_SIGNALS: the current step was
        finished and the run saved; the same call resumes it.
    Raises: UserError: invalid data, settings or checkpoint, a loss that is not finite, or too
        little memory; the message says what to do.
    """
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    group = distributed.process_group(device, config.dist_url, config.dist_timeout_minutes)
    with group, contextlib.ExitStack() as stack:
        folder = OutputFolder(Path(config.output_dir))
        distributed.from_main(lambda: _enter(folder, stack))
        distributed.from_main(lambda: config.check_world_size(distributed.world_size()))
        recorded = distributed.from_main(lambda: recorded_choices(config))
        return Run(config, resolve_runtime(config, recorded=recorded), folder).run()


def _enter(folder: OutputFolder, stack: contextlib.ExitStack) -> None:
    stack.enter_context(folder)  # not returned, as it would be sent to the other ranks


class StepMetrics(NamedTuple):
    """Metrics of one step, still on the device."""

    iteration: int
    loss: Tensor
    terms: dict[str, Tensor]
    entropy: Tensor | None


class Run:
    """A pretraining run on one rank; rank 0 holds the lock of its output folder."""

    def __init__(self, config: TrainConfig, runtime: Runtime, folder: OutputFolder):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.output_dir = folder.path
        # Before the scan, which may take minutes: a wrong name is reported at once.
        self.logger_names = distributed.from_main(lambda: resolve_names(config.loggers))
        # Scanned on rank 0, as all ranks must agree on the list of images.
        dataset = distributed.from_main(
            lambda: scan_images(
                config.data_path,
                max_bad_share=config.max_bad_share,
                workers=config.num_workers,
                conversion=Conversion(config.exif_orientation, config.image_range),
                cache=self.output_dir / "images.npz",
            )
        )
        with distributed.fail_together():  # on each node
            dataset.check_present()
        # For stochastic depth; weights are seeded by the Trainer, crops by the loader.
        torch.manual_seed(config.seed + distributed.rank())
        assert runtime.crops
        assert runtime.decode
        self.loader = build_loader(
            config,
            dataset,
            crops=runtime.crops.value,
            decode=runtime.decode.value,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            device=runtime.device.value,
        )
        with explain_failures(config, runtime):
            self.trainer = Trainer(config, self.loader.steps_per_epoch, runtime=runtime)
        self.git_commit = distributed.from_main(commit)
        self.progress = Progress(
            output_dir=self.output_dir,
            epochs=config.epochs,
            steps_per_epoch=self.loader.steps_per_epoch,
            images_per_step=self.trainer.batch.images_per_step * distributed.world_size(),
            prototypes=config.out_dim,
            enabled=distributed.rank() == 0,
            loggers=self._build_loggers(),
        )
        self.monitor = TeacherMonitor(config, self.trainer, self.progress, dataset, self.output_dir)
        self.checkpoint = RunCheckpoint(config, self.trainer, self.progress, dataset)
        self.unreported: list[StepMetrics] = []
        self.listed: set[str] = set()  # skipped images that a warning has listed

    def run(self) -> Status:
        """Train until the last epoch or a signal."""
        self.progress.info(self.headline())
        for note in self.loader.dataset.notes:
            self.progress.info(note)
        for warning in (self.loader.dataset.warning, slow_precision(self.runtime)):
            if warning:
                self.progress.warn(warning)
        self._list_skipped(self.loader.dataset.skipped)
        if self.config.global_batch_size and shares_store():
            self.progress.warn(
                "torchrun keeps one store for all restarts, and a node that returns cannot join: "
                "for an elastic run, start each torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
            )
        with contextlib.closing(self.loader), self.progress, contextlib.closing(self.checkpoint):
            self.checkpoint.resume_or_start()
            if self.checkpoint.lacks_single_file():
                self._save_epoch(self.trainer.epoch - 1)
            distributed.from_main(self._write_config)
            # Before, a signal ends the run: nothing is to be saved.
            with StopSignals(self.checkpoint.is_due) as signals:
                return self._run_epochs(signals)

    def _build_loggers(self) -> Loggers:
        """Build the loggers on rank 0; the other ranks have none."""
        settings = {
            **self.config.to_dict(),
            "processes": distributed.world_size(),
            "fastdino": fastdino.__version__,
            "torch": torch.__version__,
            "commit": self.git_commit,
        }
        origin = Origin(self.output_dir, settings, lambda text: self.progress.info(text))
        with distributed.fail_together():
            names = self.logger_names if distributed.rank() == 0 else ()
            return build_loggers(
                names,
                origin,
                lambda text: self.progress.warn(text),
                required=self.config.logger != "auto",
            )

    def _run_epochs(self, signals: StopSignals) -> Status:
        while self.trainer.epoch < self.config.epochs or self.progress.open_epoch is not None:
            with explain_failures(self.config, self.runtime):
                status = self._run_epoch(signals)
            if status == "interrupted":
                self._finish_save()
                self.progress.info(
                    f"stopped by {signals.received} and saved at iteration "
                    f"{self.trainer.iteration}; run the same command to resume"
                )
                return "interrupted"
        self._finish_save()
        return "finished"

    def headline(self) -> str:
        """Return one line with version, data, and the resolved settings with their reasons."""
        device = self.runtime.device.value
        if self.trainer.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self.trainer.device)})"
        dataset = self.loader.dataset
        parts = [
            f"fastdino {fastdino.__version__}: {self.config.arch} on {device}",
            f"--mode {self.config.mode}",
            *self._changed_loss(),
            f"{distributed.world_size()} process(es){self._divided_batch()}",
            f"{len(dataset)} images ({len(dataset.skipped)} skipped), {dataset.kind}",
            f"{self.trainer.steps_per_epoch} steps per epoch",
            *self.runtime.summary(),
            f"loader: {self.loader.description}",
        ]
        return " | ".join(parts)

    def _divided_batch(self) -> str:
        """Return how --global_batch_size is divided."""
        images, passes = self.trainer.batch
        batch = self.config.global_batch_size
        return f" x {passes} pass(es) of {images} images: global batch {batch}" if batch else ""

    def _changed_loss(self) -> list[str]:
        """Return the flags that change the paper's loss."""
        config = self.config
        flags = [] if config.centering == "centering" else [f"--centering {config.centering}"]
        return flags + ([f"--koleo_weight {config.koleo_weight:g}"] if config.koleo_weight else [])

    def _run_epoch(self, signals: StopSignals) -> Status:
        """Train to the end of the epoch, or until a rollback or a signal."""
        try:
            if self.progress.open_epoch is None and not self._train_epoch(signals):
                return "interrupted"
            return self._finish_epoch(signals)
        except NonFiniteError as error:
            self.checkpoint.roll_back(error)
            self.unreported.clear()
            return "finished"

    def _train_epoch(self, signals: StopSignals) -> bool:
        """Train to the end of the epoch; return False after a signal, with the run saved."""
        trainer, epoch = self.trainer, self.trainer.epoch
        started, first = time.perf_counter(), trainer.iteration
        for crops in self.loader.epoch(epoch, start_step=first % trainer.steps_per_epoch):
            self._step(crops)
            if trainer.epoch > epoch:
                break
            every = self.config.saveckp_every_steps
            stop = signals.should_stop_after_step()
            if stop or signals.save_due or (every and trainer.iteration % every == 0):
                distributed.from_main(self._restore_folder)
                self._save(whole=False)
            if stop:
                return False
        self._report_steps()
        seconds = time.perf_counter() - started
        images = (trainer.iteration - first) * self.progress.images_per_step
        skipped = {
            k: v for part in distributed.gather(self.loader.skipped) for k, v in part.items()
        }
        self._list_skipped(skipped)
        self.progress.close_epoch(
            epoch,
            images_per_second=images / seconds,
            skipped_images=len(self.loader.dataset.skipped) + len(skipped),
        )
        return True

    def _finish_epoch(self, signals: StopSignals) -> Status:
        """Evaluate the teacher if that is due, write the epoch's line of log.txt, and save."""
        epoch = self.progress.open_epoch
        assert epoch is not None
        distributed.from_main(self._restore_folder)  # first, as another run may now use it
        results: dict[str, float] = {}
        if self.monitor.due(epoch):
            self._save(whole=False)
            self._finish_save()  # a run that is killed during the evaluation repeats only that
            try:
                results = self.monitor.evaluate(epoch, lambda: signals.received is not None)
            except StoppedError:
                signals.should_stop()  # so that all ranks know the signal
                return "interrupted"
            distributed.from_main(self._restore_folder)
        self.progress.write_epoch(results)
        self._save_epoch(epoch)
        if signals.should_stop() and self.trainer.epoch < self.config.epochs:
            return "interrupted"
        return "finished"

    def _step(self, crops: list[Tensor]) -> None:
        trainer, iteration = self.trainer, self.trainer.iteration
        if iteration in self.checkpoint.left_out:
            trainer.skip_step()
            return
        loss = trainer.train_step(crops)
        self.unreported.append(StepMetrics(iteration, loss, trainer.terms, trainer.entropy))
        if trainer.entropy is not None:
            self._report_steps()

    def _report_steps(self) -> None:
        """Log the steps since the last call; reading their metrics waits for the device."""
        self.trainer.verify()
        steps, self.unreported = self.unreported, []
        for step in steps:
            entropy = None if step.entropy is None else distributed.mean(step.entropy).item()
            values = {
                "loss": step.loss.item(),
                "lr": self.trainer.lr_schedule(step.iteration),
                "wd": self.trainer.weight_decay_schedule(step.iteration),
                **{name: term.item() for name, term in step.terms.items()},
            }
            self.progress.step(step.iteration, values, entropy=entropy)

    def _save(self, also: Path | None = None, *, whole: bool = True) -> None:
        self._report_steps()
        self.checkpoint.save(also, whole=whole)

    def _save_epoch(self, epoch: int) -> None:
        """Save after an epoch, with a copy every --saveckp_freq epochs."""
        frequency = self.config.saveckp_freq
        keep = bool(frequency) and epoch % frequency == 0
        self._save(also=self.output_dir / f"checkpoint{epoch:04}.pth" if keep else None)

    def _finish_save(self) -> None:
        """Wait until the last save is written."""
        distributed.from_main(self._restore_folder)
        self.checkpoint.wait()

    def _restore_folder(self) -> None:
        if self.folder.restore():
            self.progress.warn(
                f"--output_dir {self.output_dir} was deleted or replaced during the run: it is "
                "written again from here on"
            )
            self._write_config()

    def _list_skipped(self, skipped: dict[str, str]) -> None:
        """Warn of skipped images, once each: list the first few and count the rest."""
        new = [path for path in skipped if path not in self.listed]
        self.listed.update(new)
        for path in new[:LISTED_AT_ONCE]:
            self.progress.warn(f"skipped {path}: {skipped[path]}")
        if len(new) > LISTED_AT_ONCE:
            self.progress.warn(f"skipped {len(new) - LISTED_AT_ONCE} more images")

    def _write_config(self) -> None:
        resolved = {
            **self.runtime.to_dict(),
            "loader": self.loader.description,
            "processes": distributed.world_size(),
            "fastdino": fastdino.__version__,
            "torch": torch.__version__,
            "commit": self.git_commit,
            "loggers": self.logger_names,
        }
        path = self.output_dir / "config.json"
        write_json({"config": self.config.to_dict(), "resolved": resolved}, path)


@contextlib.contextmanager
def explain_failures(config: TrainConfig, runtime: Runtime) -> Iterator[None]:
    """Convert out-of-memory errors and dead workers to UserErrors that suggest flags."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error):
            raise UserError(
                f"a data loading worker died ({error}): if memory or /dev/shm is full, lower "
                f"--num_workers (now {config.num_workers}) or --batch_size_per_gpu"
            ) from error
        if not is_out_of_memory(error):
            raise
        raised = f" and raise --grad_accum ({config.grad_accum}) by the same factor"
        if config.global_batch_size:  # --grad_accum follows
            raised = ""
        kept = ""
        if runtime.attention.value == "matmul":
            kept = ", or use --attention sdpa, which keeps no attention weights"
        raise UserError(
            f"out of memory: lower --batch_size_per_gpu (now {config.batch_size_per_gpu}){raised}, "
            f"which gives the same training{kept}; or lower --out_dim (now {config.out_dim}) or "
            f"--global_crops_size ({config.global_crops_size}). {error}"
        ) from error


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino train`."""
    add_train_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run `fastdino train`; the exit status is 75 if a signal interrupted it."""
    return EXIT_INTERRUPTED if train(config_from_args(args)) == "interrupted" else 0
