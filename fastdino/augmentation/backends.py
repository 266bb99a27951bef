"""Crop backends behind one interface, and their differences from the reference.

This is for figures and tables. A training run uses the loaders of fastdino.data, which make the
same crops.

Legend: B images, N crops of one resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
import torchvision
from fastdino_kernels import multi_crop_groups
from fastdino_kernels.dispatch import triton_problem
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.augmentation import dali_problem, fused_problem
from fastdino.augmentation.params import CropParams
from fastdino.augmentation.pillow import MEAN, STD, make_crop

REFERENCE = "torchvision"
BACKENDS = (REFERENCE, "fused", "multi_crop", "dali")

Images = Sequence[NDArray[np.uint8]]  # B decoded images [H, W, 3]
# Parameters of crops [B, N] of one resolution, and their side in pixels.
Drawn = tuple[CropParams, int]


@dataclass(frozen=True)
class Difference:
    """Differences from the reference in levels of 0..255, over all pixels and channels.

    exact: the normalized fp32 values are equal, bit for bit.
    """

    largest: int
    mean: float
    exact: bool

    def __str__(self) -> str:
        return f"max {self.largest}, mean {self.mean:.2f}" if self.largest else "0"


def difference(crops: Sequence[Tensor], reference: Sequence[Tensor]) -> Difference:
    """Compare normalized fp32 crops [..., 3, H, W], in groups that may differ in size."""
    pairs = list(zip(crops, reference, strict=True))
    gap = torch.cat([(levels(a).int() - levels(b).int()).abs().flatten() for a, b in pairs])
    exact = all(torch.equal(a, b) for a, b in pairs)
    return Difference(int(gap.max()), gap.double().mean().item(), exact)


def levels(crops: Tensor) -> Tensor:
    """Convert normalized crops [..., 3, H, W] back to uint8 levels, 0..255."""
    mean, std = (torch.tensor(x, device=crops.device)[:, None, None] for x in (MEAN, STD))
    return ((crops * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def problem(name: str) -> str | None:
    """Return why a backend is unavailable here, or None if it works."""
    if name == "fused":
        return fused_problem("cpu")
    return dali_problem() if name == "dali" else None


def description(name: str, device: torch.device) -> str:
    """Describe a backend by its library, version and device."""
    if name == REFERENCE:
        return f"torchvision {torchvision.__version__}, Pillow {version('pillow')} on cpu"
    if name == "fused":
        return f"Numba {version('numba')} on cpu"
    if name == "dali":
        from fastdino.augmentation.dali import VERSION

        return f"DALI {VERSION} on {device}"
    if multi_crop_impl(device) == "torch":
        return f"PyTorch {torch.__version__} on {device}"
    where = "in its interpreter" if device.type == "cpu" else f"on {device}"
    return f"Triton {version('triton')} {where}"


def multi_crop_impl(device: torch.device) -> str:
    """Return "triton" if it can run on the device (on a CPU: interpreted), else "torch"."""
    return "torch" if triton_problem(device) else "triton"


def make_crops(
    name: str,
    images: Images,
    crops: Sequence[Drawn],
    device: torch.device,
    *,
    impl: str | None = None,
) -> list[Tensor]:
    """Make the crops of B decoded images at each of several sizes.

    Args:
        name: one of BACKENDS.
        device: for multi_crop and dali; the others use the CPU.
        impl: implementation of multi_crop; None: that of multi_crop_impl.

    Returns: for each of crops [B, N, 3, size, size], fp32, normalized, on the CPU.
    """
    if name == REFERENCE:
        return [pillow_crops(images, params, size) for params, size in crops]
    if name == "fused":
        from fastdino.augmentation.cpu import fused_crops  # needs Numba

        return fused_crops(images, crops)
    if name == "dali":
        from fastdino.augmentation.dali import dali_crops

        return [made.cpu() for made in dali_crops(images, crops, device=device)]
    tensors = [torch.tensor(image, device=device) for image in images]
    impl = impl or multi_crop_impl(device)
    made = multi_crop_groups(tensors, crops, mean=MEAN, std=STD, impl=impl)
    return [of_one_size.cpu() for of_one_size in made]


def pillow_crops(
    images: Images,
    params: CropParams,
    size: int,
    order: Callable[[list[int]], list[int]] = list,
) -> Tensor:
    """Make the reference crops [B, N, 3, size, size] of B decoded images.

    order: maps the drawn order of the color operations to the applied one; may omit some.
    """
    made = [
        make_crop(picture, crop._replace(jitter_order=order(crop.jitter_order)), size)
        for b, picture in enumerate(map(Image.fromarray, images))
        for crop in params.of_sample(b)
    ]
    shape = (*params.top.shape, 3, size, size)
    return torch.stack(made).view(shape) if made else torch.empty(shape)
