"""Small networks and their gradients, to compare optimizers."""

import copy

import torch


def networks(device="cpu", count=2):
    """Make equal fp32 networks: linear, activation, linear."""
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    return [copy.deepcopy(first).to(device) for _ in range(count)]


def groups_of(network):
    """Return two groups with their own rates: decayed weights, and biases without decay."""
    weights, biases = ([p for p in network.parameters() if p.ndim == n] for n in (2, 1))
    return [
        {"params": weights, "lr": 0.02, "weight_decay": 0.3},
        {"params": biases, "lr": 0.01, "weight_decay": 0.0, "betas": (0.7, 0.9)},
    ]


def set_gradients(network, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(network.parameters()):
        gradient = torch.randn(p.shape, generator=generator) * 0.5**i
        p.grad = None if i in without else gradient.to(p.device)


def assert_networks_close(x, y, rtol=1e-5, atol=1e-6):
    for p, q in zip(x.parameters(), y.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
