"""`fastdino video`: what CLS attends to in each frame of a video, as a video.

Frames come one at a time and go into the file as they are drawn: of a video of any length a batch
is held. Beside the video lies a JSON file of its name.

Unlike the paper's tool it writes no pictures of frames and maps, and resizes a frame as a picture,
so that what is seen is what the network saw (there a tensor is resized, without rounding).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastdino.config import check_at_least
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
from fastdino.evals.video_io import FORMATS, OTHER_FORMATS, Frames, open_frames, video_writer
from fastdino.files import explain_write_errors, write_json
from fastdino.models.vit import VisionTransformer
from fastdino.runtime import choose_device

# What a frame of the video shows, side by side in the order of --show.
VIEWS = ("frame", "mean", "overlay", "mask", "heads")
SHOWN = ("frame", "mean", "mask")
# Of head_statistics, what the JSON file has the means of over all frames.
AVERAGED = ("patch_mass", "entropy", "peak_share", "kept_patches")
# What has no part in --video_only.
OF_MAPS = ("pretrained_weights", "arch", "patch_size", "resize", "threshold", "show")


def draw_frame(
    picture: Image.Image, maps: Tensor, views: Iterable[str], threshold: float
) -> Pixels:
    """The views of one frame side by side, each of its size.

    Args:
        picture: as the network saw it.
        maps: [H, h, w] of attention_maps, on the CPU.
        views: some of VIEWS.
        threshold: the share of the mean map's mass that the mask keeps.
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
    return np.concatenate([draw[view]() for view in views], axis=1)


def draw_video(
    frames: Frames,
    model: VisionTransformer,
    path: Path,
    *,
    fps: float,
    resize: list[int] | None,
    views: list[str],
    threshold: float,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Writes the video; returns what is known of it: see the JSON file.

    Args:
        frames: of open_frames.
        model: in eval mode, on the device.
        path: ends in one of FORMATS.
        fps: frames a second of what is written.
        resize: height and width, or the shorter side, in pixels; None: as they are.
        views, threshold: see draw_frame.
        batch_size: frames in a forward pass, and in memory.

    Raises: DataError: a frame cannot be decoded, or is smaller than a patch.
    """
    # Before a file is made: whether the frames can be cut to patches at all.
    sample = fit(Image.new("RGB", frames.size[::-1]), resize, model.patch_size)
    count, totals = 0, np.zeros(1)
    bar = tqdm(total=frames.count, unit="frame", disable=not sys.stderr.isatty())
    with bar, video_writer(path, fps) as write:
        for batch in _batches(frames, batch_size):
            pictures = [fit(frame, resize, model.patch_size) for frame in batch]
            images = torch.stack([to_input(picture) for picture in pictures])
            for picture, maps in zip(
                pictures, attention_maps(model, images.to(device)).cpu(), strict=True
            ):
                write(draw_frame(picture, maps, views, threshold))
                found = head_statistics(maps, threshold)
                totals = totals + np.array([[head[name] for name in AVERAGED] for head in found])
                count += 1
            bar.update(len(batch))
    if not count:
        raise DataError(f"{frames.path} holds no frame")
    return {
        "frames": count,
        "frames_announced": frames.count,
        "fps": fps,
        "size": [sample.height, sample.width],
        "grid": [sample.height // model.patch_size, sample.width // model.patch_size],
        "heads": [
            {"head": head} | dict(zip(AVERAGED, row, strict=True))
            for head, row in enumerate((totals / count).tolist())
        ],
    }


def _batches(frames: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    batch: list[Image.Image] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def join_pictures(frames: Frames, path: Path, *, fps: float) -> dict[str, Any]:
    """Writes a video of a folder's pictures as they are; returns what the JSON file says of it.

    Raises: DataError: a picture cannot be decoded.
    """
    bar = tqdm(frames, total=frames.count, unit="frame", disable=not sys.stderr.isatty())
    with video_writer(path, fps) as write:
        for frame in bar:
            write(np.asarray(frame))
    return {"frames": frames.count, "fps": fps, "size": list(frames.size)}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino video`: the paper's (video_generation.py), then ours."""
    add = parser.add_argument
    add_network_flags(parser, "a vit_*", default=("vit_small", 8))
    add("--input_path", required=True, help="a video file, or a folder of frames")
    endings = " ".join(FORMATS)
    add("--output_path", default=".", help=f"a folder, or a file that ends in {endings} (.)")
    add("--video_format", choices=[e[1:] for e in FORMATS], default="mp4", help="in a folder (mp4)")
    add("--fps", type=float, help="frames a second (default: the video's own; of a folder, 30)")
    add(
        "--resize",
        type=int,
        nargs="+",
        metavar="PX",
        help="height and width that frames are resized to, or their shorter side alone",
    )
    about = f"the share of the mass that masks keep ({THRESHOLD})"
    add("--threshold", type=float, help=about)
    about = (
        "make a video of the pictures in the folder --input_path as they are: no network, no maps"
    )
    add("--video_only", action="store_true", help=about)
    add(
        "--show",
        nargs="+",
        choices=VIEWS,
        help="what a frame shows, side by side; mean: the heads' mean map, which is all that the "
        f"paper's tool shows ({' '.join(SHOWN)})",
    )
    add("--batch_size_per_gpu", type=int, default=4, help="frames a forward pass (4)")


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino video`."""
    check_threshold(args.threshold)
    check_size("resize", args.resize)
    check_at_least(args, 1, "batch_size_per_gpu", "patch_size")
    if args.fps is not None and not 0.1 <= args.fps <= 1000:
        raise ConfigError(f"--fps must be from 0.1 to 1000, got {args.fps}")
    if args.video_only:
        check_video_only(args)
    path = output_file(args.output_path, args.video_format)
    if os.path.realpath(path) == os.path.realpath(args.input_path):
        raise ConfigError(f"--output_path {path} is the input: name another file")
    frames = open_frames(args.input_path)
    fps = args.fps or frames.fps
    make = join_pictures if args.video_only else _by_network(args)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    found = make(frames, path, fps=fps)
    record = {"settings": {"input_path": args.input_path}, "output_path": str(path), **found}
    write_json(record, path.with_suffix(".json"))
    if frames.count not in (None, found["frames"]):
        print(
            f"{args.input_path} announces {frames.count} frames, {found['frames']} were decoded",
            file=sys.stderr,
        )
    print(f"{path}: {found['frames']} frames, {found['fps']:g} a second")
    return 0


def _by_network(args: argparse.Namespace) -> Callable[..., dict[str, Any]]:
    """What makes a video of maps by the network of the flags, called as join_pictures is."""
    device = choose_device(args.device)
    model, arch = load_vit(args, device, reason=LACKS)
    views = list(args.show or SHOWN)
    threshold = THRESHOLD if args.threshold is None else args.threshold

    def make(frames: Frames, path: Path, *, fps: float) -> dict[str, Any]:
        found = draw_video(
            frames,
            model,
            path,
            fps=fps,
            resize=args.resize,
            views=views,
            threshold=threshold,
            batch_size=args.batch_size_per_gpu,
            device=device,
        )
        settings = settings_of(args, model, "input_path", "resize")
        settings |= {"arch": arch, "patch_size": model.patch_size}
        return {"settings": settings | {"threshold": threshold, "show": views}, **found}

    return make


def check_video_only(args: argparse.Namespace) -> None:
    """Raises UserError where --video_only has no folder, or flags that it has no use for."""
    given = [f"--{name}" for name in OF_MAPS if getattr(args, name) not in (None, "")]
    if given:
        raise ConfigError(
            f"--video_only shows the pictures as they are, without a network: leave out "
            f"{', '.join(given)}"
        )
    if os.path.isfile(args.input_path):
        raise DataError(
            f"--video_only makes a video of the pictures in a folder, and --input_path "
            f"{args.input_path} is a file: name a folder"
        )


def output_file(path: str, video_format: str) -> Path:
    """The file that --output_path means: itself, or video.<format> in the folder.

    Raises: ConfigError: it looks like a file of another format.
    """
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path) or not suffix:
        return Path(path) / f"video.{video_format}"
    if suffix in FORMATS:
        return Path(path)
    if suffix in OTHER_FORMATS:
        raise ConfigError(
            f"--output_path {path}: expected a folder, or a file that ends in {' '.join(FORMATS)}"
        )
    return Path(path) / f"video.{video_format}"
