"""Facts about the machine and the software: processor, package versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent


def processor() -> str:
    """Return the name of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return names[0] if names else platform.machine()


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
