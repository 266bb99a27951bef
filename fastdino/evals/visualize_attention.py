"""`fastdino attention`: pictures of what CLS attends to, for an image or a folder of them; on a set
with masks, how well these maps find the objects (attention_masks.py).

For each image it writes the names of the paper's visualize_attention.py, and a few more:

    img.png                     the image as the network saw it
    attn-head<j>.png            head j's map, a block a patch
    attn-mean.png, overlay.png  the mean of the heads, alone and over the image
    mask_th<t>_head<j>.png      with --threshold t: the image where head j's mask is
    heads.png                   all of it on one sheet

A folder's images have a folder each, named as they are. attention.json has it all in figures.
(The paper's img.png is stretched to its own least and largest value; ours is the image.)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastdino.config import check_at_least, parse_bool
from fastdino.data import scan_images
from fastdino.data.image_files import decode_rgb, quiet_pillow, read_file, reason_of
from fastdino.errors import DataError
from fastdino.evals.attention_figures import (
    draw_heads,
    map_picture,
    mask_picture,
    overlay_picture,
)
from fastdino.evals.attention_jaccard import measure
from fastdino.evals.attention_maps import (
    LACKS,
    attention_maps,
    check_size,
    check_threshold,
    fit,
    head_statistics,
    keep_mass,
)
from fastdino.evals.options import (
    add_network_flags,
    load_vit,
    settings_of,
)
from fastdino.evals.transforms import (
    to_input,
)
from fastdino.files import explain_write_errors, write_json
from fastdino.runtime import choose_device


@dataclass(frozen=True)
class _Images:
    """Images by number. names: where their pictures go, below --output_dir; "": in it."""

    paths: list[str]
    names: list[str]
    read: Callable[[int], Image.Image]
    skipped: dict[str, str]


def find_images(path: str) -> _Images:
    """An image file, or the images of a folder as pretraining finds them (tars too).

    Raises: DataError: there is nothing, or no image in the folder.
    """
    if os.path.isdir(path):
        # A bad file is left out and named; only a folder without any image is an error.
        source = scan_images(path, max_bad_share=1.0)
        paths = list(source.paths)
        names = [os.path.relpath(p, path) for p in paths]
        stems = [os.path.splitext(name)[0] for name in names]
        counts = Counter(stems)
        names = [s if counts[s] == 1 else n for s, n in zip(stems, names, strict=True)]
        return _Images(paths, names, source.read_rgb, dict(source.skipped))
    if not os.path.exists(path):
        raise DataError(f"--image_path: there is no file or folder {path}")
    return _Images([path], [""], lambda index: decode_rgb(read_file(path)), {})


def draw_image(
    picture: Image.Image, maps: Tensor, folder: Path, *, threshold: float | None, title: str = ""
) -> list[str]:
    """Writes the pictures of one image; returns their names.

    Args:
        picture: as the network saw it.
        maps: [H, h, w] of attention_maps, on the CPU.
        folder: where to; made where it is not there.
        threshold: the share of the mass that the masks keep; None: no masks.
        title: of the contact sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[str] = []

    def write(image: Image.Image, name: str) -> None:
        image.save(folder / name)
        drawn.append(name)

    pixels = np.asarray(picture)
    size = pixels.shape[:2]
    panels = torch.cat((maps.mean(0, keepdim=True), maps))
    write(picture, "img.png")
    write(Image.fromarray(map_picture(panels[0], size)), "attn-mean.png")
    write(Image.fromarray(overlay_picture(pixels, panels[0])), "overlay.png")
    for head, map_ in enumerate(maps):
        write(Image.fromarray(map_picture(map_, size)), f"attn-head{head}.png")
    masks = None
    if threshold is not None:
        masks = keep_mass(panels, threshold)
        for head, mask in enumerate(masks[1:]):
            image = Image.fromarray(mask_picture(pixels, mask, 1 + head))
            write(image, f"mask_th{threshold:g}_head{head}.png")
    draw_heads(picture, panels, masks, folder / "heads.png", title=title)
    return [*drawn, "heads.png"]


def draw_images(args: argparse.Namespace, device: torch.device) -> int:
    """The pictures of --image_path, and attention.json beside them; returns how many images."""
    images = find_images(args.image_path)
    model, arch = load_vit(args, device, reason=LACKS)
    root = Path(args.output_dir)
    records: list[dict[str, Any]] = []
    skipped = images.skipped
    bar = tqdm(images.paths, unit="image", disable=len(images.paths) < 2 or not sys.stderr.isatty())
    for index, path in enumerate(bar):
        try:
            with quiet_pillow():
                picture = images.read(index)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plugins raise all kinds on broken files.
            skipped[path] = reason_of(error)
            continue
        picture = fit(picture, args.image_size, model.patch_size)
        maps = attention_maps(model, to_input(picture)[None].to(device))[0].cpu()
        name = images.names[index]
        title = f"{Path(path).name}: what CLS attends to in the last block of {arch}"
        with explain_write_errors(root / name):
            files = draw_image(picture, maps, root / name, threshold=args.threshold, title=title)
        records.append(
            {
                "image": path,
                "size": [picture.height, picture.width],
                "grid": list(maps.shape[1:]),
                "heads": head_statistics(maps, args.threshold),
                "files": [str(Path(name) / file) for file in files],
            }
        )
    if not records:
        reasons = "; ".join(f"{path} {reason}" for path, reason in list(skipped.items())[:3])
        raise DataError(f"--image_path: no image can be read: {reasons}")
    for path, reason in skipped.items():
        print(f"left out: {path} {reason}", file=sys.stderr)
    result = {
        "settings": settings_of(args, model, "image_size", "threshold")
        | {"arch": arch, "patch_size": model.patch_size},
        "images": records,
        "skipped": skipped,
    }
    write_json(result, root / "attention.json")
    return len(records)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino attention`: the paper's visualize_attention.py's, then ours."""
    add = parser.add_argument
    add_network_flags(parser, "a vit_*", default=("vit_small", 8))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image_path", help="an image, or a folder of them, to draw")
    what.add_argument(
        "--data_path",
        help="a set with masks to measure on: PASCAL VOC's folder (JPEGImages/, "
        "SegmentationClass/ or SegmentationObject/, ImageSets/Segmentation/), or that of "
        "`fastdino shapes`",
    )
    add(
        "--image_size",
        type=int,
        nargs="+",
        default=[480, 480],
        metavar="PX",
        help="height and width that images are resized to, or their shorter side alone (480 480)",
    )
    add("--output_dir", default=".", help="where everything goes (.)")
    add(
        "--threshold",
        type=float,
        help="masks keep this share of a map's mass (default: no masks; with --data_path 0.6)",
    )
    add("--split", default="val", help="with --data_path: whose images (val)")
    add("--baseline", type=parse_bool, default=True, help="with it: also of random weights (true)")
    add("--batch_size_per_gpu", type=int, default=8, help="with it: images a forward pass (8)")
    add("--num_workers", type=int, default=4, help="with it: data loading workers, at most (4)")


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino attention`."""
    check_threshold(args.threshold)
    check_size("image_size", args.image_size)
    check_at_least(args, 1, "batch_size_per_gpu", "patch_size")
    check_at_least(args, 0, "num_workers")
    device = choose_device(args.device)
    root = Path(args.output_dir)
    if args.data_path is None:
        count = draw_images(args, device)
        print(f"{root}: pictures of {count} image(s), and attention.json")
        return 0
    result = measure(args, device)
    write_json(result, root / "jaccard.json")
    for name in ("trained", "untrained"):
        if name in result:
            print(f"Jaccard of the best head, {name} network: {result[name]['best_head']:.1f} %")
    print(f"{result['images']} images of {args.data_path}; heads and images in {root}/jaccard.json")
    return 0
