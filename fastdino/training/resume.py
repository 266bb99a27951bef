"""The checkpoint of a run: saving it, resuming from it, and rolling back to it."""

from __future__ import annotations

import errno
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from fastdino import checkpoint, distributed
from fastdino.config import TrainConfig
from fastdino.data.image_dataset import ImageDataset
from fastdino.errors import CheckpointError, NonFiniteError
from fastdino.files import os_error_of
from fastdino.liveness import listed
from fastdino.models.batch_norm import has_batch_norm
from fastdino.models.weights import initial_weights
from fastdino.runtime import MEASURED
from fastdino.training import shard_files
from fastdino.training.checkpoint_writer import WAITS, CheckpointWriter
from fastdino.training.logging import Progress
from fastdino.training.trainer import Trainer
from fastdino.training.world_size import explain_world_size

# A run with --on_nonfinite rollback stops after this many rollbacks to the same checkpoint.
MAX_ROLLBACKS = 5
# A failed save is tried again after these waits. Slurm kills a job 30 s after SIGTERM.
SECONDS_UNTIL_RETRY = (1.0, 4.0, 10.0)
PASSING_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN,
    errno.ENOMEM, errno.ENFILE, errno.EMFILE,
)  # fmt: skip
_DAMAGED = "use an older one, or move it away to start from scratch"
# Settings that may differ from the checkpoint's without a warning: they do not affect the result.
NEUTRAL_SETTINGS = (
    "data_path", "output_dir", "dist_url", "dist_timeout_minutes", "device", "num_workers",
    "init_from", "knn_data", "knn_every", "attention_every", "logger", "saveckp_in_background",
    "saveckp_every_minutes",
)  # fmt: skip

# Resolved settings that change the result, and values that give the same result.
RESULT_SETTINGS = ("precision", "crops", "decode")
_SAME_RESULT = ({"fused", "torchvision"}, {"cpu", "pillow"})

# Values on a CPU of older versions that did not record them.
_UNRECORDED = {"attention": "sdpa", "onednn": "off"}
# Values of a checkpoint without its device that only a GPU has.
_ONLY_ON_GPUS = {"precision": ("fp16",), "attention": ("xformers", "varlen"), "decode": ("gpu",)}

# Parts that a checkpoint may lack, such as those of the paper's code, and what follows from it.
OPTIONAL_PARTS = {
    "iteration": "the epoch starts at its first step",
    "steps_per_epoch": "another number of steps per epoch is not noticed",
    "generators": "the random streams of stochastic depth are new",
    "fp16_scaler": "the loss scale starts at its first value",
    "progress": "the means of the epoch lack its earlier steps",
    "left_out": "batches left out by a rollback are used",
    "args": "other settings are not noticed",
    "resolved": "other results of this machine are not noticed",
    "images": "other images are not noticed",
}


def recorded_choices(config: TrainConfig) -> dict[str, str]:
    """Return the values of MEASURED that a resumed run keeps from its checkpoint.

    They were chosen on a CPU, with the same settings. A value that was requested, or chosen on a
    GPU, is not kept.
    """
    shards = shard_files.newest(Path(config.output_dir) / "checkpoint")
    path = shards / shard_files.REST if shards else Path(config.output_dir) / "checkpoint.pth"
    if config.mode != "fast" or not path.exists():
        return {}
    try:
        state = checkpoint.load(path, mapped=True)
    except CheckpointError:  # reported when the run is resumed
        return {}
    settings, resolved = state.get("args"), state.get("resolved")
    if not (isinstance(settings, dict) and isinstance(resolved, dict)):
        return {}
    settings = TrainConfig().to_dict() | settings
    if not _chosen_on_cpu(settings, resolved):
        return {}
    resolved = _UNRECORDED | resolved
    same = {name for name, value in config.to_dict().items() if settings[name] == value}
    return {
        name: resolved[name]
        for name, reasons in MEASURED.items()
        if name in resolved and same.issuperset(reasons)
    }


def _chosen_on_cpu(settings: dict[str, Any], resolved: dict[str, str]) -> bool:
    """Return True unless the resolved values of a checkpoint are those of a GPU.

    Versions that did not record the device are judged by the other values. Before they recorded
    the attention backend, they chose bf16 on GPUs only.
    """
    if "device" in resolved:
        return resolved["device"] == "cpu"
    chose_bf16 = settings["amp_dtype"] == "auto" and resolved.get("precision") == "bf16"
    return not (
        settings["device"] == "cuda"
        or (chose_bf16 and "attention" not in resolved)
        or any(resolved.get(name) in values for name, values in _ONLY_ON_GPUS.items())
    )


class Save(NamedTuple):
    """Files of a save.

    Attributes:
        shards: folder of the shards of a sharded run; its single file is only written with `whole`.
        also: a copy of the single file.
    """

    shards: Path | None
    also: Path | None
    whole: bool


class RunCheckpoint:
    """checkpoint.pth of a run, and the shards of a sharded one.

    It has the keys of the trainer (student, teacher, optimizer, dino_loss, epoch, ...), and args,
    progress, left_out and images.

    Attributes: left_out: iterations that a rollback excluded from the training.
    """

    def __init__(
        self, config: TrainConfig, trainer: Trainer, progress: Progress, dataset: ImageDataset
    ):
        self.config, self.trainer, self.progress = config, trainer, progress
        self.path = Path(config.output_dir) / "checkpoint.pth"
        self.folder = Path(config.output_dir) / "checkpoint"  # of shards
        self._group = shard_files.new_group(config.dist_timeout_minutes) if config.fsdp else None
        self._written: Path | None = None  # the last shards
        self.left_out: list[int] = []
        # Identifies the dataset in a checkpoint.
        self._images = {"number": len(dataset), "fingerprint": dataset.fingerprint}
        self._rollbacks = 0  # since the last save
        self._writer = CheckpointWriter(progress.warn)  # used by the ranks that write
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Return True if the last save, or the start, was --saveckp_every_minutes ago."""
        minutes = self.config.saveckp_every_minutes
        return bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, also: Path | None = None, *, whole: bool = True) -> None:
        """Save the run, and a copy to `also`; all ranks must call it.

        With --saveckp_in_background the files may be written after it returns: see `wait`.

        Args: whole: False: of a sharded run, write the shards only.

        Raises: NonFiniteError: see checkpoint.save. CheckpointError: this save, or the last one,
            cannot be written.
        """
        self.wait()
        state = {
            **self.trainer.state_dict(gathered=False),
            "args": self.config.to_dict(),
            "resolved": self._resolved(),
            "progress": self.progress.state_dict(),
            "left_out": self.left_out,
            "images": self._images,
        }
        self.progress.flush(self.trainer.iteration)
        writes = distributed.rank() == 0 or self._group is not None
        copied = True
        with distributed.fail_together():
            if writes:
                checkpoint.check_finite(state)
                if self.config.saveckp_in_background:
                    copied = self._writer.copy(state)
        shards = None
        if self._group is not None:
            self._agree_on_copies(copied)
            shards = distributed.from_main(lambda: shard_files.next_save(self.folder))
        with distributed.fail_together():
            if writes:
                self._start_write(state, Save(shards, also, whole))
        self._saved_at = time.monotonic()
        self._rollbacks = 0

    def wait(self) -> None:
        """Wait until the last save is written; all ranks must call it.

        Raises: CheckpointError: it cannot be written.
        """
        if all(distributed.gather(self._finish_write())):
            return
        with distributed.fail_together():
            self._writer.repeat()

    def close(self) -> None:
        """Wait until the last save is written or has failed, on this rank; end the thread."""
        self._finish_write()
        self._writer.close()

    def _finish_write(self) -> bool:
        """Wait for the write of this rank, which is a collective in a sharded run."""
        with nullcontext() if self._group else distributed.without_collectives():
            return self._writer.finish()

    def _agree_on_copies(self, copied: bool) -> None:
        """Let all ranks of a sharded run write directly if one of them has no memory for a copy.

        Else some would train on while others wait for their writes.
        """
        lacking = [rank for rank, has in enumerate(distributed.gather(copied)) if not has]
        if lacking and copied:
            self._writer.write_directly()
            self.progress.warn(f"no host memory for a copy on {listed(lacking)}: {WAITS}")

    def _start_write(self, state: dict[str, Any], save: Save) -> None:
        def write(copied: dict[str, Any]) -> None:
            self._write(copied, save)

        if self.config.saveckp_in_background:
            self._writer.start(state, write, again=lambda copied: self._write_once(copied, save))
        else:
            write(state)

    def _write(self, state: dict[str, Any], save: Save) -> None:
        """Write the checkpoint; try again after errors that may pass."""
        for seconds in SECONDS_UNTIL_RETRY:
            try:
                return self._write_once(state, save)
            except CheckpointError as error:
                cause = os_error_of(error)
                if cause is None or cause.errno not in PASSING_ERRORS:
                    raise
                self.progress.warn(f"{error}; the next try is in {seconds:g} s")
                time.sleep(seconds)
        return self._write_once(state, save)

    def _write_once(self, state: dict[str, Any], save: Save) -> None:
        if self._group is None or save.shards is None:
            checkpoint.write(state, self.path, also=save.also)
            shard_files.remove_saves(self.folder)  # of an earlier, sharded part of this run
            return
        if self._written != save.shards:  # on all ranks: they fail together
            shard_files.write(state, save.shards, self._group)
            self._written = save.shards
        if save.whole and distributed.rank() == 0:
            whole = shard_files.read(save.shards, shard_files.whole)
            checkpoint.write(whole, self.path, also=save.also)

    def _source(self) -> Path | None:
        """Return the newest shards, else checkpoint.pth; None without any."""
        return shard_files.newest(self.folder) or (self.path if self.path.exists() else None)

    def resume_or_start(self) -> None:
        """Resume from the checkpoint if there is one, else start a new run."""
        config, trainer, progress = self.config, self.trainer, self.progress
        if source := distributed.from_main(self._source):
            self._restore()
            done = trainer.epoch >= config.epochs and progress.open_epoch is None
            status = "the run is finished" if done else f"epoch {trainer.epoch + 1}"
            progress.info(f"resumed {source} at iteration {trainer.iteration}: {status}")
            if config.init_from:
                progress.info("--init_from is ignored: it only applies to a new run")
            return
        if config.init_from:
            self._start_from_weights()
        progress.restart(0, None)
        self._saved_at = time.monotonic()
        if config.on_nonfinite == "rollback":
            self.save()

    def lacks_single_file(self) -> bool:
        """Return True if a run was killed between the shards of an epoch and their single file."""
        in_epoch = self.trainer.iteration % self.trainer.steps_per_epoch > 0
        if in_epoch or self.trainer.iteration == 0 or self.progress.open_epoch is not None:
            return False
        return distributed.from_main(self._single_file_is_older)

    def _single_file_is_older(self) -> bool:
        if shard_files.newest(self.folder) is None:
            return False
        try:
            saved = checkpoint.load(self.path, mapped=True).get("iteration")
        except CheckpointError:  # such as no file
            return True
        return bool(saved != self.trainer.iteration)

    def _start_from_weights(self) -> None:
        config = self.config
        with distributed.fail_together():
            weights, key = initial_weights(
                config.init_from,
                arch=config.arch,
                patch_size=config.patch_size,
                img_size=config.global_crops_size,
            )
        self.trainer.start_from(weights)
        network = f" ({key})" if key else ""
        self.progress.info(
            f"loaded the backbone of {config.init_from}{network} into student and teacher; "
            "the heads are new"
        )

    def _restore(self) -> None:
        source = distributed.from_main(self._source) or self.path
        if source == self.path:
            state = checkpoint.load(source)
        else:
            state = shard_files.read(source, self.trainer.empty_parts())
        with checkpoint.explain_content(source, todo=_DAMAGED):
            self._restore_from(state, source)

    def _restore_from(self, state: dict[str, Any], source: Path) -> None:
        world_size, batch_norm = distributed.world_size(), has_batch_norm(self.trainer.teacher)
        try:
            note = explain_world_size(state, self.config, world_size, batch_norm=batch_norm)
            self.trainer.load_state_dict(state)
        except CheckpointError as error:
            raise CheckpointError(
                f"cannot resume {source}: {error}; or use another --output_dir"
            ) from error
        if note:
            self.progress.info(note)
        self._warn_of_missing_parts(state, source)
        self._compare_settings(state.get("args"))
        self._compare_resolved(state.get("resolved"))
        self._compare_images(state.get("images"))
        self.left_out = list(state.get("left_out", []))
        self.progress.restart(self.trainer.iteration, state.get("progress"))

    def _warn_of_missing_parts(self, state: dict[str, Any], source: Path) -> None:
        missing = [
            f"{part} ({effect})"
            for part, effect in OPTIONAL_PARTS.items()
            if part not in state and (part != "fp16_scaler" or self.trainer.scaler.is_enabled())
        ]
        if missing:
            self.progress.warn(f"{source} lacks some parts: {', '.join(missing)}")

    def _compare_settings(self, saved: Any) -> None:
        """Warn of settings that differ from the checkpoint's."""
        if not isinstance(saved, dict):  # the paper's code saves a Namespace
            return
        # A setting that the checkpoint's version did not have.
        saved = TrainConfig().to_dict() | saved
        changed = [
            f"--{name} {value} (was {saved[name]})"
            for name, value in self.config.to_dict().items()
            if name not in NEUTRAL_SETTINGS and saved[name] != value
        ]
        if changed:
            self.progress.warn(f"resuming with other settings: {', '.join(changed)}")

    def _resolved(self) -> dict[str, str]:
        choices = self.trainer.runtime.choices()
        names = ("device", *RESULT_SETTINGS, *MEASURED)
        return {name: choices[name].value for name in names if name in choices}

    def _compare_resolved(self, saved: Any) -> None:
        """Warn if the machine gives settings another value than the checkpoint's did.

        Two runs with the same flags, such as --crops auto, can differ in these.
        """
        if not isinstance(saved, dict):  # an older checkpoint
            return
        now = self._resolved()
        changed = [
            f"{name} {now[name]} (was {saved[name]})"
            for name in RESULT_SETTINGS
            if name in now
            and name in saved
            and saved[name] != now[name]
            and {saved[name], now[name]} not in _SAME_RESULT
        ]
        if changed:
            self.progress.warn(
                f"this machine computes other results than the checkpoint's: {', '.join(changed)}; "
                "request the former value by its flag"
            )

    def _compare_images(self, saved: Any) -> None:
        """Warn if the dataset differs from the checkpoint's."""
        now = self._images
        if not isinstance(saved, dict) or saved == now:
            return
        self.progress.warn(
            f"resuming with other images: {now['number']} with fingerprint {now['fingerprint']} "
            f"(was {saved['number']} with {saved['fingerprint']}): names, sizes or broken files "
            "differ, so the order and crops of the remaining steps are not those of the "
            "uninterrupted run"
        )

    def roll_back(self, error: NonFiniteError) -> None:
        """Return to the checkpoint and exclude the failed iteration from the training.

        Raises:
            NonFiniteError: --on_nonfinite stop, or too many rollbacks.
            CheckpointError: the checkpoint cannot be written or read.
        """
        self.wait()
        problem = None
        if self.config.on_nonfinite == "stop":
            problem, hint = f"{error}", ", or --on_nonfinite rollback"
        elif self._rollbacks == MAX_ROLLBACKS:
            problem, hint = f"{error}, after {MAX_ROLLBACKS} rollbacks to the same checkpoint", ""
        if problem:
            source = self._source()
            last = f"the last good checkpoint is {source}"
            raise NonFiniteError(
                f"{problem}; {last if source else 'no checkpoint was written yet'}; "
                "try a lower --lr, a lower --clip_grad, a longer --warmup_epochs, --amp_dtype bf16 "
                f"or --use_fp16 false{hint}"
            ) from error
        # A save that finds non-finite weights has no iteration: the last step produced them.
        failed = self.trainer.iteration - 1 if error.iteration is None else error.iteration
        self._rollbacks += 1
        left_out = [*self.left_out, failed]
        self._restore()
        self.left_out = left_out
        self.progress.warn(
            f"{error}: rolled back to iteration {self.trainer.iteration}; the batch of iteration "
            f"{failed} will be left out"
        )
