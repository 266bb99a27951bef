"""`fastdino attention`: draw attention maps of images, or score them against masks.

--image_path writes the files of the paper's visualize_attention.py and a few more:

    img.png                     the image as the network's input
    attn-head<j>.png            the map of head j, one block of pixels per patch
    attn-mean.png, overlay.png  the mean over heads, alone and over the image
    mask_th<t>_head<j>.png      with --threshold t: the image inside the mask of head j
    heads.png                   image, maps and masks on one sheet
    attention.json              statistics of all images

Each image of a folder gets a subfolder of its own. (The paper rescales img.png to the full range;
here it is unchanged.) --data_path writes jaccard.json (attention_jaccard.py).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastdino.config import check_at_least, parse_bool, user_path
from fastdino.data.image_dataset import ImageDataset
from fastdino.errors import CheckpointError, ConfigError
from fastdino.evals.attention_figures import (
    draw_attention,
    map_picture,
    mask_picture,
    overlay_picture,
)
from fastdino.evals.attention_jaccard import THRESHOLD, measure
from fastdino.evals.attention_maps import (
    NO_CLS_ATTENTION,
    attention_maps,
    check_flags,
    head_statistics,
    keep_mass,
)
from fastdino.evals.options import (
    DEFAULT,
    add_conversion_flags,
    add_network_flags,
    conversion_of,
    load_vit,
    settings_of,
    warn_of_deep,
)
from fastdino.evals.picture_files import (
    SkippedImageError,
    find_images,
    raise_if_none,
    read_picture,
    writing,
)
from fastdino.evals.transforms import to_input
from fastdino.files import write_json
from fastdino.models.vit import VisionTransformer
from fastdino.runtime import choose_device
from fastdino.terminal import print_err, print_out


def draw_image(
    picture: Image.Image, maps: Tensor, folder: Path, *, threshold: float | None, title: str = ""
) -> list[str]:
    """Write the pictures of one image to a folder; return the file names.

    Args:
        picture: the network's input.
        maps: [H, h, w] of attention_maps, on the CPU.
        folder: created if missing.
        threshold: share of the mass that masks keep; None for no masks.
        title: of the sheet.
    """
    pixels, mean = np.asarray(picture), maps.mean(0)
    size = pixels.shape[:2]
    drawings = {
        "attn-mean.png": map_picture(mean, size),
        "overlay.png": overlay_picture(pixels, mean),
        **{f"attn-head{head}.png": map_picture(map_, size) for head, map_ in enumerate(maps)},
    }
    if threshold is not None:
        for head, mask in enumerate(keep_mass(maps, threshold)):
            name = f"mask_th{threshold:g}_head{head}.png"
            drawings[name] = mask_picture(pixels, mask, 1 + head)
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / "img.png")
    for name, drawing in drawings.items():
        Image.fromarray(drawing).save(folder / name)
    sheet = folder / "heads.png"
    draw_attention([picture], maps[None], sheet, threshold=threshold, title=title)
    return ["img.png", *drawings, sheet.name]


def draw_images(args: argparse.Namespace, device: torch.device) -> int:
    """Draw the images of --image_path and write attention.json; return the number of images.

    An image that cannot be drawn is skipped. attention.json lists all that are drawn, also if a
    later one ends the command.
    """
    images, folders = find_images(args.image_path)
    model, arch = load_vit(args, device, reason=NO_CLS_ATTENTION)
    images = replace(images, conversion=conversion_of(args))
    warn_of_deep(args, images.deep, len(images))
    result: dict[str, Any] = {
        "settings": settings_of(args, model, "image_size", "threshold")
        | {"arch": arch, "patch_size": model.patch_size},
        "images": [],
        "skipped": images.skipped,
    }
    path = Path(args.output_dir) / "attention.json"
    bar = tqdm(folders, unit="image", disable=len(images) < 2 or not sys.stderr.isatty())
    try:
        for index, folder in enumerate(bar):
            try:
                result["images"].append(_draw(args, images, index, folder, model, arch))
            except SkippedImageError as error:
                images.skipped[images.path(index)] = str(error)
    except BaseException:
        if result["images"]:
            with contextlib.suppress(CheckpointError):
                write_json(result, path)
        raise
    raise_if_none(len(result["images"]), images.skipped)
    for name, reason in images.skipped.items():
        print_err(f"skipped: {name} {reason}")
    write_json(result, path)
    return len(result["images"])


def _draw(
    args: argparse.Namespace,
    images: ImageDataset,
    index: int,
    folder: str,
    model: VisionTransformer,
    arch: str,
) -> dict[str, Any]:
    """Draw an image into a folder below --output_dir; return its entry in attention.json.

    Raises: SkippedImageError: it cannot be read, or its name gives no folder. CheckpointError.
    """
    path, target = images.path(index), Path(args.output_dir) / folder
    picture = read_picture(images, index, args.image_size, model.patch_size)
    maps = attention_maps(model, to_input(picture)[None].to(model.pos_embed.device))[0].cpu()
    title = f"{Path(path).name}: CLS attention in the last block of {arch}"
    with writing(target):
        files = draw_image(picture, maps, target, threshold=args.threshold, title=title)
    return {
        "image": path,
        "size": [picture.height, picture.width],
        "grid": list(maps.shape[1:]),
        "heads": head_statistics(maps, args.threshold),
        "files": [str(Path(folder) / file) for file in files],
    }


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino attention`: those of visualize_attention.py, and our own."""
    add_network_flags(parser, "architecture: a vit_*", default=("vit_small", 8))
    add_conversion_flags(parser)
    add = parser.add_argument
    about = "resize images to this height and width, or shorter side (default: 480 480)"
    add("--image_size", type=int, nargs="+", default=[480, 480], metavar="PX", help=about)
    about = "output folder (default: the current folder)"
    add("--output_dir", type=user_path, default=".", help=about)
    about = f"share of a map's mass that masks keep (default: no masks; {THRESHOLD} for scores)"
    add("--threshold", type=float, help=about)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--image_path", type=user_path, help="image to draw, or folder of images")
    about = (
        "dataset with masks to score against: a PASCAL VOC folder (JPEGImages/, SegmentationClass/ "
        "or SegmentationObject/, ImageSets/Segmentation/), or a folder written by `fastdino shapes`"
    )
    inputs.add_argument("--data_path", type=user_path, help=about)
    add = parser.add_argument_group("scores (--data_path)").add_argument
    add("--split", default="val", help=f"split to score {DEFAULT}")
    about = f"also score random weights {DEFAULT}"
    add("--baseline", type=parse_bool, default=True, metavar="BOOL", help=about)
    add("--batch_size_per_gpu", type=int, default=8, help=f"images per forward pass {DEFAULT}")
    add("--num_workers", type=int, default=4, help=f"maximum data loading workers {DEFAULT}")


def main(args: argparse.Namespace) -> int:
    """Run `fastdino attention`."""
    check_flags(args, "image_size")
    check_at_least(args, 0, "num_workers")
    device = choose_device(args.device)
    root = Path(args.output_dir)
    if args.data_path is None:
        count = draw_images(args, device)
        print_out(f"{root}: pictures of {count} image(s), and attention.json")
        return 0
    if args.exif_orientation:
        raise ConfigError(
            "--exif_orientation true is for --image_path: masks belong to the stored pixels"
        )
    args.exif_orientation = False
    result = measure(args, device)
    write_json(result, root / "jaccard.json")
    for name in ("trained", "untrained"):
        if name in result:
            print_out(
                f"Jaccard of the best head, {name} network: {result[name]['best_head']:.1f} %"
            )
    print_out(
        f"{result['images']} images of {args.data_path}; heads and images in {root}/jaccard.json"
    )
    return 0
