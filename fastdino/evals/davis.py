"""`fastdino davis`: follow objects marked in a video's first frame by their patch features.

Source: Caron et al. 2021, section 4.2.2, table 5, and the authors' eval_video_segmentation.py,
whose settings are the defaults. Scores are those of DAVIS 2017's semi-supervised benchmark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fastdino import distributed
from fastdino.augmentation.pillow import MEAN
from fastdino.config import check_at_least, user_path
from fastdino.errors import ConfigError, DataError
from fastdino.evals.batching import batches, load_batches
from fastdino.evals.davis_dataset import (
    Sequence,
    find_sequences,
    first_mask,
    read_frame,
    read_mask,
    write_mask,
)
from fastdino.evals.davis_scores import (
    Results,
    describe,
    describe_left_out,
    describe_total,
    score,
)
from fastdino.evals.label_propagation import hard_labels, one_hot_patches, propagate_video
from fastdino.evals.masks import draw_sheet, overlay
from fastdino.evals.options import (
    DEFAULT,
    add_conversion_flags,
    add_network_flags,
    add_process_flags,
    conversion_of,
    join_ranks,
    load_vit,
    lock_output,
    print_on_main,
    settings_of,
    warn_of_deep,
)
from fastdino.files import explain_write_errors
from fastdino.models.vit import VisionTransformer
from fastdino.terminal import print_line, print_out, printable

# The paper's script divides red by 0.228 instead of ImageNet's 0.229; its figures depend on it.
PAPER_STD = (0.228, 0.224, 0.225)
LONG_SIDE_STEP = 64  # the long side is rounded down to a multiple of this, in pixels
SHEET_FRAMES = 6


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino davis`: those of eval_video_segmentation.py, and ours."""
    add_network_flags(parser, "architecture: a vit_*")
    add_conversion_flags(parser, exif=False)
    add = parser.add_argument_group("data").add_argument
    about = "folder with JPEGImages/480p, Annotations/480p and ImageSets"
    add("--data_path", type=user_path, default="/path/to/davis/", help=about)
    about = f"list of ImageSets: val, train or test-dev {DEFAULT}"
    add("--split", default="val", help=about)
    about = (
        "masks of several objects (2017), of one (2016), or by the list in ImageSets (auto) "
        f"{DEFAULT}"
    )
    add("--year", choices=("auto", "2016", "2017"), default="auto", help=about)
    about = "folder for masks, overlays and davis.json (default: the current folder)"
    add("--output_dir", type=user_path, default=".", help=about)
    about = (
        "frames under their masks: none, a sheet of six per sequence above the annotations, or "
        f"also every frame (all) {DEFAULT}"
    )
    add("--overlays", choices=("none", "sheet", "all"), default="sheet", help=about)
    add = parser.add_argument_group("label propagation").add_argument
    add("--size", type=int, default=480, help=f"short side of resized frames in px {DEFAULT}")
    about = f"context frames before each frame, besides the first {DEFAULT}"
    add("--n_last_frames", type=int, default=7, help=about)
    about = f"compare patches at most this many patches apart; 0 for no limit {DEFAULT}"
    add("--size_mask_neighborhood", type=int, default=12, help=about)
    add("--topk", type=int, default=5, help=f"nearest patches that give a label {DEFAULT}")
    add("--bs", type=int, default=6, help=f"frames per forward pass {DEFAULT}")
    add_process_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Run `fastdino davis`."""
    check_at_least(args, 1, "topk", "bs", "size", "patch_size")
    check_at_least(args, 0, "n_last_frames", "size_mask_neighborhood", "num_workers")
    with join_ranks(args) as device:
        sequences, left_out = distributed.from_main(lambda: checked_sequences(args))
        model = build_model(args, device)
        frames = sum(len(one.frames) for one in sequences)
        warn_of_deep(args, sum(one.deep for one in sequences), frames)
        settings = davis_settings(args, model, sequences)
        output = Path(args.output_dir)
        with lock_output(output, "davis"):
            results = distributed.from_main(
                lambda: Results(output / "davis.json", settings, left_out)
            )
            remaining = distributed.from_main(lambda: remaining_sequences(results, sequences))
            evaluate(model, remaining, args, results)
            distributed.from_main(lambda: results.finish(sequences))
        if distributed.rank() == 0:
            print_out(*describe_total(results.total).split("\n"))
            if results.left_out:
                print_on_main(describe_left_out(results.left_out), stderr=True)
    return 0


def remaining_sequences(results: Results, sequences: list[Sequence]) -> list[Sequence]:
    """Return the sequences that are not done, and print the names of the others."""
    done = [sequence for sequence in sequences if results.has(sequence)]
    for sequence in done:
        print_out(f"{sequence.name}: already done")
    return [sequence for sequence in sequences if sequence not in done]


def evaluate(
    model: VisionTransformer, sequences: list[Sequence], args: argparse.Namespace, results: Results
) -> None:
    """Follow the objects of all sequences; rank 0 adds the scores to its results.

    In each round every rank processes one sequence. Sequences are sorted by length, because a round
    takes as long as its longest one.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    by_length = sorted(sequences, key=lambda one: len(one.frames), reverse=True)
    total = sum(len(one.frames) for one in sequences)
    quiet = rank > 0 or not sys.stderr.isatty()
    with tqdm(total=total, unit="frame", disable=quiet) as bar:
        for group in batches(by_length, world_size):
            scores: dict[str, Any] | str | None = None
            with distributed.fail_together():
                if rank < len(group):
                    bar.set_description(printable(group[rank].name))
                    try:
                        scores = follow(model, group[rank], args, bar)
                    except DataError as error:
                        scores = str(error)
            gathered = distributed.gather(scores)
            with distributed.fail_together():
                if rank == 0:
                    for sequence, outcome in zip(group, gathered, strict=False):
                        if isinstance(outcome, str):
                            results.leave_out(sequence, outcome)
                            continue
                        results.add(sequence, outcome)
                        line = describe(sequence, results.sequences[sequence.name])
                        print_line(line, sys.stdout, write=tqdm.write)
            bar.update(sum(len(one.frames) for one in group[1:]))


def follow(
    model: VisionTransformer, sequence: Sequence, args: argparse.Namespace, bar: Any
) -> dict[str, Any] | None:
    """Write the masks and overlays of a sequence; return its scores, None without annotations."""
    output = Path(args.output_dir)
    masks = segment(model, sequence, args, bar)
    stacks = [masks]
    if sequence.is_scored:
        truth = [read_mask(path, binary=sequence.binary) for path in sequence.annotations]
        stacks.append(np.stack(truth))
    with explain_write_errors(output):
        folder = output / sequence.name  # in the benchmark's layout: <sequence>/<frame>.png
        folder.mkdir(parents=True, exist_ok=True)
        for frame, mask in zip(sequence.frames, masks, strict=True):
            write_mask(mask, folder / f"{frame.stem}.png", binary=sequence.binary)
        if args.overlays != "none":
            write_overlays(sequence, stacks, output / "overlays", args)
    return score(masks, stacks[1], model.pos_embed.device) if sequence.is_scored else None


def checked_sequences(args: argparse.Namespace) -> tuple[list[Sequence], dict[str, str]]:
    """Return what find_sequences does for the flags, checked before the first is processed.

    Raises: DataError: see find_sequences. ConfigError: see working_size.
    """
    sequences, left_out = find_sequences(Path(args.data_path), split=args.split, year=args.year)
    for sequence in sequences:
        working_size(sequence.size, args.size)
    return sequences, left_out


@distributed.fail_together()
def build_model(args: argparse.Namespace, device: torch.device) -> VisionTransformer:
    """Build the network of the flags; raise ConfigError if it has no patch tokens."""
    model, _ = load_vit(args, device, reason="gives no patch tokens to compare")
    if model.patch_size > args.size:
        raise ConfigError(f"--size {args.size} is smaller than a {model.patch_size} px patch")
    return model


def davis_settings(
    args: argparse.Namespace, model: VisionTransformer, sequences: list[Sequence]
) -> dict[str, Any]:
    """Return the settings that masks and scores depend on."""
    flags = ("n_last_frames", "size_mask_neighborhood", "topk", "size", "split")
    return {
        **settings_of(args, model, *flags),
        "data_path": str(Path(args.data_path).resolve()),
        "year": "2016" if sequences[0].binary else "2017",
        "patch_size": model.patch_size,
    }


def working_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Return (height, width) of resized frames: short side `short`, long side a multiple of 64."""
    height, width = size
    long = short * max(size) // min(size) // LONG_SIDE_STEP * LONG_SIDE_STEP
    if long == 0:
        raise ConfigError(
            f"--size {short} resizes frames of {height} x {width} px to less than "
            f"{LONG_SIDE_STEP} px on the long side: pass a larger one"
        )
    return (long, short) if height > width else (short, long)


def prepare(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize and normalize frames [B, 3, H, W] uint8 as in the paper: [B, 3, *size] float32.

    The resize is OpenCV's: bilinear between the four nearest pixels without antialiasing, rounded
    to integers (OpenCV's fixed-point arithmetic may differ by one level).
    """
    images = frames.float()
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=False).round()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, PAPER_STD))
    return (images / 255 - mean) / std


@torch.no_grad()
def patch_features(
    model: VisionTransformer, sequence: Sequence, size: tuple[int, int], args: argparse.Namespace
) -> Iterator[Tensor]:
    """Yield the last block's patch tokens [h, w, D] of each frame, resized to `size`, in order."""
    grid = (size[0] // model.patch_size, size[1] // model.patch_size)
    read = partial(read_frame, conversion=conversion_of(args))
    for frames in load_batches(read, sequence.frames, args.bs, args.num_workers):
        images = prepare(torch.stack(frames).to(model.pos_embed.device), size)
        tokens = model.get_intermediate_layers(images, 1)[0]
        yield from tokens[:, 1:].unflatten(1, grid)


@torch.no_grad()
def segment(
    model: VisionTransformer, sequence: Sequence, args: argparse.Namespace, bar: Any
) -> NDArray[np.uint8]:
    """Return the masks [T, H, W] of a sequence: the given first one, and the predicted others."""
    first = first_mask(sequence)
    numbers = np.unique(np.append(first, np.uint8(0)))  # of the background and the objects
    size = working_size(sequence.size, args.size)
    grid = (size[0] // model.patch_size, size[1] // model.patch_size)
    labels = np.searchsorted(numbers, first).astype(np.uint8)
    soft_labels = propagate_video(
        patch_features(model, sequence, size, args),
        one_hot_patches(labels, len(numbers), grid).to(model.pos_embed.device),
        n_last_frames=args.n_last_frames,
        radius=args.size_mask_neighborhood,
        topk=args.topk,
    )
    masks = np.empty((len(sequence.frames), *sequence.size), np.uint8)
    masks[0] = first
    bar.update(1)
    for i, soft in enumerate(soft_labels, start=1):
        masks[i] = numbers[hard_labels(soft, model.patch_size, sequence.size)]
        bar.update(1)
    return masks


def write_overlays(
    sequence: Sequence, stacks: list[NDArray[np.uint8]], folder: Path, args: argparse.Namespace
) -> None:
    """Write <sequence>.png: some frames under their masks, with one row per stack of masks.

    Args:
        stacks: [T, H, W] each: the predicted masks, then the annotations if available.
        args: with --overlays all, also write every frame under its predicted mask,
            <sequence>/<frame>.jpg.
    """
    conversion = conversion_of(args)

    def draw(i: int, masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return overlay(np.asarray(conversion.read(sequence.frames[i])), masks[i])

    folder.mkdir(parents=True, exist_ok=True)
    frames = np.linspace(0, len(sequence.frames) - 1, SHEET_FRAMES).round().astype(int)
    rows = [[draw(i, masks) for i in np.unique(frames)] for masks in stacks]
    draw_sheet(rows, folder / f"{sequence.name}.png")
    if args.overlays == "all":
        (folder / sequence.name).mkdir(exist_ok=True)
        for i, path in enumerate(sequence.frames):
            picture = Image.fromarray(draw(i, stacks[0]))
            picture.save(folder / sequence.name / f"{path.stem}.jpg", quality=92)
