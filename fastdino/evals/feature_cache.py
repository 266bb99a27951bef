"""Features of a frozen backbone on disk, one memory-mapped file a pass over the images.

A cache lies in a folder named by everything that its features depend on, so that features of other
weights, images or settings are never taken for these.

Legend: N images, D channels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from fastdino import distributed
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.workers import SteadyLoader
from fastdino.environment import cpu_count
from fastdino.errors import DataError
from fastdino.evals.options import (
    weights_digest,
)
from fastdino.files import explain_write_errors, write_json


class CachedFeatures(Dataset[tuple[Tensor, int]]):
    """The features fp32 [D] and the label of each image, read from disk when asked for."""

    def __init__(self, path: Path):
        self.features: NDArray[np.float32] = np.load(path, mmap_mode="r")
        self.labels: NDArray[np.int64] = np.load(labels_path(path))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.features[index].copy()), int(self.labels[index])


def cache_key(model: nn.Module, source: ImageDataset, settings: dict[str, Any]) -> str:
    """Names a cache: a hash of the weights, of the images (names, sizes, labels, and each file's
    size and time of change), and of the settings.

    Raises: DataError: an image has gone since the scan.
    """
    digest = hashlib.sha256()
    digest.update(weights_digest(model).encode())
    digest.update(source.fingerprint.encode())
    digest.update(source.labels.tobytes())
    for path in source.files:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise DataError(f"{path} was there when the images were counted: {error}") from error
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="replace"))
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def cached(
    path: Path,
    features: Callable[[Tensor], Tensor],
    images: Dataset[tuple[Tensor, int]],
    *,
    dim: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
) -> CachedFeatures | None:
    """The features in `path`, made and written first where there are none.

    In a run of many processes each writes a share, so all must see the folder. A run that is cut
    off leaves no file that looks whole.

    Args:
        path: the .npy file; the labels lie beside it.
        features: [B, 3, H, W] on the device -> [B, dim].
        images: N images with their labels.
        stopped: asked after each batch, as often in every process; where it says so, None is
            returned, and the next call goes on after what is written.

    Raises: CheckpointError: the file cannot be written.
    """
    number = len(images)  # type: ignore[arg-type]
    if not distributed.from_main(path.exists):
        part = path.with_name(path.name + ".part")
        done = distributed.from_main(lambda: _begin(part, number, dim))
        done = _write_share(
            part, features, images, done, batch_size, workers, device, path.stem, stopped
        )
        distributed.gather(None)  # all shares are on the disk
        if done < number:
            distributed.from_main(lambda: write_json(done, _done_path(part)))
            return None
        distributed.from_main(lambda: _finish(part, path))
    return CachedFeatures(path)


def labels_path(path: Path) -> Path:
    """Where the labels of a file of features are."""
    return path.with_name(f"{path.stem}.labels.npy")


def _done_path(part: Path) -> Path:
    """Where it stands how many of the first rows of a file that was stopped are written."""
    return part.with_suffix(".done")


def _begin(part: Path, number: int, dim: int) -> int:
    """Makes a file to be written, unless one was stopped; returns how many rows are done."""
    with explain_write_errors(part):
        if _done_path(part).exists():
            return int(json.loads(_done_path(part).read_text()))
        part.parent.mkdir(parents=True, exist_ok=True)
        create = np.lib.format.open_memmap
        create(labels_path(part), mode="w+", dtype=np.int64, shape=(number,)).flush()
        create(part, mode="w+", dtype=np.float32, shape=(number, dim)).flush()
        with open(part, "r+b") as file:
            # Its blocks too: a full disk is then an error here, not a bus error at a write.
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return 0


def _write_share(
    part: Path,
    features: Callable[[Tensor], Tensor],
    images: Dataset[tuple[Tensor, int]],
    done: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    title: str,
    stopped: Callable[[], bool],
) -> int:
    """Writes this process's share of the rows after the first `done`.

    Returns: how many of the first rows all processes together are done with.
    """
    rows = np.load(part, mmap_mode="r+")
    labels = np.load(labels_path(part), mmap_mode="r+")
    world = distributed.world_size()
    share = range(done + distributed.rank(), len(labels), world)
    loader = SteadyLoader(
        Subset(images, share),
        batch_size=batch_size,
        num_workers=min(workers, cpu_count()),
        pin_memory=device.type == "cuda",
    )
    # Of every process: one whose share is smaller waits for the others' last batch.
    steps = math.ceil((len(labels) - done) / world / batch_size)
    bar = tqdm(loader, desc=title, disable=not sys.stderr.isatty())
    for step, batch in zip_longest(range(steps), bar):
        if batch is not None:
            inputs, batch_labels = batch
            places = share[step * batch_size : (step + 1) * batch_size]
            rows[places] = features(inputs.to(device)).float().cpu().numpy()
            labels[places] = batch_labels.numpy()
        if stopped():
            done += (step + 1) * batch_size * world
            break
    else:
        done = len(labels)
    rows.flush()
    labels.flush()
    return min(done, len(labels))


def _finish(part: Path, path: Path) -> None:
    # First: a part without its labels, which a kill leaves, is made anew.
    _done_path(part).unlink(missing_ok=True)
    os.replace(labels_path(part), labels_path(path))
    os.replace(part, path)  # last: a file of features is a whole one
