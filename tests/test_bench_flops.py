"""FLOPs of the model by a plain count of its products, and peaks of GPUs by their names."""

from __future__ import annotations

import runpy

import pytest
import torch

from fastdino.bench import flops
from fastdino.config import TrainConfig
from fastdino.models import linear_layer
from fastdino.models.vit import VIT_ARCHS

CUDA = torch.device("cuda")


# Dense bf16 TFLOP/s of the data sheets, by the names that PyTorch reports.
@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_data_sheet(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "measured_peak", lambda device, precision: f"measured {precision}")
    for precision in ("bf16", "fp16"):
        peak = flops.peak_of(CUDA, precision)
        assert peak.flops == tflops * 1e12
        part = peak.source.removesuffix(f"'s dense {precision} product")
        assert part in name
    assert flops.peak_of(CUDA, "fp32") == "measured fp32"


@pytest.mark.parametrize(
    "name", ["NVIDIA A10", "NVIDIA L40S", "AMD Instinct MI300X", "NVIDIA H200 MIG 1g.18gb"]
)
def test_the_peak_of_other_gpus_and_of_parts_of_a_gpu_is_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "measured_peak", lambda device, precision: f"measured {precision}")
    assert flops.peak_of(CUDA, "bf16") == "measured bf16"


@pytest.mark.parametrize("problem", [None, "no oneDNN"])
def test_the_measured_peak_is_the_fastest_product(monkeypatch, problem):
    """By oneDNN too, where it works."""
    ways = (False,) if problem else (False, True)
    seconds = iter([3.0, 2.0, 0.5, 4.0, 3.0, 2.0])
    used = []
    monkeypatch.setattr(flops, "onednn_problem", lambda: problem)
    monkeypatch.setattr(flops, "product", lambda a, b, *, onednn: used.append(onednn))
    monkeypatch.setattr(flops, "host_seconds", lambda calls, device: (calls[0](), next(seconds))[1])
    peak = flops.measured_peak(torch.device("cpu"), "fp32", repetitions=3)
    assert used == [*ways] * 3
    assert peak.flops == 2 * 1024**3 / 0.5
    assert peak.source == "a float32 product of 1024 x 1024 matrices in this run"


@pytest.mark.parametrize(
    ("device", "precision", "size", "ways"),
    [
        ("cpu", "fp32", 1024, 2), ("cpu", "bf16", 1024, 1), ("cpu", "fp16", 1024, 1),
        ("cuda", "fp32", 8192, 1), ("cuda", "bf16", 8192, 1), ("cuda", "fp16", 8192, 1),
    ],
)  # fmt: skip
def test_the_product_is_in_the_precision_and_measured_once_in_each_way(
    monkeypatch, device, precision, size, ways
):
    """Only fp32 on a CPU has two ways."""
    randn, used = torch.randn, []
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(*shape, device="meta"))
    monkeypatch.setattr(flops, "onednn_problem", lambda: None)
    monkeypatch.setattr(flops, "product", lambda a, b, *, onednn: used.append((a.dtype, a.shape)))
    monkeypatch.setattr(flops, "host_seconds", lambda calls, device: (calls[0](), 0.5)[1])
    peak = flops.measured_peak(torch.device(device), precision, repetitions=3)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert used == [(dtype, (size, size))] * 3 * ways
    assert peak.source == f"a {str(dtype)[6:]} product of {size} x {size} matrices in this run"


def test_the_import_multiplies_nothing(monkeypatch):
    """Else a cached answer about oneDNN would be that of the moment of the import."""
    monkeypatch.setattr(linear_layer, "onednn_problem", None)
    names = runpy.run_path(flops.__file__)
    counted = torch.ops.mkldnn._linear_pointwise in names["_CPU_OPERATOR_FLOPS"]
    assert counted == hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.mark.parametrize("local_crops", [0, 3])
def test_flops_of_the_model_are_those_of_its_products(local_crops):
    config = TrainConfig(
        arch="vit_tiny", patch_size=8, global_crops_size=64, local_crops_size=24,
        local_crops_number=local_crops, out_dim=1000,
    )  # fmt: skip
    sizes = VIT_ARCHS["vit_tiny"]
    D, depth = sizes["embed_dim"], sizes["depth"]

    def product(rows, inner, columns):
        return 2 * rows * inner * columns

    def forward(side):
        """Return the FLOPs of the patch embedding, of the blocks, and of the head."""
        patches = (side // 8) ** 2
        N = patches + 1
        heads = 2 * product(N, D, N)  # scores and their products with the values
        layers = product(N, D, 3 * D) + product(N, D, D) + 2 * product(N, D, 4 * D)
        head = [(D, 2048), (2048, 2048), (2048, 256), (256, 1000)]
        return (
            product(patches, 3 * 8 * 8, D),
            depth * (heads + layers),
            sum(product(1, *sizes) for sizes in head),
        )

    backbone = heads = 0
    for side, number, teacher in ((64, 2, 2), (24, local_crops, 0)):
        embedding, blocks, head = forward(side)
        backbone += number * (2 * embedding + 3 * blocks) + teacher * (embedding + blocks)
        heads += (3 * number + teacher) * head
    counted = flops.model_flops(config)
    assert (counted.backbone, counted.head) == (backbone, heads)
    assert counted.total == backbone + heads
