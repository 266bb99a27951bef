from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastdino.evals.descriptors import Whitening, cls_and_gem, gem, multi_scale
from fastdino.models.weights import load_backbone


def test_gem_is_the_fourth_root_of_the_mean_fourth_power():
    tokens = torch.tensor([[[1.0, -5.0], [2.0, 3.0]]])
    expected = [[(17 / 2) ** 0.25, (81 / 2) ** 0.25]]
    torch.testing.assert_close(gem(tokens), torch.tensor(expected))
    assert gem(-torch.ones(1, 3, 1)).item() == pytest.approx(1e-6), "negative values are clamped"


def test_copy_descriptor_concatenates_cls_and_gem():
    model = load_backbone("", checkpoint_key="teacher", arch="vit_nano", patch_size=8).module
    images = torch.randn(2, 3, 24, 16)
    with torch.no_grad():
        descriptors = cls_and_gem(model)(images)
        tokens = model.get_intermediate_layers(images, 1)[0].double()
    assert descriptors.shape == (2, 2 * 96)
    torch.testing.assert_close(descriptors[:, :96].double(), tokens[:, 0])
    mean = tokens[:, 1:].clamp(min=1e-6).pow(4).mean(1).pow(0.25)
    torch.testing.assert_close(descriptors[:, 96:].double(), mean, rtol=1e-5, atol=1e-6)


def test_scales_are_averaged_without_normalisation():
    sides = []

    def model(images):
        sides.append(tuple(images.shape[-2:]))
        return images.mean((2, 3)) * images.shape[-1]  # the length grows with the scale

    images = torch.randn(2, 3, 40, 20)
    features = multi_scale(model)(images)
    assert sides == [(40, 20), (28, 14), (20, 10)]
    expected = images.mean((2, 3)) * 20
    for height, width in sides[1:]:
        scale = (2**-0.5, 0.5)[width == 10]
        small = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        assert small.shape[-2:] == (height, width)
        expected = expected + small.mean((2, 3)) * width
    torch.testing.assert_close(features, expected / 3)


def test_whitened_features_have_the_identity_as_second_moment():
    torch.manual_seed(0)
    features = torch.randn(500, 6).double() @ torch.randn(6, 6).double() + 3
    whitening = Whitening.learn(features)
    # The moment is about zero, as in the paper's code, which subtracts the mean only on use.
    rotated = features @ whitening.projection.T
    torch.testing.assert_close(rotated.T @ rotated / 500, torch.eye(6).double())
    torch.testing.assert_close(whitening(features), rotated - rotated.mean(0))
    energy = whitening.projection.norm(dim=1)
    assert torch.equal(energy, energy.sort().values), "the strongest axis first"


def test_whitening_does_not_amplify_axes_without_energy():
    features = torch.randn(50, 4).double()
    features[:, 3] = 0
    projection = Whitening.learn(features).projection
    largest = torch.linalg.eigvalsh(features.T @ features / 50).max()
    assert projection.abs().max().item() == pytest.approx((1e-5 * largest.item()) ** -0.5)
