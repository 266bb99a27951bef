"""CropParams: the drawn augmentation parameters, input of multi_crop and other crop backends.

Legend: B images, N crops per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

MAX_BLUR_RADIUS = 100.0
# First columns in CropParams.pack: the box has 4, then come flags, order, factors and blur.
FLAGS, ORDER, FACTOR, BLUR, COLUMNS = 4, 5, 9, 13, 14
FLIP, JITTER, GRAY, SOLARIZE = 1, 2, 4, 8


class Crop(NamedTuple):
    """Parameters of one crop of one image as plain numbers, with the fields of CropParams."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: bool
    jitter_order: list[int]
    jitter_factor: list[float]
    gray: bool
    blur_radius: float
    solarize: bool


@dataclass(frozen=True)
class CropParams:
    """Random parameters of [B, N] crops, sufficient to reproduce a crop with PIL.

    top, left, height, width: int32, pixels of the decoded image.
    flip, jitter, gray, solarize: bool; jitter switches the four colour operations on.
    jitter_order: int32 [B, N, 4], a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue.
    jitter_factor: fp32 [B, N, 4], in the same numbering; hue is from -.5 to .5.
    blur_radius: fp32, from 0 (no blur) to 100.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    jitter: Tensor
    jitter_order: Tensor
    jitter_factor: Tensor
    gray: Tensor
    blur_radius: Tensor
    solarize: Tensor

    def of_sample(self, b: int) -> list[Crop]:
        """Return the N crops of sample b."""
        columns = [getattr(self, field.name)[b].tolist() for field in fields(self)]
        return [Crop(*row) for row in zip(*columns)]

    def pack(self) -> Tensor:
        """Pack everything into one int32 tensor [B, N, 14], so that one copy moves it.

        Columns: top, left, height, width, flags (1 flip, 2 jitter, 4 gray, 8 solarize), 4 of
        order, 4 of factor and the blur radius; fp32 values as their bits.
        """
        flags = self.flip.to(torch.int32)  # bit FLIP
        for bit, flag in ((JITTER, self.jitter), (GRAY, self.gray), (SOLARIZE, self.solarize)):
            flags = torch.add(flags, flag, alpha=bit)
        box = torch.stack([self.top, self.left, self.height, self.width, flags], dim=-1)
        floats = torch.cat([self.jitter_factor, self.blur_radius[..., None]], dim=-1)
        return torch.cat([box, self.jitter_order, floats.view(torch.int32)], dim=-1)


_DTYPES = {
    **dict.fromkeys(("top", "left", "height", "width", "jitter_order"), torch.int32),
    **dict.fromkeys(("jitter_factor", "blur_radius"), torch.float32),
}


def check_params(params: CropParams, images: Sequence[Tensor]) -> None:
    """Raise TypeError or ValueError for params that cannot belong to these images.

    Only shapes, dtypes and devices are checked; nothing is read from a device.
    """
    if not isinstance(params, CropParams):
        raise TypeError(f"params must be CropParams, got {type(params).__name__}")
    if params.top.dim() != 2 or len(params.top) != len(images):
        raise ValueError(
            f"params must be of [B, N] crops with B = {len(images)} like the images, "
            f"got top of shape {tuple(params.top.shape)}"
        )
    for field in fields(params):
        value = getattr(params, field.name)
        dtype = _DTYPES.get(field.name, torch.bool)
        shape = tuple(params.top.shape) + ((4,) if field.name.startswith("jitter_") else ())
        if value.dtype != dtype:
            raise TypeError(f"params.{field.name} must be {dtype}, got {value.dtype}")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"params.{field.name} must have shape {shape}, got {tuple(value.shape)}"
            )
        if value.device != params.top.device:
            raise ValueError(
                f"params must be on one device, got top on {params.top.device} "
                f"and {field.name} on {value.device}"
            )
    device = params.top.device
    if images and device.type != "cpu" and device != images[0].device:
        raise ValueError(
            f"params must be on {images[0].device} like the images, or on the CPU, got {device}"
        )


def check_values(packed: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError for an invalid crop of packed [B, N, 14], on the CPU.

    sizes: B pairs (height, width), pixels.
    """
    if packed.numel() == 0:
        return
    bounds = torch.tensor(sizes, dtype=torch.int32)[:, None]
    box, order = packed[..., :4], packed[..., ORDER:FACTOR]
    expected = "a box (top, left, height, width) must be inside its image"
    _raise_at(box >= _LEAST_BOX, box, expected, sizes)
    _raise_at(box[..., :2] <= bounds - box[..., 2:], box, expected, sizes)
    expected = "jitter_order must be a permutation of 0, 1, 2, 3"
    _raise_at(order.sort(dim=-1).values == _OPERATIONS, order, expected)
    floats = packed.view(torch.float32)
    factor, radius = floats[..., FACTOR:BLUR], floats[..., BLUR:]
    unused = packed[..., FLAGS : FLAGS + 1] & JITTER == 0
    expected = "jitter_factor must be finite, and the hue's from -0.5 to 0.5"
    _raise_at((factor.abs() <= _LARGEST_FACTORS) | unused, factor, expected)
    expected = f"blur_radius must be from 0 to {MAX_BLUR_RADIUS:g}"
    _raise_at((radius >= 0) & (radius <= MAX_BLUR_RADIUS), radius, expected)


_LEAST_BOX = torch.tensor([0, 0, 1, 1], dtype=torch.int32, device="cpu")
_OPERATIONS = torch.arange(4, dtype=torch.int32, device="cpu")
_LARGEST_FACTORS = torch.tensor(3 * [torch.finfo(torch.float32).max] + [0.5], device="cpu")


def _raise_at(
    right: Tensor, values: Tensor, expected: str, sizes: Sequence[tuple[int, int]] = ()
) -> None:
    """Raise for the first crop that has a False in right [B, N, ...], naming its image's size."""
    if right.all():
        return
    b, n = (~right).any(-1).nonzero()[0].tolist()
    got = values[b, n].tolist()
    place = ", {} x {}".format(*sizes[b]) if sizes else ""
    raise ValueError(
        f"{expected}, got {got if len(got) > 1 else got[0]} for crop {n} of images[{b}]{place}"
    )
