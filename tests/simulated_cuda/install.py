"""simulate_cuda(): torch.cuda as on a machine with GPUs, on one without."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.simulated_cuda.backward import run_backward
from tests.simulated_cuda.device import SimulatedCuda
from tests.simulated_cuda.objects import Event, Graph, Stream

PROPERTIES = SimpleNamespace(
    name="Simulated GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    warp_size=32, max_threads_per_multi_processor=2048, shared_memory_per_block_optin=232448,
    regs_per_multiprocessor=65536, L2_cache_size=50 << 20, is_integrated=0,
    gcnArchName="", uuid="simulated",
)  # fmt: skip


@contextmanager
def simulate_cuda(count: int = 1) -> Iterator[SimulatedCuda]:
    """Simulate `count` GPUs, in threads that are started meanwhile too.

    Triton's kernels are interpreted.

    Raises: AssertionError: at the end, if there was a fault that the code under test caught, or
        that shows when memory is freed.
    """
    assert not torch.cuda.is_available(), "this machine has a GPU"
    gpu = SimulatedCuda(count)
    # A process keeps this guard, as after the first use of FakeTensorMode: it never calls CUDA.
    torch._C._ensureCUDADeviceGuardSet()
    with ExitStack() as stack:
        for owner, name, value in _replacements(gpu):
            stack.enter_context(mock.patch.object(owner, name, value))
        lifts = torch._C._only_lift_cpu_tensors()
        # torch.tensor(data, device="cuda") then copies where a mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        stack.enter_context(gpu.mode())
        yield gpu
        gpu.check_copies(finished=True)
    assert not gpu.faults, "\n".join(gpu.faults)


def _replacements(gpu: SimulatedCuda) -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, replacement) of everything that would call the CUDA driver."""
    yield from _devices(gpu)
    yield from _streams(gpu)
    yield from _rest(gpu)


def _devices(gpu: SimulatedCuda) -> Iterator[tuple[Any, str, Any]]:
    def exchange(index: int) -> int:
        previous = gpu.current_device
        if index >= 0:
            gpu.current_device = index
        return previous

    C, cuda, accelerator = torch._C, torch.cuda, torch.accelerator
    for name in ("_lazy_init", "init", "empty_cache"):
        yield cuda, name, lambda: None
    yield cuda, "is_available", lambda: True
    yield cuda, "is_initialized", lambda: True
    yield cuda, "device_count", lambda: gpu.count
    yield cuda, "get_device_properties", lambda device=None: PROPERTIES
    yield C, "_cuda_getDevice", lambda: gpu.current_device
    yield C, "_cuda_setDevice", exchange
    yield cuda, "_exchange_device", exchange
    yield cuda, "_maybe_exchange_device", exchange
    yield C, "_cuda_getDeviceCount", lambda: gpu.count
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        yield cuda, name, lambda device=None: 1 << 20
    yield cuda, "reset_peak_memory_stats", lambda device=None: None
    yield cuda, "mem_get_info", lambda device=None: (70 << 30, 80 << 30)
    yield accelerator, "is_available", lambda: True
    yield accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    yield accelerator, "current_device_index", lambda: gpu.current_device
    yield accelerator, "set_device_index", lambda index: exchange(torch.device("cuda", index).index)


def _streams(gpu: SimulatedCuda) -> Iterator[tuple[Any, str, Any]]:
    class BoundStream(Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **known: int) -> Any:
            return gpu.streams[known["stream_id"]] if known else Stream(gpu, device)

    gpu_ = gpu

    def identify(stream: Stream) -> tuple[int, int, int]:
        return stream.stream_id, stream.device_index, stream.device_type

    def synchronize(device: Any = None) -> None:
        index = gpu.resolve("cuda" if device is None else device).index
        for stream in gpu.streams:
            if stream.device_index == index:
                gpu.wait("torch.cuda.synchronize", stream)

    class BoundEvent(Event):
        gpu = gpu_

    class BoundGraph(Graph):
        gpu = gpu_

    C, cuda = torch._C, torch.cuda
    yield cuda, "Stream", BoundStream
    yield cuda, "Event", BoundEvent
    yield cuda.streams, "Event", BoundEvent
    yield cuda, "synchronize", synchronize
    yield C, "_cuda_getCurrentStream", lambda index: identify(gpu.current_stream(index))
    yield C, "_cuda_getDefaultStream", lambda index: identify(gpu.default_streams[index])
    yield (
        C, "_cuda_setStream",
        lambda stream_id, device_index, device_type: gpu.set_stream(gpu.streams[stream_id]),
    )  # fmt: skip
    yield Tensor, "record_stream", lambda tensor, stream: gpu.record_stream(tensor, stream)
    yield (
        cuda.graphs,
        "_cuda_isCurrentStreamCapturing",
        lambda: gpu.current_stream().tape is not None,
    )
    yield cuda, "CUDAGraph", BoundGraph
    yield cuda.graph, "default_capture_stream", None  # kept by the class from its first use on
    yield cuda, "graph_pool_handle", lambda: (0, 1)


class _AnyGenerator(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch._C.Generator)


def _rest(gpu: SimulatedCuda) -> Iterator[tuple[Any, str, Any]]:
    generator, new_generator = torch.Generator(), torch.Generator
    launch, run_thread = interpreter.GridExecutor.__call__, threading.Thread.run
    patch_language, patched = interpreter._patch_lang, set[int]()
    launching = threading.Lock()

    class CpuGenerator(metaclass=_AnyGenerator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return new_generator()

    def launch_on_gpu(grid: Any, *args: Any, **kwargs: Any) -> None:
        def interpret(*args: Any, **kwargs: Any) -> None:
            with launching:  # the interpreter's state is global
                patched.clear()
                launch(grid, *args, **kwargs)

        gpu.launch_kernel(grid.fn.__name__, interpret, list(args), kwargs)

    def patch_language_once(function: Any) -> Any:
        """Patch triton.language for a module's functions once per launch, not at every call."""
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch_language(function)

    def run_on_gpu(thread: threading.Thread) -> None:
        with gpu.mode():
            run_thread(thread)

    def run_engine(outputs: Any, gradients: Any, *rest: Any, **options: Any) -> Any:
        if any(isinstance(x, Tensor) and x.is_cuda for x in outputs):
            return run_backward(outputs, gradients, *rest, **options)
        return run_engine_of_torch(outputs, gradients, *rest, **options)

    make_tensor = torch.tensor

    def tensor(data: Any, *, pin_memory: bool = False, **options: Any) -> Tensor:
        made = make_tensor(data, **options)
        return made.pin_memory() if pin_memory else made

    run_engine_of_torch = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    yield torch.cuda, "default_generators", (generator,) * gpu.count
    yield torch, "Generator", CpuGenerator
    yield torch, "tensor", tensor
    yield torch.autograd, "_engine_run_backward", run_engine
    yield interpreter.GridExecutor, "__call__", launch_on_gpu
    yield interpreter, "_patch_lang", patch_language_once
    yield threading.Thread, "run", run_on_gpu
