"""`fastdino davis`: objects marked in a video's first frame, followed by patch features alone.

Source: Caron et al. 2021, section 4.2.2, table 5, and the authors' eval_video_segmentation.py,
whose settings are the defaults. Scores are those of DAVIS 2017's semi-supervised benchmark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fastdino import distributed
from fastdino.augmentation.pillow import MEAN
from fastdino.config import check_at_least
from fastdino.environment import cpu_count
from fastdino.errors import ConfigError, DataError
from fastdino.evals.davis_dataset import (
    Sequence,
    find_sequences,
    read_frame,
    read_mask,
    write_mask,
)
from fastdino.evals.davis_scores import Results, describe, describe_total, score
from fastdino.evals.label_propagation import hard_labels, one_hot_patches, propagate_video
from fastdino.evals.mask_overlay import draw_sheet, overlay
from fastdino.evals.options import (
    add_network_flags,
    add_process_flags,
    load_vit,
    settings_of,
)
from fastdino.files import explain_write_errors
from fastdino.models.vit import VisionTransformer
from fastdino.runtime import choose_device

# The paper's script divides red by .228, where ImageNet's deviation is .229: its figures have it.
PAPER_STD = (0.228, 0.224, 0.225)
LONG_SIDE_STEP = 64  # the long side is rounded down to a multiple of it, in pixels
SHEET_FRAMES = 6
RESULTS = "davis.json"
OVERLAYS = "overlays"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino davis`: the paper's eval_video_segmentation.py's, then ours."""
    add_network_flags(parser, "architecture, a vit_*")
    add_process_flags(parser)
    add = parser.add_argument
    add("--output_dir", default=".", help="folder for masks, overlays and davis.json (.)")
    add("--data_path", default="/path/to/davis/", help="folder with JPEGImages/480p and the rest")
    add("--n_last_frames", type=int, default=7, help="frames before that labels come from (7)")
    add(
        "--size_mask_neighborhood",
        type=int,
        default=12,
        help="labels come from at most so many patches away; 0: from everywhere (12)",
    )
    add("--topk", type=int, default=5, help="patches that a patch's label comes from (5)")
    add("--bs", type=int, default=6, help="frames a forward pass (6)")
    add("--size", type=int, default=480, help="short side the frames are resized to (480)")
    add("--split", default="val", help="which list of ImageSets: val, train, test-dev (val)")
    add(
        "--year",
        choices=("auto", "2016", "2017"),
        default="auto",
        help="masks of many objects (2017) or of one (2016); auto: by the list that is there",
    )
    add(
        "--overlays",
        choices=("none", "sheet", "all"),
        default="sheet",
        help="pictures: six frames of a sequence above the truth (sheet), every frame too (all)",
    )


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino davis`."""
    check_at_least(args, 1, "topk", "bs", "size", "patch_size")
    check_at_least(args, 0, "n_last_frames", "size_mask_neighborhood", "num_workers")
    device = choose_device(args.device)
    with distributed.process_group(device, args.dist_url):
        sequences = distributed.from_main(lambda: checked_sequences(args))
        model = build_model(args, device)
        results = distributed.from_main(
            lambda: Results(Path(args.output_dir) / RESULTS, davis_settings(args, model, sequences))
        )
        left = distributed.from_main(lambda: what_is_left(results, sequences))
        evaluate(model, left, args, results, device)
        distributed.from_main(lambda: results.finish(sequences))
        if distributed.rank() == 0:
            print(describe_total(results.total))
    return 0


def what_is_left(results: Results, sequences: list[Sequence]) -> list[Sequence]:
    """The sequences that are not done; says which are."""
    left = []
    for sequence in sequences:
        if results.has(sequence):
            print(f"{sequence.name}: already there")
        else:
            left.append(sequence)
    return left


def evaluate(
    model: VisionTransformer,
    sequences: list[Sequence],
    args: argparse.Namespace,
    results: Results,
    device: torch.device,
) -> None:
    """Follows the objects of all sequences; process 0 takes the scores into its results.

    Of many processes each has one sequence of a round, which ends with the longest of them: they go
    by falling length, so that those of a round are about equally long.
    """
    rank, number = distributed.rank(), distributed.world_size()
    by_length = sorted(sequences, key=lambda one: len(one.frames), reverse=True)
    total = sum(len(one.frames) for one in sequences)
    quiet = rank > 0 or not sys.stderr.isatty()
    with tqdm(total=total, unit="frame", disable=quiet) as bar:
        for first in range(0, len(by_length), number):
            group = by_length[first : first + number]
            scores = None
            with distributed.together():
                if rank < len(group):
                    bar.set_description(group[rank].name)
                    scores = follow(model, group[rank], args, device, bar)
            found = distributed.gather(scores)
            with distributed.together():
                if rank == 0:
                    for sequence, its in zip(group, found, strict=False):
                        results.add(sequence, its)
                        line = describe(sequence, results.sequences[sequence.name])
                        tqdm.write(line, file=sys.stdout)
            bar.update(sum(len(one.frames) for one in group[1:]))


def follow(
    model: VisionTransformer,
    sequence: Sequence,
    args: argparse.Namespace,
    device: torch.device,
    bar: Any,
) -> dict[str, Any] | None:
    """Writes a sequence's masks and overlays; its scores, None where it has no truth."""
    output = Path(args.output_dir)
    masks = segment(model, sequence, args, device=device, bar=bar)
    truth = read_truth(sequence)
    with explain_write_errors(output):
        write_masks(sequence, masks, output)
        if args.overlays != "none":
            write_overlays(sequence, masks, truth, output, every=args.overlays == "all")
    return None if truth is None else score(masks, truth, device)


def checked_sequences(args: argparse.Namespace) -> list[Sequence]:
    """The sequences of the flags; a bad one ends it now, not after an hour.

    Raises: DataError: see find_sequences; a first mask without objects. ConfigError: frames of no
        size that works.
    """
    sequences = find_sequences(Path(args.data_path), split=args.split, year=args.year)
    for sequence in sequences:
        first_mask(sequence)
        working_size(sequence.size, args.size)
    return sequences


@distributed.together()
def build_model(args: argparse.Namespace, device: torch.device) -> VisionTransformer:
    """The network of the flags, on the device; raises ConfigError where it has no patch tokens."""
    model, _ = load_vit(args, device, reason="gives no patch tokens to compare")
    if model.patch_size > args.size:
        raise ConfigError(f"--size {args.size} is smaller than a {model.patch_size} px patch")
    return model


def davis_settings(
    args: argparse.Namespace, model: VisionTransformer, sequences: list[Sequence]
) -> dict[str, Any]:
    """What a sequence's masks and scores depend on."""
    flags = ("n_last_frames", "size_mask_neighborhood", "topk", "size", "split")
    return {
        **settings_of(args, model, *flags),
        "data_path": str(Path(args.data_path).resolve()),
        "year": "2016" if sequences[0].binary else "2017",
        "patch_size": model.patch_size,
    }


def first_mask(sequence: Sequence) -> np.ndarray:
    """The first annotation [H, W] uint8; raises DataError where it marks no object."""
    path = sequence.annotations[0]
    mask = read_mask(path, binary=sequence.binary)
    if not mask.any():
        raise DataError(
            f"sequence {sequence.name}: {path} marks no object to follow (255 is void; for masks "
            "of 0 and 255 say --year 2016)"
        )
    return mask


def working_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(height, width) a frame is resized to: short side `short`, long side a multiple of 64."""
    height, width = size
    long = short * max(size) // min(size) // LONG_SIDE_STEP * LONG_SIDE_STEP
    if long == 0:
        raise ConfigError(
            f"--size {short} makes frames of {height} x {width} px less than {LONG_SIDE_STEP} px "
            "long; say a larger one"
        )
    return (long, short) if height > width else (short, long)


def prepare(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames [B, 3, H, W] uint8 -> [B, 3, *size] float32, resized and normalised as the paper's.

    Its resize is OpenCV's: bilinear between the four nearest pixels, however much smaller, rounded
    to whole values (OpenCV's fixed point may end one level away).
    """
    images = frames.float()
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=False).round()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, PAPER_STD))
    return (images / 255 - mean) / std


@torch.no_grad()
def patch_features(
    model: VisionTransformer,
    sequence: Sequence,
    size: tuple[int, int],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """The last block's patch tokens [h, w, D] of each frame resized to `size`, in order.

    The next batch's frames are decoded while one is computed.
    """
    grid = (size[0] // model.patch_size, size[1] // model.patch_size)
    with ThreadPoolExecutor(max(1, min(workers, cpu_count()))) as pool:
        paths = iter(sequence.frames)
        coming = [pool.submit(read_frame, path) for path in islice(paths, batch_size)]
        while coming:
            frames = torch.stack([future.result() for future in coming])
            coming = [pool.submit(read_frame, path) for path in islice(paths, batch_size)]
            images = prepare(frames.to(device), size)
            tokens = model.get_intermediate_layers(images, 1)[0]
            yield from tokens[:, 1:].unflatten(1, grid)


@torch.no_grad()
def segment(
    model: VisionTransformer,
    sequence: Sequence,
    args: argparse.Namespace,
    *,
    device: torch.device,
    bar: Any,
) -> np.ndarray:
    """The masks [T, H, W] uint8 of a sequence: the first as given, the others found."""
    first = first_mask(sequence)
    numbers = np.unique(np.append(first, np.uint8(0)))  # of the background and the objects
    size = working_size(sequence.size, args.size)
    features = patch_features(
        model, sequence, size, batch_size=args.bs, workers=args.num_workers, device=device
    )
    grid = (size[0] // model.patch_size, size[1] // model.patch_size)
    labels = np.searchsorted(numbers, first).astype(np.uint8)
    soft_labels = propagate_video(
        features,
        one_hot_patches(labels, len(numbers), grid).to(device),
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


def read_truth(sequence: Sequence) -> np.ndarray | None:
    """All annotations [T, H, W] uint8 of a sequence; None where only the first is there."""
    if not sequence.is_scored:
        return None
    return np.stack([read_mask(path, binary=sequence.binary) for path in sequence.annotations])


def write_masks(sequence: Sequence, masks: np.ndarray, output: Path) -> None:
    """Writes a sequence's masks in the benchmark's layout: <sequence>/<frame>.png."""
    folder = output / sequence.name
    folder.mkdir(parents=True, exist_ok=True)
    for frame, mask in zip(sequence.frames, masks, strict=True):
        write_mask(mask, folder / f"{frame.stem}.png", binary=sequence.binary)


def write_overlays(
    sequence: Sequence, masks: np.ndarray, truth: np.ndarray | None, output: Path, *, every: bool
) -> None:
    """Writes overlays/<sequence>.png: frames with what was found, below them with what is true.

    Args:
        every: writes every frame's overlay too, overlays/<sequence>/<frame>.jpg.
    """
    folder = output / OVERLAYS
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.unique(np.linspace(0, len(masks) - 1, SHEET_FRAMES).round().astype(int))
    frames = {i: read_frame(sequence.frames[i]).permute(1, 2, 0).numpy() for i in chosen}
    stacks = [masks] if truth is None else [masks, truth]
    rows = [[overlay(frame, stack[i]) for i, frame in frames.items()] for stack in stacks]
    draw_sheet(rows, folder / f"{sequence.name}.png")
    if every:
        (folder / sequence.name).mkdir(exist_ok=True)
        for path, mask in zip(sequence.frames, masks, strict=True):
            picture = overlay(read_frame(path).permute(1, 2, 0).numpy(), mask)
            Image.fromarray(picture).save(folder / sequence.name / f"{path.stem}.jpg", quality=92)
