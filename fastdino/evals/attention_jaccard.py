"""Jaccard index of attention masks against annotated objects (Caron et al. 2021, figure 4).

Each head's map is thresholded to keep a share of its mass (0.6 in the paper). The mask is compared
with the foreground of any class, on the pixels that the network saw. The score is the best head of
each image, averaged over images, for trained and for random weights.

Shapes: N images, B per batch, H heads, h x w patches.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from fastdino.data.image_files import (
    AS_STORED,
    Conversion,
    count_deep,
    quiet_pillow,
    read_file,
    read_headers,
)
from fastdino.data.image_names import image_files
from fastdino.errors import DataError
from fastdino.evals.attention_maps import (
    NO_CLS_ATTENTION,
    attention_maps,
    fit_to_patches,
    keep_mass,
    to_pixels,
)
from fastdino.evals.batching import load_batches
from fastdino.evals.masks import palette_colors, read_mask_pixels
from fastdino.evals.options import (
    conversion_of,
    load_vit,
    print_on_main,
    settings_of,
    warn_of_deep,
)
from fastdino.evals.segmentation_metrics import jaccard
from fastdino.evals.transforms import to_input
from fastdino.file_names import as_path, decode_lines
from fastdino.models.backbones import build_backbone
from fastdino.models.vit import VisionTransformer

THRESHOLD = 0.6
BACKGROUND, FOREGROUND, VOID = 0, 1, 2
VOC_VOID = 255  # palette index of PASCAL VOC's void pixels


@dataclass(frozen=True)
class MaskedImages:
    """Images and their masks, by index.

    void: value of the mask pixels that do not count; None if all count.
    """

    layout: str
    images: list[Path]
    masks: list[Path]
    void: int | None


def find_masked(root: Path, split: str) -> MaskedImages:
    """List the images and masks of a split, in the layout of PASCAL VOC or `fastdino shapes`.

    Raises: DataError: unknown layout or split, or an image or mask is missing.
    """
    if (root / "JPEGImages").is_dir():
        masked = _find_voc(root, split)
    elif (root / "masks" / split).is_dir():
        folder = root / split
        images = image_files(folder, below=True)
        if not images:
            raise DataError(f"no images in {folder}")
        masks = [root / "masks" / path.relative_to(root).with_suffix(".png") for path in images]
        masked = MaskedImages("class folders", images, masks, None)
    else:
        raise DataError(
            f"--data_path {root} has neither JPEGImages/ (PASCAL VOC) nor masks/{split}/ "
            "(`fastdino shapes`): pass a folder with one of them, e.g. VOCdevkit/VOC2012"
        )
    for path in (*masked.images, *masked.masks):
        if not path.is_file():
            raise DataError(f"{path} is missing: each image of the split needs a mask")
    return masked


def _find_voc(root: Path, split: str) -> MaskedImages:
    listing = root / f"ImageSets/Segmentation/{split}.txt"
    try:
        names = [as_path(n) for line in decode_lines(read_file(str(listing))) for n in line.split()]
    except OSError as error:
        raise DataError(f"{listing} cannot be read: {error.strerror or error}") from error
    if not names:
        raise DataError(f"{listing} lists no image")
    # Both folders have the same foreground; only the objects are numbered differently.
    for folder in (root / "SegmentationClass", root / "SegmentationObject"):
        if folder.is_dir():
            images = [root / f"JPEGImages/{name}.jpg" for name in names]
            masks = [folder / f"{name}.png" for name in names]
            return MaskedImages("PASCAL VOC", images, masks, VOC_VOID)
    raise DataError(f"{root} has neither SegmentationClass/ nor SegmentationObject/")


def read_labels(path: Path, void: int | None) -> NDArray[np.uint8]:
    """Read a mask [height, width] as BACKGROUND, FOREGROUND and VOID.

    Palette indices and gray values other than 0 are foreground. In a mask saved as colors, all
    but black is foreground, and the color of VOC_VOID has its value.

    Raises: DataError: the file cannot be read.
    """
    pixels = read_mask_pixels(path)
    if pixels.ndim == 3:
        is_void = (pixels == palette_colors()[VOC_VOID]).all(axis=2)
        pixels = np.where(is_void, VOC_VOID, pixels.any(axis=2))
    labels = np.where(pixels > 0, FOREGROUND, BACKGROUND).astype(np.uint8)
    if void is not None:
        labels[pixels == void] = VOID
    return labels


def load_pair(
    image_path: Path,
    mask_path: Path,
    void: int | None,
    size: list[int],
    patch_size: int,
    conversion: Conversion = AS_STORED,
) -> tuple[Tensor, Tensor]:
    """Read an image as network input [3, height, width], and its labels [height, width].

    Raises: DataError: a file cannot be read, or the sizes differ.
    """
    image, labels = conversion.read(image_path), Image.fromarray(read_labels(mask_path, void))
    if labels.size != image.size:
        raise DataError(
            f"{mask_path} is {labels.height} x {labels.width} px, but its image is "
            f"{image.height} x {image.width} px: expected one size"
        )
    image = fit_to_patches(image, size, patch_size)
    labels = fit_to_patches(labels, size, patch_size, InterpolationMode.NEAREST)
    return to_input(image), torch.from_numpy(np.array(labels))


def head_scores(
    model: VisionTransformer, images: Tensor, labels: Tensor, threshold: float
) -> Tensor:
    """Compute the Jaccard index of each head's mask, [B, H] float64 on the CPU.

    Args:
        model: in eval mode, on the device of the images.
        images: [B, 3, height, width], whole patches.
        labels: [B, height, width] of BACKGROUND, FOREGROUND and VOID.
        threshold: share of a map's mass that its mask keeps.

    Returns: NaN rows for images without foreground.
    """
    masks = to_pixels(keep_mass(attention_maps(model, images), threshold), model.patch_size)
    labels = labels[:, None].to(images.device)
    truth = labels == FOREGROUND
    scores = jaccard(masks, truth, labels != VOID)
    return scores.masked_fill(~truth.any(-1).any(-1), torch.nan).cpu()


def summary(scores: Tensor) -> dict[str, Any]:
    """Summarize scores [N, H] without NaN, in percent.

    Returns: best_head, the mean over images of each image's best head; heads, the mean of each
        head; fixed_head, the head with the best mean.
    """
    heads = 100 * scores.mean(0)
    return {
        "best_head": 100 * float(scores.max(1).values.mean()),
        "fixed_head": {"head": int(heads.argmax()), "jaccard": float(heads.max())},
        "heads": heads.tolist(),
    }


def score_images(
    args: argparse.Namespace,
    masked: MaskedImages,
    models: dict[str, VisionTransformer],
    threshold: float,
) -> tuple[dict[str, Tensor], list[int], list[str]]:
    """Compute the scores [N, H] of each network, of the images that can be used.

    Returns: the scores, the indices of the images used, and why others are left out.
    Raises: DataError: no image can be used.
    """
    patch_size = next(iter(models.values())).patch_size
    device = next(iter(models.values())).pos_embed.device
    parts: dict[str, list[Tensor]] = {name: [] for name in models}
    conversion = conversion_of(args)
    headers = read_headers(masked.images, args.num_workers)
    warn_of_deep(args, count_deep(headers), len(headers))
    used: list[int] = []
    left_out: list[str] = []

    def load(index: int) -> tuple[int, tuple[Tensor, Tensor] | str]:
        pair = masked.images[index], masked.masks[index]
        try:
            return index, load_pair(*pair, masked.void, args.image_size, patch_size, conversion)
        except DataError as error:
            return index, str(error)

    indices = range(len(masked.images))
    # The shorter side alone leaves images of different sizes: one per batch.
    batch_size = args.batch_size_per_gpu if len(args.image_size) == 2 else 1
    bar = tqdm(total=len(indices), unit="image", disable=not sys.stderr.isatty())
    with bar, quiet_pillow():
        for batch in load_batches(load, indices, batch_size, args.num_workers):
            bar.update(len(batch))
            left_out += [loaded for _, loaded in batch if isinstance(loaded, str)]
            pairs = {i: loaded for i, loaded in batch if not isinstance(loaded, str)}
            if not pairs:
                continue
            used += pairs
            images, labels = (torch.stack(tensors) for tensors in zip(*pairs.values(), strict=True))
            for name, network in models.items():
                parts[name].append(head_scores(network, images.to(device), labels, threshold))
    if not used:
        raise DataError(f"no image of {args.data_path} can be used: {left_out[0]}")
    if left_out:
        print_on_main(f"{len(left_out)} images left out: {left_out[0]}", stderr=True)
    return {name: torch.cat(rows) for name, rows in parts.items()}, used, left_out


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compute the contents of jaccard.json for `fastdino attention --data_path`."""
    masked = find_masked(Path(args.data_path), args.split)
    threshold = THRESHOLD if args.threshold is None else args.threshold
    model, arch = load_vit(args, device, reason=NO_CLS_ATTENTION)
    models = {"trained" if args.pretrained_weights else "untrained": model}
    if args.baseline and args.pretrained_weights:
        torch.manual_seed(args.seed)
        side = math.isqrt(model.pos_embed.shape[1] - 1) * model.patch_size
        untrained, _ = build_backbone(arch, patch_size=model.patch_size, img_size=side)
        assert isinstance(untrained, VisionTransformer)
        models["untrained"] = untrained.eval().to(device)
    scores, used, left_out = score_images(args, masked, models, threshold)
    empty = next(iter(scores.values())).isnan().any(1)
    if bool(empty.all()):
        raise DataError(f"none of the {len(used)} masks of {args.data_path} has any foreground")
    names = [masked.images[i].relative_to(args.data_path).as_posix() for i in used]
    return {
        "settings": settings_of(args, model, "data_path", "split", "image_size")
        | {"threshold": threshold, "arch": arch, "patch_size": model.patch_size},
        "layout": masked.layout,
        "images": int((~empty).sum()),
        "left_out": left_out,
        "without_foreground": [name for name, skip in zip(names, empty, strict=True) if skip],
        **{name: summary(rows[~empty]) for name, rows in scores.items()},
        "per_image": {
            names[i]: {name: (100 * rows[i]).tolist() for name, rows in scores.items()}
            for i in (~empty).nonzero().flatten().tolist()
        },
    }
