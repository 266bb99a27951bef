"""Model of the step on many GPUs, from the step of one GPU and the sizes of its messages.

Each GPU keeps its batch. Gradients are summed in the buckets of DistributedDataParallel, one after
the other, during the backward pass. Communication that ends after it makes the step longer. A sum
of n bytes over p GPUs takes 2 (p - 1)/p * n/bandwidth, as in a ring, plus a latency.

The head's gradients are ready at once, those of the backbone evenly over the backward pass, last
block first. The sum for the center comes before them. The GPU waits for the mean of the loss before
the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastdino.bench.report import table, wrap
from fastdino.bench.step_messages import Message, step_messages
from fastdino.config import TrainConfig

GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8  # GPUs
NODE_BANDWIDTH, NETWORK_BANDWIDTH = 400e9, 300e9  # bytes/s that NCCL reaches on H100s
# Seconds per sum, and per hop in a node and between nodes, from NCCL's tuning table (tree).
BASE_LATENCY, NODE_LATENCY, NETWORK_LATENCY = 8.4e-6, 4e-6, 14e-6
EXPLANATION = """\
A model, not a measurement: a step of {step:.4g} ms with a backward pass of {backward:.4g} ms
({source}), {messages} buckets of {gradients:.4g} MB of fp32 gradients in all, 400 GB/s in a node of
8 GPUs and 300 across. On 8 GPUs each rank sends {sent:.4g} MB per step (in rings), and
{sharded:.4g} MB with --fsdp, whose time is not modelled."""
CPU_WARNING = "The step was measured on a CPU: these figures do not predict the scaling of GPUs."


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
    """Predictions for a step.

    Attributes:
        source: where its time comes from.
        messages, gradients: number of buckets, and their bytes.
        sent, sharded: bytes that each of 8 ranks sends per step, without and with --fsdp.
    """

    scaled: Sequence[Scaled]
    step: float
    backward: float
    source: str
    messages: int
    gradients: int
    sent: int
    sharded: int
    on_cpu: bool

    def markdown(self) -> str:
        """Return the section of the report."""
        about = EXPLANATION.format(
            step=1e3 * self.step,
            backward=1e3 * self.backward,
            source=self.source,
            messages=self.messages,
            gradients=self.gradients / 1e6,
            sent=self.sent / 1e6,
            sharded=self.sharded / 1e6,
        )
        rows = [[f"{s.gpus}", f"{1e3 * s.exposed:.2f}", f"{s.efficiency:.1%}"] for s in self.scaled]
        parts = ["## Many GPUs", *([CPU_WARNING] if self.on_cpu else []), wrap(about)]
        return "\n\n".join([*parts, table(["GPUs", "exposed, ms", "efficiency"], rows)])


def model_scaling(config: TrainConfig, time: StepTime, source: str, *, on_cpu: bool) -> Scaling:
    """Predict the efficiency of a config's step on up to 1024 GPUs."""
    unsharded = replace(config, fsdp=False)
    messages = step_messages(unsharded, 1)
    sizes = [message.size for message in messages if message.purpose == "gradients"]
    sent, sharded = (
        round(sum(message.sent(NODE) for message in step_messages(one, NODE)))
        for one in (unsharded, replace(config, fsdp=True))
    )
    return Scaling(
        scale(time, messages), time.step, time.backward, source, len(sizes), sum(sizes), sent,
        sharded, on_cpu,
    )  # fmt: skip


def scale(time: StepTime, messages: Sequence[Message], gpus: Sequence[int] = GPUS) -> list[Scaled]:
    """Return the images/s per GPU for each number of GPUs, relative to one GPU."""
    exposed = {number: exposed_seconds(time, messages, number) for number in gpus}
    return [Scaled(n, seconds, time.step / (time.step + seconds)) for n, seconds in exposed.items()]


def exposed_seconds(time: StepTime, messages: Sequence[Message], gpus: int) -> float:
    """Return the seconds by which all-reduces make a step longer.

    Those that block come before the backward pass. The others overlap with it.
    """
    waited = sum(sum_seconds(message.size, gpus) for message in messages if message.blocks)
    clock = 0.0
    for message in messages:
        if not message.blocks:
            clock = max(clock, message.ready * time.backward) + sum_seconds(message.size, gpus)
    return waited + max(0.0, clock - time.backward) if gpus > 1 else 0.0


def sum_seconds(size: int, gpus: int) -> float:
    """Return the seconds of an all-reduce of `size` bytes."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / NODE)
    bandwidth = NODE_BANDWIDTH if nodes == 1 else NETWORK_BANDWIDTH
    hops = (min(gpus, NODE) - 1) * NODE_LATENCY + math.log2(nodes) * NETWORK_LATENCY
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * hops + BASE_LATENCY
