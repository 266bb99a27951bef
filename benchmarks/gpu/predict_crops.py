"""Predict the time of multi_crop's kernels from counted instructions, without a GPU.

    python -m benchmarks.gpu.predict_crops [--images 64] [--write benchmarks/results]

Nothing here is a measurement. The instructions per pixel are those of the loops in the machine code
for sm_90 by Triton 3.6. A program's time is its instructions over its share of the rate at which an
SM issues them, or its load wavefronts over its share of one per cycle, whichever is longer.
Programs start in the order of the grid on the first free slot of an SM.

"before" is the kernel of commit 4538aea: a program per crop, one launch per size.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdino_kernels.crop_params import Crop
from fastdino_kernels.crop_table import BLUR_WORK, JITTER_WORK
from fastdino_kernels.multi_crop_triton import BAND, PART, STRIP

from fastdino.augmentation.params import draw_crops
from fastdino.config import TrainConfig

SMS, GHZ, LAUNCH_US = 132, 1.83, 4.0
# Instructions per cycle: of a warp that waits for its loads and results, and of an SM at most.
WARP_RATE, SM_RATE = 0.13, 2.6
IMAGE = (375, 500)
BLEND, HUE = 45, 120  # instructions per pixel
# Lines of 128 bytes that one load of a warp touches: bytes of 32 neighbors at a stretch of 1.9; of
# 16 rows, as Triton 3.6 reads a look-up of a matrix; words of 128 neighbors, 4 per thread.
NEIGHBORS, ROWS, FOURS = 2.5, 16.0, 4.0
VERSIONS = "before", "in three launches", "heaviest first", "the same, one program per crop"


@dataclass(frozen=True)
class Program:
    """The instructions and load wavefronts of one program, of all its warps."""

    instructions: float
    wavefronts: float = 0.0

    def __add__(self, other: Program) -> Program:
        return Program(self.instructions + other.instructions, self.wavefronts + other.wavefronts)


@dataclass(frozen=True)
class Launch:
    """Programs in the order of the grid, how many of them an SM holds, and their warps."""

    programs: Sequence[Program]
    slots: int
    warps: int

    def microseconds(self) -> float:
        rate = min(self.slots * self.warps * WARP_RATE, SM_RATE)
        free = [0.0] * (SMS * self.slots)
        for program in self.programs:
            cycles = max(program.instructions / rate, program.wavefronts) * self.slots
            heapq.heapreplace(free, free[0] + cycles)
        return max(free) / GHZ / 1000 + LAUNCH_US


def per_pixel(pixels: float, instructions: float, wavefronts: float = 0.0) -> Program:
    """Return the work of a loop over pixels; wavefronts are those of a warp."""
    return Program(pixels * instructions / 32, pixels * wavefronts / 32)


def taps(length: int, size: int) -> int:
    return math.ceil(4 * max(length / size, 1))


def strip_rows(crop: Crop, size: int) -> float:
    """Return the input rows that all strips of a crop resize along x."""
    return crop.height + size / STRIP * 4 * max(crop.height / size, 1)


def colors(pixels: float, operations: Sequence[int]) -> Program:
    return per_pixel(pixels, sum(HUE if operation == 3 else BLEND for operation in operations))


def split_operations(crop: Crop) -> tuple[list[int], list[int]]:
    """Return the operations before contrast, and the others."""
    order = crop.jitter_order if crop.jitter else []
    place = order.index(1) if order else 0
    return order[:place], order[place:]


def before(crop: Crop, size: int) -> Program:
    """Return the work of the only program of a crop."""
    area, along_x, along_y = size * size, taps(crop.width, size), taps(crop.height, size)
    early, late = split_operations(crop)
    work = per_pixel(strip_rows(crop, size) * size, 34 + 19 * along_x, (3 * ROWS + 1) * along_x)
    work += per_pixel(area, 82 + 24 * along_y, 2 * along_y)
    if crop.jitter or crop.gray:
        work += per_pixel(2 * area, 24) + colors(area, early + late)
    if crop.blur_radius > 0:
        work += per_pixel(3 * area, 75, 4 * FOURS + 1) + per_pixel(3 * area, 75, 5)
    return work + per_pixel(area, 25, 3 * FOURS)


def resize(crop: Crop, size: int, columns: int) -> Program:
    early, _ = split_operations(crop)
    groups, along_y = math.ceil(taps(crop.width, size) / 4), taps(crop.height, size)
    work = per_pixel(
        strip_rows(crop, size) * columns, 55 + 50 * groups, (3 * NEIGHBORS + 4) * groups
    )
    work += per_pixel(size * columns, 50 + 20 * along_y, 2 * along_y)
    coefficients = per_pixel(size * along_y + columns * 4 * groups, 29 + 67)
    return work + coefficients + colors(size * columns, early)


def color(crop: Crop, size: int, rows: int) -> Program:
    _, late = split_operations(crop)
    work = per_pixel(size * rows, 72, 1 + 3 * FOURS) + colors(size * rows, late)
    if crop.blur_radius > 0:
        work += per_pixel(3 * size * rows, 56, 5)
    return work


def blur(crop: Crop, size: int, columns: int) -> Program:
    if not crop.blur_radius:
        return Program(0)
    return per_pixel(2 * size * columns, 68, 5) + per_pixel(size * columns, 92, 5 + 3 * FOURS)


def parts(size: int, part: int) -> list[int]:
    return [min(part, size - start) for start in range(0, size, part)]


def work_of(crop: Crop, size: int) -> float:
    """Return crop_table's estimate, by which the crops are sorted."""
    operations = JITTER_WORK * crop.jitter + BLUR_WORK * (crop.blur_radius > 0)
    return crop.height * taps(crop.width, size) + size * (taps(crop.height, size) + operations)


def predictions(images: int, seed: int) -> dict[str, float]:
    """Return the microseconds of one batch by version of the kernels."""
    config = TrainConfig(seed=seed)
    drawn = draw_crops(config, 0, range(images), [IMAGE] * images)
    sizes = config.global_crops_size, config.local_crops_size
    groups = [
        [(crop, size) for b in range(images) for crop in params.of_sample(b)]
        for params, size in zip(drawn, sizes, strict=True)
    ]
    old = [
        Launch([before(*crop) for crop in group], slots, warps).microseconds()
        for group, (slots, warps) in zip(groups, ((1, 16), (2, 8)), strict=True)
    ]
    together = [crop for group in groups for crop in group]
    ordered = sorted(together, key=lambda crop: -work_of(*crop))
    whole = [
        resize(*crop, crop[1]) + color(*crop, crop[1]) + blur(*crop, crop[1]) for crop in ordered
    ]
    times = sum(old), divided(together), divided(ordered), Launch(whole, 2, 8).microseconds()
    return dict(zip(VERSIONS, times, strict=True))


def divided(crops: Sequence[tuple[Crop, int]]) -> float:
    """Return the microseconds of the three kernels for crops in the order of their programs."""
    return sum(
        Launch(
            [kernel(*crop, part) for crop in crops for part in parts(crop[1], width)], slots, 4
        ).microseconds()
        for kernel, width, slots in ((resize, BAND, 4), (color, PART, 9), (blur, PART, 8))
    )


def table(images: int) -> str:
    """Return a Markdown table: means over ten batches."""
    batches = [predictions(images, seed) for seed in range(10)]
    mean = {name: sum(batch[name] for batch in batches) / 10 for name in batches[0]}
    lines = [
        f"| multi_crop, {images} images, one H200 | us, predicted | images/s |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {us:.0f} | {images / us * 1e6:,.0f} |" for name, us in mean.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--write", type=Path, help="folder for predictions_crops.md")
    options = parser.parse_args(arguments)
    text = table(options.images)
    print(text)
    if options.write:
        page = f"# Predictions of multi_crop\n\n{__doc__.split(chr(10), 2)[2]}\n{text}\n"
        (options.write / "predictions_crops.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
