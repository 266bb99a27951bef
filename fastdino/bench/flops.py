"""FLOPs of a step: of the model, from its sizes, and those that a baseline executes, counted.

A multiplication and an addition are two FLOPs. The model's FLOPs are the matrix products of the
student's forward and backward passes and the teacher's forward pass. They do not depend on the
implementation, so that throughputs of different steps compare.

Legend: N tokens (1 CLS + patches), D width, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastdino.bench.baselines.training_step import vit_sizes
from fastdino.bench.measurement import host_seconds
from fastdino.config import TrainConfig
from fastdino.models.linear_layer import onednn_problem, product
from fastdino.runtime import AUTOCAST_DTYPES

HEAD_HIDDEN, HEAD_BOTTLENECK = 2048, 256
# FLOP/s of dense bf16 and fp16 products from the data sheets, by a part of the device's name.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
}


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per image of one step."""

    backbone: float
    head: float

    @property
    def total(self) -> float:
        """Return the FLOPs of backbone and head."""
        return self.backbone + self.head


def model_flops(config: TrainConfig) -> ModelFlops:
    """Return the FLOPs per image: the student on all crops, the teacher on the 2 global ones.

    A backward pass takes twice the forward pass, except for the patch embedding: pixels need no
    gradient.
    """
    sizes = vit_sizes(config)
    D, patch = sizes["embed_dim"], config.patch_size
    # Side of the crops, their number for the student and for the teacher.
    passes = (
        (config.global_crops_size, 2, 2),
        (config.local_crops_size, config.local_crops_number, 0),
    )
    backbone = 0.0
    for side, student, teacher in passes:
        patches = (side // patch) ** 2
        backbone += (3 * student + teacher) * _block_flops(D, sizes["depth"], 1 + patches)
        backbone += (2 * student + teacher) * 2 * patches * 3 * patch**2 * D
    hidden, bottleneck = HEAD_HIDDEN, HEAD_BOTTLENECK
    head = 2 * (D * hidden + hidden**2 + hidden * bottleneck + bottleneck * config.out_dim)
    return ModelFlops(backbone, float((3 * config.ncrops + 2) * head))


def _block_flops(D: int, depth: int, N: int) -> float:
    """Return the forward FLOPs of one crop: 12 D^2 per token for qkv, projection, MLP; 2 N D."""
    return depth * 2 * N * (12 * D * D + 2 * N * D)


def executed_flops(step: Callable[[], object]) -> int:
    """Count the FLOPs of the products, convolutions and attentions that a step runs.

    Compiled parts run eagerly for it: the operations that they fuse are no products.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_OPERATOR_FLOPS)
    with torch.compiler.set_stance("force_eager"), counter:
        step()
    return counter.get_total_flops()


# PyTorch's counter does not know these operators of CPUs.
_aten = torch.ops.aten
_CPU_OPERATOR_FLOPS: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _CPU_OPERATOR_FLOPS[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: (
        2 * math.prod(x) * weight[0]
    )


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s for the utilization, and the source of the number."""

    flops: float
    source: str


def peak_of(device: torch.device, precision: str) -> Peak:
    """Return the data sheet's peak of a known GPU, else that of a product measured now.

    A MIG instance, a part of a GPU that has the GPU's name and its own, is measured. So is fp32 on
    every GPU.

    Args: precision: fp32, bf16 or fp16.
    """
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAKS.items():
            if part in name and "MIG" not in name:
                return Peak(flops, f"{part}'s dense {precision} product")
    return measured_peak(device, precision)


def measured_peak(device: torch.device, precision: str, repetitions: int = 10) -> Peak:
    """Measure the fastest of several square products.

    In fp32 on a CPU by PyTorch's BLAS and by oneDNN, of which --mode fast takes the faster one.
    """
    size = 8192 if device.type == "cuda" else 1024
    dtype = AUTOCAST_DTYPES[precision] or torch.float32
    x = torch.randn(size, size, device=device).to(dtype)
    both = device.type == "cpu" and precision == "fp32" and onednn_problem() is None
    seconds = min(
        host_seconds([partial(product, x, x, onednn=onednn)], device)
        for _ in range(repetitions)
        for onednn in ((False, True) if both else (False,))
    )
    name = str(dtype).removeprefix("torch.")
    source = f"a {name} product of {size} x {size} matrices in this run"
    return Peak(2 * size**3 / seconds, source)
