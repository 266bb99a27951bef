"""The table of crops that multi_crop's kernels read: a row per crop, those of most work first."""

from __future__ import annotations

from array import array
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
# resize (about 16, in the machine code for sm_90).
JITTER_WORK, BLUR_WORK = 16, 25


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
    # Nothing is read from a device: the boxes there are taken to be whole images, and blurred.
    boxes = packed[:, 2:4] if on_cpu else rows[:, HEIGHT : WIDTH + 1]
    blurred = packed[:, BLUR] != 0 if on_cpu else torch.ones(len(rows), dtype=torch.bool)
    stretches = (boxes / rows[:, SIZE, None].double()).clamp_(min=1.0)
    taps = (4 * stretches).ceil_()
    words = _assign_scratch(rows, stretches, taps, blurred, band, strip)
    work = rows[:, SIZE] * (taps[:, 0] + BLUR_WORK * blurred) + boxes[:, 0] * taps[:, 1]
    if on_cpu:
        work += rows[:, SIZE] * JITTER_WORK * (packed[:, FLAGS] & JITTER != 0)
    order = work.argsort(descending=True)
    table_words, packed_words = rows.numel(), on_cpu * packed.numel() // 2
    memory = _memory_to_copy(table_words + packed_words, device)
    torch.index_select(rows, 0, order, out=memory[:table_words].view(-1, TABLE_COLUMNS))
    if on_cpu:
        memory[table_words:].view(torch.int32).view(-1, COLUMNS).copy_(packed)
    memory = memory.to(device, non_blocking=True)
    table, moved = memory[:table_words], memory[table_words:].view(torch.int32)
    return table.view(-1, TABLE_COLUMNS), moved.view(-1, COLUMNS) if on_cpu else packed, words


def _memory_to_copy(words: int, device: torch.device) -> Tensor:
    """Return memory on the CPU; PyTorch reuses it only after its copy to the device."""
    return torch.empty(words, dtype=torch.int64, pin_memory=device.type == "cuda")


def _unsorted_rows(outs: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """Return the rows in the order of outs, without those of scratch."""
    places = array("q")
    for image in images:
        height, width, _ = image.shape
        places.extend((image.data_ptr(), height, width, image.stride(0)))
    count = sum(out.shape[0] * out.shape[1] for out in outs)
    rows = torch.empty(count, TABLE_COLUMNS, dtype=torch.int64)
    of_images = torch.frombuffer(places, dtype=torch.int64).view(-1, PITCH + 1)
    start = 0
    for out in outs:
        end, of_crop = start + out.shape[0] * out.shape[1], out.stride(1) * out.element_size()
        group, address = rows[start:end], out.data_ptr()
        group.view(*out.shape[:2], TABLE_COLUMNS)[..., : PITCH + 1] = of_images
        group[:, SIZE] = out.shape[-1]
        last = address + (end - start) * of_crop
        torch.arange(address, last, of_crop, out=group[:, OUT])
        start = end
    torch.arange(start, out=rows[:, PARAMS])
    return rows


def _assign_scratch(
    rows: Tensor, stretches: Tensor, taps: Tensor, blurred: Tensor, band: int, strip: int
) -> int:
    """Write the columns of scratch; return the words of all crops.

    stretches, taps: [C, 2], of the resizes along y and x.

    First area: the pixels, then the sum of the gray levels of each band. Second: what the bands
    need for the resize, later the pixels between two passes of the blur.
    """
    sizes = rows[:, SIZE]
    bands, area = (sizes + (band - 1)) // band, sizes * sizes
    of_strip = (strip - 1) * stretches[:, 0] + taps[:, 0] + 3  # input rows, rounded down
    # The taps along x are padded to a multiple of 4.
    of_band = band * (4 + taps[:, 1] + of_strip.floor_()) + sizes * (1 + taps[:, 0])
    rows[:, BAND_WORDS] = of_band
    pixels = _aligned(area + bands)
    work = _aligned(torch.maximum(bands * rows[:, BAND_WORDS], blurred * area))
    ends = (pixels + work).cumsum_(0)
    torch.sub(ends, work, out=rows[:, WORK])
    torch.sub(rows[:, WORK], pixels, out=rows[:, PIXELS])
    return int(ends[-1])


def _aligned(words: Tensor) -> Tensor:
    return words.add_(_ALIGNMENT - 1).bitwise_and_(-_ALIGNMENT)
