"""Features of a frozen backbone on disk, one memory-mapped file per pass over the images.

A cache is stored in a folder named by everything that its features depend on (see cache_key), so
it is never reused for other weights, images or settings.

Shapes: B images per batch, N images, D channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset
from tqdm import tqdm

from fastdino import distributed
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.workers import SteadyLoader
from fastdino.environment import cpu_count
from fastdino.errors import DataError
from fastdino.evals.options import weights_digest
from fastdino.files import explain_write_errors, file_lock, write_json
from fastdino.terminal import print_err


def load_features(path: Path) -> TensorDataset:
    """Return features float32 [D] and labels of images, read from disk on access."""
    features, labels = np.load(path, mmap_mode="c"), np.load(labels_path(path))
    return TensorDataset(torch.from_numpy(features), torch.from_numpy(labels))


def cache_key(model: nn.Module, images: ImageDataset, settings: dict[str, Any]) -> str:
    """Return a hash of the weights, the images and the settings.

    The images enter with their names, sizes in pixels, labels, conversion to RGB, and each file's
    size and mtime.

    Raises: DataError: an image has disappeared since the scan.
    """
    digest = hashlib.sha256()
    digest.update(weights_digest(model).encode())
    digest.update(images.fingerprint.encode())
    digest.update(images.labels.tobytes())
    digest.update(repr(images.conversion).encode())
    for path in images.files:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise DataError(f"{path} has disappeared since the scan: {error}") from error
        digest.update(
            f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class FeatureCache:
    """A frozen network whose features are kept on disk.

    Attributes:
        features: [B, 3, H, W] on `device` -> [B, dim].
        workers: data loading workers, at most.
        stopped: called after each batch, equally often on every rank; True stops the writing.
    """

    features: Callable[[Tensor], Tensor]
    dim: int
    batch_size: int
    workers: int
    device: torch.device
    stopped: Callable[[], bool] = lambda: False

    def load_or_write(
        self, path: Path, images: Dataset[tuple[Tensor, int]]
    ) -> TensorDataset | None:
        """Return the features of `images` stored at `path`; extract and write them if missing.

        In a distributed run each rank writes a share, so all ranks must see the folder. An
        interrupted write leaves no file that looks complete, a damaged file is written again with
        a warning, and a second run waits until the first has written the file.

        Args:
            path: a .npy file; the labels are stored next to it.

        Returns: None if `stopped` returned True; the next call continues after the rows that are
            written.
        Raises: CheckpointError: the file cannot be written.
        """
        shape = (len(images), self.dim)  # type: ignore[arg-type]
        with contextlib.ExitStack() as stack:
            if not distributed.from_main(lambda: _is_complete(path, shape)):
                distributed.from_main(lambda: _lock(path, stack))
                # Another run may have written it while this one waited.
                complete = distributed.from_main(lambda: _is_complete(path, shape))
                if not complete and not self._write(path, images, shape):
                    return None
        return load_features(path)

    def _write(
        self, path: Path, images: Dataset[tuple[Tensor, int]], shape: tuple[int, int]
    ) -> bool:
        """Write the features; return False if `stopped` did."""
        part = path.with_name(path.name + ".part")
        done = distributed.from_main(lambda: _create(part, *shape))
        done = self._write_share(part, images, done)
        distributed.gather(None)  # wait until all shares are on disk
        if done < shape[0]:
            distributed.from_main(lambda: write_json(done, _done_path(part)))
            return False
        distributed.from_main(lambda: _finish(part, path))
        return True

    def _write_share(self, part: Path, images: Dataset[tuple[Tensor, int]], done: int) -> int:
        """Write this rank's share of the rows after the first `done`.

        Returns: how many of the first rows are written by all ranks together.
        """
        rows = np.load(part, mmap_mode="r+")
        labels = np.load(labels_path(part), mmap_mode="r+")
        world = distributed.world_size()
        share = range(done + distributed.rank(), len(labels), world)
        loader = SteadyLoader(
            Subset(images, share),
            batch_size=self.batch_size,
            num_workers=min(self.workers, cpu_count()),
            pin_memory=self.device.type == "cuda",
        )
        # The same number on every rank: one with a smaller share waits for the others' last batch.
        steps = math.ceil((len(labels) - done) / world / self.batch_size)
        bar = tqdm(loader, desc=part.with_suffix("").stem, disable=not sys.stderr.isatty())
        for step, batch in zip_longest(range(steps), bar):
            if batch is not None:
                inputs, batch_labels = batch
                indices = share[step * self.batch_size : (step + 1) * self.batch_size]
                rows[indices] = self.features(inputs.to(self.device)).float().cpu().numpy()
                labels[indices] = batch_labels.numpy()
            if self.stopped():
                done += (step + 1) * self.batch_size * world
                break
        else:
            done = len(labels)
        rows.flush()
        labels.flush()
        return min(done, len(labels))


def labels_path(path: Path) -> Path:
    """Return the path of the labels of a file of features."""
    return path.with_name(f"{path.stem}.labels.npy")


def _done_path(part: Path) -> Path:
    """Return the path of the JSON that holds how many first rows of a stopped file are written."""
    return part.with_suffix(".done")


def _lock(path: Path, stack: contextlib.ExitStack) -> None:
    """Keep other runs from writing `path` until `stack` closes."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(file_lock(path.with_suffix(".lock"), wait=True))


def _is_complete(path: Path, shape: tuple[int, int]) -> bool:
    """Return True if features and labels of this shape are stored; warn if they are damaged."""
    if not path.exists():
        return False
    try:
        features = np.load(path, mmap_mode="r")
        labels = np.load(labels_path(path), mmap_mode="r")
        problem = "" if (features.shape, labels.shape) == (shape, shape[:1]) else "wrong shape"
    except (OSError, ValueError, EOFError) as error:
        problem = str(error).partition("\n")[0] or type(error).__name__
    if problem:
        print_err(f"warning: {path} is damaged ({problem}) and is written again")
    return not problem


def _create(part: Path, number: int, dim: int) -> int:
    """Create an unfinished file, unless a stopped one exists; return how many rows are written."""
    with explain_write_errors(part):
        if (done := _rows_done(part, number, dim)) is not None:
            return done
        part.parent.mkdir(parents=True, exist_ok=True)
        create = np.lib.format.open_memmap
        create(labels_path(part), mode="w+", dtype=np.int64, shape=(number,)).flush()
        create(part, mode="w+", dtype=np.float32, shape=(number, dim)).flush()
        with open(part, "r+b") as file:
            # Allocate the blocks: a full disk is an error here, and a bus error at a later write.
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return 0


def _rows_done(part: Path, number: int, dim: int) -> int | None:
    """Return how many rows of a stopped file are written; None, with a warning if it is damaged."""
    if not _done_path(part).exists():
        return None
    try:
        done = json.loads(_done_path(part).read_text())
        shapes = [np.load(file, mmap_mode="r").shape for file in (part, labels_path(part))]
        if isinstance(done, int) and 0 <= done <= number and shapes == [(number, dim), (number,)]:
            return done
        problem = f"{done} rows of {shapes}"
    except (OSError, ValueError, EOFError) as error:
        problem = str(error).partition("\n")[0] or type(error).__name__
    _done_path(part).unlink()
    print_err(f"warning: {part} is damaged ({problem}) and is written again")
    return None


def _finish(part: Path, path: Path) -> None:
    # First, so that an unfinished file without labels, as a kill leaves it, is written again.
    _done_path(part).unlink(missing_ok=True)
    os.replace(labels_path(part), labels_path(path))
    os.replace(part, path)  # last: a file of features is complete
