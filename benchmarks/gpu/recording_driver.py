"""A Triton driver that records each launch instead of running it, so that no GPU is needed.

A launch takes Triton's own path as far as the GPU: the generated binder reads the arguments, their
types and alignment choose a specialisation, and the kernel is compiled for the target. So an error
that only a launch shows (an argument name that the binder reserves, an option that the compiler
refuses) shows here, and the recorded machine code is the one that a GPU would run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fastdino_kernels import dispatch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver

Arch = int | str  # as in Triton's GPUTarget: 90 for sm_90, "gfx942"

# Bytes of shared memory of one block, which decide whether a compiled kernel may be loaded.
SHARED_BYTES: Mapping[Arch, int] = {
    80: 166_912,
    90: 232_448,
    100: 232_448,
    "gfx942": 65_536,
}
ARCHS = tuple(SHARED_BYTES)
MAX_THREADS = 1024


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, grid and options, and the code compiled for the target."""

    kernel: str
    arch: Arch
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int
    fp_fusion: bool  # products and sums may be fused into one rounding
    binary: bytes
    files: Mapping[str, str]  # path of each stage of compilation, by file name

    def text(self, suffix: str) -> str:
        """Return the text of a stage of compilation, such as "ptx" or "amdgcn"."""
        path = next(path for name, path in self.files.items() if name.endswith("." + suffix))
        return Path(path).read_text(encoding="utf-8")


class _RecordingDriver:
    """The part of Triton's driver interface that a launch uses."""

    def __init__(self, target: GPUTarget, *, compiles: bool) -> None:
        self.target = target
        self.launches: list[Launch] = []
        self.device: torch.device | None = None  # of all tensor arguments, if they are checked
        self.utils = SimpleNamespace(
            # (module, function, registers, spills, threads); the "function" is the machine code. A
            # module that is None would be loaded anew by each launch.
            load_binary=lambda name, binary, shared, device: (binary, binary, 0, 0, MAX_THREADS),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[target.arch]},
        )
        # Triton caches compiled kernels per device.
        self._device = f"{target.arch}" if compiles else f"{target.arch}, front end"

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that Triton calls for each launch of one compiled kernel."""
        files = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json") or {}

        def launch(x: int, y: int, z: int, stream: int, binary: bytes, *rest: Any) -> None:
            if self.device is not None:
                arguments = rest[-len(source.fn.arg_names) :]  # after metadata and hooks
                _check_devices(source, arguments, self.device)
            self.launches.append(
                Launch(
                    source.name,
                    self.target.arch,
                    (x, y, z),
                    metadata.num_warps,
                    metadata.shared,
                    metadata.enable_fp_fusion,
                    binary,
                    files,
                )
            )

        return launch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _check_devices(source: Any, arguments: Sequence[Any], device: torch.device) -> None:
    for name, argument in zip(source.fn.arg_names, arguments, strict=True):
        if isinstance(argument, torch.Tensor) and argument.device != device:
            raise ValueError(
                f"{source.name}: argument {name} is a tensor on {argument.device}, not on {device}"
            )


@functools.cache
def _driver_for(arch: Arch, compiles: bool) -> _RecordingDriver:
    """Return the only driver of an architecture, which its compiled kernels keep a reference to."""
    is_nvidia = isinstance(arch, int)
    target = GPUTarget("cuda" if is_nvidia else "hip", arch, 32 if is_nvidia else 64)
    return _RecordingDriver(target, compiles=compiles)


def _no_problem(device: object) -> None:
    """Replace dispatch.triton_problem; a mock would take as long as a launch."""


@contextmanager
def record_launches(
    arch: Arch, *, compiles: bool = True, device: torch.device | None = None
) -> Iterator[list[Launch]]:
    """Record the launches of calls on tensors of any device, compiled for a GPU.

    Args:
        arch: one of ARCHS: 90 for sm_90.
        compiles: False stops after Triton's own language is checked and lowered to its first
            intermediate form, which takes a tenth of the time; it is then the recorded code.
        device: if given, a launch with a tensor on another device raises ValueError.

    Raises: RuntimeError: TRITON_INTERPRET=1 has replaced the kernels by interpreted ones.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels: unset it to compile them")
    recorder = _driver_for(arch, compiles)
    recorder.launches.clear()
    recorder.device = device
    with (
        mock.patch.object(driver, "_active", recorder),  # reset_active() would look for a GPU
        mock.patch.object(dispatch, "triton_problem", _no_problem),
        contextlib.nullcontext() if compiles else _front_end_only(),
    ):
        yield recorder.launches


@contextmanager
def _front_end_only() -> Iterator[None]:
    """Compile no further than Triton's intermediate form, in a cache of its own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _keep_first_stage),
    ):
        knobs.cache.dir = folder
        yield


def _keep_first_stage(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Replace all stages of compilation but the first; without arguments return a cache key."""
    if backend is None:
        return "front end", "front end"

    def text(module: Any, metadata: dict[str, Any]) -> bytes:
        metadata.update(name="", shared=0)
        return str(module).encode()

    first = stages["ttir"]
    stages.clear()
    stages.update({"ttir": first, backend.binary_ext: text})
    return None
