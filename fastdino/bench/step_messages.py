"""The collectives of one training step of a ViT, from the sizes of its network.

`python -m benchmarks.step_collectives` counts them in runs and compares.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastdino.bench.baselines.paper_step import plain_network
from fastdino.config import TrainConfig

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
FP32 = 4  # bytes; weights, gradients and sums are fp32 in both modes
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes, the defaults of DistributedDataParallel
SINKHORN_ITERATIONS = 3
# FSDP gathers a group of weights for the teacher, for the student, and for its backward pass.
GATHERS_PER_PASS = 3


@dataclass(frozen=True)
class Message:
    """A collective.

    Attributes:
        size: bytes of the whole tensor: reduced, gathered, or before it is scattered.
        ready: share of the backward pass before its content is ready.
        blocks: the device waits for it before it computes on.
    """

    size: int
    ready: float = 0.0
    kind: Kind = "all-reduce"
    purpose: str = "gradients"
    blocks: bool = False

    def sent(self, ranks: int) -> float:
        """Return the bytes that each rank sends in a ring."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (ranks - 1) / ranks * self.size


def step_messages(config: TrainConfig, ranks: int, *, on_cpu: bool = False) -> list[Message]:
    """Return the collectives of a step of several ranks, once the last layer is trained.

    Not included: the entropy every --print_freq steps, and the exchange of signals once per second.

    Args: on_cpu: include the check of the sizes in Sinkhorn-Knopp, which only a CPU makes.
    """
    passes = config.split_batch(ranks).passes
    messages = passes * _sinkhorn_messages(config, on_cpu)
    messages.append(Message(FP32, purpose="loss", blocks=True))
    if config.koleo_weight:
        messages.append(Message(2 * FP32, purpose="loss", blocks=True))
    if config.centering != "sinkhorn":
        messages.append(Message(FP32 * config.out_dim, purpose="center"))
    if config.fsdp:
        return messages + _sharded_messages(config, ranks, passes)
    return messages + gradient_buckets(config)


def _sinkhorn_messages(config: TrainConfig, on_cpu: bool) -> list[Message]:
    """Return those of a forward pass: a maximum and sums of each prototype."""
    if config.centering != "sinkhorn":
        return []
    sizes = [FP32 * config.out_dim] * (1 + SINKHORN_ITERATIONS)
    if on_cpu:
        sizes.append(4 * 8)  # the extremes of two numbers
    return [Message(size, purpose="Sinkhorn-Knopp", blocks=True) for size in sizes]


def gradient_buckets(config: TrainConfig) -> list[Message]:
    """Return the buckets of the student's gradients in the order in which they are ready.

    Parameters are added from last to first, those of the patches at the end; a bucket is closed
    once it is full.
    """
    trained = [(name, p) for name, p in _parameters(config) if p.requires_grad]
    trained.sort(key=lambda pair: not pair[0].startswith("backbone.patch_embed."))
    backbone = sum(FP32 * p.numel() for name, p in trained if name.startswith("backbone."))
    buckets: list[Message] = []
    size = ready = 0
    for name, parameter in reversed(trained):
        size += FP32 * parameter.numel()
        ready += FP32 * parameter.numel() * name.startswith("backbone.")
        if size >= (BUCKET if buckets else FIRST_BUCKET):
            buckets.append(Message(size, ready / backbone))
            size = 0
    return [*buckets, Message(size, 1.0)] if size else buckets


def _sharded_messages(config: TrainConfig, ranks: int, passes: int) -> list[Message]:
    """Return those of --fsdp: weights per pass and group; gradients and their norms per step."""
    weights: dict[str, int] = defaultdict(int)
    gradients: dict[str, int] = defaultdict(int)
    trained = 0
    for name, parameter in _parameters(config):
        group = _group_of(name)
        # Every rank has the same number of rows; the last ones may be padding.
        rows = ranks * math.ceil(parameter.shape[0] / ranks)
        size = FP32 * rows * parameter[0].numel()
        weights[group] += size
        if parameter.requires_grad:
            gradients[group] += size
            trained += 1
    gathered = [Message(n, kind="all-gather", purpose="weights", blocks=True)
                for n in weights.values()]  # fmt: skip
    reduced = [Message(n, kind="reduce-scatter") for n in gradients.values()]
    norms = Message(FP32 * trained, purpose="norms", blocks=True)
    return [*(passes * GATHERS_PER_PASS * gathered), *reduced, norms]


def _group_of(name: str) -> str:
    """Return the group of a parameter in training/sharding.py: a block, the head, or the rest."""
    words = name.split(".")
    if words[:2] == ["backbone", "blocks"]:
        return words[2]
    return "head" if words[0] == "head" else "rest"


def _parameters(config: TrainConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the student's parameters without their values."""
    with torch.device("meta"):
        network = plain_network(config)
    yield from network.named_parameters()
