"""Clips of the shapes dataset: objects that move, meet and occlude each other, as in DAVIS 2017.

Objects stand out by lightness: in a clip their luma is in one band and the whole background's in
another (`Scheme`), independently of the hues.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino.data import shapes_drawing as drawing
from fastdino.data.shapes_drawing import CLASSES, SPLITS

CLIP_WIDTH, CLIP_HEIGHT = 854, 480

_CLIP_MARGIN = 32  # pixels by which a clip's background exceeds its frames on each side


@dataclass(frozen=True)
class Scheme:
    """Colors of a scene: the luma ranges of objects and background never overlap."""

    object: drawing.Paints
    background: drawing.Paints
    halo: float  # gray that the background around an object is blended to, for contrast

    @staticmethod
    def draw(rng: drawing.Rng) -> Scheme:
        """Draw light objects on a dark background or the reverse, at least 0.24 apart in luma."""
        middle = rng.uniform(0.42, 0.58)
        dark = (max(0.05, middle - 0.42), middle - 0.12)
        light = (middle + 0.12, min(0.96, middle + 0.42))
        vivid, pale = (0.6, 1.0), (0.1, 0.6)
        if rng.random() < 0.5:
            return Scheme(drawing.Paints(light, vivid), drawing.Paints(dark, pale), 0.0)
        return Scheme(drawing.Paints(dark, vivid), drawing.Paints(light, pale), 1.0)


def background(rng: drawing.Rng, height: int, width: int, paints: drawing.Paints) -> drawing.Array:
    """Draw a cluttered canvas [height, width, 3] using only the given paints."""
    side = min(height, width)
    crowd = max(height, width) / side  # a long canvas holds proportionally more
    canvas = np.empty((height, width, 3), np.float32)
    columns = np.arange(width, dtype=np.float32)[None]
    rows = np.arange(height, dtype=np.float32)[:, None]
    base = drawing.Texture.draw(rng, paints, (4, 10))
    canvas[:] = base.sample(drawing.Pose(width / 2, height / 2, side), columns, rows)
    clutter = (
        (drawing.blob, 5, 0.15, 0.35),
        (drawing.stroke, 4, 0.5, 1.2),
        (drawing.fragment, 7, 0.2, 0.45),
    )
    for shape, count, smallest, largest in clutter:
        for _ in range(round(count * crowd)):
            scale = rng.uniform(smallest, largest)
            x, y, angle = rng.uniform(0, (width, height, 2 * math.pi)).tolist()
            texture = drawing.Texture.draw(rng, paints, (4 * scale, 10 * scale))
            drawing.paint(canvas, shape(rng), drawing.Pose(x, y, scale * side, angle), texture)
    return canvas


@dataclass(frozen=True)
class _Actor:
    """An object of a clip and its motion; time runs from 0 to 1."""

    outline: drawing.Points
    texture: drawing.Texture
    meeting: drawing.Points  # (x, y) at time 1/2
    reach: drawing.Points  # offset from there at time 0
    sway: drawing.Points  # amplitude of the sideways motion
    scale: float
    swell: float  # relative change of scale
    angle: float
    spin: float  # change of angle from time 0 to 1

    def pose(self, moment: float) -> drawing.Pose:
        away, aside = math.cos(math.pi * moment), math.sin(2 * math.pi * moment)
        x, y = (self.meeting + away * self.reach + aside * self.sway).tolist()
        angle = self.angle + self.spin * (moment - 0.5)
        return drawing.Pose(x, y, self.scale * (1 + self.swell * aside), angle)


def _draw_actors(rng: np.random.Generator, paints: drawing.Paints) -> list[_Actor]:
    """Draw two or three objects that start at the border and meet in the middle half-way."""
    count = int(rng.integers(2, 4))
    forms = rng.permutation(len(CLASSES))[:count]
    hue, heading = rng.random(), rng.uniform(-0.5, 0.5)
    # They pass each other at just under half their size, so that they overlap but stay visible.
    apart = 0.225 / math.sin(math.pi / count)
    actors = []
    for i, form in enumerate(forms):
        first_hue = hue + i / count
        actor_paints = dataclasses.replace(paints, hue=(first_hue, first_hue + 0.1))
        scale = CLIP_HEIGHT * rng.uniform(0.34, 0.42)
        direction = heading + 2 * math.pi * i / count
        cos, sin = math.cos(direction), math.sin(direction)
        sideways = np.array([-sin, cos])
        sway = rng.uniform(-0.06, 0.06) * CLIP_HEIGHT
        actors.append(
            _Actor(
                outline=drawing.outline(CLASSES[form], rng),
                texture=drawing.Texture.draw(rng, actor_paints, (2.5, 5)),
                meeting=np.array([CLIP_WIDTH, CLIP_HEIGHT]) / 2 + apart * scale * sideways,
                reach=np.array([0.33 * CLIP_WIDTH * cos, 0.26 * CLIP_HEIGHT * sin]),
                sway=sway * sideways,
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
    """Yield each frame of a clip with its labels [480, 854]: 0 background, 1..n objects."""
    rng = drawing.generator(seed, len(SPLITS), index)
    scheme = Scheme.draw(rng)
    actors = _draw_actors(rng, scheme.object)
    drift = rng.uniform(0, 2 * math.pi, 2)
    margin = 2 * _CLIP_MARGIN
    scenery = drawing.to_image(
        background(rng, CLIP_HEIGHT + margin, CLIP_WIDTH + margin, scheme.background)
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
        for label, actor in enumerate(actors, start=1):  # later objects are in front
            pose = actor.pose(moment)
            cover = drawing.paint(canvas, actor.outline, pose, actor.texture, scheme.halo)
            labels[cover >= 0.5] = label
        yield drawing.to_image(canvas), labels


def davis_palette() -> list[int]:
    """Return the flat palette of DAVIS and PASCAL VOC: an id's bits go to R, G, B in rotation."""
    return [
        sum(((label >> (3 * k + channel)) & 1) << (7 - k) for k in range(3))
        for label in range(256)
        for channel in range(3)
    ]


def _clip_name(index: int) -> str:
    return f"shapes_{index:02d}"


def write_clip(root: Path, index: int, frames: int, seed: int) -> int:
    """Write the frames and annotations of a clip below the folder davis/; return their number."""
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


def write_clip_lists(root: Path, clips: int) -> None:
    """List every third clip for training and the rest for evaluation, which needs no training."""
    if clips == 0:
        return
    folder = root / "ImageSets" / "2017"
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        listed = [i for i in range(clips) if (i % 3 == 2) == (split == "train")]
        (folder / f"{split}.txt").write_text("".join(_clip_name(i) + "\n" for i in listed))
