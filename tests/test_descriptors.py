from __future__ import annotations

import pytest
import torch

from fastdino.evals import descriptors
from fastdino.evals.descriptors import Whitening, cls_and_gem
from fastdino.models.weights import load_backbone


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


def test_whitening_learns_from_all_blocks_of_rows(monkeypatch):
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    whole = Whitening.learn(features)
    monkeypatch.setattr(descriptors, "_MOMENT_ROWS", 7)
    blocks = Whitening.learn(features)
    torch.testing.assert_close(blocks.projection.abs(), whole.projection.abs())


def test_whitening_does_not_amplify_axes_without_energy():
    features = torch.randn(50, 4).double()
    features[:, 3] = 0
    projection = Whitening.learn(features).projection
    largest = torch.linalg.eigvalsh(features.T @ features / 50).max()
    assert projection.abs().max().item() == pytest.approx((1e-5 * largest.item()) ** -0.5)
