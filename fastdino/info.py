"""`fastdino info`: what this machine has, which parts fastdino would take on it, and why."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import torch
from fastdino_kernels import chosen_impl as chosen_kernels

import fastdino
from fastdino.data.loader import dali_problem
from fastdino.distributed import choose_device
from fastdino.models.attention import choose_attention, xformers_problem

PACKAGES = (
    "torch", "triton", "torchvision", "timm", "xformers", "nvidia-dali-cuda130",
    "nvidia-dali-cuda120", "pillow", "numpy", "tensorboard",
)  # fmt: skip


def report() -> dict[str, str]:
    """Facts by name, in the order to show them."""
    device = choose_device("auto")
    attention = choose_attention("auto", device)
    problem = xformers_problem(device)
    dali = dali_problem()
    facts = {
        "fastdino": fastdino.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads",
        "gpu": _gpus(),
    }
    facts |= {name: _version(name) for name in PACKAGES}
    facts |= {
        "attention": f"{attention.name} ({attention.reason})",
        "  xformers": "available" if problem is None else f"not available: {problem}",
        "  sdpa": "available",
        "kernels": chosen_kernels(device),
        "crops": "dali" if dali is None else f"torchvision (no DALI: {dali})",
    }
    return facts


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return f"none that PyTorch sees (built for {'CUDA ' + built if built else 'CPU only'})"
    names = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        names.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return "; ".join(names) + f" (CUDA {torch.version.cuda})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def configure(parser: argparse.ArgumentParser) -> None:
    """`fastdino info` has no flags."""


def main(args: argparse.Namespace) -> int:
    """Prints the report."""
    for name, fact in report().items():
        print(f"{name:20} {fact}")
    return 0
