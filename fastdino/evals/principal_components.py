"""Principal components of patch features as colors, with the foreground by the first of them.

As in DINOv2 (Oquab et al. 2023, figure 1): a first PCA of all patches separates foreground from
background by its first component, and a second PCA, of the foreground, gives three colors.

Shapes: N patches, D channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdino.errors import CheckpointError, DataError
from fastdino.evals.feature_files import Column, write_npz
from fastdino.files import atomic_write, explain_write_errors

FORMAT = "fastdino pca 1"
FOREGROUNDS = ("auto", "positive", "negative", "none")
COLORS = 3
# Share of the mean squared norm below which a variance is rounding: features are float32.
VARIANCE_FLOOR = 1e-12
# The colors' range: quantiles of the foreground's components, because extremes would fade the rest.
RANGE = (0.01, 0.99)
_ROWS = 4096  # features converted to float64 at a time

Array = NDArray[np.float64]


def principal_axes(features: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean [D], the first principal axes [count, D] and their variances [count], float64.

    The covariance (1 / N) sum_i (x_i - m)(x_i - m)^T is computed in float64. Each axis has the sign
    that makes its largest coefficient positive; the first of equal ones decides.

    Args:
        features: [N, D].

    Raises: DataError: the features have fewer than `count` components with a variance.
    """
    number, dim = features.shape
    chunks = features.split(_ROWS)
    mean = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / number
    covariance = torch.zeros(dim, dim, dtype=torch.float64)
    for chunk in chunks:
        centred = chunk.double() - mean
        covariance += centred.T @ centred / number
    values, vectors = torch.linalg.eigh(covariance)
    values, axes = values.flip(0), vectors.flip(1).T
    floor = VARIANCE_FLOOR * float(mean.square().sum() + values.clamp(min=0).sum())
    available = int((values > floor).sum())
    if not available:
        raise DataError(f"the features of all {number} patches are equal: there are no components")
    if available < count:
        raise DataError(
            f"the features of {number} patches have {available} principal component(s), expected "
            f"at least {count}: use more or larger images"
        )
    axes = axes[:count]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return mean, axes * largest.sign(), values[:count]


def two_class_threshold(values: Tensor) -> float:
    """Return the threshold between two classes of values [N] with the largest variance between.

    It is the middle of two neighbours in the sorted values (Otsu 1979, without a histogram).

    Raises: DataError: all values are equal.
    """
    ordered = values.double().sort().values
    number = len(ordered)
    below = torch.arange(1, number, dtype=torch.float64)
    sums = ordered.cumsum(0)[:-1]
    between = (ordered.sum() * below / number - sums).square() / (below * (number - below))
    between = torch.where(ordered[1:] > ordered[:-1], between, -1.0)
    if not len(between) or float(between.max()) < 0:
        raise DataError("the first principal component of all patches is equal")
    split = int(between.argmax())
    return float(ordered[split] + ordered[split + 1]) / 2


@dataclass(frozen=True)
class PatchPCA:
    """Principal components that were fitted to patches; all arrays are float64.

    A patch x is foreground if side * (first . (x - mean)) > side * threshold; a side of 0 means
    that all patches are. Its colors are axes . (x - center), of which low..high becomes 0..1.

    Attributes:
        mean: [D], of all patches. first: [D]. threshold, side: [].
        center: [D], mean of the foreground. axes: [3, D]. low, high: [3].
        about: values for JSON.
    """

    mean: Array
    first: Array
    threshold: Array
    side: Array
    center: Array
    axes: Array
    low: Array
    high: Array
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """D."""
        return len(self.mean)

    def foreground(self, features: Tensor) -> NDArray[np.bool_]:
        """Return which patches of features [..., D] are foreground, [...]."""
        first = (features.double().numpy() - self.mean) @ self.first
        return (self.side * first > self.side * self.threshold) | (self.side == 0)

    def colors(self, features: Tensor) -> Array:
        """Return the colors [..., 3] from 0 to 1 of features [..., D], as of foreground."""
        components = (features.double().numpy() - self.center) @ self.axes.T
        return ((components - self.low) / (self.high - self.low)).clip(0, 1)

    def save(self, path: Path) -> None:
        """Write an npz; raise CheckpointError if that fails."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        about = {"format": FORMAT, **self.about}
        arrays["about"] = np.array(json.dumps(about))
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                write_npz(file, {name: Column.of(array) for name, array in arrays.items()})

    @classmethod
    def load(cls, path: Path) -> PatchPCA:
        """Read a file of `save`; raise CheckpointError if it is none, or damaged."""
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _ARRAYS}
                about = json.loads(str(file["about"]))
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r}")
            if not isinstance(about.get("settings", {}), dict):
                raise ValueError("settings are no JSON object")
            _check_arrays(arrays)
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no file {path}") from error
        # numpy, zipfile and json raise many types on other bytes, and MemoryError for a huge shape.
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{path} is damaged, or was not written by --save_pca: {reason}"
            ) from error
        return cls(**arrays, about=about)


_ARRAYS = tuple(item.name for item in fields(PatchPCA) if item.name != "about")


def _check_arrays(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise ValueError unless these are the arrays of a PatchPCA."""
    dim = arrays["mean"].size
    shapes = {"threshold": (), "side": (), "axes": (COLORS, dim), "low": (COLORS,)}
    shapes |= {"high": (COLORS,)}
    for name, array in arrays.items():
        shape = shapes.get(name, (dim,))
        if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
            raise ValueError(
                f"{name} is {array.dtype} {list(array.shape)}, expected finite float64 "
                f"{list(shape)}"
            )
    if not (arrays["high"] > arrays["low"]).all():
        raise ValueError("high is not above low")


def fit(
    features: Tensor,
    border: Tensor,
    *,
    foreground: str = "auto",
    threshold: float | None = None,
    about: Mapping[str, Any] | None = None,
) -> PatchPCA:
    """Fit the components to patches.

    Args:
        features: [N, D].
        border: bool [N], patches at the border of their image.
        foreground: side of the first component that is foreground, one of FOREGROUNDS. auto: the
            side with the smaller share of its patches at borders.
        threshold: of the first component, in standard deviations from the mean; None: that of
            two_class_threshold.

    Raises: DataError: too few patches, or components with a variance.
    """
    if len(features) <= COLORS:
        raise DataError(
            f"{len(features)} patch(es) are too few for {COLORS} components: use more or larger "
            "images"
        )
    mean, axes, variances = principal_axes(features, 1)
    first = _project(features, mean, axes)[:, 0]
    limit = two_class_threshold(first) if threshold is None else threshold * variances[0].sqrt()
    side = _side(first > limit, border, foreground)
    inside = (side * first > side * float(limit)) | (side == 0)
    if int(inside.sum()) <= COLORS:
        raise DataError(
            f"{int(inside.sum())} of {len(inside)} patches are foreground, too few for {COLORS} "
            "components: use another --threshold or --foreground"
        )
    center, colors, color_variances = principal_axes(features[inside], COLORS)
    components = _project(features[inside], center, colors).sort(0).values
    last = len(components) - 1
    low, high = (components[round(share * last)] for share in RANGE)
    low, high = (
        torch.where(high > low, low, components[0]),
        torch.where(high > low, high, components[-1]),
    )
    arrays = {
        "mean": mean,
        "first": axes[0],
        "threshold": torch.as_tensor(limit, dtype=torch.float64),
        "side": torch.tensor(float(side), dtype=torch.float64),
        "center": center,
        "axes": colors,
        "low": low,
        "high": high,
    }
    facts = {
        "patches": len(features),
        "foreground_share": float(inside.double().mean()),
        "first_variance": float(variances[0]),
        "color_variances": color_variances.tolist(),
    }
    return PatchPCA(
        **{name: array.numpy() for name, array in arrays.items()}, about={**facts, **(about or {})}
    )


def _project(features: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """Return the components [N, count] in float64."""
    return torch.cat([(chunk.double() - mean) @ axes.T for chunk in features.split(_ROWS)])


def _side(above: Tensor, border: Tensor, foreground: str) -> int:
    """Return 1 if patches above the threshold are foreground, -1 if those below, 0 if all.

    Raises: DataError: foreground is auto, and all patches are on one side.
    """
    if foreground != "auto":
        return {"positive": 1, "negative": -1, "none": 0}[foreground]
    if above.all() or not above.any():
        raise DataError(
            f"all {len(above)} patches are on one side of the threshold: use another --threshold"
        )
    shares = [border[part].double().mean() for part in (above, ~above)]
    return 1 if shares[0] <= shares[1] else -1


class PatchSample:
    """A random sample of at most `size` patches of a stream, kept with their features.

    Each patch draws a number that depends on the seed, its image and its place; the smallest are
    kept. Memory holds up to twice `size` features.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.images = size, seed, 0
        self._chunks: list[tuple[Tensor, Tensor, Tensor]] = []
        self._held = 0

    def add(self, features: Tensor) -> None:
        """Add the patches of an image, float32 [h, w, D] on the CPU."""
        height, width = features.shape[:2]
        rng = np.random.default_rng([self.seed, self.images])
        border = torch.ones(height, width, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        draws = torch.from_numpy(rng.random(height * width))
        self._chunks.append((features.flatten(0, 1), border.flatten(), draws))
        self.images += 1
        self._held += height * width
        if self._held > 2 * self.size:
            self._shrink()

    def result(self) -> tuple[Tensor, Tensor]:
        """Return features [N, D] and if they are at a border [N], in the order of the stream.

        Raises: DataError: no image was added.
        """
        if not self._chunks:
            raise DataError("there is no image to fit the components to")
        self._shrink()
        features, border, _ = self._chunks[0]
        return features, border

    def _shrink(self) -> None:
        columns = [torch.cat(column) for column in zip(*self._chunks, strict=True)]
        if len(columns[2]) > self.size:
            kept = columns[2].argsort(stable=True)[: self.size].sort().values
            columns = [column[kept] for column in columns]
        self._chunks = [(columns[0], columns[1], columns[2])]
        self._held = len(columns[2])
