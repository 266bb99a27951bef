"""`fastdino info`: versions, hardware, the choices of a default run and the available backends."""

from __future__ import annotations

import argparse
import os
import platform

import torch
from fastdino_kernels.dispatch import triton_problem

import fastdino
from fastdino.augmentation import dali_problem, fused_problem
from fastdino.config import TrainConfig
from fastdino.data.decoding import dali_decode_problem
from fastdino.environment import processor, processor_features, version
from fastdino.models.attention import BACKENDS, AttentionInputs, attention_problem
from fastdino.models.compile import compile_problem
from fastdino.models.linear_layer import onednn_problem
from fastdino.runtime import resolve_runtime
from fastdino.terminal import print_out

PACKAGES = (
    "torch", "triton", "torchvision", "timm", "xformers", "nvidia-dali-cuda130",
    "nvidia-dali-cuda120", "numba", "pillow", "numpy", "tensorboard",
)  # fmt: skip


def report() -> dict[str, str]:
    """Return the facts by name, in the order to print them."""
    runtime = resolve_runtime(TrainConfig())
    device = torch.device(runtime.device.value)
    facts = {
        "fastdino": fastdino.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads",
        "cpu features": processor_features(),
        "gpu": _gpus(),
    }
    facts |= {name: version(name) for name in PACKAGES}
    problems: dict[str, dict[str, str | None]] = {
        "attention": {name: attention_problem(name, AttentionInputs(device)) for name in BACKENDS},
        "kernels": {"triton": triton_problem(device), "torch": None},
        "compile": {"on": compile_problem(device)},
        "onednn": {"on": "it is for CPUs" if device.type == "cuda" else onednn_problem()},
        "crops": {"fused": fused_problem(device), "torchvision": None, "dali": dali_problem()},
        "decode": {
            "cpu": dali_decode_problem(),
            "gpu": dali_problem() if device.type == "cuda" else "it needs a GPU",
            "pillow": None,
        },
    }
    for name, choice in runtime.choices().items():
        facts[name] = str(choice)
        for backend, problem in problems.get(name, {}).items():
            available = "available" if problem is None else f"not available: {problem}"
            facts[f"  {name} {backend}"] = available
    return facts


def _gpus() -> str:
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        return f"PyTorch sees none (built for {f'CUDA {cuda}' if cuda else 'CPU only'})"
    names = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        names.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return "; ".join(names) + f" (CUDA {torch.version.cuda})"


def configure(parser: argparse.ArgumentParser) -> None:
    """`fastdino info` has no flags."""


def main(args: argparse.Namespace) -> int:
    """Print the report."""
    for name, fact in report().items():
        print_out(f"{name:20} {fact}")
    return 0
