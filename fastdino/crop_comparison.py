"""`fastdino crops`: a figure of one image's crops by each backend, and of their differences."""

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
from fastdino.config import TrainConfig, add_arguments, user_path
from fastdino.data.image_files import (
    Conversion,
    count_deep,
    explained_reading,
    quiet_pillow,
    read_file,
    read_header,
)
from fastdino.data.rgb_conversion import deep_warning
from fastdino.data.shapes_drawing import to_image
from fastdino.data.shapes_stills import still
from fastdino.errors import ConfigError
from fastdino.evals.attention_figures import drawable
from fastdino.runtime import choose_device
from fastdino.terminal import print_err, print_out

# The settings of `fastdino train` that determine the crops.
SETTINGS = (
    "seed", "global_crops_size", "local_crops_size", "local_crops_number", "global_crops_scale",
    "local_crops_scale", "exif_orientation", "image_range", "device",
)  # fmt: skip
# More columns or larger crops would not be legible.
MOST_CROPS, LARGEST_CROP = 64, 4096
AMPLIFY = 8
SHOWN = 900  # px: longer side of the image in the figure
# Inches: width of a column, height of the image, least width of the figure; dots per inch.
CELL, PHOTO, WIDTH, DPI = 1.2, 3.0, 11.0, 110

_Pixels = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True)
class Comparison:
    """The crops of one image by backend, the reference first.

    drawn: parameters of the 2 + N crops, global ones first.
    crops: backend -> pixels of each crop, [size, size, 3].
    differences: backend, without the reference -> difference of each crop from the reference.
    overall: backend, without the reference -> difference over all crops.
    unavailable: requested backends that cannot run here -> the reason.
    """

    picture: Image.Image
    drawn: list[Crop]
    crops: dict[str, list[_Pixels]]
    differences: dict[str, list[Difference]]
    overall: dict[str, Difference]
    unavailable: dict[str, str]


def compare_crops(
    picture: Image.Image,
    config: TrainConfig,
    *,
    epoch: int = 0,
    backends: Sequence[str] = BACKENDS,
    device: torch.device | None = None,
) -> Comparison:
    """Make the crops of sample 0 of an epoch with each available backend.

    Args:
        picture: an RGB image.
        config: provides the seed and the crops' sizes, scales and number.
        epoch: from 0.
        backends: some of BACKENDS; the reference is always added.
        device: for multi_crop and dali.

    Raises:
        ConfigError: an unknown backend, or crops that do not fit a figure.
    """
    _check(config, epoch, backends)
    device = device or torch.device("cpu")
    image = np.asarray(picture)
    drawn = draw_crops(config, epoch, [0], [image.shape[:2]])
    pairs = list(zip(drawn, (config.global_crops_size, config.local_crops_size), strict=True))
    unavailable = {name: reason for name in backends if (reason := problem(name))}
    available = {REFERENCE, *backends} - unavailable.keys()
    # backend -> 2 + N crops [3, size, size]
    made = {
        name: [crop for crops in make_crops(name, [image], pairs, device) for crop in crops[0]]
        for name in BACKENDS
        if name in available
    }
    reference = made[REFERENCE]
    others = {name: crops for name, crops in made.items() if name != REFERENCE}
    return Comparison(
        picture=picture,
        drawn=[crop for params in drawn for crop in params.of_sample(0)],
        crops={
            name: [levels(crop).permute(1, 2, 0).numpy() for crop in crops]
            for name, crops in made.items()
        },
        differences={
            name: [difference([a], [b]) for a, b in zip(crops, reference, strict=True)]
            for name, crops in others.items()
        },
        overall={name: difference(crops, reference) for name, crops in others.items()},
        unavailable=unavailable,
    )


def _check(config: TrainConfig, epoch: int, backends: Sequence[str]) -> None:
    for name in backends:
        if name not in BACKENDS:
            allowed = ", ".join(BACKENDS)
            raise ConfigError(f"--executors must be some of {allowed}, got {name!r}")
    if not 0 <= epoch < 1 << 32:
        raise ConfigError(f"--epoch must be from 0 to 2^32 - 1, got {epoch}")
    limits = {"local_crops_number": MOST_CROPS - 2}
    limits |= dict.fromkeys(("global_crops_size", "local_crops_size"), LARGEST_CROP)
    for name, most in limits.items():
        value = getattr(config, name)
        if value > most:
            raise ConfigError(f"--{name} must be at most {most} for a figure, got {value}")


def comparison_figure(comparison: Comparison, *, words: str = "", amplify: int = AMPLIFY) -> Figure:
    """Draw the image with its boxes, then one row per backend and one per difference.

    Args:
        words: lines next to the image.
        amplify: factor of the shown differences.
    """
    drawn, crops, others = comparison.drawn, comparison.crops, list(comparison.differences)
    columns, count = len(drawn), len(crops) + len(others)
    height = PHOTO + CELL * count + 0.2 * (len(others) + 3)
    size = (max(WIDTH, CELL * columns + 1.5), height)
    figure = Figure(figsize=size, layout="constrained")
    halves = figure.subfigures(2, 1, squeeze=False, height_ratios=[PHOTO, height - PHOTO])
    top, bottom = halves[:, 0]
    colors = [colormaps["tab10"](n % 10) for n in range(columns)]
    _draw_picture(top, comparison, colors, words)
    axes = bottom.subplots(count, columns, squeeze=False)
    for row, (name, pixels) in enumerate(crops.items()):
        _draw_row(axes[row], f"{name}\n(reference)" if name == REFERENCE else name, pixels)
    for n, (axis, crop, shown) in enumerate(zip(axes[0], drawn, crops[REFERENCE], strict=True)):
        kind = "global" if n < 2 else "local"
        text = f"{n}: {kind}, {len(shown)} px\n{_operations(crop)}"
        axis.set_title(text, fontsize=6.5, color=[0.75 * c for c in colors[n][:3]])
    for row, name in enumerate(others, start=len(crops)):
        pairs = zip(crops[name], crops[REFERENCE], strict=True)
        gaps = [np.abs(a.astype(int) - b) * amplify for a, b in pairs]
        shown_gaps = [np.minimum(gap, 255).astype(np.uint8) for gap in gaps]
        _draw_row(axes[row], f"|{name} -\n{REFERENCE}|\nx {amplify}", shown_gaps)
        for axis, gap in zip(axes[row], comparison.differences[name], strict=True):
            axis.set_title(str(gap), fontsize=6.5)
    return figure


def save_figure(figure: Figure, path: Path, *, palette: bool = False) -> None:
    """Write a PNG; palette: with 256 colors, a quarter of the file size."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    with Image.open(file) as drawn:
        picture = drawn.convert("RGB")
    if palette:
        picture = picture.quantize(256, kmeans=3)
    picture.save(path, "PNG", optimize=True)


def _draw_picture(figure: Any, comparison: Comparison, colors: Sequence[Any], words: str) -> None:
    width, height = comparison.picture.size
    axis, text_axis = figure.subplots(1, 2, width_ratios=[1, 1])
    shown = comparison.picture.copy()
    shown.thumbnail((SHOWN, SHOWN))
    axis.imshow(shown, extent=(0, width, height, 0))
    for crop, color in zip(comparison.drawn, colors, strict=True):
        box = (crop.left, crop.top), crop.width, crop.height
        for line, paint in ((2.6, "white"), (1.6, color)):
            axis.add_patch(Rectangle(*box, fill=False, color=paint, linewidth=line))
    for n, place in enumerate(_number_places(comparison.drawn)):
        label = {"facecolor": colors[n], "edgecolor": "white", "linewidth": 0.5, "pad": 1.2}
        axis.text(*place, str(n), fontsize=7, color="white", ha="center", va="center", bbox=label)
    options = {"fontsize": 8, "va": "top", "parse_math": False}  # file names may contain $
    text_axis.text(0, 1, words, transform=text_axis.transAxes, **options)
    axis.set_axis_off()
    text_axis.set_axis_off()


def _number_places(drawn: Sequence[Crop]) -> list[tuple[int, int]]:
    """Choose for each box the corner (x, y) that is furthest from those chosen before."""
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


def _operations(crop: Crop) -> str:
    """List the operations of a crop in order, on at most three lines."""
    words = ["flip"] * crop.flip
    if crop.jitter:
        words.append(f"jitter (hue {360 * crop.jitter_factor[3]:+.0f}\N{DEGREE SIGN})")
    words += ["gray"] * crop.gray
    if crop.blur_radius > 0:
        words.append(f"blur {crop.blur_radius:.1f}")
    words += ["solarize"] * crop.solarize
    return textwrap.fill(", ".join(words) or "crop only", width=24)


def summary(comparison: Comparison, device: torch.device) -> str:
    """Describe the backends and their differences from the reference, one per line."""
    lines = [
        f"Differences from {REFERENCE} ({description(REFERENCE, device)}),",
        "in levels of 0..255, over all crops:",
    ]
    for name, overall in comparison.overall.items():
        gap = "0, bit for bit" if overall.exact else str(overall)
        lines.append(f"  {name}: {gap} ({description(name, device)})")
    lines += [f"  {name} is left out: {why}" for name, why in comparison.unavailable.items()]
    return "\n".join(lines)


def default_picture() -> Image.Image:
    """Draw a scene in vivid colors, 480 x 480, free of licenses and always the same."""
    canvas, _ = still("heart", 480, np.random.default_rng(5), seed=0)
    return to_image(canvas)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino crops`."""
    add = parser.add_argument
    add("--image", type=user_path, help="an image file (default: a drawn scene)")
    add(
        "--output",
        type=user_path,
        default="crops.png",
        help="the PNG to write (default: crops.png)",
    )
    add(
        "--executors",
        nargs="+",
        default=BACKENDS,
        metavar="NAME",
        help=f"crop backends to compare with {REFERENCE}, the paper's chain (default: "
        f"{' '.join(BACKENDS)}). multi_crop uses the Triton kernel if Triton runs, "
        "TRITON_INTERPRET=1 included, else PyTorch",
    )
    add("--epoch", type=int, default=0, help="epoch of the crops (default: 0)")
    add("--amplify", type=int, default=AMPLIFY, help=f"difference factor (default: {AMPLIFY})")
    add("--palette", action="store_true", help="a PNG with 256 colors, a quarter of the size")
    add_arguments(parser, SETTINGS)


def main(args: argparse.Namespace) -> int:
    """Make the crops, write the figure, and print the differences."""
    # There is no network, so a crop may be smaller than a patch.
    config = TrainConfig(patch_size=1, **{name: getattr(args, name) for name in SETTINGS})
    path = Path(args.output)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--output must end in .png, got {args.output!r}")
    if args.amplify < 1:
        raise ConfigError(f"--amplify must be at least 1, got {args.amplify}")
    picture, name = default_picture(), "a drawn scene"
    if args.image:
        conversion = Conversion(config.exif_orientation, config.image_range)
        with quiet_pillow(), explained_reading(f"--image {args.image}"):
            picture = conversion.decode(read_file(args.image))
        deep = count_deep([read_header(args.image)])
        if warning := deep_warning(deep, 1, config.image_range):
            print_err(f"warning: {warning}")
        name = drawable(Path(args.image).name)
    device = choose_device(config.device)
    comparison = compare_crops(
        picture, config, epoch=args.epoch, backends=args.executors, device=device
    )
    title = (
        f"{config.ncrops} crops of {name} ({picture.width} x {picture.height}), "
        f"seed {config.seed}, epoch {args.epoch}"
    )
    text = summary(comparison, device)
    lines = [title, "", *text.split("\n"), ""]
    lines.append(f"The lowest rows show the differences times {args.amplify}; black is 0.")
    words = "\n".join(textwrap.fill(line, 80, subsequent_indent="    ") for line in lines)
    figure = comparison_figure(comparison, words=words, amplify=args.amplify)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path, palette=args.palette)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output {path} cannot be written: {reason}") from error
    print_out(f"{path}: {title}", *text.split("\n"))
    return 0
