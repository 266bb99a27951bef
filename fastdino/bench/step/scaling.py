"""How a step would fare on many GPUs: a model, from one GPU's step and the sizes of its messages.

Each GPU keeps its batch; gradients are summed in buckets as DistributedDataParallel makes them, one
after the other, while the backward pass goes on. What ends after it makes the step longer. A sum of
n bytes over p GPUs takes 2 (p - 1)/p * n/bandwidth (a ring moves as much), and a latency.

The head's gradients are ready at once; those of the backbone evenly over the backward pass, last
block first. The center's sum goes ahead of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastdino.bench.step.paper import plain_network
from fastdino.bench.telling import table
from fastdino.config import TrainConfig

GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8  # GPUs
NODE_BANDWIDTH, NETWORK_BANDWIDTH = 400e9, 300e9  # bytes a second: what NCCL reaches on H100s
# Seconds: of any sum, and of a hop in a node and between nodes; NCCL's own tuning table (tree).
BASE_LATENCY, NODE_LATENCY, NETWORK_LATENCY = 8.4e-6, 4e-6, 14e-6
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes, DistributedDataParallel's


@dataclass(frozen=True)
class Message:
    """A bucket of gradients: fp32 bytes, and when it is ready, as a share of the backward pass."""

    size: int
    ready: float


@dataclass(frozen=True)
class StepTime:
    """Seconds on one GPU: of the whole step, and of its backward pass."""

    step: float
    backward: float


@dataclass(frozen=True)
class Scaled:
    """The model's answer for a number of GPUs. exposed: seconds that a step gets longer."""

    gpus: int
    exposed: float
    efficiency: float


def scale(
    time: StepTime, messages: Sequence[Message], center_size: int, gpus: Sequence[int] = GPUS
) -> list[Scaled]:
    """The efficiency of each number of GPUs: images/s a GPU, by that of one."""
    scaled = []
    for number in gpus:
        exposed = exposed_seconds(time, messages, center_size, number)
        scaled.append(Scaled(number, exposed, time.step / (time.step + exposed)))
    return scaled


def exposed_seconds(
    time: StepTime, messages: Sequence[Message], center_size: int, gpus: int
) -> float:
    """Seconds from the end of the backward pass to the end of the last sum."""
    clock = sum_seconds(center_size, gpus)
    for message in messages:
        clock = max(clock, message.ready * time.backward) + sum_seconds(message.size, gpus)
    return max(0.0, clock - time.backward) if gpus > 1 else 0.0


def sum_seconds(size: int, gpus: int) -> float:
    """Of an all-reduce of `size` bytes."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / NODE)
    bandwidth = NODE_BANDWIDTH if nodes == 1 else NETWORK_BANDWIDTH
    hops = (min(gpus, NODE) - 1) * NODE_LATENCY + math.log2(nodes) * NETWORK_LATENCY
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * hops + BASE_LATENCY


def messages_of(config: TrainConfig) -> list[Message]:
    """The buckets of the student's gradients, in the order in which they are ready."""
    with torch.device("meta"):
        network = plain_network(config)
    return buckets(network)


def buckets(network: nn.Module) -> list[Message]:
    """From the last parameter to the first; a bucket is closed once it is full."""
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    backbone = sum(4 * p.numel() for name, p in trained if name.startswith("backbone."))
    found: list[Message] = []
    size = ready = 0
    for name, parameter in reversed(trained):
        size += 4 * parameter.numel()
        ready += 4 * parameter.numel() * name.startswith("backbone.")
        if size >= (BUCKET if found else FIRST_BUCKET):
            found.append(Message(size, ready / backbone))
            size = 0
    return [*found, Message(size, 1.0)] if size else found


def scaling_table(scaled: Sequence[Scaled]) -> str:
    """In Markdown."""
    rows = [[f"{s.gpus}", f"{1e3 * s.exposed:.2f}", f"{s.efficiency:.1%}"] for s in scaled]
    return table(["GPUs", "exposed, ms", "efficiency"], rows)
