"""All who can make the crops, behind one call, and how far each is from the paper's chain.

For pictures and tables: a run takes the loaders of loader.py, which make the same crops.

Legend: B images, N crops of one resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import PIL
import torch
import torchvision
from fastdino_kernels import multi_crop
from fastdino_kernels.dispatch import triton_problem
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.augmentation.params import CropParams
from fastdino.augmentation.pillow import MEAN, STD, make_crop
from fastdino.data.loader import dali_problem, fused_problem

ORACLE = "torchvision"
EXECUTORS = (ORACLE, "fused", "multi_crop", "dali")

Images = Sequence[NDArray[np.uint8]]  # B decoded images [H, W, 3]
# What was drawn for crops [B, N] of one resolution, and their side in pixels.
Drawn = tuple[CropParams, int]


@dataclass(frozen=True)
class Difference:
    """How far some crops are from the oracle's, in levels of 0..255 over all pixels and channels.

    exact: the normalised fp32 values are equal, bit for bit.
    """

    largest: int
    mean: float
    exact: bool

    def __str__(self) -> str:
        return f"max {self.largest}, mean {self.mean:.2f}" if self.largest else "0"


def difference(crops: Sequence[Tensor], oracle: Sequence[Tensor]) -> Difference:
    """Of normalised fp32 crops [..., 3, H, W], in groups that may differ in size."""
    gaps = [
        (levels(ours).int() - levels(theirs).int()).abs().flatten()
        for ours, theirs in zip(crops, oracle, strict=True)
    ]
    gap = torch.cat(gaps)
    exact = all(torch.equal(ours, theirs) for ours, theirs in zip(crops, oracle, strict=True))
    return Difference(int(gap.max()), gap.double().mean().item(), exact)


def levels(crops: Tensor) -> Tensor:
    """Normalised crops [..., 3, H, W] as the levels they were before: uint8, 0..255."""
    mean, std = (torch.tensor(x, device=crops.device)[:, None, None] for x in (MEAN, STD))
    return ((crops * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def problem(name: str) -> str | None:
    """Why this one of EXECUTORS cannot make crops here; None where it can."""
    if name == "fused":
        return fused_problem("cpu")
    return dali_problem() if name == "dali" else None


def description(name: str, device: torch.device) -> str:
    """With what, and where, this one of EXECUTORS makes crops."""
    if name == ORACLE:
        return f"torchvision {torchvision.__version__}, Pillow {PIL.__version__} on cpu"
    if name == "fused":
        return f"Numba {version('numba')} on cpu"
    if name == "dali":
        from fastdino.data.loader_dali import VERSION

        return f"DALI {VERSION} on {device}"
    if multi_crop_impl(device) == "torch":
        return f"PyTorch {torch.__version__} on {device}"
    where = "in its interpreter" if device.type == "cpu" else f"on {device}"
    return f"Triton {version('triton')} {where}"


def multi_crop_impl(device: torch.device) -> str:
    """The kernel where it can run, on a CPU in Triton's interpreter; else PyTorch."""
    return "torch" if triton_problem(device.type) else "triton"


def make_crops(
    name: str,
    images: Images,
    crops: Sequence[Drawn],
    device: torch.device,
    *,
    impl: str | None = None,
) -> list[Tensor]:
    """The crops of B decoded images at each of several sizes, by one of EXECUTORS.

    device: for multi_crop and dali; the others work on the CPU.
    impl: of multi_crop; None: as multi_crop_impl says.

    Returns: for each of crops [B, N, 3, size, size], fp32, normalised, on the CPU.
    """
    if name == ORACLE:
        return [_by_pil(images, params, size) for params, size in crops]
    if name == "fused":
        from fastdino.augmentation.cpu import fused_crops  # needs Numba

        return fused_crops(images, crops, mean=MEAN, std=STD)
    if name == "dali":
        from fastdino.data.loader_dali import dali_crops

        return [made.cpu() for made in dali_crops(images, crops, device=device)]
    tensors = [torch.tensor(image, device=device) for image in images]
    impl = impl or multi_crop_impl(device)
    return [
        multi_crop(tensors, params, size=size, mean=MEAN, std=STD, impl=impl).cpu()
        for params, size in crops
    ]


def _by_pil(images: Images, params: CropParams, size: int) -> Tensor:
    made = [
        make_crop(picture, crop, size)
        for b, picture in enumerate(map(Image.fromarray, images))
        for crop in params.of_sample(b)
    ]
    shape = (*params.top.shape, 3, size, size)
    return torch.stack(made).view(shape) if made else torch.empty(shape)
