"""Descriptors of images for retrieval: several scales, GeM, whitening; extraction from files.

Legend: B images of a batch, N images, D channels.
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
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastdino import distributed
from fastdino.data.image_files import EXTENSIONS, explained_reading, read_rgb
from fastdino.environment import cpu_count
from fastdino.errors import DataError
from fastdino.models.vit import VisionTransformer

SCALES = (1.0, 2**-0.5, 0.5)
GEM_POWER = 4
GEM_FLOOR = 1e-6
EIGENVALUE_FLOOR = 1e-5  # of the largest one: smaller ones would blow up noise
_MOMENT_ROWS = 4096  # features in float64 at once

Model = Callable[[Tensor], Tensor]


def multi_scale(model: Model) -> Model:
    """A model whose features [B, D] are the mean of those at scales 1, .71 and .5, as the paper's.

    The features of a scale are not normalised before the mean, whatever their lengths.
    """

    def describe(images: Tensor) -> Tensor:
        features = model(images)
        for scale in SCALES[1:]:
            features = features + model(
                F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
            )
        return features / len(SCALES)

    return describe


def gem(tokens: Tensor, power: float = GEM_POWER) -> Tensor:
    """Generalised mean over tokens, [B, N, D] -> [B, D]; what is below 1e-6 counts as 1e-6."""
    return tokens.clamp(min=GEM_FLOOR).pow(power).mean(dim=1).pow(1 / power)


def cls_and_gem(model: VisionTransformer) -> Model:
    """The paper's descriptor of copies: CLS beside GeM(4) of the patch tokens, [B, 2 D]."""

    def describe(images: Tensor) -> Tensor:
        tokens = model.get_intermediate_layers(images, 1)[0]
        return torch.cat((tokens[:, 0], gem(tokens[:, 1:])), dim=1)

    return describe


@dataclass(frozen=True)
class Whitening:
    """x -> projection (x - mean): rotated to principal axes, each divided by its deviation.

    Attributes:
        mean: [D]. projection: [D, D], rows by falling eigenvalue.
    """

    mean: Tensor
    projection: Tensor

    @classmethod
    def learn(cls, features: Tensor) -> Whitening:
        """From features [N, D] that were not normalised.

        The axes are those of the second moment about zero, not about the mean, which is what the
        paper's code takes for the covariance.
        """
        dim = features.shape[1]
        moment = torch.zeros(dim, dim, dtype=torch.float64)
        for rows in features.double().split(_MOMENT_ROWS):
            moment += rows.T @ rows
        values, vectors = torch.linalg.eigh(moment / len(features))
        values, vectors = values.flip(0), vectors.flip(1)
        values = values.clamp(min=float(values[0]) * EIGENVALUE_FLOOR)
        projection = vectors.T / values.sqrt()[:, None]
        return cls(features.double().mean(dim=0), projection)

    def __call__(self, features: Tensor) -> Tensor:
        """[M, D] -> [M, D], in the dtype of the features."""
        centred = features.double() - self.mean
        return (centred @ self.projection.T).to(features.dtype)


@dataclass(frozen=True)
class Picture:
    """A file, and the part of it that counts: left, top, right, bottom in pixels; None: all."""

    path: Path
    box: tuple[int, int, int, int] | None = None


def pictures_in(folder: Path) -> list[Picture]:
    """The images that lie in a folder, by name; raises DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise DataError(f"no images in {folder}: no file there ends in {', '.join(EXTENSIONS)}")
    return [Picture(path) for path in paths]


class Pictures(Dataset["tuple[int, Tensor | str]"]):
    """Pictures as tensors [3, H, W] with their places; in place of a bad one, why it is bad.

    Args:
        min_side: sides in pixels below which an image, transformed, is of no use.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        transform: Callable[[Image.Image], Tensor],
        min_side: int,
    ):
        self.pictures, self.transform, self.min_side = pictures, transform, min_side

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        picture = self.pictures[index]
        try:
            with explained_reading(picture.path):
                image = read_rgb(picture.path)
                if picture.box is not None:
                    image = image.crop(picture.box)  # refused where it is huge
        except DataError as error:
            return index, str(error)
        tensor = self.transform(image)
        height, width = tensor.shape[1:]
        if min(height, width) < self.min_side:
            return index, (
                f"{picture.path} is {height} x {width} px when resized; "
                f"expected sides of at least {self.min_side} px, a patch at the smallest scale"
            )
        return index, tensor


Batch = tuple[list[int], "Tensor | None", dict[int, str]]


def collate(items: list[tuple[int, Tensor | str]]) -> Batch:
    """The places and the tensors [B, 3, H, W] of the good ones, and the others' reasons."""
    good = {index: item for index, item in items if isinstance(item, Tensor)}
    bad = {index: item for index, item in items if isinstance(item, str)}
    return list(good), torch.stack(list(good.values())) if good else None, bad


def batches_of(kinds: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Places in batches of one kind each, of at most batch_size."""
    places: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    return [
        group[first : first + batch_size]
        for group in places.values()
        for first in range(0, len(group), batch_size)
    ]


@torch.no_grad()
def extract_descriptors(
    model: Model,
    pictures: Sequence[Picture],
    transform: Callable[[Image.Image], Tensor],
    *,
    min_side: int = 1,
    kinds: Sequence[Hashable] | None = None,
    batch_size: int,
    workers: int,
    device: torch.device,
    title: str = "",
) -> tuple[Tensor, dict[int, str]]:
    """Features [N, D] as the model gives them, on the CPU, in order; and what is bad, with reasons.

    A bad one's row is zero. In a run of many processes each computes a share of the batches, and
    every one gets the whole.

    Args:
        kinds: images of equal ones are of equal size when transformed; None: all are.

    Raises: DataError: all are bad.
    """
    batches = batches_of(kinds or [0] * len(pictures), batch_size)
    loader: DataLoader[Batch] = DataLoader(
        Pictures(pictures, transform, min_side),  # type: ignore[arg-type]
        batch_sampler=batches[distributed.rank() :: distributed.world_size()],
        collate_fn=collate,
        num_workers=min(workers, cpu_count()),
        pin_memory=device.type == "cuda",
    )
    features: Tensor | None = None
    bad: dict[int, str] = {}
    for places, images, reasons in tqdm(loader, desc=title, disable=not sys.stderr.isatty()):
        bad |= reasons
        if images is None:
            continue
        out = model(images.to(device)).float().cpu()
        if features is None:
            features = torch.zeros(len(pictures), out.shape[1])
        features[places] = out
    gathered = distributed.gather((0 if features is None else features.shape[1], bad))
    bad = {place: reason for _, reasons in gathered for place, reason in reasons.items()}
    width = max(width for width, _ in gathered)
    if not width:
        raise DataError(f"none of the {len(pictures)} images can be used: {bad[min(bad)]}")
    if features is None:  # more processes than batches: this one had none
        features = torch.zeros(len(pictures), width)
    return distributed.total(features), bad


@distributed.together()
def raise_if_bad(bad: dict[int, str]) -> None:
    """Raises DataError, naming the first, where an image that cannot be left out is bad."""
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise DataError(f"{bad[min(bad)]}{more}")


def without(features: Tensor, bad: dict[int, str]) -> Tensor:
    """The rows of features that are not bad."""
    kept = np.setdiff1d(np.arange(len(features)), list(bad))
    return features[torch.from_numpy(kept)]
