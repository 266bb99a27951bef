"""Facts about the machine and the software: processor, package versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# Instructions that decide how fast products are, and in which precision.
FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
CLOCKS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def environment(
    device: torch.device, packages: Sequence[str], facts: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return what a measurement depends on: hardware, commit, versions and further `facts`.

    device: "cpu", or the GPU's name. packages: distributions; those not installed are left out.
    """
    on_gpu = device.type == "cuda"
    versions = {package: version(package) for package in packages}
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processor": processor(),
        "features": processor_features(),
        "cores": str(cpu_count()),
        "threads": str(torch.get_num_threads()),
        "commit": commit(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **(_gpu_facts(device) if on_gpu else {}),
        **(facts or {}),
        **{name: number for name, number in versions.items() if number != "not installed"},
    }


def _gpu_facts(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    query = ("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
    return {
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "multiprocessors": str(properties.multi_processor_count),
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "CUDA": torch.version.cuda or "unknown",
        CLOCKS: output_of(*query).replace("\n", "; "),
    }


def processor() -> str:
    """Return the name of the CPU."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_features() -> str:
    """Return those of FEATURES that the CPU has; "unknown" where Linux does not list them."""
    flags = _cpuinfo("flags").split()
    return ", ".join(name for name in FEATURES if name in flags) or "unknown"


def _cpuinfo(name: str) -> str:
    """Return a value that Linux lists for the first core; "" if there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    values = re.findall(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return values[0] if values else ""


def version(package: str) -> str:
    """Return the version of an installed distribution, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def output_of(*command: str) -> str:
    """Return the output of a command run in the checkout, or "unknown" if it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def commit() -> str:
    """Return the checkout's commit, marked if files were changed; "unknown" without a checkout."""
    if not (ROOT / ".git").exists():  # an installed package, perhaps inside another repository
        return "unknown"
    head = output_of("git", "rev-parse", "HEAD")
    if head != "unknown" and output_of("git", "status", "--porcelain", "-uno"):
        head += ", with changes"
    return head


def cpu_count() -> int:
    """Return the number of processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
