"""`fastdino shapes`: a small labelled image set, drawn from a seed, with nothing to download.

Twelve classes that differ in form alone; colour, texture, size, place, rotation and background
vary independently of the class. Beside the pictures there are their object masks, and a few short
clips in which objects pass in front of each other, in the layout of DAVIS 2017:

    train/<class>/*.jpg  val/<class>/*.jpg          an ImageFolder
    masks/{train,val}/<class>/*.png                 the objects, 0 or 255
    davis/{JPEGImages,Annotations}/480p/<clip>/     frames, and the visible part of each object
    davis/ImageSets/2017/{train,val}.txt
    shapes.json                                     the settings; written last

Every picture has a generator of its own, keyed by (seed, split, class, index): a larger set
contains the smaller one. shapes_drawing.py does the drawing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino.data import shapes_drawing as drawing
from fastdino.environment import cpu_count
from fastdino.errors import ConfigError, DataError

CLASSES = tuple(drawing.FORMS)
SPLITS = ("train", "val")
CLIP_WIDTH, CLIP_HEIGHT = 854, 480

_VERSION = 1  # of the drawing: raise it when the same settings give other pictures
_CLIP_MARGIN = 32  # pixels by which a clip's background is larger than its frames, on each side
_CHUNK = 16  # pictures in one job of a worker
_MAX_WORKERS = 8  # unless more are asked for; the default set is a matter of seconds

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Flag:
    default: int
    smallest: int
    largest: int
    help: str


_FLAGS = {
    "train_per_class": _Flag(100, 1, 99_999, "Training images of each class."),
    "val_per_class": _Flag(25, 1, 99_999, "Validation images of each class."),
    "size": _Flag(128, 32, 1024, "Side of the square images, in pixels."),
    "clips": _Flag(3, 0, 99, "Video clips in the DAVIS layout; 0: none."),
    "frames": _Flag(24, 2, 999, "Frames of each clip."),
    "seed": _Flag(0, 0, 2**63 - 1, "Same seed, same pictures."),
}


@dataclass(frozen=True)
class _Settings:
    train_per_class: int
    val_per_class: int
    size: int
    clips: int
    frames: int
    seed: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            flag = _FLAGS[name]
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not flag.smallest <= value <= flag.largest:
                allowed = f"an integer from {flag.smallest} to {flag.largest}"
                raise ConfigError(f"--{name} is {value!r}; allowed: {allowed}")

    def record(self) -> dict[str, int]:
        """What shapes.json holds."""
        return {"version": _VERSION} | dataclasses.asdict(self)


def write_shapes(
    root: str | os.PathLike[str],
    *,
    train_per_class: int = 100,
    val_per_class: int = 25,
    size: int = 128,
    clips: int = 3,
    frames: int = 24,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the set under root, or does nothing if root already holds it, complete.

    The same settings give the same bytes with the same Pillow, whatever the number of workers. An
    interrupted run is taken up by running it again.

    Args:
        root: a folder that is new, empty, or holds this very set.
        train_per_class: training images of each of the twelve classes.
        val_per_class: validation images of each class.
        size: side of the images, in pixels; clips are always 854 x 480.
        clips: how many clips; 0 for no davis/ at all.
        frames: frames of each clip.
        seed: what everything is drawn from.
        workers: processes that draw; None: one a core it may use, eight at most.
        progress: called with (pictures written, pictures in all) as the work goes on.

    Raises:
        ValueError: a setting is out of range, or root holds something else or cannot be written.

    """
    settings = _Settings(train_per_class, val_per_class, size, clips, frames, seed)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers!r}; allowed: an integer from 1, or None")
    root = Path(root)
    if _is_complete(root, settings):
        _log.info("%s is already complete, nothing written", root)
        return
    with _naming(root):
        _write_set(root, settings, workers, progress or (lambda done, total: None))


@contextmanager
def _naming(root: Path) -> Iterator[None]:
    """Turns the system's errors into one that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"--output_dir {root} cannot be written or read: {reason}") from error


def _write_set(
    root: Path, settings: _Settings, workers: int | None, progress: Callable[[int, int], None]
) -> None:
    root.mkdir(parents=True, exist_ok=True)
    marker = root / "shapes.json.part"
    marker.write_text(json.dumps(settings.record(), indent=2) + "\n")
    stills = len(CLASSES) * (settings.train_per_class + settings.val_per_class)
    total = stills + settings.clips * settings.frames
    done = 0
    for count in _results(_jobs(root, settings), workers):
        done += count
        progress(done, total)
    _write_clip_lists(root / "davis", settings.clips)
    os.replace(marker, root / "shapes.json")


def _is_complete(root: Path, settings: _Settings) -> bool:
    """Whether root holds just this set; a DataError if it holds anything else."""
    with _naming(root):
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            return False
    for name in ("shapes.json", "shapes.json.part"):
        marker = root / name
        if not marker.is_file():
            continue
        try:
            found = json.loads(marker.read_text())
        except ValueError:
            found = None
        if found == settings.record():
            return name == "shapes.json"
        raise DataError(
            f"--output_dir {root} holds a shapes set with other settings ({marker.name} says "
            f"{found}, wanted {settings.record()}); choose another folder or delete this one"
        )
    raise DataError(
        f"--output_dir {root} holds something that is not a shapes set; "
        "choose a new or empty folder"
    )


def _jobs(root: Path, settings: _Settings) -> list[Callable[[], int]]:
    """The work in pieces, each of which returns the number of its pictures; longest first."""
    jobs: list[Callable[[], int]] = [
        partial(_write_clip, root / "davis", clip, settings.frames, settings.seed)
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
    # Forked workers start at once and need no `if __name__ == "__main__"` in the caller's script;
    # Python 3.12 warns of forking beside other threads, but these children only draw.
    fork = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            results = pool.map(_run, jobs)
        yield from results


def _run(job: Callable[[], int]) -> int:
    return job()


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _write_stills(root: Path, settings: _Settings, split: str, form: str, chunk: range) -> int:
    images, masks = root / split / form, root / "masks" / split / form
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for index in chunk:
        rng = _generator(settings.seed, SPLITS.index(split), CLASSES.index(form), index)
        canvas, objects = drawing.still(form, settings.size, rng)
        name = f"{form}_{index:05d}"
        drawing.to_image(canvas).save(images / f"{name}.jpg", quality=92)
        Image.fromarray((objects > 0).astype(np.uint8) * 255).save(masks / f"{name}.png")
    return len(chunk)


@dataclass(frozen=True)
class _Actor:
    """An object of a clip and how it moves; time runs from 0 to 1."""

    outline: drawing.Points
    texture: drawing.Texture
    meeting: tuple[float, float]  # where it is at time 1/2
    reach: tuple[float, float]  # from there to where it is at time 0
    sway: tuple[float, float]  # how far it is carried sideways on its way
    scale: float
    swell: float  # relative change of scale
    angle: float
    spin: float  # change of angle from time 0 to 1

    def pose(self, moment: float) -> drawing.Pose:
        away, aside = math.cos(math.pi * moment), math.sin(2 * math.pi * moment)
        return drawing.Pose(
            x=self.meeting[0] + away * self.reach[0] + aside * self.sway[0],
            y=self.meeting[1] + away * self.reach[1] + aside * self.sway[1],
            scale=self.scale * (1 + self.swell * aside),
            angle=self.angle + self.spin * (moment - 0.5),
        )


def _cast(rng: np.random.Generator, paints: drawing.Paints) -> list[_Actor]:
    """Two or three objects that set out from around the frame and meet in the middle half-way."""
    count = int(rng.integers(2, 4))
    forms = rng.permutation(len(CLASSES))[:count]
    hue, heading = rng.random(), rng.uniform(-0.5, 0.5)
    # They pass each other at just under half their size: they overlap, and none disappears.
    apart = 0.225 / math.sin(math.pi / count)
    actors = []
    for i, form in enumerate(forms):
        own_hue = hue + i / count
        own_paints = dataclasses.replace(paints, hue=(own_hue, own_hue + 0.1))
        scale = CLIP_HEIGHT * rng.uniform(0.34, 0.42)
        direction = heading + 2 * math.pi * i / count
        cos, sin = math.cos(direction), math.sin(direction)
        sway = rng.uniform(-0.06, 0.06) * CLIP_HEIGHT
        actors.append(
            _Actor(
                outline=drawing.outline(CLASSES[form], rng),
                texture=drawing.Texture.draw(rng, own_paints, (2.5, 5)),
                meeting=(
                    CLIP_WIDTH / 2 - apart * scale * sin,
                    CLIP_HEIGHT / 2 + apart * scale * cos,
                ),
                reach=(0.33 * CLIP_WIDTH * cos, 0.26 * CLIP_HEIGHT * sin),
                sway=(-sway * sin, sway * cos),
                scale=scale,
                swell=rng.uniform(-0.12, 0.12),
                angle=math.radians(rng.uniform(-30, 30)),
                spin=math.radians(rng.uniform(-80, 80)),
            )
        )
    return actors


def draw_clip(
    index: int, frames: int, seed: int
) -> Iterator[tuple[Image.Image, NDArray[np.uint8]]]:
    """The frames of one clip and their labels [480, 854]: 0 background, 1..n the objects seen."""
    rng = _generator(seed, len(SPLITS), index)
    scheme = drawing.Scheme.draw(rng)
    actors = _cast(rng, scheme.object)
    drift = rng.uniform(0, 2 * math.pi, 2)
    margin = 2 * _CLIP_MARGIN
    scenery = drawing.to_image(
        drawing.background(rng, CLIP_HEIGHT + margin, CLIP_WIDTH + margin, scheme.background)
    )
    for frame in range(frames):
        moment = frame / (frames - 1)
        left, top = _CLIP_MARGIN * (1 + 0.9 * np.sin(drift + math.pi * moment))
        window = scenery.transform(
            (CLIP_WIDTH, CLIP_HEIGHT),
            Image.Transform.AFFINE,
            (1, 0, left, 0, 1, top),
            Image.Resampling.BILINEAR,
        )
        canvas = np.asarray(window, np.float32) / np.float32(255)
        labels = np.zeros((CLIP_HEIGHT, CLIP_WIDTH), np.uint8)
        for label, actor in enumerate(actors, start=1):  # each in front of those before it
            pose = actor.pose(moment)
            cover = drawing.paint(canvas, actor.outline, pose, actor.texture, scheme.halo)
            labels[cover >= 0.5] = label
        yield drawing.to_image(canvas), labels


def davis_palette() -> list[int]:
    """The palette of DAVIS and PASCAL VOC, flat: the bits of an id dealt out to R, G, B in turn."""
    palette = []
    for label in range(256):
        for channel in range(3):
            bits = [(label >> (3 * k + channel)) & 1 for k in range(3)]
            palette.append(sum(bit << (7 - k) for k, bit in enumerate(bits)))
    return palette


def _clip_name(index: int) -> str:
    return f"shapes_{index:02d}"


def _write_clip(root: Path, index: int, frames: int, seed: int) -> int:
    images = root / "JPEGImages" / "480p" / _clip_name(index)
    annotations = root / "Annotations" / "480p" / _clip_name(index)
    for folder in (images, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    palette = davis_palette()
    for frame, (picture, labels) in enumerate(draw_clip(index, frames, seed)):
        picture.save(images / f"{frame:05d}.jpg", quality=92)
        annotation = Image.fromarray(labels)
        annotation.putpalette(palette)
        annotation.save(annotations / f"{frame:05d}.png")
    return frames


def _write_clip_lists(root: Path, clips: int) -> None:
    """Every third clip is for training; the evaluation, which needs no training, gets the rest."""
    if clips == 0:
        return
    folder = root / "ImageSets" / "2017"
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        wanted = [i for i in range(clips) if (i % 3 == 2) == (split == "train")]
        (folder / f"{split}.txt").write_text("".join(_clip_name(i) + "\n" for i in wanted))


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino shapes`."""
    parser.add_argument(
        "--output_dir", required=True, help="Folder to write to: new, empty, or this very set."
    )
    for name, flag in _FLAGS.items():
        text = f"{flag.help} (default: {flag.default})"
        parser.add_argument(f"--{name}", type=int, default=flag.default, help=text)


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino shapes`; a bar on a terminal, then one line that says what was done."""
    values = {name: getattr(args, name) for name in _FLAGS}
    settings, root = _Settings(**values), Path(args.output_dir)
    if _is_complete(root, settings):
        print(f"{root}: already complete with these settings, nothing written")
        return 0
    from tqdm import tqdm

    start = time.monotonic()
    with tqdm(unit="image", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        write_shapes(root, **values, progress=progress)
    n_train, n_val = len(CLASSES) * settings.train_per_class, len(CLASSES) * settings.val_per_class
    print(
        f"{root}: {len(CLASSES)} classes, {n_train} training and {n_val} validation images of "
        f"{settings.size} px, {settings.clips} clips of {settings.frames} frames, "
        f"in {time.monotonic() - start:.1f} s"
    )
    return 0
