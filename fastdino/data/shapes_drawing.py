"""Forms, colors and textures of the images and clips of the shapes dataset.

An object is an outline (a closed polygon), a Pose that places it on the canvas, and a Texture that
fills it. Outlines and textures use object coordinates, so a texture moves with its object and a
scene can be drawn at any size.

Canvases are float32 RGB arrays [H, W, 3] in 0..1; points are [N, 2], x to the right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.float32]
Points = NDArray[np.float64]
Rng = np.random.Generator

SUPERSAMPLING = 4  # factor of the finer grid on which polygons are filled
LUMA = (0.299, 0.587, 0.114)
TEXTURES = ("flat", "gradient", "stripes", "dots", "checks", "noise")


def _arc(start: float, stop: float, count: int = 48, radius: float = 1.0) -> Points:
    """Return points of a circle's arc between two angles in turns, both ends included."""
    angle = 2 * math.pi * np.linspace(start, stop, count)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _ribbon(line: Points, width: float) -> Points:
    """Return the outline of a line drawn with a broad pen."""
    along = np.gradient(line, axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    side = 0.5 * width * np.stack([-along[:, 1], along[:, 0]], axis=1)
    return np.concatenate([line + side, (line - side)[::-1]])


def _arrow(rng: Rng) -> Points:
    shaft, neck = rng.uniform(0.14, 0.2), rng.uniform(0.0, 0.12)
    top = [(-1.0, -shaft), (neck, -shaft), (neck, -0.62), (1.0, 0.0)]
    return np.array([*top, *((x, -y) for x, y in top[-2::-1])])


def _bolt(rng: Rng) -> Points:
    slant = rng.uniform(0.1, 0.2)
    half = [(0.3 + slant, -1.0), (-0.55, 0.12), (-0.08, 0.12)]
    return np.array(half + [(-x, -y) for x, y in half])


def _crescent(rng: Rng) -> Points:
    horn = rng.uniform(0.11, 0.14)  # angle of the tips, in turns from the open side
    bite = rng.uniform(0.42, 0.5)  # how far the cut-out circle's centre is shifted
    x, y = math.cos(2 * math.pi * horn), math.sin(2 * math.pi * horn)
    tip = math.atan2(y, x - bite) / (2 * math.pi)
    inner = _arc(1 - tip, tip, radius=math.hypot(x - bite, y)) + np.array([bite, 0.0])
    return np.concatenate([_arc(horn, 1 - horn), inner])


def _cross(rng: Rng) -> Points:
    a = rng.uniform(0.26, 0.36)
    quarter = np.array([(a, -1.0), (a, -a), (1.0, -a)])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _disk(rng: Rng) -> Points:
    return _arc(0, 1)


def _heart(rng: Rng) -> Points:
    t = 2 * math.pi * np.linspace(0, 1, 64)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


def _hourglass(rng: Rng) -> Points:
    waist, half = rng.uniform(0.06, 0.14), rng.uniform(0.66, 0.8)
    right = [(half, -1.0), (waist, 0.0), (half, 1.0)]
    return np.array(right + [(-x, y) for x, y in right[::-1]])


def _ring(rng: Rng) -> Points:
    return np.concatenate([_arc(0, 1), _arc(1, 0, radius=rng.uniform(0.5, 0.64))])


def _spiral(rng: Rng) -> Points:
    turns = rng.uniform(1.9, 2.1)
    t = np.linspace(0.12, 1, 96)
    return _ribbon(_arc(0.12 * turns, turns, 96) * t[:, None], rng.uniform(0.22, 0.26))


def _square(rng: Rng) -> Points:
    return np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])


def _star(rng: Rng) -> Points:
    outer, inner = _arc(-0.25, 0.55, 5), _arc(-0.15, 0.65, 5, radius=rng.uniform(0.38, 0.46))
    return np.stack([outer, inner], axis=1).reshape(10, 2)


def _triangle(rng: Rng) -> Points:
    return _arc(-0.25, 5 / 12, 3)


FORMS: dict[str, Callable[[Rng], Points]] = {
    function.__name__[1:]: function
    for function in (
        _arrow, _bolt, _crescent, _cross, _disk, _heart, _hourglass, _ring, _spiral, _square, _star,
        _triangle,
    )
}  # fmt: skip


CLASSES = tuple(FORMS)  # of the dataset, in the order of their labels
SPLITS = ("train", "val")


def normalized(points: Points) -> Points:
    """Center the outline's bounding box on 0 and scale its longer side to 1."""
    low, high = points.min(axis=0), points.max(axis=0)
    centred: Points = (points - (low + high) / 2) / (high - low).max()
    return centred


def outline(form: str, rng: Rng) -> Points:
    """Draw a normalized outline of a form, possibly mirrored, of slightly random proportions."""
    stretch = rng.uniform(0.88, 1.0, 2) * (rng.choice((-1, 1)), 1)
    return normalized(FORMS[form](rng) * stretch)


def area(points: Points) -> float:
    """Return the area of an outline that does not cross itself (the shoelace formula)."""
    x, y = points.T
    return 0.5 * abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))))


@dataclass(frozen=True)
class Pose:
    """Position of an outline: center and scale in pixels, angle in radians (clockwise)."""

    x: float
    y: float
    scale: float
    angle: float = 0.0

    def place(self, points: Points) -> Points:
        """Map object coordinates to canvas pixels; both [N, 2]."""
        cos, sin = self.scale * math.cos(self.angle), self.scale * math.sin(self.angle)
        placed: Points = points @ np.array([[cos, sin], [-sin, cos]]) + (self.x, self.y)
        return placed

    def unplace(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Map canvas coordinates to object coordinates: x [1, W] and y [H, 1] to [H, W]."""
        cos, sin = math.cos(self.angle) / self.scale, math.sin(self.angle) / self.scale
        x, y = x - np.float32(self.x), y - np.float32(self.y)
        return (
            x * np.float32(cos) + y * np.float32(sin),
            y * np.float32(cos) - x * np.float32(sin),
        )


@dataclass(frozen=True)
class Paints:
    """Ranges of random colors: hue in turns, saturation and luma, each within 0..1."""

    luma: tuple[float, float]
    saturation: tuple[float, float]
    hue: tuple[float, float] = (0.0, 1.0)


def colour(rng: Rng, paints: Paints) -> Array:
    """Draw a random color [3] whose luma is within the range of the paints."""
    turn, saturation = 6 * rng.uniform(*paints.hue), rng.uniform(*paints.saturation)
    # Plain floats: NumPy takes ten times as long for three numbers.
    spread = [min(max(abs((turn + k) % 6 - 3) - 1, 0), 1) for k in (0, 4, 2)]
    rgb = [1 - saturation * (1 - s) for s in spread]
    luma = sum(weight * c for weight, c in zip(LUMA, rgb, strict=True))
    wanted = rng.uniform(*paints.luma)
    if luma > wanted:
        rgb = [c * wanted / luma for c in rgb]
    else:
        rgb = [c + (1 - c) * (wanted - luma) / (1 - luma) for c in rgb]
    return np.array(rgb, np.float32)


@dataclass(frozen=True)
class Texture:
    """A pattern that mixes two colors."""

    kind: str
    colours: tuple[Array, Array]
    frequency: float  # periods per unit of the object coordinates
    angle: float
    phase: tuple[float, float]
    lattice: Array  # [8, 8] in 0..1, the values that "noise" interpolates

    @staticmethod
    def draw(rng: Rng, paints: Paints, frequency: tuple[float, float]) -> Texture:
        """Draw a random pattern in two colors of the paints, with a frequency from the range."""
        return Texture(
            kind=TEXTURES[rng.integers(len(TEXTURES))],
            colours=(colour(rng, paints), colour(rng, paints)),
            frequency=rng.uniform(*frequency),
            angle=rng.uniform(0, 2 * math.pi),
            phase=(rng.random(), rng.random()),
            lattice=rng.random((8, 8), dtype=np.float32),
        )

    def sample(self, pose: Pose, x: Array, y: Array) -> Array:
        """Return colors [H, W, 3] at columns x [1, W] and rows y [H, 1] ([1, 1, 3] if flat)."""
        first, second = self.colours
        if self.kind == "flat":
            return first.reshape(1, 1, 3)
        rotated = Pose(pose.x, pose.y, pose.scale, pose.angle + self.angle)
        share = self._share(*rotated.unplace(x, y))
        mixed: Array = first + share[..., None] * (second - first)
        return mixed

    def _share(self, u: Array, v: Array) -> Array:
        """Return the share of the second color, 0..1."""
        share: Array
        if self.kind == "gradient":
            share = np.clip(u + np.float32(0.5), 0, 1)
            return share
        u = u * np.float32(self.frequency) + np.float32(self.phase[0])
        v = v * np.float32(self.frequency) + np.float32(self.phase[1])
        if self.kind == "noise":
            return _value_noise(self.lattice, u, v)
        tau = np.float32(2 * math.pi)
        if self.kind == "stripes":
            wave = np.sin(tau * u)
        elif self.kind == "checks":
            wave = 2 * np.sin(tau / 2 * u) * np.sin(tau / 2 * v)
        else:  # dots
            wave = np.cos(tau * u) + np.cos(tau * v) - np.float32(0.6)
        share = np.clip(2 * wave + np.float32(0.5), 0, 1)  # steep, not a step: soft edges
        return share


def _value_noise(lattice: Array, u: Array, v: Array) -> Array:
    """Interpolate bilinearly a lattice that repeats in both directions."""
    side = lattice.shape[0]
    i, j = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    a, b = u - i, v - j
    low_i, low_j, high_i, high_j = i % side, j % side, (i + 1) % side, (j + 1) % side
    low = lattice[low_i, low_j] * (1 - b) + lattice[low_i, high_j] * b
    high = lattice[high_i, low_j] * (1 - b) + lattice[high_i, high_j] * b
    values: Array = low + a * (high - low)
    return values


def paint(
    canvas: Array, points: Points, pose: Pose, texture: Texture, halo: float | None = None
) -> Array:
    """Draw an outline onto the canvas in place, with an anti-aliased edge.

    Args:
        points: the outline in object coordinates; pose places it.
        halo: gray that the surroundings are blended to, as a soft shadow or glow; None: no halo.

    Returns: the share of each pixel that the outline covers, 0..1, [H, W].
    """
    height, width = canvas.shape[:2]
    covered = np.zeros((height, width), np.float32)
    placed = pose.place(points)
    reach = 2 if halo is None else 2 + round(0.2 * pose.scale)
    left, top = np.maximum(np.floor(placed.min(axis=0)).astype(int) - reach, 0).tolist()
    right, bottom = (np.ceil(placed.max(axis=0)).astype(int) + reach).tolist()
    right, bottom = min(right, width), min(bottom, height)
    if left >= right or top >= bottom:
        return covered
    fine = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    corners = ((placed - (left, top)) * SUPERSAMPLING - 0.5).ravel().tolist()
    ImageDraw.Draw(fine).polygon(corners, fill=255)
    mask = fine.reduce(SUPERSAMPLING)
    cover = np.asarray(mask, np.float32) / 255
    part = canvas[top:bottom, left:right]
    if halo is not None:
        soft = mask.filter(ImageFilter.GaussianBlur(0.05 * pose.scale))
        part += np.asarray(soft, np.float32)[..., None] * (0.5 / 255) * (np.float32(halo) - part)
    x = np.arange(left, right, dtype=np.float32)[None] + np.float32(0.5)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5)
    part += cover[..., None] * (texture.sample(pose, x, y) - part)
    covered[top:bottom, left:right] = cover
    return covered


def blob(rng: Rng) -> Points:
    """Draw a smooth random closed shape."""
    t = np.linspace(0, 1, 40, endpoint=False)
    radius = np.ones(40)
    for k in (2, 3, 4):
        radius += rng.uniform(0, 0.25) * np.cos(2 * math.pi * (k * t + rng.random()))
    return _arc(0, 1 - 1 / 40, 40) * radius[:, None]


def fragment(rng: Rng) -> Points:
    """Draw a stroke along part of a random form's outline, so that parts do not reveal a class."""
    names = tuple(FORMS)
    whole = outline(names[rng.integers(len(names))], rng)
    dense = np.linspace(0, len(whole) - 1, 64)
    line = np.stack([np.interp(dense, np.arange(len(whole)), axis) for axis in whole.T], axis=1)
    start = int(rng.integers(0, 40))
    return _ribbon(line[start : start + 24], rng.uniform(0.06, 0.14))


def stroke(rng: Rng) -> Points:
    """Draw a long bent stroke."""
    t = np.linspace(-0.5, 0.5, 24)
    bend = rng.uniform(-0.5, 0.5) * np.cos(math.pi * t) + rng.uniform(-0.12, 0.12) * np.sin(9 * t)
    return _ribbon(np.stack([t, bend], axis=1), rng.uniform(0.02, 0.07))


def to_image(canvas: Array) -> Image.Image:
    """Convert the canvas to an 8-bit RGB image."""
    return Image.fromarray((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8))


def generator(seed: int, *key: int) -> Rng:
    """Return the generator of one part of the dataset, independent of all other keys."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))
