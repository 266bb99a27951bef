"""`fastdino crops`: a picture of one photo's crops by each executor, and of how they differ."""

from __future__ import annotations

import argparse
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from fastdino.augmentation.backends import (
    BACKENDS,
    REFERENCE,
    Difference,
    description,
    difference,
    levels,
    make_crops,
    problem,
)
from fastdino.augmentation.params import Crop, draw_crops
from fastdino.config import TrainConfig, add_arguments
from fastdino.data.image_files import decode_rgb, quiet_pillow, read_file, reason_of
from fastdino.data.shapes_drawing import still, to_image
from fastdino.errors import ConfigError, DataError
from fastdino.runtime import choose_device

# The settings of `fastdino train` that say what the crops are.
SETTINGS = (
    "seed", "global_crops_size", "local_crops_size", "local_crops_number", "global_crops_scale",
    "local_crops_scale", "exif_orientation", "device",
)  # fmt: skip
# A figure of more columns, or larger crops, is beyond what can be drawn and looked at.
MOST_CROPS, LARGEST_CROP = 64, 4096
AMPLIFY = 8
SHOWN = 900  # px: the photo's longer side in the figure
# Inches: a column, the photo's height, the least width, for the words; dots an inch.
CELL, PHOTO, WIDTH, DPI = 1.2, 3.0, 11.0, 110

_Pixels = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True)
class Sheet:
    """The crops of one picture, by executor, the oracle first.

    drawn: the 2 + N crops, global ones first.
    crops: name -> their pixels [size, size, 3].
    differences: name, but the oracle's -> how far each crop is from the oracle's.
    overall: name, but the oracle's -> the same over all crops.
    absent: executors that were asked for and are not here -> the reason.
    """

    picture: Image.Image
    drawn: list[Crop]
    crops: dict[str, list[_Pixels]]
    differences: dict[str, list[Difference]]
    overall: dict[str, Difference]
    absent: dict[str, str]


def make_sheet(
    picture: Image.Image,
    config: TrainConfig,
    *,
    epoch: int = 0,
    executors: Sequence[str] = BACKENDS,
    device: torch.device | None = None,
) -> Sheet:
    """Makes the crops that picture 0 of a run has in this epoch, by each executor that is here.

    Args:
        picture: RGB.
        config: of it the seed, and the crops' sizes, scales and number are read.
        epoch: from 0.
        executors: some of BACKENDS; the oracle is always one of them.
        device: for multi_crop and dali.
    Raises: ConfigError: an executor that there is not, crops that no figure can show.
    """
    _check(config, epoch, executors)
    device = device or torch.device("cpu")
    image = np.asarray(picture)
    drawn = draw_crops(config, epoch, [0], [image.shape[:2]])
    pairs = list(zip(drawn, (config.global_crops_size, config.local_crops_size), strict=True))
    absent = {name: reason for name in executors if (reason := problem(name))}
    here = [name for name in BACKENDS if name == REFERENCE or name in {*executors} - absent.keys()]
    # name -> 2 + N crops [3, size, size]
    made = {
        name: [crop for crops in make_crops(name, [image], pairs, device) for crop in crops[0]]
        for name in here
    }
    oracle = made[REFERENCE]
    others = {name: crops for name, crops in made.items() if name != REFERENCE}
    return Sheet(
        picture=picture,
        drawn=[crop for params in drawn for crop in params.of_sample(0)],
        crops={
            name: [levels(crop).permute(1, 2, 0).numpy() for crop in crops]
            for name, crops in made.items()
        },
        differences={
            name: [difference([a], [b]) for a, b in zip(crops, oracle, strict=True)]
            for name, crops in others.items()
        },
        overall={name: difference(crops, oracle) for name, crops in others.items()},
        absent=absent,
    )


def _check(config: TrainConfig, epoch: int, executors: Sequence[str]) -> None:
    for name in executors:
        if name not in BACKENDS:
            allowed = ", ".join(BACKENDS)
            raise ConfigError(f"--executors must be some of {allowed}, got {name!r}")
    if not 0 <= epoch < 1 << 32:
        raise ConfigError(f"--epoch must be from 0 to 2^32 - 1, got {epoch}")
    if config.ncrops > MOST_CROPS:
        raise ConfigError(
            f"--local_crops_number must be at most {MOST_CROPS - 2} for a figure, "
            f"got {config.local_crops_number}"
        )
    for name in ("global_crops_size", "local_crops_size"):
        size = getattr(config, name)
        if size > LARGEST_CROP:
            raise ConfigError(f"--{name} must be at most {LARGEST_CROP}, got {size}")


def sheet_figure(sheet: Sheet, *, words: str = "", amplify: int = AMPLIFY) -> Figure:
    """A row an executor, a row a difference, a column a crop; above, the picture and its boxes.

    Args:
        sheet: of make_sheet.
        words: lines beside the picture.
        amplify: what the shown differences are multiplied with.
    """
    columns, others = len(sheet.drawn), list(sheet.differences)
    count = len(sheet.crops) + len(others)
    height = PHOTO + CELL * count + 0.2 * (len(others) + 3)
    size = (max(WIDTH, CELL * columns + 1.5), height)
    figure = Figure(figsize=size, layout="constrained")
    halves = figure.subfigures(2, 1, squeeze=False, height_ratios=[PHOTO, height - PHOTO])
    top, bottom = halves[:, 0]
    colours = [colormaps["tab10"](n % 10) for n in range(columns)]
    _draw_picture(top, sheet, colours, words)
    axes = bottom.subplots(count, columns, squeeze=False)
    for row, (name, crops) in enumerate(sheet.crops.items()):
        _draw_row(axes[row], f"{name}\n(reference)" if name == REFERENCE else name, crops)
    for n, (axis, crop, pixels) in enumerate(
        zip(axes[0], sheet.drawn, sheet.crops[REFERENCE], strict=True)
    ):
        kind = "global" if n < 2 else "local"
        text = f"{n}: {kind}, {len(pixels)} px\n{_what_happens(crop)}"
        axis.set_title(text, fontsize=6.5, color=[0.75 * c for c in colours[n][:3]])
    for row, name in enumerate(others, start=len(sheet.crops)):
        gaps = _gaps(sheet.crops[name], sheet.crops[REFERENCE], amplify)
        _draw_row(axes[row], f"|{name} -\n{REFERENCE}|\nx {amplify}", gaps)
        for axis, gap in zip(axes[row], sheet.differences[name], strict=True):
            axis.set_title(str(gap), fontsize=6.5)
    return figure


def save_figure(figure: Figure, path: Path, *, palette: bool = False) -> None:
    """Writes a PNG; palette: of 256 colours, which takes a quarter of the bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    with Image.open(file) as drawn:
        picture = drawn.convert("RGB")
    if palette:
        picture = picture.quantize(256, kmeans=3)
    picture.save(path, "PNG", optimize=True)


def _gaps(crops: Sequence[_Pixels], oracle: Sequence[_Pixels], amplify: int) -> list[_Pixels]:
    """Absolute differences, amplified."""
    pairs = zip(crops, oracle, strict=True)
    gaps = [np.abs(ours.astype(int) - theirs.astype(int)) for ours, theirs in pairs]
    return [np.minimum(amplify * gap, 255).astype(np.uint8) for gap in gaps]


def _draw_picture(figure: Any, sheet: Sheet, colours: Sequence[Any], words: str) -> None:
    width, height = sheet.picture.size
    axis, beside = figure.subplots(1, 2, width_ratios=[1, 1])
    shown = sheet.picture.copy()
    shown.thumbnail((SHOWN, SHOWN))
    axis.imshow(shown, extent=(0, width, height, 0))
    for crop, colour in zip(sheet.drawn, colours, strict=True):
        for line, paint in ((2.6, "white"), (1.6, colour)):
            box = (crop.left, crop.top), crop.width, crop.height
            axis.add_patch(Rectangle(*box, fill=False, color=paint, linewidth=line))
    for n, place in enumerate(_number_places(sheet.drawn)):
        label = {"facecolor": colours[n], "edgecolor": "white", "linewidth": 0.5, "pad": 1.2}
        axis.text(*place, str(n), fontsize=7, color="white", ha="center", va="center", bbox=label)
    beside.text(0, 1, words, fontsize=8, va="top", transform=beside.transAxes)
    axis.set_axis_off()
    beside.set_axis_off()


def _number_places(drawn: Sequence[Crop]) -> list[tuple[int, int]]:
    """Of each box the corner (x, y) that is furthest from those taken before it."""
    places: list[tuple[int, int]] = []
    for crop in drawn:
        corners = [
            (x, y)
            for y in (crop.top, crop.top + crop.height)
            for x in (crop.left, crop.left + crop.width)
        ]
        places.append(
            max(corners, key=lambda corner: min([math.dist(corner, p) for p in places] or [0]))
        )
    return places


def _draw_row(axes: Sequence[Any], label: str, pictures: Sequence[_Pixels]) -> None:
    for axis, picture in zip(axes, pictures, strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
    axes[0].text(
        -0.08, 0.5, label, fontsize=7.5, ha="right", va="center", transform=axes[0].transAxes
    )


def _what_happens(crop: Crop) -> str:
    """The operations of a crop in their order, on at most three lines."""
    words = ["flip"] * crop.flip
    if crop.jitter:
        words.append(f"jitter (hue {360 * crop.jitter_factor[3]:+.0f}\N{DEGREE SIGN})")
    words += ["gray"] * crop.gray
    if crop.blur_radius > 0:
        words.append(f"blur {crop.blur_radius:.1f}")
    words += ["solarize"] * crop.solarize
    return textwrap.fill(", ".join(words) or "crop alone", width=24)


def summary(sheet: Sheet, device: torch.device) -> str:
    """Lines that say who made the crops, and how far they are from the oracle's."""
    lines = [
        f"Differences from {REFERENCE} ({description(REFERENCE, device)}),",
        "in levels of 0..255, over all crops:",
    ]
    for name, overall in sheet.overall.items():
        gap = "0, bit for bit" if overall.exact else str(overall)
        lines.append(f"  {name}: {gap} ({description(name, device)})")
    lines += [f"  {name} is left out: {reason}" for name, reason in sheet.absent.items()]
    return "\n".join(lines)


def default_picture() -> Image.Image:
    """A drawn scene of vivid colours, 480 x 480: free of licences, and the same everywhere."""
    canvas, _ = still("heart", 480, np.random.default_rng(5))
    return to_image(canvas)


def read_picture(path: str, *, exif: bool = False) -> Image.Image:
    """The photo as the loaders decode it; raises DataError for what is none."""
    try:
        with quiet_pillow():
            return decode_rgb(read_file(path), exif=exif)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds on broken files.
        raise DataError(f"--image {path} {reason_of(error)}") from error


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino crops`."""
    add = parser.add_argument
    add("--image", help="a photo (default: a drawn scene)")
    add("--output", default="crops.png", help="the PNG to write (default: crops.png)")
    add(
        "--executors",
        nargs="+",
        default=BACKENDS,
        metavar="NAME",
        help=f"crop backends to compare with {REFERENCE}, the paper's chain (default: "
        f"{' '.join(BACKENDS)}). multi_crop uses the Triton kernel if Triton runs, "
        "TRITON_INTERPRET=1 included, else PyTorch",
    )
    add("--epoch", type=int, default=0, help="whose crops (default: 0)")
    add("--amplify", type=int, default=AMPLIFY, help=f"of the differences (default: {AMPLIFY})")
    add("--palette", action="store_true", help="a PNG of 256 colours, a quarter of the size")
    add_arguments(parser, SETTINGS)


def main(args: argparse.Namespace) -> int:
    """Makes the crops, writes the picture, and prints the differences."""
    # No network is made: a crop may be smaller than a patch.
    config = TrainConfig(patch_size=1, **{name: getattr(args, name) for name in SETTINGS})
    path = Path(args.output)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--output must end in .png, got {args.output!r}")
    if args.amplify < 1:
        raise ConfigError(f"--amplify must be at least 1, got {args.amplify}")
    if args.image:
        picture = read_picture(args.image, exif=config.exif_orientation)
    else:
        picture = default_picture()
    device = choose_device(config.device)
    sheet = make_sheet(picture, config, epoch=args.epoch, executors=args.executors, device=device)
    what = Path(args.image).name if args.image else "a drawn scene"
    title = (
        f"{config.ncrops} crops of {what} ({picture.width} x {picture.height}), "
        f"seed {config.seed}, epoch {args.epoch}"
    )
    found = summary(sheet, device)
    lines = [title, "", *found.split("\n"), ""]
    lines.append(f"The lowest rows show them times {args.amplify}; black is 0.")
    words = "\n".join(textwrap.fill(line, 80, subsequent_indent="    ") for line in lines)
    figure = sheet_figure(sheet, words=words, amplify=args.amplify)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path, palette=args.palette)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output {path} cannot be written: {reason}") from error
    print(f"{path}: {title}\n{found}")
    return 0
