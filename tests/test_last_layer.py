"""fastdino_kernels.last_layer_weight: plain and weight-normed last layers."""

import pytest
import torch
from fastdino_kernels import last_layer_weight
from fastdino_kernels.last_layer import product_dtype
from torch import nn

from fastdino.models.head import WeightNormLinear


def plain() -> nn.Module:
    return nn.Linear(6, 9, bias=False)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(plain())


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(plain())


def frozen() -> nn.Module:
    layer = old_weight_norm()
    layer.weight_g.data.fill_(1)
    layer.weight_g.requires_grad_(False)
    return layer


def of_this_project() -> nn.Module:
    return WeightNormLinear(6, 9, train_magnitude=False)


LAYERS = (plain, old_weight_norm, parametrized, frozen, of_this_project)


@pytest.mark.parametrize("make", LAYERS)
def test_weight_and_its_gradients_are_those_of_the_layer(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(4, 6)
    # As after an optimizer step: the layer's own attribute may hold an older weight.
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    results = []
    for product in (layer, lambda x: x @ last_layer_weight(layer).t()):
        layer.zero_grad()
        y = product(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in layer.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results)


def test_frozen_magnitude_gets_no_gradient():
    layer = frozen()
    weight = last_layer_weight(layer)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(9))
    weight.sum().backward()
    assert layer.weight_g.grad is None


def test_nothing_is_kept_for_a_teacher():
    with torch.no_grad():
        assert not last_layer_weight(parametrized()).requires_grad


@pytest.mark.parametrize(
    ("layer", "raises", "match"),
    [
        (nn.Linear(6, 9), ValueError, "layer must have no bias"),
        (nn.ReLU(), TypeError, r"with a weight \[K, D\].*got ReLU"),
        (nn.Conv2d(3, 4, 2, bias=False), TypeError, "got Conv2d"),
        (nn.LayerNorm(4, bias=False), TypeError, "got LayerNorm"),
    ],
)
def test_invalid_layers(layer, raises, match):
    with pytest.raises(raises, match=match):
        last_layer_weight(layer)


@pytest.mark.parametrize("dim", [None, 1])
def test_weight_norm_of_other_dimensions(dim):
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(plain(), dim=dim)
    with pytest.raises(ValueError, match=r"weight_g \[K, 1\], got \[9, 6\] and .*dim=0"):
        last_layer_weight(old)
    parametrized = nn.utils.parametrizations.weight_norm(plain(), dim=dim)
    assert torch.equal(last_layer_weight(parametrized), parametrized.weight)


def test_layers_with_a_weight_v_that_is_no_matrix():
    spectral = nn.utils.spectral_norm(plain())
    with pytest.raises(ValueError, match=r"got \[6\] and None"):
        last_layer_weight(spectral)
    with pytest.warns(FutureWarning, match="weight_norm"):
        convolution = nn.utils.weight_norm(nn.Conv2d(3, 4, 2, bias=False))
    with pytest.raises(ValueError, match=r"got \[4, 3, 2, 2\] and \[4, 1, 1, 1\]"):
        last_layer_weight(convolution)


@pytest.mark.parametrize(
    ("x", "weight", "plain", "autocast"),
    [
        (torch.float32, torch.float32, torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64, torch.float64),
        (torch.float16, torch.float32, None, torch.bfloat16),
        (torch.float32, torch.float64, None, None),
        (torch.float64, torch.float32, None, None),
    ],
)
def test_dtype_of_products(x, weight, plain, autocast):
    """None is an error: two dtypes, which autocast unites unless one of them is fp64."""
    for enabled, expected in ((False, plain), (True, autocast)):
        arguments = ("x", torch.zeros(2, 3, dtype=x), "weight", torch.zeros(4, 3, dtype=weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if expected is None:
                with pytest.raises(ValueError, match="x and weight must have the same dtype"):
                    product_dtype(*arguments)
            else:
                assert product_dtype(*arguments) == expected
