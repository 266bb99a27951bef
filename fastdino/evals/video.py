"""`fastdino video`: the CLS attention of each frame of a video, as a video.

Frames are decoded, drawn and encoded batch by batch, so videos of any length fit in memory. A JSON
file of the same name has the settings and statistics.

Unlike the paper's video_generation.py, it writes no image files, and resizes frames as 8-bit
pictures, so that the video shows the network's input (there a float tensor is resized).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastdino.config import user_path
from fastdino.data.image_files import count_deep
from fastdino.errors import ConfigError, DataError
from fastdino.evals.attention_figures import (
    Pixels,
    heads_picture,
    map_picture,
    mask_picture,
    overlay_picture,
)
from fastdino.evals.attention_jaccard import THRESHOLD
from fastdino.evals.attention_maps import (
    NO_CLS_ATTENTION,
    attention_maps,
    check_flags,
    fit_to_patches,
    head_statistics,
    keep_mass,
)
from fastdino.evals.batching import batches
from fastdino.evals.options import (
    DEFAULT,
    add_conversion_flags,
    add_network_flags,
    conversion_of,
    load_vit,
    settings_of,
    warn_of_deep,
)
from fastdino.evals.transforms import to_input
from fastdino.evals.video_io import (
    CLOCK,
    FORMATS,
    OTHER_FORMATS,
    Frames,
    open_frames,
    video_writer,
    warn_of_missing,
)
from fastdino.files import write_json
from fastdino.models.vit import VisionTransformer
from fastdino.runtime import choose_device
from fastdino.terminal import print_out

PANELS = ("frame", "mean", "overlay", "mask", "heads")  # values of --show
DEFAULT_PANELS = ("frame", "mean", "mask")
# The statistics of head_statistics that are averaged over frames.
AVERAGED = ("patch_mass", "entropy", "peak_share", "kept_patches")
# The flags that --video_only does not accept.
NETWORK_FLAGS = ("pretrained_weights", "arch", "patch_size", "resize", "threshold", "show")


def draw_frame(
    picture: Image.Image, maps: Tensor, panels: Iterable[str], threshold: float
) -> Pixels:
    """Draw the panels of one frame side by side.

    Args:
        picture: the network's input.
        maps: [H, h, w] of attention_maps, on the CPU.
        panels: a selection of PANELS.
        threshold: share of the mean map's mass that the mask keeps.
    """
    pixels = np.asarray(picture)
    size, mean = pixels.shape[:2], maps.mean(0)
    draw = {
        "frame": lambda: pixels,
        "mean": lambda: map_picture(mean, size),
        "overlay": lambda: overlay_picture(pixels, mean),
        "mask": lambda: mask_picture(pixels, keep_mass(mean, threshold)),
        "heads": lambda: heads_picture(maps, size),
    }
    return np.concatenate([draw[panel]() for panel in panels], axis=1)


class Network(NamedTuple):
    """A ViT on a device."""

    device: torch.device
    model: VisionTransformer
    arch: str

    @classmethod
    def load(cls, args: argparse.Namespace) -> Network:
        """Load the network of the flags; raise what load_vit raises."""
        device = choose_device(args.device)
        return cls(device, *load_vit(args, device, reason=NO_CLS_ATTENTION))


class AttentionVideo:
    """The drawn frames of a video, with each head's statistics averaged over frames.

    Raises: DataError: the frames are smaller than a patch.
    """

    def __init__(self, frames: Frames, args: argparse.Namespace, network: Network):
        self.device, self.model, self.arch = network
        self.frames, self.args = frames, args
        self.panels = list(args.show or DEFAULT_PANELS)
        self.threshold = THRESHOLD if args.threshold is None else args.threshold
        self.totals = np.zeros(1)  # [H, len(AVERAGED)] after the first frame
        self.fit = partial(fit_to_patches, size=args.resize, patch_size=self.model.patch_size)
        # Fit an empty picture to check the size before a file is created.
        self.size = self.fit(Image.new("RGB", frames.size[::-1])).size[::-1]

    def __iter__(self) -> Iterator[tuple[Pixels, float]]:
        for batch in batches(self.frames.timed(), self.args.batch_size_per_gpu):
            pictures = [self.fit(frame) for frame, _ in batch]
            images = torch.stack([to_input(picture) for picture in pictures])
            batch_maps = attention_maps(self.model, images.to(self.device)).cpu()
            for picture, maps, (_, seconds) in zip(pictures, batch_maps, batch, strict=True):
                heads = head_statistics(maps, self.threshold)
                self.totals = self.totals + [[head[name] for name in AVERAGED] for head in heads]
                yield draw_frame(picture, maps, self.panels, self.threshold), seconds

    def record(self, count: int) -> dict[str, Any]:
        """Return the entries of the JSON file that depend on the network, after `count` frames."""
        patch_size = self.model.patch_size
        return {
            "settings": settings_of(self.args, self.model, "input_path", "resize")
            | {"arch": self.arch, "patch_size": patch_size}
            | {"threshold": self.threshold, "show": self.panels},
            "frames_announced": self.frames.count,
            "size": list(self.size),
            "grid": [side // patch_size for side in self.size],
            "heads": [
                {"head": head} | dict(zip(AVERAGED, row, strict=True))
                for head, row in enumerate((self.totals / count).tolist())
            ],
        }


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino video`: those of video_generation.py, and our own."""
    add_network_flags(parser, "architecture: a vit_*", default=("vit_small", 8))
    # For frames that are image files. The rotation of a video file always applies.
    add_conversion_flags(parser)
    add = parser.add_argument
    add("--input_path", type=user_path, required=True, help="video file, or folder of frames")
    about = f"output folder, or file ending in {' '.join(FORMATS)} (default: the current folder)"
    add("--output_path", type=user_path, default=".", help=about)
    about = f"format of the video in an output folder {DEFAULT}"
    add("--video_format", choices=[suffix[1:] for suffix in FORMATS], default="mp4", help=about)
    about = "frames per second (default: as in the input, 30 for a folder)"
    add("--fps", type=float, help=about)
    about = "resize frames to this height and width, or shorter side (default: keep the size)"
    add("--resize", type=int, nargs="+", metavar="PX", help=about)
    about = f"share of the map's mass that masks keep (default: {THRESHOLD})"
    add("--threshold", type=float, help=about)
    about = "encode the images of a folder as they are, without a network"
    add("--video_only", action="store_true", help=about)
    about = (
        "panels side by side; mean is the mean map over heads, which the paper's tool shows "
        f"(default: {' '.join(DEFAULT_PANELS)})"
    )
    add("--show", nargs="+", choices=PANELS, help=about)
    add("--batch_size_per_gpu", type=int, default=4, help=f"frames per forward pass {DEFAULT}")


def main(args: argparse.Namespace) -> int:
    """Run `fastdino video`."""
    check_flags(args, "resize")
    if args.fps is not None and not 0.1 <= args.fps <= 1000:
        raise ConfigError(f"--fps must be from 0.1 to 1000, got {args.fps}")
    given = [f"--{name}" for name in NETWORK_FLAGS if getattr(args, name) not in (None, "")]
    if args.video_only and given:
        raise ConfigError(f"--video_only runs without a network: remove {', '.join(given)}")
    if args.video_only and os.path.isfile(args.input_path):
        raise DataError(
            f"--input_path {args.input_path}: --video_only needs a folder of images, not a file"
        )
    path = output_file(args.output_path, args.video_format)
    if os.path.realpath(path) == os.path.realpath(args.input_path):
        raise ConfigError(f"--output_path {path} is also the input: choose another file")
    network = None if args.video_only else Network.load(args)
    frames = open_frames(args.input_path, conversion_of(args))
    if frames.headers:
        warn_of_deep(args, count_deep(frames.headers), len(frames.headers))
    fps, time_base = args.fps or frames.fps, None if args.fps else frames.time_base
    attention = AttentionVideo(frames, args, network) if network else None
    drawings = attention or ((np.asarray(frame), seconds) for frame, seconds in frames.timed())
    bar = tqdm(drawings, total=frames.count, unit="frame", disable=not sys.stderr.isatty())
    count, last = 0, 0.0
    with video_writer(path, fps, time_base) as write:
        for pixels, seconds in bar:
            write(pixels, count / fps if args.fps else seconds)
            count, last = count + 1, seconds
    if time_base == CLOCK and last:  # the rate may vary
        fps = (count - 1) / last
    record = {
        "settings": {"input_path": args.input_path},
        "output_path": str(path),
        "frames": count,
        "fps": fps,
        "size": list(frames.size),
        "left_out": list(frames.left_out),
    }
    if attention is not None:
        record |= attention.record(count)
    write_json(record, path.with_suffix(".json"))
    warn_of_missing(frames, count)
    print_out(f"{path}: {count} frames, {fps:g} a second")
    return 0


def output_file(path: str, video_format: str) -> Path:
    """Return the file that --output_path means: itself, or video.<format> in the folder.

    Raises: ConfigError: the suffix is of an unsupported format.
    """
    suffix = "" if os.path.isdir(path) else Path(path).suffix.lower()
    if suffix in FORMATS:
        return Path(path)
    if suffix in OTHER_FORMATS:
        raise ConfigError(
            f"--output_path {path}: expected a folder, or a file that ends in {' '.join(FORMATS)}"
        )
    return Path(path) / f"video.{video_format}"
