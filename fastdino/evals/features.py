"""Features of images by a frozen network, extracted in batches that the ranks share.

Shapes: B images per batch, N images, D channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from fastdino import distributed
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import (
    AS_STORED,
    Box,
    Conversion,
    Header,
    Unusable,
    explained_reading,
)
from fastdino.data.image_names import EXTENSIONS, image_files
from fastdino.data.workers import SteadyLoader
from fastdino.environment import cpu_count
from fastdino.errors import DataError
from fastdino.evals.options import print_on_main
from fastdino.evals.transforms import Transform
from fastdino.terminal import is_terminal

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ImageFiles:
    """Image files.

    boxes: if not empty, has for each the box to cut out of the stored pixels, or None.
    conversion: how they become RGB.
    """

    paths: list[Path]
    boxes: Sequence[Box | None] = ()
    conversion: Conversion = AS_STORED

    @classmethod
    def in_folder(cls, folder: Path, conversion: Conversion = AS_STORED) -> ImageFiles:
        """List the images of a folder by name; raise DataError if it has none."""
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}")
        paths = image_files(folder)
        if not paths:
            raise DataError(f"no images in {folder}: no file name ends in {', '.join(EXTENSIONS)}")
        return cls(paths, conversion=conversion)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.paths[index]

    def read_rgb(self, index: int) -> Image.Image:
        """Decode an image, and cut out its box."""
        return self.conversion.read(self.paths[index], self.boxes[index] if self.boxes else None)

    def sizes(self, headers: Sequence[Header | Unusable]) -> list[tuple[int, ...]]:
        """Return (height, width) of each image or box, rotated; () for an unreadable header."""

        def size(header: Header | Unusable, box: Box | None) -> tuple[int, ...]:
            if not isinstance(header, Header):
                return ()  # Decoding will report the file.
            if box is not None:
                header = header._replace(height=box[3] - box[1], width=box[2] - box[0])
            return self.conversion.size_of(header)

        return [*map(size, headers, self.boxes or [None] * len(self))]


Images = ImageDataset | ImageFiles


class ImageInputs(Dataset["tuple[int, Tensor | str]"]):
    """Images with their index, as tensors [3, H, W], or the reason why one is unusable."""

    def __init__(self, images: Images, transform: Transform, min_side: int):
        self.images, self.transform, self.min_side = images, transform, min_side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        path = self.images.path(index)
        try:
            with explained_reading(path):
                image = self.images.read_rgb(index)
        except DataError as error:
            return index, str(error)
        tensor = self.transform(image)
        height, width = tensor.shape[1:]
        if min(height, width) < self.min_side:
            return index, (
                f"{path} is {height} x {width} px when resized; expected sides of at least "
                f"{self.min_side} px, one patch at the smallest scale"
            )
        return index, tensor


Batch = tuple[list[int], "Tensor | None", dict[int, str]]


def collate_usable(items: list[tuple[int, Tensor | str]]) -> Batch:
    """Return indices and tensors [B, 3, H, W] of the usable images, and the others' reasons."""
    usable = {index: item for index, item in items if isinstance(item, Tensor)}
    reasons = {index: item for index, item in items if isinstance(item, str)}
    return list(usable), torch.stack(list(usable.values())) if usable else None, reasons


def batches_by_size(sizes: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Group indices into batches of at most batch_size, each of images of one size."""
    groups: dict[Hashable, list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


class StoppedError(Exception):
    """An extraction was stopped on all ranks, because `should_stop` returned True on one."""


def _report_on_main(text: str) -> None:
    print_on_main(text, stderr=True)


@dataclass(frozen=True)
class Extractor:
    """A frozen network with the transform of its inputs and the settings of the data loading.

    Attributes:
        model: [B, 3, H, W] on `device` -> [B, D].
        workers: data loading workers, at most.
        min_side: an image is unusable if a side is shorter after the transform, in pixels.
        should_stop: asked before each batch; True on one rank stops the extraction on all.
        report: called on each rank with a line about images that are left out.
    """

    model: Model
    transform: Transform
    batch_size: int
    workers: int
    device: torch.device
    min_side: int = 1
    should_stop: Callable[[], bool] = lambda: False
    report: Callable[[str], None] = _report_on_main

    @torch.no_grad()
    def extract(
        self, images: Images, title: str, *, sizes: Sequence[Hashable] | None = None
    ) -> tuple[Tensor, dict[int, str]]:
        """Return features [N, D] on the CPU, in order, and why images are unusable, by index.

        Rows of unusable images are zero. Each rank computes a share of the batches; every rank
        gets the whole.

        Args:
            title: for the progress bar and messages.
            sizes: images with equal values have one size after the transform; None: all have.

        Raises: DataError: no image is usable. StoppedError: see `should_stop`.
        """
        batches = batches_by_size(sizes or [0] * len(images), self.batch_size)
        loader = SteadyLoader(
            ImageInputs(images, self.transform, self.min_side),
            batch_sampler=batches[distributed.rank() :: distributed.world_size()],
            collate_fn=collate_usable,
            num_workers=min(self.workers, cpu_count()),
            pin_memory=self.device.type == "cuda",
        )
        features: Tensor | None = None
        unusable: dict[int, str] = {}
        stopped = False
        # Inside another bar it is removed at the end.
        bar = tqdm(loader, desc=title, disable=not is_terminal(sys.stderr), leave=None)
        for indices, batch, reasons in bar:
            stopped = self.should_stop()
            if stopped:
                break
            unusable |= reasons
            if batch is None:
                continue
            rows = self.model(batch.to(self.device)).float().cpu()
            features = torch.zeros(len(images), rows.shape[1]) if features is None else features
            features[indices] = rows
        width = 0 if features is None else features.shape[1]
        gathered = distributed.gather((width, unusable, stopped))
        if any(stopped for *_, stopped in gathered):
            raise StoppedError(title)
        unusable = {index: why for _, reasons, _ in gathered for index, why in reasons.items()}
        width = max(width for width, *_ in gathered)
        with distributed.fail_together():
            if not width:
                reason = unusable[min(unusable)]
                raise DataError(
                    f"none of the {len(images)} images of {title} can be used: {reason}"
                )
        if features is None:  # this rank had no batch with a usable image
            features = torch.zeros(len(images), width)
        return distributed.total(features), unusable

    def extract_usable(
        self,
        images: Images,
        title: str,
        *,
        sizes: Sequence[Hashable] | None = None,
        skipped: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return features of the usable images and their indices; report how many are left out.

        Args:
            sizes: see `extract`.
            skipped: images that were left out before, for the report.
        """
        features, unusable = self.extract(images, title, sizes=sizes)
        if unusable or skipped:
            count = len(unusable) + skipped
            example = f": {unusable[min(unusable)]}" if unusable else ""
            self.report(f"{title}: {count} images left out{example}")
        usable = torch.from_numpy(np.setdiff1d(np.arange(len(features)), list(unusable)))
        return features[usable], usable
