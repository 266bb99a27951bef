"""A Triton driver that records each launch instead of running it, so that no GPU is needed.

A launch takes Triton's own path as far as the GPU: the generated binder reads the arguments, their
types and alignment choose a specialisation, and the kernel is compiled for the target. So an error
that only a launch shows (an argument name that the binder reserves, an option that the compiler
refuses) shows here, and the recorded machine code is the one that a GPU would run.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fastdino_kernels import dispatch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

# Limits of an H100, which decide whether a compiled kernel may be loaded.
MAX_SHARED_BYTES, MAX_THREADS = 232448, 1024


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name and options, and the machine code compiled for the target."""

    kernel: str
    num_warps: int
    shared_bytes: int
    fp_fusion: bool  # products and sums may be fused into one rounding
    binary: bytes


class _RecordingDriver:
    """The part of Triton's driver interface that a launch uses."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.launches: list[Launch] = []
        self.utils = SimpleNamespace(
            # (module, function, registers, spills, threads); the "function" is the machine code.
            load_binary=lambda name, binary, shared, device: (None, binary, 0, 0, MAX_THREADS),
            get_device_properties=lambda device: {"max_shared_mem": MAX_SHARED_BYTES},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that Triton calls for each launch of one compiled kernel."""

        def launch(x: int, y: int, z: int, stream: int, binary: bytes, *arguments: Any) -> None:
            self.launches.append(
                Launch(
                    metadata.name,
                    metadata.num_warps,
                    metadata.shared,
                    metadata.enable_fp_fusion,
                    binary,
                )
            )

        return launch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        return self.target.arch  # Triton caches compiled kernels per device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@functools.cache
def _driver_for(arch: int) -> _RecordingDriver:
    """Return the only driver of an architecture, which its compiled kernels keep a reference to."""
    return _RecordingDriver(GPUTarget("cuda", arch, 32))


def _no_problem(device: object) -> None:
    """Replace dispatch.triton_problem; a mock would take as long as a launch."""


@contextmanager
def record_launches(arch: int) -> Iterator[list[Launch]]:
    """Record the launches of calls on CPU tensors, compiled for a compute capability.

    Args:
        arch: 90 for sm_90.

    Raises: RuntimeError: TRITON_INTERPRET=1 has replaced the kernels by interpreted ones.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels: unset it to compile them")
    recorder = _driver_for(arch)
    recorder.launches.clear()
    with (
        mock.patch.object(driver, "_active", recorder),  # reset_active() would look for a GPU
        mock.patch.object(dispatch, "triton_problem", _no_problem),
    ):
        yield recorder.launches
