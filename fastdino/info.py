"""`fastdino info`: what this machine has, which parts fastdino would take on it, and why."""

from __future__ import annotations

import argparse
import os
import platform

import torch
from fastdino_kernels import chosen_impl as chosen_kernels
from fastdino_kernels.dispatch import triton_problem

import fastdino
from fastdino.augmentation import dali_problem, fused_problem
from fastdino.data.decoding import dali_decode_problem
from fastdino.data.loader import choose_crops, choose_decode
from fastdino.distributed import choose_device
from fastdino.environment import processor, version
from fastdino.models.attention import BACKENDS, attention_problem, choose_attention

PACKAGES = (
    "torch", "triton", "torchvision", "timm", "xformers", "nvidia-dali-cuda130",
    "nvidia-dali-cuda120", "numba", "pillow", "numpy", "tensorboard",
)  # fmt: skip


def report() -> dict[str, str]:
    """Facts by name, in the order to show them."""
    device = choose_device("auto")
    attention = choose_attention("auto", device)
    crops, why_crops = choose_crops("auto", device)
    decode, why_decode = choose_decode("auto", crops, device)
    facts = {
        "fastdino": fastdino.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads",
        "gpu": _gpus(),
    }
    facts |= {name: version(name) for name in PACKAGES}
    facts["attention"] = f"{attention.name} ({attention.reason})"
    facts |= {f"  {name}": _availability(attention_problem(name, device)) for name in BACKENDS}
    facts |= {
        "kernels": chosen_kernels(device),
        "  triton": _availability(triton_problem(device.type)),
        "crops": f"{crops} ({why_crops})",
        "  fused": _availability(fused_problem(device)),
        "  dali": _availability(dali_problem()),
        "  torchvision": "available",
        "decode": f"{decode} ({why_decode})",
        "  decode cpu": _availability(dali_decode_problem()),
        "  decode gpu": _availability(_nvjpeg_problem(device)),
    }
    return facts


def _nvjpeg_problem(device: torch.device) -> str | None:
    return dali_problem() if device.type == "cuda" else "it needs a GPU"


def _availability(problem: str | None) -> str:
    return "available" if problem is None else f"not available: {problem}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return f"none that PyTorch sees (built for {'CUDA ' + built if built else 'CPU only'})"
    names = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        names.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return "; ".join(names) + f" (CUDA {torch.version.cuda})"


def configure(parser: argparse.ArgumentParser) -> None:
    """`fastdino info` has no flags."""


def main(args: argparse.Namespace) -> int:
    """Prints the report."""
    for name, fact in report().items():
        print(f"{name:20} {fact}")
    return 0
