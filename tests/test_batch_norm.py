"""Batch norm in the step, and over the batches of two and three ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fastdino_kernels import reference
from timm.layers import BatchNormAct2d
from torch import nn

from fastdino import TrainConfig, Trainer, distributed
from fastdino.models.batch_norm import synchronize_batch_norm
from tests.processes import run_ranks
from tests.runs import assert_same_state
from tests.small_networks import shrink_networks

CPU = torch.device("cpu")
ROWS = (3, 1, 2)  # of the ranks' batches of a layer
LAYERS = ((0.1, nn.BatchNorm2d), (None, nn.BatchNorm2d), (0.1, BatchNormAct2d))


def plain_norm(x: torch.Tensor, layer: nn.Module, running: list[torch.Tensor]) -> torch.Tensor:
    """Normalize the columns of x [rows, D], and update the running mean and variance."""
    mean, variance = x.mean(0), (x - x.mean(0)).square().mean(0)
    unbiased = variance * len(x) / (len(x) - 1)
    for average, value in zip(running, (mean, unbiased), strict=True):
        average.mul_(0.9).add_(0.1 * value.detach())
    return layer.weight * (x - mean) / (variance + 1e-5).sqrt() + layer.bias


def plain_head(head: nn.Module, x: torch.Tensor, running: list[list[torch.Tensor]]) -> torch.Tensor:
    """The paper's projection head with batch norm, in plain operations."""
    for i, averages in zip((0, 3), running, strict=True):
        x = x @ head.mlp[i].weight.T + head.mlp[i].bias
        x = plain_norm(x, head.mlp[i + 1], averages)
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    x = x @ head.mlp[6].weight.T + head.mlp[6].bias
    x = x / x.norm(dim=1, keepdim=True)
    prototypes = head.last_layer.weight_v
    return x @ (prototypes / prototypes.norm(dim=1, keepdim=True)).T


@pytest.mark.usefixtures("float64", "small_networks")
@pytest.mark.parametrize("mode", ["parity", "fast"])
def test_heads_with_batch_norm_are_those_of_the_paper(tiny, crops_of, mode):
    """The student's batch is all crops, the teacher's the global ones, of each forward pass."""
    settings = {"mode": mode, "compile": "off", "batch_size_per_gpu": 2, "grad_accum": 2}
    trainer = Trainer(tiny(use_bn_in_head=True, freeze_last_layer=0, **settings), 2)
    networks = [copy.deepcopy(network) for network in (trainer.student, trainer.teacher)]
    crops, running = crops_of(trainer.config, 0), []
    for network in networks:
        layers = (network.head.mlp[1], network.head.mlp[4])
        running.append([[layer.running_mean, layer.running_var] for layer in layers])
    losses, weight = [], networks[0].head.mlp[0].weight
    for part in zip(*(crop.chunk(2) for crop in crops), strict=True):
        student, teacher = (
            plain_head(network.head, torch.cat([network.backbone(x) for x in images]), averages)
            for network, averages, images in zip(networks, running, (part, part[:2]), strict=True)
        )
        shapes = (student.unflatten(0, (4, 2)), teacher.unflatten(0, (2, 2)))
        losses.append(reference.dino_loss(*shapes, torch.zeros(1, 64), 0.1, 0.04)[0])
    loss = torch.stack(losses).mean()
    gradient = torch.autograd.grad(loss, weight)[0]

    gradients = []
    trainer.student.head.mlp[0].weight.register_post_accumulate_grad_hook(
        lambda parameter: gradients.append(parameter.grad.clone())
    )
    assert trainer.train_step(crops).item() == pytest.approx(loss.item(), rel=1e-10)
    torch.testing.assert_close(gradients[-1], gradient, rtol=1e-9, atol=1e-12)
    for network, averages in zip((trainer.student, trainer.teacher), running, strict=True):
        for i, (mean, variance) in zip((1, 4), averages, strict=True):
            layer = network.head.mlp[i]
            torch.testing.assert_close(layer.running_mean, mean, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(layer.running_var, variance, rtol=1e-10, atol=1e-12)
            assert layer.num_batches_tracked == 2


def run_layer(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> dict[str, Any]:
    """Return output, gradients and running statistics of one batch; then the output in eval."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(gradient)
    result = {"y": y.detach(), "x": x.grad, "eval": layer.eval()(x.detach()).detach()}
    gradients = {"weight.grad": layer.weight.grad, "bias.grad": layer.bias.grad}
    return result | gradients | layer.state_dict()


def make_layer(momentum: float | None, make: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    layer = make(3, momentum=momentum)
    layer.weight.data.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return nn.Sequential(layer)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_activation_of_a_layer_of_timm_is_kept(device):
    """As most of timm's convolutional networks have it: normalization and activation in one."""
    network = nn.Sequential(BatchNormAct2d(3, act_layer=nn.ReLU))
    network[0].bias.data.fill_(0.1)
    names, x = list(network.state_dict()), torch.randn(2, 3, 4, 4)
    want = network.eval()(x)
    converted = synchronize_batch_norm(network, torch.device(device))
    assert list(converted.state_dict()) == names
    assert "Sync" in type(converted[0]).__name__
    assert want.min() == 0
    torch.testing.assert_close(converted(x), want)


def layer_inputs(world_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(ROWS[:world_size]), 3, 2, 4)
    return [3 + torch.randn(shape, generator=generator) for _ in range(2)]


def train_share(config: dict[str, Any], batches: list[list[torch.Tensor]], folder: Path) -> None:
    """Train on every n-th image of each batch, and again from a checkpoint after the first."""
    shrink_networks(pytest.MonkeyPatch())
    torch.set_default_dtype(torch.float64)
    with distributed.process_group(CPU, "env://"):
        rank, world_size = distributed.rank(), distributed.world_size()
        results: dict[str, Any] = {}
        for layer in LAYERS:
            synchronized = synchronize_batch_norm(make_layer(*layer), CPU)[0]
            rows = [x.split(ROWS[:world_size])[rank] for x in layer_inputs(world_size)]
            results[str(layer)] = run_layer(synchronized, *rows)
        share = config | {"batch_size_per_gpu": 6 // world_size}
        own = [[crop[rank::world_size] for crop in batch] for batch in batches]
        trainer = Trainer(TrainConfig.from_dict(share), 2)
        results["losses"] = [trainer.train_step(own[0]).item()]
        saved = copy.deepcopy(trainer.state_dict())
        results["losses"] += [trainer.train_step(batch).item() for batch in own[1:]]
        results["state"] = state = trainer.state_dict()
        resumed = Trainer(TrainConfig.from_dict(share | {"seed": 5}), 2)
        resumed.load_state_dict(saved)
        for batch in own[1:]:
            resumed.train_step(batch)
        assert_same_state(resumed.state_dict(), state)
        torch.save(results, folder / f"{rank}.pt")


@pytest.mark.usefixtures("float64", "small_networks")
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_statistics_and_train_like_one(tiny, crops_of, tmp_path, world_size):
    """Layer, loss, networks, center and running statistics; also resumed, on each rank."""
    # AdamW would amplify the rounding of the biases' gradients, which batch norm makes 0.
    settings = {"optimizer": "sgd", "mode": "fast", "compile": "off", "use_bn_in_head": True}
    config = tiny(**settings, batch_size_per_gpu=6, warmup_epochs=0, freeze_last_layer=0, lr=0.5)
    batches = [crops_of(config, i) for i in range(3)]
    run_ranks(world_size, train_share, config.to_dict(), batches, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for layer in LAYERS:
        want = run_layer(make_layer(*layer)[0], *layer_inputs(world_size))
        got = [rank[str(layer)] for rank in ranks]
        for name, value in want.items():
            parts = [result[name] for result in got]
            if name in ("y", "x", "eval"):
                torch.testing.assert_close(torch.cat(parts), value)
            elif name in ("weight.grad", "bias.grad"):  # each rank has its share
                torch.testing.assert_close(sum(parts), value)
            else:
                torch.testing.assert_close(parts, [value] * world_size)
    trainer = Trainer(config, 2)
    losses = [trainer.train_step(batch).item() for batch in batches]
    expected = trainer.state_dict()
    for rank in ranks:  # each has the state of its own networks
        assert rank["losses"] == pytest.approx(losses, rel=1e-9)
        for key in ("student", "teacher", "dino_loss"):
            got, first = (some["state"][key] for some in (rank, ranks[0]))
            torch.testing.assert_close(got, expected[key], rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(got, first, rtol=0, atol=0)
    means = [name for name in expected["teacher"] if name.endswith("running_mean")]
    assert len(means) == 2
    assert all(expected["teacher"][name].any() for name in means)
