"""Model of the step on many GPUs, from the step of one GPU and the sizes of its messages.

Each GPU keeps its batch. Gradients are summed in the buckets of DistributedDataParallel, one after
the other, during the backward pass. Communication that ends after it makes the step longer. A sum
of n bytes over p GPUs takes 2 (p - 1)/p * n/bandwidth, as in a ring, plus a latency.

The head's gradients are ready at once, those of the backbone evenly over the backward pass, last
block first. The sum for the center comes before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastdino.bench.baselines.paper_step import plain_network
from fastdino.bench.report import table, wrap
from fastdino.config import TrainConfig

GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8  # GPUs
NODE_BANDWIDTH, NETWORK_BANDWIDTH = 400e9, 300e9  # bytes/s that NCCL reaches on H100s
# Seconds per sum, and per hop in a node and between nodes, from NCCL's tuning table (tree).
BASE_LATENCY, NODE_LATENCY, NETWORK_LATENCY = 8.4e-6, 4e-6, 14e-6
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes, the defaults of DistributedDataParallel
EXPLANATION = """\
A model, not a measurement: a step of {step:.4g} ms with a backward pass of {backward:.4g} ms
({source}), {messages} buckets of {gradients:.4g} MB of fp32 gradients in all, 400 GB/s in a node of
8 GPUs and 300 across."""
CPU_WARNING = "The step was measured on a CPU: these figures do not predict the scaling of GPUs."


@dataclass(frozen=True)
class Message:
    """A bucket of gradients: fp32 bytes, and the share of the backward pass before it is ready."""

    size: int
    ready: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of the step and of its backward pass on one GPU."""

    step: float
    backward: float


@dataclass(frozen=True)
class Scaled:
    """Prediction for a number of GPUs; exposed: seconds by which the step gets longer."""

    gpus: int
    exposed: float
    efficiency: float


@dataclass(frozen=True)
class Scaling:
    """Predictions for a step; source: where its time comes from. gradients: bytes."""

    scaled: Sequence[Scaled]
    step: float
    backward: float
    source: str
    messages: int
    gradients: int
    on_cpu: bool

    def markdown(self) -> str:
        """Return the section of the report."""
        about = EXPLANATION.format(
            step=1e3 * self.step,
            backward=1e3 * self.backward,
            source=self.source,
            messages=self.messages,
            gradients=self.gradients / 1e6,
        )
        rows = [[f"{s.gpus}", f"{1e3 * s.exposed:.2f}", f"{s.efficiency:.1%}"] for s in self.scaled]
        parts = ["## Many GPUs", *([CPU_WARNING] if self.on_cpu else []), wrap(about)]
        return "\n\n".join([*parts, table(["GPUs", "exposed, ms", "efficiency"], rows)])


def model_scaling(config: TrainConfig, time: StepTime, source: str, *, on_cpu: bool) -> Scaling:
    """Predict the efficiency of a config's step on up to 1024 GPUs."""
    messages = gradient_buckets(config)
    scaled = scale(time, messages, 4 * config.out_dim)
    gradients = sum(message.size for message in messages)
    return Scaling(scaled, time.step, time.backward, source, len(messages), gradients, on_cpu)


def scale(
    time: StepTime, messages: Sequence[Message], center_size: int, gpus: Sequence[int] = GPUS
) -> list[Scaled]:
    """Return the images/s per GPU for each number of GPUs, relative to one GPU."""
    exposed = {number: exposed_seconds(time, messages, center_size, number) for number in gpus}
    return [Scaled(n, seconds, time.step / (time.step + seconds)) for n, seconds in exposed.items()]


def exposed_seconds(
    time: StepTime, messages: Sequence[Message], center_size: int, gpus: int
) -> float:
    """Return the seconds from the end of the backward pass to the end of the last sum."""
    clock = sum_seconds(center_size, gpus)
    for message in messages:
        clock = max(clock, message.ready * time.backward) + sum_seconds(message.size, gpus)
    return max(0.0, clock - time.backward) if gpus > 1 else 0.0


def sum_seconds(size: int, gpus: int) -> float:
    """Return the seconds of an all-reduce of `size` bytes."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / NODE)
    bandwidth = NODE_BANDWIDTH if nodes == 1 else NETWORK_BANDWIDTH
    hops = (min(gpus, NODE) - 1) * NODE_LATENCY + math.log2(nodes) * NETWORK_LATENCY
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * hops + BASE_LATENCY


def gradient_buckets(config: TrainConfig) -> list[Message]:
    """Return the buckets of the student's gradients in the order in which they are ready.

    Parameters are added from last to first; a bucket is closed once it is full.
    """
    with torch.device("meta"):
        network = plain_network(config)
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    backbone = sum(4 * p.numel() for name, p in trained if name.startswith("backbone."))
    buckets: list[Message] = []
    size = ready = 0
    for name, parameter in reversed(trained):
        size += 4 * parameter.numel()
        ready += 4 * parameter.numel() * name.startswith("backbone.")
        if size >= (BUCKET if buckets else FIRST_BUCKET):
            buckets.append(Message(size, ready / backbone))
            size = 0
    return [*buckets, Message(size, 1.0)] if size else buckets
