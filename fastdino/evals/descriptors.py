"""Image descriptors for retrieval and copy detection: multi-scale features, GeM, whitening.

Shapes: B images per batch, N images or tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdino.evals.features import Model
from fastdino.models.vit import VisionTransformer

SCALES = (1.0, 2**-0.5, 0.5)
GEM_POWER = 4
GEM_FLOOR = 1e-6
EIGENVALUE_FLOOR = 1e-5  # relative to the largest; smaller ones would amplify noise
_MOMENT_ROWS = 4096  # features converted to float64 at a time


def multi_scale(model: Model) -> Model:
    """Return a model that averages the features [B, D] of `model` at scales 1, 0.71 and 0.5.

    As in the paper's code, features are not normalised before the mean.
    """

    def describe(images: Tensor) -> Tensor:
        features = model(images)
        for scale in SCALES[1:]:
            features = features + model(
                F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
            )
        return features / len(SCALES)

    return describe


def gem(tokens: Tensor, power: float = GEM_POWER) -> Tensor:
    """Return the generalised mean over tokens, [B, N, D] -> [B, D], of values clamped at 1e-6."""
    return tokens.clamp(min=GEM_FLOOR).pow(power).mean(dim=1).pow(1 / power)


def cls_and_gem(model: VisionTransformer) -> Model:
    """Return the paper's copy detector: CLS concatenated with GeM(4) of the patches, [B, 2 D]."""

    def describe(images: Tensor) -> Tensor:
        tokens = model.get_intermediate_layers(images, 1)[0]
        return torch.cat((tokens[:, 0], gem(tokens[:, 1:])), dim=1)

    return describe


@dataclass(frozen=True)
class Whitening:
    """The map x -> projection (x - mean): principal axes, each divided by its deviation.

    Attributes:
        mean: [D]. projection: [D, D], rows by falling eigenvalue.
    """

    mean: Tensor
    projection: Tensor

    @classmethod
    def learn(cls, features: Tensor) -> Whitening:
        """Learn from features [N, D] that are not normalised.

        As in the paper's code, the axes are those of the second moment about zero, not of the
        covariance.
        """
        dim = features.shape[1]
        moment = torch.zeros(dim, dim, dtype=torch.float64)
        for rows in features.double().split(_MOMENT_ROWS):
            moment += rows.T @ rows
        values, vectors = torch.linalg.eigh(moment / len(features))
        values, vectors = values.flip(0), vectors.flip(1)
        values = values.clamp(min=float(values[0]) * EIGENVALUE_FLOOR)
        projection = vectors.T / values.sqrt()[:, None]
        return cls(features.double().mean(dim=0), projection)

    def __call__(self, features: Tensor) -> Tensor:
        """Whiten features [N, D], keeping their dtype."""
        centred = features.double() - self.mean
        return (centred @ self.projection.T).to(features.dtype)
