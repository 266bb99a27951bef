"""`fastdino shapes`: a small labelled dataset, generated from a seed, with no download.

Twelve classes of objects, in scenery that says nothing about the class, with object masks; and
short clips in which objects occlude each other, in the layout of DAVIS 2017:

    train/<class>/*.jpg  val/<class>/*.jpg          an ImageFolder
    masks/{train,val}/<class>/*.png                 object masks, 0 or 255
    davis/{JPEGImages,Annotations}/480p/<clip>/     frames, and the visible part of each object
    davis/ImageSets/2017/{train,val}.txt
    shapes.json                                     the settings; written last

Each image has a separate generator keyed by (seed, split, class, index), so a larger dataset
contains the smaller one. shapes_stills.py and shapes_clips.py draw the images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdino.config import user_path
from fastdino.data.shapes_clips import write_clip, write_clip_lists
from fastdino.data.shapes_drawing import CLASSES, SPLITS, generator, to_image
from fastdino.data.shapes_stills import draw_patchworks, still
from fastdino.environment import cpu_count
from fastdino.errors import ConfigError, DataError
from fastdino.files import open_locked
from fastdino.terminal import print_out

_VERSION = 2  # of the images: increase it when the same settings give other images
_CHUNK = 16  # images per job of a worker
_MAX_WORKERS = 8  # default limit: the default dataset takes seconds


def _setting(default: int, smallest: int, largest: int, help: str) -> Any:
    return field(default=default, metadata={"range": (smallest, largest), "help": help})


@dataclass(frozen=True)
class _Settings:
    train_per_class: int = _setting(100, 1, 99_999, "Training images per class.")
    val_per_class: int = _setting(25, 1, 99_999, "Validation images per class.")
    size: int = _setting(128, 32, 1024, "Side of the square images, in pixels.")
    clips: int = _setting(3, 0, 99, "Video clips in the DAVIS layout; 0: none.")
    frames: int = _setting(24, 2, 999, "Frames per clip.")
    seed: int = _setting(0, 0, 2**63 - 1, "Seed of all images.")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value, (smallest, largest) = getattr(self, setting.name), setting.metadata["range"]
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not smallest <= value <= largest:
                allowed = f"an integer from {smallest} to {largest}"
                raise ConfigError(f"--{setting.name} is {value!r}; allowed: {allowed}")

    def record(self) -> dict[str, int]:
        """Return the content of shapes.json."""
        return {"version": _VERSION} | dataclasses.asdict(self)


def write_shapes(
    root: str | os.PathLike[str],
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: int,
) -> bool:
    """Write the dataset to root, unless root already holds it completely.

    The same settings and Pillow version give the same bytes for any number of workers. Running it
    again completes an interrupted run.

    Args:
        root: a folder that is new, empty, or holds this dataset.
        workers: processes that draw; None: one per available core, at most eight.
        progress: called with (images written, total images) during the work.
        settings: train_per_class (100) and val_per_class (25), images of each of the twelve
            classes; size (128), side of the images in pixels; clips (3) of 854 x 480 pixels, 0 for
            no davis/ folder; frames (24) per clip; seed (0).

    Returns: whether anything was written.

    Raises:
        ValueError: a setting is out of range, or root holds something else or cannot be written.
    """
    values = _Settings(**settings)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers!r}; allowed: an integer from 1, or None")
    root = Path(root)
    if _is_complete(root, values):
        return False
    with _os_errors(root):
        _write_dataset(root, values, workers, progress or (lambda done, total: None))
    return True


@contextmanager
def _os_errors(root: Path) -> Iterator[None]:
    """Convert errors of the operating system to a DataError that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"--output_dir {root} cannot be written or read: {reason}") from error


def _write_dataset(
    root: Path, settings: _Settings, workers: int | None, progress: Callable[[int, int], None]
) -> None:
    root.mkdir(parents=True, exist_ok=True)
    marker = root / "shapes.json.part"
    lock, _ = open_locked(marker, wait=True)
    try:
        if (root / "shapes.json").exists():  # another process has written it meanwhile
            marker.unlink(missing_ok=True)
            _is_complete(root, settings)  # else it has other settings
            return
        os.truncate(lock, 0)
        os.pwrite(lock, (json.dumps(settings.record(), indent=2) + "\n").encode(), 0)
        _write_images(root, settings, workers, progress)
        os.replace(marker, root / "shapes.json")
    finally:
        os.close(lock)


def _write_images(
    root: Path, settings: _Settings, workers: int | None, progress: Callable[[int, int], None]
) -> None:
    stills = len(CLASSES) * (settings.train_per_class + settings.val_per_class)
    total = stills + settings.clips * settings.frames
    done = 0
    draw_patchworks(settings.size, settings.seed)  # before workers are forked, which share them
    for count in _results(_jobs(root, settings), workers):
        done += count
        progress(done, total)
    write_clip_lists(root / "davis", settings.clips)


def _is_complete(root: Path, settings: _Settings) -> bool:
    """Return whether root holds exactly this dataset; raise DataError if it holds another."""
    with _os_errors(root):
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            return False
    for name in ("shapes.json", "shapes.json.part"):
        marker = root / name
        if not marker.is_file():
            continue
        if not marker.stat().st_size:  # another process is about to begin
            return False
        try:
            record = json.loads(marker.read_text())
        except ValueError:
            record = None
        if record == settings.record():
            return name == "shapes.json"
        raise DataError(
            f"--output_dir {root} holds a shapes dataset with other settings ({marker.name} has "
            f"{record}, expected {settings.record()}); choose another folder or delete this one"
        )
    raise DataError(
        f"--output_dir {root} is not empty and holds no shapes dataset; "
        "choose a new or empty folder"
    )


def _jobs(root: Path, settings: _Settings) -> list[Callable[[], int]]:
    """Split the work into jobs that return their number of images, longest first."""
    jobs: list[Callable[[], int]] = [
        partial(write_clip, root / "davis", clip, settings.frames, settings.seed)
        for clip in range(settings.clips)
    ]
    counts = {"train": settings.train_per_class, "val": settings.val_per_class}
    for split, count in counts.items():
        for form in CLASSES:
            for first in range(0, count, _CHUNK):
                chunk = range(first, min(first + _CHUNK, count))
                jobs.append(partial(_write_stills, root, settings, split, form, chunk))
    return jobs


def _results(jobs: list[Callable[[], int]], workers: int | None) -> Iterator[int]:
    if workers is None:
        workers = min(cpu_count(), _MAX_WORKERS)
    workers = min(workers, len(jobs))
    if workers == 1:
        yield from map(_run, jobs)
        return
    # Forked workers start fast and need no `if __name__ == "__main__"` in the caller's script.
    # Python 3.12 warns about forking a process with threads, but these children only draw.
    fork = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            results = pool.map(_run, jobs)
        yield from results


def _run(job: Callable[[], int]) -> int:
    return job()


def _write_stills(root: Path, settings: _Settings, split: str, form: str, chunk: range) -> int:
    images, masks = root / split / form, root / "masks" / split / form
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for index in chunk:
        rng = generator(settings.seed, SPLITS.index(split), CLASSES.index(form), index)
        canvas, objects = still(form, settings.size, rng, settings.seed)
        name = f"{form}_{index:05d}"
        to_image(canvas).save(images / f"{name}.jpg", quality=92)
        Image.fromarray((objects > 0).astype(np.uint8) * 255).save(masks / f"{name}.png")
    return len(chunk)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino shapes`."""
    parser.add_argument(
        "--output_dir",
        type=user_path,
        required=True,
        help="Folder to write to: new, empty, or this dataset's.",
    )
    for setting in dataclasses.fields(_Settings):
        text = f"{setting.metadata['help']} (default: {setting.default})"
        parser.add_argument(f"--{setting.name}", type=int, default=setting.default, help=text)


def main(args: argparse.Namespace) -> int:
    """Run `fastdino shapes`: show a progress bar on a terminal, then print a summary line."""
    from tqdm import tqdm

    root, start = Path(args.output_dir), time.monotonic()
    settings = _Settings(**{name: getattr(args, name) for name in _Settings.__annotations__})
    with tqdm(unit="image", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        written = write_shapes(root, **dataclasses.asdict(settings), progress=progress)
    if not written:
        print_out(f"{root}: already complete with these settings, nothing written")
        return 0
    n_train, n_val = len(CLASSES) * settings.train_per_class, len(CLASSES) * settings.val_per_class
    print_out(
        f"{root}: {len(CLASSES)} classes, {n_train} training and {n_val} validation images of "
        f"{settings.size} px, {settings.clips} clips of {settings.frames} frames, "
        f"in {time.monotonic() - start:.1f} s"
    )
    return 0
