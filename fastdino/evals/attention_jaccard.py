"""How well attention maps find objects: their masks' Jaccard index (Caron et al. 2021, figure 4).

Each head's map is thresholded to keep a share of its mass (.6 in the paper); the mask is compared
with the foreground, whichever classes it has, on the pixels that the network saw; the best head of
each image counts, and images are averaged. The paper sets it beside random weights.

Legend: N images, B of a batch, H heads, h x w patches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from fastdino.data.image_files import EXTENSIONS, NUMBERS, explained_reading, quiet_pillow, read_rgb
from fastdino.environment import cpu_count
from fastdino.errors import DataError
from fastdino.evals.attention_maps import (
    LACKS,
    attention_maps,
    fit,
    jaccard,
    keep_mass,
    pretrained_side,
    to_pixels,
)
from fastdino.evals.options import (
    load_vit,
    settings_of,
)
from fastdino.evals.transforms import (
    to_input,
)
from fastdino.models.backbones import build_backbone
from fastdino.models.vit import VisionTransformer

THRESHOLD = 0.6
BACKGROUND, FOREGROUND, VOID = 0, 1, 2
# PASCAL VOC: the index of pixels that do not count, and its colour where a mask is saved as RGB.
VOC_VOID, VOC_VOID_COLOUR = 255, (224, 224, 192)


@dataclass(frozen=True)
class MaskedImages:
    """Images and their masks, by number. void: the value of a mask's pixels that do not count."""

    layout: str
    images: list[Path]
    masks: list[Path]
    void: int | None


def find_masked(root: Path, split: str) -> MaskedImages:
    """The images of a split that have masks, in PASCAL VOC's layout or in that of the shapes set.

    Raises: DataError: neither layout, no such split, an image without its mask or the reverse.
    """
    if (root / "JPEGImages").is_dir():
        found = _find_voc(root, split)
    elif (root / "masks" / split).is_dir():
        found = _find_folders(root, split)
    else:
        raise DataError(
            f"--data_path {root} has neither JPEGImages/ (PASCAL VOC's layout) nor masks/{split}/ "
            "(that of `fastdino shapes`); expected one of them, e.g. VOCdevkit/VOC2012"
        )
    for path in (*found.images, *found.masks):
        if not path.is_file():
            raise DataError(f"{path} is missing: each image of the split needs its mask")
    return found


def _find_voc(root: Path, split: str) -> MaskedImages:
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        names = listed.read_text().split()
    except OSError as error:
        raise DataError(f"{listed} cannot be read: {error.strerror}") from error
    if not names:
        raise DataError(f"{listed} names no image")
    # The two differ in which object a pixel belongs to, not in where objects are.
    folders = [root / "SegmentationClass", root / "SegmentationObject"]
    masks = next((folder for folder in folders if folder.is_dir()), None)
    if masks is None:
        raise DataError(f"{root} has neither SegmentationClass/ nor SegmentationObject/")
    return MaskedImages(
        "PASCAL VOC",
        [root / "JPEGImages" / f"{name}.jpg" for name in names],
        [masks / f"{name}.png" for name in names],
        VOC_VOID,
    )


def _find_folders(root: Path, split: str) -> MaskedImages:
    """<split>/<class>/*, with masks/<split>/<class>/*.png."""
    folder = root / split
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not images:
        raise DataError(f"no images in {folder}")
    below = root / "masks" / split
    masks = [below / path.relative_to(folder).with_suffix(".png") for path in images]
    return MaskedImages("class folders", images, masks, None)


def read_mask(path: Path, void: int | None) -> NDArray[np.uint8]:
    """A mask as BACKGROUND, FOREGROUND, VOID, [height, width].

    A mask with a palette has its indices read, a gray one its values; one that was saved in
    colours is foreground where it is not black.

    Raises: DataError: it cannot be read.
    """
    with quiet_pillow(), explained_reading(path), Image.open(path) as image:
        if image.mode in NUMBERS:
            values = np.asarray(image)
            unknown = values == void if void is not None else np.zeros(values.shape, bool)
            inside = values > 0
        else:
            colours = np.asarray(image.convert("RGB"))
            inside = colours.max(axis=2) > 0
            colour = (-1, -1, -1) if void is None else VOC_VOID_COLOUR
            unknown = (colours == np.array(colour)).all(axis=2)
    return np.where(unknown, VOID, np.where(inside, FOREGROUND, BACKGROUND)).astype(np.uint8)


# A network's input [3, height, width], and its mask's labels [height, width].
_Pair = tuple[Tensor, Tensor]


class _Pairs(Dataset["_Pair | DataError"]):
    """Pairs, or the error: a worker that raised it would wrap its message in a traceback."""

    def __init__(self, found: MaskedImages, size: list[int], patch_size: int):
        self.found, self.size, self.patch_size = found, size, patch_size

    def __len__(self) -> int:
        return len(self.found.images)

    def __getitem__(self, index: int) -> _Pair | DataError:
        try:
            return self.pair(index)
        except DataError as error:
            return error

    def pair(self, index: int) -> _Pair:
        path = self.found.images[index]
        with quiet_pillow():
            picture = read_rgb(path)
        mask = Image.fromarray(read_mask(self.found.masks[index], self.found.void))
        if mask.size != picture.size:
            raise DataError(
                f"{self.found.masks[index]} is {mask.height} x {mask.width} px, "
                f"its image {picture.height} x {picture.width}"
            )
        picture = fit(picture, self.size, self.patch_size)
        mask = fit(mask, self.size, self.patch_size, InterpolationMode.NEAREST)
        return to_input(picture), torch.from_numpy(np.array(mask))


def _batches(pairs: _Pairs, batch_size: int, workers: int) -> Iterator[list[_Pair]]:
    """The pairs in order, those of a batch of one size; raises the first error."""
    loader = DataLoader(
        pairs,
        batch_size=batch_size if len(pairs.size) == 2 else 1,
        num_workers=min(workers, cpu_count()),
        collate_fn=list,
    )
    for batch in loader:
        for pair in batch:
            if isinstance(pair, DataError):
                raise pair
        yield batch


def head_scores(
    model: VisionTransformer, images: Tensor, labels: Tensor, threshold: float
) -> Tensor:
    """The Jaccard index of each head's mask, [B, H] float64 on the CPU.

    Args:
        model: in eval mode, where the images are.
        images: [B, 3, height, width], of whole patches.
        labels: [B, height, width], BACKGROUND, FOREGROUND, VOID.
        threshold: the share of a map's mass that its mask keeps.

    Returns: NaN in the row of an image without foreground.
    """
    masks = to_pixels(keep_mass(attention_maps(model, images), threshold), model.patch_size)
    rows = []
    for mask, label in zip(masks, labels.to(images.device), strict=True):
        truth = label == FOREGROUND
        scores = jaccard(mask, truth, label != VOID)
        rows.append(scores if bool(truth.any()) else torch.full_like(scores, torch.nan))
    return torch.stack(rows).cpu()


def summary(scores: Tensor) -> dict[str, Any]:
    """In percent, of [N, H] without NaN: best_head, the mean over images of each one's best head;
    heads, each head's mean; fixed_head, the best of these.
    """
    heads = 100 * scores.mean(0)
    return {
        "best_head": 100 * float(scores.max(1).values.mean()),
        "fixed_head": {"head": int(heads.argmax()), "jaccard": float(heads.max())},
        "heads": heads.tolist(),
    }


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The Jaccard indices of `fastdino attention --data_path`, as jaccard.json has them."""
    found = find_masked(Path(args.data_path), args.split)
    threshold = THRESHOLD if args.threshold is None else args.threshold
    model, arch = load_vit(args, device, reason=LACKS)
    models = {"trained" if args.pretrained_weights else "untrained": model}
    if args.baseline and args.pretrained_weights:
        models["untrained"] = _untrained_like(model, arch, args.seed, device)
    pairs = _Pairs(found, args.image_size, model.patch_size)
    parts: dict[str, list[Tensor]] = {name: [] for name in models}
    with tqdm(total=len(pairs), unit="image", disable=not sys.stderr.isatty()) as bar:
        for batch in _batches(pairs, args.batch_size_per_gpu, args.num_workers):
            images = torch.stack([image for image, _ in batch]).to(device)
            labels = torch.stack([label for _, label in batch])
            for name, network in models.items():
                parts[name].append(head_scores(network, images, labels, threshold))
            bar.update(len(batch))
    scores = {name: torch.cat(rows) for name, rows in parts.items()}
    empty = next(iter(scores.values())).isnan().any(1)
    if bool(empty.all()):
        raise DataError(f"none of the {len(pairs)} masks of {args.data_path} has any foreground")
    names = [path.relative_to(args.data_path).as_posix() for path in found.images]
    return {
        "settings": settings_of(args, model, "data_path", "split", "image_size")
        | {"threshold": threshold, "arch": arch, "patch_size": model.patch_size},
        "layout": found.layout,
        "images": int((~empty).sum()),
        "without_foreground": [name for name, gone in zip(names, empty, strict=True) if gone],
        **{name: summary(rows[~empty]) for name, rows in scores.items()},
        "per_image": {
            names[i]: {name: (100 * rows[i]).tolist() for name, rows in scores.items()}
            for i in (~empty).nonzero().flatten().tolist()
        },
    }


def _untrained_like(
    model: VisionTransformer, arch: str, seed: int, device: torch.device
) -> VisionTransformer:
    torch.manual_seed(seed)
    side = pretrained_side(model)
    fresh, _ = build_backbone(arch, patch_size=model.patch_size, img_size=side)
    assert isinstance(fresh, VisionTransformer)
    return fresh.eval().to(device)
