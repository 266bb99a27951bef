"""Measures how far each executor's crops are from the paper's PIL chain, for the same draws.

    python -m benchmarks.crop_differences [--images FOLDER] [--pictures 24] [--write docs/crops.md]

First whole crops. Then DALI's operators one by one, each done to every crop: it and PIL get the
same pixels, the crops of the drawn boxes as PIL resizes them. Differences are in levels of 0..255.
With TRITON_INTERPRET=1 the kernel multi_crop takes part on a CPU: 2.5 s a crop, so of few pictures.

Legend: B pictures, N crops of one resolution; M = B N pieces, a box of a picture each.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
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
    problem,
)
from fastdino.augmentation.params import BLUR_RADIUS, CropParams
from fastdino.augmentation.pillow import make_crop
from fastdino.data import draw_crops
from fastdino.data.image_files import decode_rgb
from fastdino.runtime import choose_device

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HUE = 3  # in the numbering of CropParams.jitter_order
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # the factors that change nothing
INTERPRETED = 3  # pictures for Triton's interpreter
FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("JPEG", {"quality": 75, "subsampling": "4:2:0"}),
    ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ("JPEG", {"quality": 85, "progressive": True}),
    ("PNG", {}),
)

Order = Callable[[list[int]], list[int]]  # from the drawn order of the jitter to another
Pixels = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True)
class Row:
    """A line of a table: of the global crops and the local ones, or of whole pictures."""

    what: str
    gaps: Sequence[Difference]
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """Operations done to every crop; of the jitter those in `kept`, in PIL in this order."""

    what: str
    kept: tuple[int, ...] = ()
    order: Order = sorted
    flip: bool = False
    gray: bool = False
    blur: bool = False
    solarize: bool = False
    note: str = ""

    def params(self, drawn: CropParams) -> CropParams:
        """The drawn boxes with these operations alone, of the drawn factors."""
        kept = torch.tensor([operation in self.kept for operation in range(4)])
        radii = torch.linspace(*BLUR_RADIUS, drawn.top.numel()).view_as(drawn.blur_radius)
        return dataclasses.replace(
            drawn,
            flip=torch.full_like(drawn.flip, self.flip),
            jitter=torch.full_like(drawn.jitter, bool(self.kept)),
            jitter_factor=torch.where(kept, drawn.jitter_factor, torch.tensor(NEUTRAL)),
            gray=torch.full_like(drawn.gray, self.gray),
            blur_radius=radii if self.blur else torch.zeros_like(radii),
            solarize=torch.full_like(drawn.solarize, self.solarize),
        )

    def pils_order(self, drawn: list[int]) -> list[int]:
        """What PIL does of the jitter: its turn of the hue by 0 would be lossy."""
        return self.order([operation for operation in drawn if operation in self.kept])


ALL = (0, 1, 2, HUE)
PLAIN = Stage("crop, bicubic resize", note="PIL rounds between its two passes")
HUE_ALONE = Stage("hue", (HUE,), note="turns in YIQ, PIL in HSV")
IN_DALIS_ORDER = Stage("all four; PIL in DALI's order", ALL)
IN_DRAWN_ORDER = Stage("all four; PIL in the drawn order", ALL, order=list)
STAGES = (
    Stage("flip", flip=True),
    Stage("brightness", (0,), note="rounds, PIL truncates"),
    Stage("contrast", (1,), note="rounds, PIL truncates, but for the mean"),
    Stage("saturation", (2,), note="rounds, PIL truncates"),
    HUE_ALONE,
    Stage("these but hue; PIL in DALI's order", (0, 1, 2), note="does not clip in between"),
    IN_DALIS_ORDER,
    IN_DRAWN_ORDER,
    Stage("gray", gray=True, note="is saturation 0"),
    Stage(
        "blur, radius .1 to 2",
        blur=True,
        note="a true Gaussian, edges reflected",
    ),
    Stage("solarize", solarize=True),
)


@dataclass(frozen=True)
class Pieces:
    """The drawn boxes of all pictures as PIL resizes them: M pictures, with what was drawn.

    pixels: M arrays [size, size, 3]. params: [M, 1], their boxes the whole of these.
    """

    pixels: list[Pixels]
    params: CropParams
    size: int

    @classmethod
    def of(cls, images: Sequence[Pixels], params: CropParams, size: int) -> Pieces:
        made = levels(by_pil(images, PLAIN.params(params), size)).flatten(0, 1)
        values = {
            field.name: getattr(params, field.name).flatten(0, 1)[:, None]
            for field in dataclasses.fields(params)
        }
        for name, value in (("top", 0), ("left", 0), ("height", size), ("width", size)):
            values[name] = torch.full_like(values[name], value)
        return cls([*made.permute(0, 2, 3, 1).numpy()], CropParams(**values), size)

    def by_pil(self, stage: Stage) -> Tensor:
        """[M, 1, 3, size, size], normalised."""
        return by_pil(self.pixels, stage.params(self.params), self.size, stage.pils_order)

    def by_dali(self, stage: Stage, device: torch.device) -> Tensor:
        """[M, 1, 3, size, size], normalised."""
        drawn = stage.params(self.params), self.size
        return make_crops("dali", self.pixels, [drawn], device)[0]


def by_pil(images: Sequence[Pixels], params: CropParams, size: int, order: Order = list) -> Tensor:
    """[B, N, 3, size, size], normalised: the paper's chain with another order of its jitter."""
    made = [
        make_crop(
            Image.fromarray(image), crop._replace(jitter_order=order(crop.jitter_order)), size
        )
        for b, image in enumerate(images)
        for crop in params.of_sample(b)
    ]
    return torch.stack(made).view(*params.top.shape, 3, size, size)


def whole_crops(
    images: Sequence[Pixels], drawn: Sequence[Drawn], device: torch.device
) -> list[Row]:
    """Every executor that is here, and the paper's chain with one change."""
    oracle = [by_pil(images, *pair) for pair in drawn]

    def row(what: str, crops: Sequence[Tensor]) -> Row:
        gaps = [difference([a], [b[: len(a)]]) for a, b in zip(crops, oracle, strict=True)]
        return Row(what, gaps, "bit for bit" if all(gap.exact for gap in gaps) else "")

    def make(name: str, pairs: Sequence[Drawn], impl: str | None = None) -> list[Tensor]:
        return make_crops(name, images[: len(pairs[0][0].top)], pairs, device, impl=impl)

    rows = []
    if problem("fused") is None:
        rows.append(row("`fused`", make("fused", drawn)))
    rows.append(row("`multi_crop`, PyTorch", make("multi_crop", drawn, "torch")))
    if multi_crop_impl(device) == "triton":
        few = len(images) if device.type == "cuda" else INTERPRETED
        pairs = [(of_pictures(params, slice(few)), size) for params, size in drawn]
        count = sum(params.top.numel() for params, _ in pairs)
        rows.append(row(f"`multi_crop`, Triton, {count} crops", make("multi_crop", pairs)))
    if problem("dali") is None:
        rows.append(row("`dali`", make("dali", drawn)))
        pairs = [(unturned(params), size) for params, size in drawn]
        rows.append(row("`dali` with no hue", make("dali", pairs)))
    rows.append(row("PIL with no hue", [by_pil(images, *pair, without_hue) for pair in drawn]))
    rows.append(row("PIL in DALI's order", [by_pil(images, *pair, sorted) for pair in drawn]))
    return rows


def of_pictures(params: CropParams, pictures: slice) -> CropParams:
    """The crops of some of the pictures."""
    names = [field.name for field in dataclasses.fields(params)]
    return CropParams(**{name: getattr(params, name)[pictures] for name in names})


def without_hue(order: list[int]) -> list[int]:
    return [operation for operation in order if operation != HUE]


def unturned(params: CropParams) -> CropParams:
    """The same crops with hue factors of 0."""
    kept = torch.tensor([operation != HUE for operation in ALL])
    return dataclasses.replace(params, jitter_factor=params.jitter_factor * kept)


def operators(images: Sequence[Pixels], drawn: Sequence[Drawn], device: torch.device) -> list[Row]:
    """DALI's operators one by one, each after the same pixels as PIL's."""
    plain = [(PLAIN.params(params), size) for params, size in drawn]
    cropped = make_crops("dali", images, plain, device)
    gaps = [
        difference([crops], [by_pil(images, *pair)])
        for crops, pair in zip(cropped, plain, strict=True)
    ]
    rows = [Row(PLAIN.what, gaps, PLAIN.note)]
    pieces = [Pieces.of(images, *pair) for pair in drawn]
    for stage in STAGES:
        gaps = [difference([x.by_dali(stage, device)], [x.by_pil(stage)]) for x in pieces]
        rows.append(Row(stage.what, gaps, stage.note))
        if stage is HUE_ALONE:
            gaps = [difference([x.by_pil(PLAIN)], [x.by_pil(stage)]) for x in pieces]
            rows.append(Row("(hue left out)", gaps, "no turn against PIL's"))
        if stage is IN_DRAWN_ORDER:
            gaps = [difference([x.by_pil(IN_DALIS_ORDER)], [x.by_pil(stage)]) for x in pieces]
            rows.append(Row("(the order alone)", gaps, "PIL's in both orders"))
    pairs = [(x.by_dali(PLAIN, device), x.by_pil(PLAIN)) for x in pieces]
    most = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    gaps = [difference([ours], [theirs]) for ours, theirs in pairs]
    rows.append(Row("normalise", gaps, f"at most {most:.0e} apart once normalised"))
    return rows


def decoding(images: Sequence[Pixels]) -> Row:
    """DALI's decoder on the CPU against Pillow's, in several formats; of whole pictures."""
    from fastdino.data.dali_decoding import DaliDecoder

    decoder, gaps = DaliDecoder(len(FORMATS), 1), []
    for image in images:
        files = [encode(image, form, **options) for form, options in FORMATS]
        for file, ours in zip(files, decoder.decode(files), strict=True):
            assert isinstance(ours, np.ndarray)
            gaps.append(np.abs(ours.astype(int) - np.asarray(decode_rgb(file))).ravel())
    decoder.close()
    gap = np.concatenate(gaps)
    found = Difference(int(gap.max()), float(gap.mean()), not gap.any())
    return Row("decode, whole pictures", [found], "JPEG 4:2:0, 4:4:4, progressive; PNG")


def by_colour(
    kinds: dict[str, list[Pixels]], drawn: Drawn, device: torch.device
) -> list[list[str]]:
    """Cells a kind of pictures: how vivid they are, and mean differences of some of their crops.

    drawn: for the pictures of all kinds, one kind after the other.
    """
    cells, begin = [], 0
    for kind, images in kinds.items():
        params, size = of_pictures(drawn[0], slice(begin, begin + len(images))), drawn[1]
        begin += len(images)
        oracle = by_pil(images, params, size)
        pieces = Pieces.of(images, params, size)
        turned = pieces.by_pil(HUE_ALONE)
        hsv = [np.asarray(Image.fromarray(image).convert("HSV"))[..., 1] for image in images]
        pairs = (
            (make_crops("dali", images, [(params, size)], device), [oracle]),
            (make_crops("dali", images, [(unturned(params), size)], device), [oracle]),
            ([pieces.by_dali(HUE_ALONE, device)], [turned]),
            ([pieces.by_pil(PLAIN)], [turned]),
        )
        saturation = np.mean([values.mean() / 255 for values in hsv])
        means = [f"{difference(*pair).mean:.1f}" for pair in pairs]
        cells.append([kind, f"{saturation:.2f}", *means])
    return cells


def draw(images: Sequence[Pixels], config: TrainConfig) -> list[Drawn]:
    """The paper's crops of these pictures."""
    drawn = draw_crops(config, 0, range(len(images)), [image.shape[:2] for image in images])
    return list(zip(drawn, (config.global_crops_size, config.local_crops_size), strict=True))


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def cells_of(row: Row) -> list[str]:
    cells = [row.what]
    for gap in row.gaps:
        cells += [str(gap.largest), f"{gap.mean:.2f}" if gap.largest else "0"]
    return [*cells, *[""] * (5 - len(cells)), row.note]


def report(
    kinds: dict[str, list[Pixels]], config: TrainConfig, device: torch.device, command: str
) -> str:
    """All tables as Markdown, with what they were measured on."""
    images = [image for some in kinds.values() for image in some]
    drawn = draw(images, config)
    counts = [params.top.numel() for params, _ in drawn]
    head = ["", "global: max", "mean", "local: max", "mean", ""]
    versions = [description(name, device) for name in BACKENDS if problem(name) is None]
    versions.append(f"torch {torch.__version__}")
    parts = [
        f"Measured by `{command}` with {'; '.join(versions)}: {len(images)} pictures, {counts[0]} "
        f"global crops of {drawn[0][1]} px, {counts[1]} local ones of {drawn[1][1]} px. Levels of "
        "0..255; the mean is over all pixels and channels.",
        "Whole crops, against the paper's chain (the last two rows: that chain with one change):",
        markdown(head, [cells_of(row) for row in whole_crops(images, drawn, device)]),
    ]
    if problem("dali") is None:
        rows = [decoding(images), *operators(images, drawn, device)]
        parts += [
            "DALI's operators one by one, each done to every crop, on the same pixels as PIL's (in "
            "parentheses: PIL against PIL):",
            markdown(head, [cells_of(row) for row in rows]),
            "Means for global crops, by how vivid the pictures are (HSV saturation, 0..1): "
            "of whole crops, and of the hue alone:",
            markdown(
                ["pictures", "saturation", "`dali`", "`dali` with no hue", "hue", "(hue left out)"],
                by_colour(kinds, drawn[0], device),
            ),
        ]
    return "\n\n".join(parts)


def write(text: str, path: Path) -> None:
    """Puts the text between the two marks of a Markdown file; SystemExit where they are not."""
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
    kinds = {kind: [np.asarray(decode_rgb(data)) for data in some] for kind, some in files.items()}
    words = ["python", "-m", "benchmarks.crop_differences", *(arguments or sys.argv[1:])]
    prefix = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    text = report(kinds, TrainConfig(), choose_device("auto"), prefix + shlex.join(words))
    print(text)
    if options.write:
        write(text, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
