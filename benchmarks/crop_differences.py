"""Measures how far each backend's crops are from the paper's Pillow chain, for the same draws.

    python -m benchmarks.crop_differences [--images FOLDER] [--pictures 24] [--write docs/crops.md]

It measures whole crops first, then DALI's operators one by one on every crop. Each operator and
Pillow get the same pixels: the drawn boxes as Pillow resizes them. Differences are in levels of
0..255. With TRITON_INTERPRET=1 the kernel multi_crop runs on a CPU, at 2.5 s per crop and therefore
on few images.

Legend: B images, N crops of one resolution; M = B N pieces, one box of an image each.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.command_line import command_line
from benchmarks.crop_pictures import encode, pictures
from fastdino import TrainConfig
from fastdino.augmentation.backends import (
    BACKENDS,
    Difference,
    Drawn,
    description,
    difference,
    levels,
    make_crops,
    multi_crop_impl,
    pillow_crops,
    problem,
)
from fastdino.augmentation.params import BLUR_RADIUS, CropParams, draw_crops, select
from fastdino.data.image_files import AS_STORED
from fastdino.runtime import choose_device

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HUE = 3  # in the numbering of CropParams.jitter_order
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])  # factors that change nothing
INTERPRETED = 3  # images for Triton's interpreter
FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("JPEG", {"quality": 75, "subsampling": "4:2:0"}),
    ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ("JPEG", {"quality": 85, "progressive": True}),
    ("PNG", {}),
)

Order = Callable[[list[int]], list[int]]  # maps the drawn order of the jitter to another
Pixels = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True)
class Row:
    """A table row: differences of the global and the local crops, or of whole images."""

    label: str
    gaps: Sequence[Difference]
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """Operations applied to every crop; of the jitter those in `kept`, by Pillow in `order`."""

    label: str
    kept: tuple[int, ...] = ()
    order: Order = sorted
    flip: bool = False
    gray: bool = False
    blur: bool = False
    solarize: bool = False
    note: str = ""

    def params(self, drawn: CropParams) -> CropParams:
        """Return the drawn boxes with only these operations, using the drawn factors."""
        kept = torch.tensor([operation in self.kept for operation in range(4)])
        radii = torch.linspace(*BLUR_RADIUS, drawn.top.numel()).view_as(drawn.blur_radius)
        return dataclasses.replace(
            drawn,
            flip=torch.full_like(drawn.flip, self.flip),
            jitter=torch.full_like(drawn.jitter, bool(self.kept)),
            jitter_factor=torch.where(kept, drawn.jitter_factor, NEUTRAL),
            gray=torch.full_like(drawn.gray, self.gray),
            blur_radius=radii if self.blur else torch.zeros_like(radii),
            solarize=torch.full_like(drawn.solarize, self.solarize),
        )

    def pillow_order(self, drawn: list[int]) -> list[int]:
        """Return Pillow's color operations; its hue shift by 0 would be lossy, so omit it."""
        return self.order([operation for operation in drawn if operation in self.kept])


ALL = (0, 1, 2, HUE)
PLAIN = Stage("crop, bicubic resize", note="Pillow rounds between its two passes")
HUE_ONLY = Stage("hue", (HUE,), note="rotates in YIQ, Pillow in HSV")
IN_DALI_ORDER = Stage("all four; Pillow in DALI's order", ALL)
IN_DRAWN_ORDER = Stage("all four; Pillow in the drawn order", ALL, order=list)
STAGES = (
    Stage("flip", flip=True),
    Stage("brightness", (0,), note="rounds, Pillow truncates"),
    Stage("contrast", (1,), note="rounds, Pillow truncates except for the mean"),
    Stage("saturation", (2,), note="rounds, Pillow truncates"),
    HUE_ONLY,
    Stage("all but hue; Pillow in DALI's order", (0, 1, 2), note="does not clip in between"),
    IN_DALI_ORDER,
    IN_DRAWN_ORDER,
    Stage("gray", gray=True, note="the same as saturation 0"),
    Stage("blur, radius .1 to 2", blur=True, note="a true Gaussian, edges reflected"),
    Stage("solarize", solarize=True),
)


@dataclass(frozen=True)
class Pieces:
    """The drawn boxes of all images as Pillow resizes them: M images and their parameters.

    pixels: M arrays [size, size, 3]. params: [M, 1], with boxes that cover these arrays.
    """

    pixels: list[Pixels]
    params: CropParams
    size: int

    @classmethod
    def of(cls, images: Sequence[Pixels], params: CropParams, size: int) -> Pieces:
        made = levels(pillow_crops(images, PLAIN.params(params), size)).flatten(0, 1)
        values = {
            field.name: getattr(params, field.name).flatten(0, 1)[:, None]
            for field in dataclasses.fields(params)
        }
        for name, value in (("top", 0), ("left", 0), ("height", size), ("width", size)):
            values[name] = torch.full_like(values[name], value)
        return cls([*made.permute(0, 2, 3, 1).numpy()], CropParams(**values), size)

    def by_pillow(self, stage: Stage) -> Tensor:
        """Apply a stage with Pillow: [M, 1, 3, size, size], normalized."""
        return pillow_crops(self.pixels, stage.params(self.params), self.size, stage.pillow_order)

    def by_dali(self, stage: Stage, device: torch.device) -> Tensor:
        """Apply a stage with DALI: [M, 1, 3, size, size], normalized."""
        drawn = stage.params(self.params), self.size
        return make_crops("dali", self.pixels, [drawn], device)[0]


def whole_crops(
    images: Sequence[Pixels], drawn: Sequence[Drawn], device: torch.device
) -> list[Row]:
    """Measure every available backend, and the paper's chain with one change."""
    reference = [pillow_crops(images, *pair) for pair in drawn]

    def row(label: str, crops: Sequence[Tensor]) -> Row:
        gaps = [difference([a], [b[: len(a)]]) for a, b in zip(crops, reference, strict=True)]
        return Row(label, gaps, "bit for bit" if all(gap.exact for gap in gaps) else "")

    def make(name: str, pairs: Sequence[Drawn], impl: str | None = None) -> list[Tensor]:
        return make_crops(name, images[: len(pairs[0][0].top)], pairs, device, impl=impl)

    rows = []
    if problem("fused") is None:
        rows.append(row("`fused`", make("fused", drawn)))
    rows.append(row("`multi_crop`, PyTorch", make("multi_crop", drawn, "torch")))
    if multi_crop_impl(device) == "triton":
        few = len(images) if device.type == "cuda" else INTERPRETED
        pairs = [(select(params, slice(few)), size) for params, size in drawn]
        count = sum(params.top.numel() for params, _ in pairs)
        rows.append(row(f"`multi_crop`, Triton, {count} crops", make("multi_crop", pairs)))
    if problem("dali") is None:
        rows.append(row("`dali`", make("dali", drawn)))
        pairs = [(with_neutral_hue(params), size) for params, size in drawn]
        rows.append(row("`dali` without hue", make("dali", pairs)))
    for label, order in (("Pillow without hue", without_hue), ("Pillow in DALI's order", sorted)):
        rows.append(row(label, [pillow_crops(images, *pair, order) for pair in drawn]))
    return rows


def without_hue(order: list[int]) -> list[int]:
    return [operation for operation in order if operation != HUE]


def with_neutral_hue(params: CropParams) -> CropParams:
    """Return the same crops with hue factors of 0."""
    kept = torch.tensor([operation != HUE for operation in ALL])
    return dataclasses.replace(params, jitter_factor=params.jitter_factor * kept)


def operators(images: Sequence[Pixels], drawn: Sequence[Drawn], device: torch.device) -> list[Row]:
    """Measure DALI's operators one by one, each on the same pixels as Pillow's."""
    plain = [(PLAIN.params(params), size) for params, size in drawn]
    cropped = make_crops("dali", images, plain, device)
    gaps = [
        difference([crops], [pillow_crops(images, *pair)])
        for crops, pair in zip(cropped, plain, strict=True)
    ]
    rows = [Row(PLAIN.label, gaps, PLAIN.note)]
    pieces = [Pieces.of(images, *pair) for pair in drawn]
    for stage in STAGES:
        gaps = [difference([x.by_dali(stage, device)], [x.by_pillow(stage)]) for x in pieces]
        rows.append(Row(stage.label, gaps, stage.note))
        if stage is HUE_ONLY:
            gaps = [difference([x.by_pillow(PLAIN)], [x.by_pillow(stage)]) for x in pieces]
            rows.append(Row("(hue skipped)", gaps, "Pillow without and with the shift"))
        if stage is IN_DRAWN_ORDER:
            gaps = [difference([x.by_pillow(IN_DALI_ORDER)], [x.by_pillow(stage)]) for x in pieces]
            rows.append(Row("(order only)", gaps, "Pillow in both orders"))
    pairs = [(x.by_dali(PLAIN, device), x.by_pillow(PLAIN)) for x in pieces]
    most = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    gaps = [difference([ours], [theirs]) for ours, theirs in pairs]
    rows.append(Row("normalize", gaps, f"at most {most:.0e} apart once normalized"))
    return rows


def decoding(images: Sequence[Pixels]) -> Row:
    """Measure DALI's decoder on the CPU against Pillow's on whole images in several formats."""
    from fastdino.data.dali_decoding import DaliDecoder

    decoder, gaps = DaliDecoder(len(FORMATS), 1), []
    for image in images:
        files = [encode(image, form, **options) for form, options in FORMATS]
        for file, ours in zip(files, decoder.decode(files), strict=True):
            assert isinstance(ours, np.ndarray)
            gaps.append(np.abs(ours.astype(int) - np.asarray(AS_STORED.decode(file))).ravel())
    decoder.close()
    gap = np.concatenate(gaps)
    overall = Difference(int(gap.max()), float(gap.mean()), not gap.any())
    return Row("decode, whole images", [overall], "JPEG 4:2:0, 4:4:4, progressive; PNG")


def by_color(kinds: dict[str, list[Pixels]], drawn: Drawn, device: torch.device) -> list[list[str]]:
    """Return a table row per kind of image: its saturation, and mean differences of its crops.

    drawn: parameters for the images of all kinds, one kind after the other.
    """
    cells, begin = [], 0
    for kind, images in kinds.items():
        params, size = select(drawn[0], slice(begin, begin + len(images))), drawn[1]
        begin += len(images)
        reference = pillow_crops(images, params, size)
        pieces = Pieces.of(images, params, size)
        shifted = pieces.by_pillow(HUE_ONLY)
        hsv = [np.asarray(Image.fromarray(image).convert("HSV"))[..., 1] for image in images]
        pairs = (
            (make_crops("dali", images, [(params, size)], device), [reference]),
            (make_crops("dali", images, [(with_neutral_hue(params), size)], device), [reference]),
            ([pieces.by_dali(HUE_ONLY, device)], [shifted]),
            ([pieces.by_pillow(PLAIN)], [shifted]),
        )
        saturation = np.mean([values.mean() / 255 for values in hsv])
        means = [f"{difference(*pair).mean:.1f}" for pair in pairs]
        cells.append([kind, f"{saturation:.2f}", *means])
    return cells


def draw(images: Sequence[Pixels], config: TrainConfig) -> list[Drawn]:
    """Draw the paper's crops of these images."""
    drawn = draw_crops(config, 0, range(len(images)), [image.shape[:2] for image in images])
    return list(zip(drawn, (config.global_crops_size, config.local_crops_size), strict=True))


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format a table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def cells_of(row: Row) -> list[str]:
    cells = [row.label]
    for gap in row.gaps:
        cells += [str(gap.largest), f"{gap.mean:.2f}" if gap.largest else "0"]
    return [*cells, *[""] * (5 - len(cells)), row.note]


def report(
    kinds: dict[str, list[Pixels]], config: TrainConfig, device: torch.device, command: str
) -> str:
    """Measure, and format all tables and the environment as Markdown."""
    images = [image for some in kinds.values() for image in some]
    drawn = draw(images, config)
    counts = [params.top.numel() for params, _ in drawn]
    head = ["", "global: max", "mean", "local: max", "mean", ""]
    versions = [description(name, device) for name in BACKENDS if problem(name) is None]
    versions.append(f"torch {torch.__version__}")
    parts = [
        f"Measured by `{command}` with {'; '.join(versions)}: {len(images)} images, {counts[0]} "
        f"global crops of {drawn[0][1]} px, {counts[1]} local crops of {drawn[1][1]} px. Levels of "
        "0..255; the mean is over all pixels and channels.",
        "Whole crops against the paper's chain (the last two rows change one thing in that chain):",
        markdown(head, [cells_of(row) for row in whole_crops(images, drawn, device)]),
    ]
    if problem("dali") is None:
        rows = [decoding(images), *operators(images, drawn, device)]
        parts += [
            "DALI's operators one by one, each applied to every crop, on the same pixels as "
            "Pillow's (in parentheses: Pillow against Pillow):",
            markdown(head, [cells_of(row) for row in rows]),
            "Mean differences of global crops by the saturation of the images (HSV, 0..1), for "
            "whole crops and for hue only:",
            markdown(
                ["images", "saturation", "`dali`", "`dali` without hue", "hue", "(hue skipped)"],
                by_color(kinds, drawn[0], device),
            ),
        ]
    return "\n\n".join(parts)


def write(text: str, path: Path) -> None:
    """Replace the text between the two marks of a Markdown file; SystemExit if one is missing."""
    old = path.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{path}: expected the lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder (default: drawn scenes and one photograph)")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--write", type=Path, help="Markdown file with the two marks")
    options = parser.parse_args(arguments)
    files = pictures(options.pictures, options.images)
    kinds = {
        kind: [np.asarray(AS_STORED.decode(data)) for data in some] for kind, some in files.items()
    }
    command = command_line("crop_differences", arguments or sys.argv[1:])
    text = report(kinds, TrainConfig(), choose_device("auto"), command)
    print(text)
    if options.write:
        write(text, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
