"""`fastdino pca`: patch features in color by their principal components.

The components are fitted to the input or to --fit_on, in float64, with fixed signs. Each image of
the input gives <name>-pca.png, each video <name>-pca.mp4; pca.json has settings and statistics.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastdino.config import check_at_least, user_path
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_names import is_image_name
from fastdino.errors import CheckpointError, ConfigError
from fastdino.evals import options
from fastdino.evals.attention_figures import DIMMED, OVERLAY, Pixels, mask_picture
from fastdino.evals.attention_maps import fit_to_patches
from fastdino.evals.batching import batches
from fastdino.evals.masks import blend
from fastdino.evals.options import DEFAULT
from fastdino.evals.picture_files import (
    SkippedImageError,
    find_images,
    raise_if_none,
    read_picture,
    writing,
)
from fastdino.evals.principal_components import FOREGROUNDS, PatchPCA, PatchSample, fit
from fastdino.evals.token_features import check_patches, patch_size_of, patch_tokens
from fastdino.evals.transforms import to_input
from fastdino.evals.video_io import FORMATS, Frames, open_frames, video_writer, warn_of_missing
from fastdino.files import check_writable, write_json
from fastdino.models.weights import Backbone
from fastdino.runtime import choose_device
from fastdino.terminal import print_err, print_out

PANELS = ("image", "pca", "overlay", "foreground")  # values of --show
DEFAULT_PANELS = ("image", "pca")
FIT_PATCHES = 100_000
# The flags of the fit, which --load_pca replaces.
FIT_FLAGS = ("fit_on", "fit_patches", "foreground", "threshold", "save_pca")


def draw_panels(
    picture: Image.Image, features: Tensor, pca: PatchPCA, panels: Sequence[str]
) -> Pixels:
    """Draw the panels of one image side by side.

    Args:
        picture: the network's input, h * P x w * P pixels.
        features: [h, w, D].
        panels: a selection of PANELS.
    """
    pixels, mask = np.asarray(picture), pca.foreground(features)
    patch_size = pixels.shape[0] // len(mask)
    colors = (255 * pca.colors(features) * mask[..., None]).round().astype(np.uint8)
    drawing = colors.repeat(patch_size, 0).repeat(patch_size, 1)
    inside = mask.repeat(patch_size, 0).repeat(patch_size, 1)[..., None]

    def overlay() -> Pixels:
        dim = (DIMMED * pixels.mean(axis=2, keepdims=True)).round().astype(np.uint8)
        return np.where(inside, blend(pixels, drawing, OVERLAY), dim)

    draw = {
        "image": lambda: pixels,
        "pca": lambda: drawing,
        "overlay": overlay,
        "foreground": lambda: mask_picture(pixels, torch.from_numpy(mask)),
    }
    return np.concatenate([draw[panel]() for panel in panels], axis=1)


class PatchNetwork:
    """A network with patch tokens on a device, and the size of its inputs.

    Attributes:
        patch_size: P, in pixels.
        size: of pictures, see fit_to_patches.
    """

    def __init__(self, args: argparse.Namespace, backbone: Backbone, device: torch.device):
        self.module, self.device = backbone.module.to(device), device
        self.arch, self.patch_size = backbone.arch, patch_size_of(backbone)
        self.size, self.batch_size = args.image_size, args.batch_size_per_gpu

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the patch tokens [B, h, w, D] of pictures of one size, float32 on the CPU.

        Raises: CheckpointError: they are not finite.
        """
        images = torch.stack([to_input(picture) for picture in pictures])
        features = patch_tokens(self.module, images.to(self.device)).float().cpu()
        if not features.isfinite().all():
            raise CheckpointError("the features are not finite: check the weights")
        return features


@dataclass
class Input:
    """An image or a video.

    Attributes:
        name: of the output, relative to --output_dir, without suffix.
        images, index: dataset and place of an image; None for a video.
        frames: the video.
    """

    path: str
    name: str
    images: ImageDataset | None = None
    index: int = 0
    frames: Frames | None = None

    def pictures(self, network: PatchNetwork) -> Iterator[tuple[Image.Image, float]]:
        """Yield the picture, or each frame with its time in seconds.

        Raises: SkippedImageError: an image cannot be read. DataError: a video cannot.
        """
        if self.images is not None:
            picture = read_picture(self.images, self.index, network.size, network.patch_size)
            yield picture, 0.0
        else:
            assert self.frames is not None
            for frame, seconds in self.frames.timed():
                yield fit_to_patches(frame, network.size, network.patch_size), seconds

    def batches(self, network: PatchNetwork) -> Iterator[list[tuple[Image.Image, float, Tensor]]]:
        """Yield the pictures in batches with times and features [h, w, D]."""
        for batch in batches(self.pictures(network), network.batch_size):
            features = network.features([picture for picture, _ in batch])
            yield [(*item, rows) for item, rows in zip(batch, features, strict=True)]


@dataclass
class Inputs:
    """The images and videos of a flag.

    Attributes:
        skipped: path -> reason, of the images that cannot be read.
    """

    flag: str
    items: list[Input] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, args: argparse.Namespace, paths: Sequence[str], flag: str) -> Inputs:
        """List images, folders of images and videos; other files are opened as videos.

        Raises: DataError: a path does not exist, or has no image or frame.
        """
        inputs, conversion = cls(flag), options.conversion_of(args)
        for path in paths:
            stem = os.path.splitext(os.path.basename(os.path.abspath(path)))[0]
            if os.path.isfile(path) and not is_image_name(os.path.basename(path)):
                inputs.items.append(Input(path, stem, frames=open_frames(path, conversion)))
                continue
            images, names = find_images(path, flag)
            images = replace(images, conversion=conversion)
            options.warn_of_deep(args, images.deep, len(images))
            inputs.skipped |= images.skipped
            for index, name in enumerate(names):
                parts = [stem] if not name else [name] if len(paths) == 1 else [stem, name]
                inputs.items.append(Input(images.path(index), os.path.join(*parts), images, index))
        inputs._tell_names_apart()
        return inputs

    def _tell_names_apart(self) -> None:
        """Append a number to the names that occur again."""
        used: set[str] = set()
        for item in self.items:
            name, number = item.name, 2
            while item.name in used:
                item.name, number = f"{name}-{number}", number + 1
            used.add(item.name)

    def bar(self, title: str) -> Any:
        """Return an iterator over the items with a progress bar on a terminal."""
        quiet = len(self.items) < 2 or not sys.stderr.isatty()
        return tqdm(self.items, desc=title, disable=quiet)


def fit_components(args: argparse.Namespace, inputs: Inputs, network: PatchNetwork) -> PatchPCA:
    """Fit the components to the patches of all inputs, or to a sample of them.

    Raises: DataError: no image can be read, or the patches have too few components.
    """
    sample = PatchSample(args.fit_patches or FIT_PATCHES, args.seed)
    for item in inputs.bar("fit"):
        try:
            for batch in item.batches(network):
                for _, _, features in batch:
                    sample.add(features)
        except SkippedImageError as error:
            inputs.skipped[item.path] = str(error)
    raise_if_none(sample.images, inputs.skipped, inputs.flag)
    features, border = sample.result()
    settings = options.settings_of(args, network.module, "image_size", "seed")
    pca = fit(
        features,
        border,
        foreground=args.foreground or "auto",
        threshold=args.threshold,
        about={"settings": settings | {"arch": network.arch, "patch_size": network.patch_size}},
    )
    share = 100 * pca.about["foreground_share"]
    print_out(
        f"fitted to {len(features)} patches of {sample.images} image(s) or frame(s) of "
        f"{inputs.flag}: {share:.1f} % are foreground"
    )
    return pca


def draw_image(
    item: Input, network: PatchNetwork, pca: PatchPCA, panels: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Write the PNG of an image; return its entry in pca.json.

    Raises: SkippedImageError: it cannot be read, or its name gives no file. CheckpointError.
    """
    ((picture, _, features),) = next(item.batches(network))
    path = folder / f"{item.name}-pca.png"
    drawing = Image.fromarray(draw_panels(picture, features, pca, panels))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.save(path)
    return {
        "image": item.path,
        "file": str(path.relative_to(folder)),
        "size": [picture.height, picture.width],
        "grid": list(features.shape[:2]),
        "foreground_share": float(pca.foreground(features).mean()),
    }


def draw_video(
    item: Input, network: PatchNetwork, pca: PatchPCA, panels: Sequence[str], path: Path
) -> dict[str, Any]:
    """Write the video of a video, with its frames' times; return its entry in pca.json.

    Raises: DataError: no frame can be read. CheckpointError: the file cannot be written.
    """
    frames = item.frames
    assert frames is not None
    # Fit an empty picture to check the size before a file is created.
    fit_picture = partial(fit_to_patches, size=network.size, patch_size=network.patch_size)
    size = fit_picture(Image.new("RGB", frames.size[::-1])).size[::-1]
    bar = tqdm(total=frames.count, unit="frame", disable=not sys.stderr.isatty())
    count, share = 0, 0.0
    with bar, video_writer(path, frames.fps, frames.time_base) as write:
        for batch in item.batches(network):
            for picture, seconds, features in batch:
                write(draw_panels(picture, features, pca, panels), seconds)
                count, share = count + 1, share + float(pca.foreground(features).mean())
                bar.update()
    warn_of_missing(frames, count)
    return {
        "video": item.path,
        "file": path.name,
        "frames": count,
        "size": list(size),
        "grid": [side // network.patch_size for side in size],
        "foreground_share": share / count,
        "left_out": list(frames.left_out),
    }


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino pca`."""
    about = "architecture: a vit_*, or a ViT of timm"
    options.add_network_flags(parser, about, default=("vit_small", 8))
    options.add_conversion_flags(parser)
    add = parser.add_argument_group("images").add_argument
    about = "images, folders of images, or videos"
    add("--input_path", type=user_path, nargs="+", required=True, metavar="PATH", help=about)
    about = "resize images to this height and width, or shorter side (default: 480)"
    add("--image_size", type=int, nargs="+", default=[480], metavar="PX", help=about)
    about = f"frames of a video per forward pass {DEFAULT}"
    add("--batch_size_per_gpu", type=int, default=4, help=about)
    add = parser.add_argument_group("components").add_argument
    about = "images, folders or videos to fit the components to (default: the input)"
    add("--fit_on", type=user_path, nargs="+", metavar="PATH", help=about)
    about = f"largest number of patches in the fit, drawn with --seed (default: {FIT_PATCHES})"
    add("--fit_patches", type=int, help=about)
    about = (
        "side of the first component's threshold that is foreground; auto: the one with fewer "
        "patches at image borders; none: all patches are colored (default: auto)"
    )
    add("--foreground", choices=FOREGROUNDS, help=about)
    about = (
        "threshold of the first component, in standard deviations from the mean (default: the "
        "one between two classes, by Otsu's method)"
    )
    add("--threshold", type=float, help=about)
    about = "write the fitted components to this .npz"
    add("--save_pca", type=user_path, metavar="NPZ", help=about)
    about = "use components that --save_pca wrote"
    add("--load_pca", type=user_path, metavar="NPZ", help=about)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=user_path, default="pca", help=f"output folder {DEFAULT}")
    about = f"panels side by side (default: {' '.join(DEFAULT_PANELS)})"
    add("--show", nargs="+", choices=PANELS, default=list(DEFAULT_PANELS), help=about)
    about = f"format of videos {DEFAULT}"
    add("--video_format", choices=[suffix[1:] for suffix in FORMATS], default="mp4", help=about)


def main(args: argparse.Namespace) -> int:
    """Run `fastdino pca`."""
    _check_flags(args)
    folder = Path(args.output_dir)
    check_writable(folder, folder=True)
    if args.save_pca:
        check_writable(Path(args.save_pca))
    loaded = PatchPCA.load(Path(args.load_pca)) if args.load_pca else None
    backbone = options.load_frozen(args)
    check_patches(backbone, "fastdino pca")
    network = PatchNetwork(args, backbone, choose_device(args.device))
    if loaded is not None:
        _check_loaded(args, loaded, network)
    inputs = Inputs.find(args, args.input_path, "--input_path")
    fit_inputs = Inputs.find(args, args.fit_on, "--fit_on") if args.fit_on else inputs
    pca = loaded or fit_components(args, fit_inputs, network)
    if args.save_pca:
        pca.save(Path(args.save_pca))
    flags = ("image_size", "seed", "fit_on", "load_pca", "show")
    settings = options.settings_of(args, network.module, *flags)
    entries = draw(args, inputs, network, pca, folder)
    skipped = fit_inputs.skipped | inputs.skipped
    result = {
        "settings": settings | {"arch": network.arch, "patch_size": network.patch_size},
        "pca": dict(pca.about),
        **entries,
        "skipped": skipped,
    }
    write_json(result, folder / "pca.json")
    for name, reason in skipped.items():
        print_err(f"skipped: {name} {reason}")
    numbers = f"{len(entries['images'])} image(s) and {len(entries['videos'])} video(s)"
    print_out(f"{folder}: pictures of {numbers}, and pca.json")
    return 0


def draw(
    args: argparse.Namespace, inputs: Inputs, network: PatchNetwork, pca: PatchPCA, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Draw all inputs; return the entries `images` and `videos` of pca.json.

    Raises: DataError: no image or video can be read.
    """
    images: list[dict[str, Any]] = []
    videos: list[dict[str, Any]] = []
    for item in inputs.bar("draw"):
        if item.images is None:
            path = folder / f"{item.name}-pca.{args.video_format}"
            videos.append(draw_video(item, network, pca, args.show, path))
            continue
        try:
            images.append(draw_image(item, network, pca, args.show, folder))
        except SkippedImageError as error:
            inputs.skipped[item.path] = str(error)
    raise_if_none(len(images) + len(videos), inputs.skipped, inputs.flag)
    return {"images": images, "videos": videos}


def _check_flags(args: argparse.Namespace) -> None:
    check_at_least(args, 1, "batch_size_per_gpu", "patch_size", "fit_patches")
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        raise ConfigError(
            "--image_size must be a height and a width, or the shorter side alone, in pixels "
            f"from 1; got {' '.join(map(str, args.image_size))}"
        )
    if args.threshold is not None and not np.isfinite(args.threshold):
        raise ConfigError(f"--threshold must be a finite number, got {args.threshold}")
    if args.threshold is not None and args.foreground == "none":
        raise ConfigError("--foreground none uses no threshold: remove --threshold")
    given = [f"--{name}" for name in FIT_FLAGS if getattr(args, name) is not None]
    if args.load_pca and given:
        raise ConfigError(f"--load_pca has fitted components: remove {', '.join(given)}")
    if args.save_pca and not args.save_pca.endswith(".npz"):
        raise ConfigError(f"--save_pca {args.save_pca}: expected a file that ends in .npz")


def _check_loaded(args: argparse.Namespace, pca: PatchPCA, network: PatchNetwork) -> None:
    """Raise ConfigError if the components have another dimension; warn if of other weights."""
    dim = network.module.embed_dim
    if dim != pca.dim:
        raise ConfigError(
            f"--load_pca {args.load_pca} has components of {pca.dim} channels, but the features of "
            f"{network.arch} have {dim}: fit components to this network"
        )
    if pca.about.get("settings", {}).get("weights") != options.weights_digest(network.module):
        print_err(
            f"warning: --load_pca {args.load_pca} was fitted to features of other weights: colors "
            "and foreground mean nothing here"
        )
