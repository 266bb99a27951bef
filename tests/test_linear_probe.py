from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

from fastdino.errors import NonFiniteError
from fastdino.evals.linear_probe import UNREADABLE, FrozenFeatures, Probe
from fastdino.models.vit import VisionTransformer

CPU = torch.device("cpu")


def identity(features):
    return features


def test_training_matches_plain_float64_sgd():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 5, generator=rng)
    y = torch.randint(0, 4, (3, 8), generator=rng)
    y[1, 3] = UNREADABLE
    epochs, lr = 3, 0.5
    probe = Probe(5, 4, lr=lr, epochs=epochs, seed=1, device=CPU)
    weight, bias = (p.detach().double() for p in (probe.linear.weight, probe.linear.bias))
    assert 0.005 < weight.std() < 0.015
    assert not bias.any()
    speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(epochs):
        now = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        assert probe.lr == pytest.approx(now)
        losses = []
        for features, labels in zip(x.double(), y, strict=True):
            features, labels = features[labels >= 0], labels[labels >= 0]
            shares = (features @ weight.T + bias).softmax(1)
            losses.append(-shares[range(len(labels)), labels].log().mean().item())
            slope = (shares - F.one_hot(labels, 4)) / len(labels)
            for parameter, speed, gradient in zip(
                (weight, bias), speeds, (slope.T @ features, slope.sum(0)), strict=True
            ):
                speed.mul_(0.9).add_(gradient)
                parameter.sub_(now * speed)
        assert probe.train_epoch(zip(x, y, strict=True), identity) == pytest.approx(
            np.mean(losses), rel=1e-5
        )
    torch.testing.assert_close(probe.linear.weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probe.linear.bias.double(), bias, rtol=1e-5, atol=1e-6)
    assert (probe.epoch, probe.lr) == (3, 0)


def test_a_batch_without_readable_images_only_decays_the_momentum():
    probe = Probe(5, 4, lr=0.5, epochs=1, seed=1, device=CPU)
    weight = probe.linear.weight.detach().clone()
    batch = torch.randn(3, 5), torch.full((3,), UNREADABLE)
    assert probe.train_epoch([batch], identity) == 0
    assert torch.equal(probe.linear.weight, weight)


def test_accuracies_count_only_readable_images():
    probe = Probe(7, 7, lr=1, epochs=1, seed=0, device=CPU)
    probe.linear.weight.data = torch.eye(7)
    scores = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]]).repeat(5, 1)
    labels = torch.tensor([0, 4, 5, UNREADABLE, 1])
    result = probe.validate([(scores[:3], labels[:3]), (scores[3:], labels[3:])], identity)
    assert (result["acc1"], result["acc5"], result["images"]) == (25, 75, 4)
    expected = F.cross_entropy(scores[labels >= 0], labels[labels >= 0]).item()
    assert result["loss"] == pytest.approx(expected)


def test_with_fewer_than_five_classes_top5_is_100():
    probe = Probe(3, 3, lr=1, epochs=1, seed=0, device=CPU)
    assert probe.validate([(torch.randn(6, 3), torch.arange(6) % 3)], identity)["acc5"] == 100


def test_a_nonfinite_loss_is_an_error():
    probe = Probe(3, 3, lr=1, epochs=1, seed=0, device=CPU)
    with pytest.raises(NonFiniteError, match="loss of epoch 1 is nan: lower --lr"):
        probe.train_epoch([(torch.full((2, 3), math.nan), torch.zeros(2).long())], identity)


@pytest.fixture
def vit():
    """Return a small ViT, images, and each block's normalised output [2, N, D] by hooks."""
    torch.manual_seed(0)
    model = VisionTransformer(patch_size=8, embed_dim=12, depth=3, num_heads=3, img_size=32).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    hooks = [b.register_forward_hook(lambda *a: seen.append(a[2])) for b in model.blocks]
    with torch.no_grad():
        model.cls_only = False
        model(images)
        tokens = [model.norm(x).reshape(2, 17, 12) for x in seen]
    for hook in hooks:
        hook.remove()
    return model, images, tokens


def test_features_are_the_cls_tokens_of_the_last_blocks(vit):
    model, images, tokens = vit
    features = FrozenFeatures(model, blocks=2, avgpool=False)(images)
    torch.testing.assert_close(features, torch.cat([tokens[1][:, 0], tokens[2][:, 0]], dim=-1))
    assert not features.requires_grad


def test_cls_and_mean_patch_channels_alternate_as_in_the_papers_code(vit):
    model, images, tokens = vit
    features = FrozenFeatures(model, blocks=1, avgpool=True)(images)
    cls, mean = tokens[2][:, 0], tokens[2][:, 1:].mean(dim=1)
    expected = torch.cat((cls.unsqueeze(-1), mean.unsqueeze(-1)), dim=-1).reshape(2, -1)
    torch.testing.assert_close(features, expected)


def test_features_of_other_networks_are_their_output():
    model = torchvision.models.resnet18(weights=None).eval()
    model.fc = torch.nn.Identity()
    images = torch.randn(1, 3, 32, 32)
    features = FrozenFeatures(model, blocks=4, avgpool=False)(images)
    assert features.shape == (1, 512)
    torch.testing.assert_close(features, model(images).detach())
