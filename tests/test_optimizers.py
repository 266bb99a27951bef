"""Parameter groups, and LARS against its equations."""

from __future__ import annotations

import pytest
import torch

from fastdino.models.backbones import build_networks
from fastdino.training.optimizers import LARS, build_optimizer, parameter_groups
from tests.multi_tensor import long_normal

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize("settings", [{}, {"use_bn_in_head": True}, {"arch": "resnet18"}], ids=str)
def test_biases_and_norms_have_no_weight_decay_and_frozen_weights_no_update(
    tiny, settings, norm_last_layer
):
    student, _ = build_networks(tiny(**settings, norm_last_layer=norm_last_layer))
    decayed, exempt = parameter_groups(student)
    assert "weight_decay" not in decayed
    assert exempt["weight_decay"] == 0.0
    names = {id(p): name for name, p in student.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in (decayed, exempt)]
    # Of the layers that a backbone or the head has, all weights but those of norms are matrices.
    norms = {
        f"{name}.weight"
        for name, module in student.named_modules()
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm))
    }
    expected = [[], []]
    for name in names.values():
        if norm_last_layer and name == "head.last_layer.weight_g":
            continue
        expected[name.endswith(".bias") or name in norms].append(name)
    assert groups == expected
    assert norms <= set(groups[1])
    if "arch" not in settings:
        assert {"backbone.pos_embed", "backbone.cls_token"} <= set(groups[0])


def plain_lars(p, g, moment, lr, decay):
    """Return a parameter and its moment after a step; None is a moment before the first one."""
    if p.ndim > 1:
        g = g + decay * p
        if p.norm() > 0 and g.norm() > 0:
            g = g * (0.001 * p.norm() / g.norm())
    moment = g if moment is None else 0.9 * moment + g
    return p - lr * moment, moment


def test_lars_follows_its_equations():
    """Matrices are scaled by their norms; vectors, zero weights and zero gradients are not."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = [(4, 3), (3,), (2, 5), (2, 2), (2, 3, 4)]
    expected = [draw(shape) for shape in shapes]
    expected[2].zero_()
    parameters = [torch.nn.Parameter(value.clone()) for value in expected]
    optimizer = LARS([{"params": parameters[:3]}, {"params": parameters[3:]}])
    moments: list[torch.Tensor | None] = [None] * len(shapes)
    for step, (lr, decay) in enumerate([(0.5, 0.1), (0.25, 0.2), (0.125, 0.3)]):
        optimizer.param_groups[0] |= {"lr": lr, "weight_decay": decay}
        optimizer.param_groups[1] |= {"lr": 2 * lr}
        for i, p in enumerate(parameters):
            p.grad = draw(p.shape) * (i != 3)
            if (i, step) == (0, 1):
                p.grad = None
                continue
            rates = (lr, decay) if i < 3 else (2 * lr, 0.0)
            expected[i], moments[i] = plain_lars(expected[i], p.grad, moments[i], *rates)
        optimizer.step()
        for p, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.data, value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rows", [16384, 16383])
def test_lars_scales_millions_of_weights_accurately(rows):
    """The weights are as large as each other, so that the errors of both norms differ."""
    weight = torch.nn.Parameter(torch.full((rows, 512), 1.0))
    weight.grad = long_normal(weight.numel()).view_as(weight)
    p, g = weight.detach().double(), weight.grad.double()
    optimizer = LARS([weight], lr=1.0)
    optimizer.step()
    _, moment = plain_lars(p, g, None, 1.0, 0.0)
    torch.testing.assert_close(optimizer.state[weight]["mu"].double(), moment, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", LARS)]
)
def test_optimizers_have_the_papers_settings(name, kind):
    optimizer = build_optimizer(name, torch.nn.Linear(2, 3))
    assert type(optimizer) is kind
    expected = {"adamw": {"betas": (0.9, 0.999), "eps": 1e-8}}.get(name, {"momentum": 0.9})
    for group in optimizer.param_groups:
        assert expected.items() <= group.items()
        assert not group.get("nesterov")
        assert group.get("eta", 0.001) == 0.001
