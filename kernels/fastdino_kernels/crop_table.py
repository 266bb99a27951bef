"""The table of crops that multi_crop's kernels read: a row per crop, those of most work first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .crop_params import BLUR, COLUMNS, FLAGS, JITTER

# Columns, int64: the image's address, height, width and bytes per row; the crop's size and the
# address of its output; its row in the packed parameters; the first words of its two areas of
# scratch; the words of a band in the second one.
ADDRESS, HEIGHT, WIDTH, PITCH, SIZE, OUT, PARAMS, PIXELS, WORK, BAND_WORDS = range(10)
TABLE_COLUMNS = 10
_ALIGNMENT = 32  # words, 128 bytes
# Instructions per pixel of the color operations and of the blur, in units of those per tap of a
# resize; from the machine code.
JITTER_WORK, BLUR_WORK = 25, 30


def crop_table(
    outs: Sequence[Tensor], images: Sequence[Tensor], packed: Tensor, band: int, strip: int
) -> tuple[Tensor, Tensor, int]:
    """Return the table [C, 10], the parameters [C, 14] and the words of scratch of all C crops.

    The first two are on the device of outs. Parameters that are on the CPU go there with the table,
    in one copy.

    Args:
        outs: [N, B, 3, size, size] per group of crops.
        images: B uint8 [H, W, 3], on the same device.
        packed: int32 [C, 14], the crops in the order of outs, on the CPU or on that device.
        band, strip: columns and rows that the resize works on at once, see multi_crop_triton.
    """
    device, on_cpu = outs[0].device, packed.device.type == "cpu"
    rows = _unsorted_rows(outs, images)
    sizes, extents = rows[:, SIZE], rows[:, HEIGHT : WIDTH + 1]
    if on_cpu:
        order, blurred = _heaviest_first(sizes, packed), packed[:, BLUR] != 0
        extents = packed[:, 2:4]
    else:  # Nothing is read from a device: expect whole images, blurred.
        order, blurred = sizes.argsort(descending=True), torch.ones_like(sizes)
    words = _assign_scratch(rows, extents, blurred, band, strip)
    table_words, packed_words = rows.numel(), on_cpu * packed.numel() // 2
    memory = torch.empty(
        table_words + packed_words, dtype=torch.int64, pin_memory=device.type != "cpu"
    )
    torch.index_select(rows, 0, order, out=memory[:table_words].view(-1, TABLE_COLUMNS))
    if on_cpu:
        memory[table_words:].view(torch.int32).view(-1, COLUMNS).copy_(packed)
    # PyTorch does not reuse pinned memory before the copy is complete.
    memory = memory.to(device, non_blocking=True)
    table, moved = memory[:table_words], memory[table_words:].view(torch.int32)
    return table.view(-1, TABLE_COLUMNS), moved.view(-1, COLUMNS) if on_cpu else packed, words


def _unsorted_rows(outs: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """Return the rows in the order of outs, without those of scratch."""
    places = torch.tensor([(x.data_ptr(), *x.shape[:2], x.stride(0)) for x in images])
    rows = torch.empty(sum(out.shape[0] * out.shape[1] for out in outs), TABLE_COLUMNS).long()
    start = 0
    for out in outs:
        crops, of_crop = out.shape[0] * out.shape[1], out[0, 0].numel() * out.element_size()
        group = rows[start : start + crops]
        group.view(*out.shape[:2], TABLE_COLUMNS)[..., : PITCH + 1] = places
        group[:, SIZE] = out.shape[-1]
        torch.arange(
            out.data_ptr(), out.data_ptr() + crops * of_crop, of_crop, out=group[:, OUT]
        )
        start += crops
    torch.arange(start, out=rows[:, PARAMS])
    return rows


def _stretches(sizes: Tensor, extents: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale [C, 2] of the resizes along y and x, at least 1, and their taps, all fp64."""
    stretches = (extents / sizes.double()[:, None]).clamp_(min=1.0)
    return stretches, (4 * stretches).ceil_()


def _heaviest_first(sizes: Tensor, packed: Tensor) -> Tensor:
    """Return the crops' indices, sorted by the estimated work per part, which is size wide."""
    _, taps = _stretches(sizes, packed[:, 2:4])
    operations = JITTER_WORK * (packed[:, FLAGS] & JITTER != 0) + BLUR_WORK * (packed[:, BLUR] != 0)
    work = packed[:, 2] * taps[:, 1] + sizes * (taps[:, 0] + operations)
    return work.argsort(descending=True)


def _assign_scratch(
    rows: Tensor, extents: Tensor, blurred: Tensor, band: int, strip: int
) -> int:
    """Write the columns of scratch; return the words of all crops.

    First area: the pixels, then the sum of the gray levels of each band. Second: what the bands
    need for the resize, later the pixels between two passes of the blur.
    """
    sizes = rows[:, SIZE]
    stretches, taps = _stretches(sizes, extents)
    bands = (sizes + (band - 1)) // band
    height = torch.minimum((strip - 1) * stretches[:, 0] + taps[:, 0] + 3, extents[:, 0])
    of_band = band * (1 + taps[:, 1] + height.floor_()) + sizes * (1 + taps[:, 0])
    rows[:, BAND_WORDS] = of_band
    pixels = _aligned(sizes * sizes + bands)
    work = _aligned(torch.maximum(bands * rows[:, BAND_WORDS], blurred * sizes * sizes))
    ends = (pixels + work).cumsum_(0)
    torch.sub(ends, work, out=rows[:, WORK])
    torch.sub(rows[:, WORK], pixels, out=rows[:, PIXELS])
    return int(ends[-1])


def _aligned(words: Tensor) -> Tensor:
    return (words + (_ALIGNMENT - 1)) // _ALIGNMENT * _ALIGNMENT
