"""A CUDA device simulated by the CPU: real values, and the rules of a GPU.

Tensors on it have the type torch.Tensor and the device cuda:<index>; their memory is the CPU's. A
TorchDispatchMode runs each operation on CPU tensors over the same memory, and keeps the books of a
GPU: which stream an operation runs on, what it may read by then, where the host waits, which host
memory is pinned, what a CUDA graph records. What is wrong on a GPU raises CudaError.
"""

from __future__ import annotations

import bisect
import ctypes
import sys
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.simulated_cuda.aliases import on_cpu, on_cuda
from tests.simulated_cuda.objects import Stream, Tape
from tests.simulated_cuda.schemas import (
    TAKES_HOST_INDICES,
    TAKES_HOST_SCALARS,
    arguments_of,
    device_of,
    returns_view,
    waits,
    written_results,
)
from tests.simulated_cuda.streams import Access, CudaError, Memory, Timeline

_ROOT = Path(__file__).parents[2]
aten = torch.ops.aten

_PRODUCTS = {"addmm", "convolution", "mm"}
# Products of half precision in fp32, which only a GPU has, as operations of a CPU.
_COMPUTED = {
    aten.mm.dtype: lambda x, y, dtype: aten.mm(x.to(dtype), y.to(dtype)),
    aten.addmm.dtype_out: lambda total, x, y, dtype, **options: aten.addmm.out(
        total, x.to(dtype), y.to(dtype), **options
    ),
}
_pinned: dict[int, int] = {}  # address and bytes of host memory that a simulation pinned
_CAPTURING = "operation not permitted when stream is capturing"


@dataclass(frozen=True)
class Wait:
    """A place where the host waited for the device."""

    operation: str
    where: str

    def __str__(self) -> str:
        return f"{self.operation} at {self.where}"


class _Mode(TorchDispatchMode):
    def __init__(self, gpu: SimulatedCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return self.gpu.run(func, args, kwargs or {}, self)


class SimulatedCuda:
    """The simulated GPUs of a process; simulate_cuda() makes and installs them.

    Attributes:
        waits: where the host waited for a device, in order.
        faults: messages of all faults, including those that code under test caught.
        launches: names of the launched Triton kernels.
        products: number of linear layers and convolutions, by the dtype of their inputs.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.host = Timeline("the host")
        self.waits: list[Wait] = []
        self.faults: list[str] = []
        self.launches: list[str] = []
        self.products: Counter[torch.dtype] = Counter()
        self.streams: list[Stream] = []
        self.default_streams = [
            Stream(self, f"cuda:{i}", f"default stream {i}") for i in range(count)
        ]
        self._memories: dict[int, Memory] = {}  # by the address of the storage
        self._in_flight: list[tuple[Access, Tensor, Tensor]] = []  # copy, source, its content
        self._forbidden = threading.local()
        self._thread = threading.local()
        self._lock = threading.RLock()

    # Devices and streams, per thread.

    @property
    def current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    @current_device.setter
    def current_device(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        self._thread.device = index

    def resolve(self, device: Any) -> torch.device:
        """Return a device with an index."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return device
        index = self.current_device if device.index is None else device.index
        if not 0 <= index < self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        return torch.device("cuda", index)

    def current_stream(self, index: int | None = None) -> Stream:
        index = self.current_device if index is None else index
        return self._own_streams().get(index, self.default_streams[index])

    def set_stream(self, stream: Stream) -> None:
        self._own_streams()[stream.device.index] = stream
        self.current_device = stream.device.index

    def _own_streams(self) -> dict[int, Stream]:
        if not hasattr(self._thread, "streams"):
            self._thread.streams = {}
        return self._thread.streams

    def mode(self) -> TorchDispatchMode:
        """Return what makes operations of the thread that enters it run on the device."""
        return _Mode(self)

    # Faults and waits.

    def fault(self, message: str) -> None:
        message = f"{message} (at {_where()})"
        self.faults.append(message)
        raise CudaError(message)

    @contextmanager
    def no_wait(self) -> Iterator[None]:
        """Make every wait of this thread for the device a fault."""
        self._forbidden.value = True
        try:
            yield
        finally:
            self._forbidden.value = False

    def wait(self, operation: str, stream: Stream | None = None, clock: Any = None) -> None:
        """Note that the host waits for a stream, or for an event's clock."""
        if clock is None:
            stream = stream or self.current_stream()
            clock = stream.timeline.clock
        if self.current_stream().tape is not None:
            raise RuntimeError(f"{_CAPTURING}: {operation}")
        wait = Wait(operation, _where())
        self.waits.append(wait)
        if getattr(self._forbidden, "value", False):
            self.fault(f"{operation} waits for the device")
        self.host.wait(clock)
        self.check_copies()

    def check_copies(self, finished: bool = False) -> None:
        """Report host memory that was rewritten before its copy to a device had finished.

        finished: all copies have finished, as at the end of the simulation.
        """
        with self._lock:
            copies, self._in_flight = self._in_flight, []
            changed = [
                access for access, source, content in copies if not _same_bits(source, content)
            ]
            if not finished:
                self._in_flight = [
                    copy for copy in copies
                    if copy[0] not in changed and not copy[0].precedes(self.host)
                ]  # fmt: skip
        if changed:
            self.fault(f"pinned memory was rewritten while {changed[0]} may still read it")

    # Memory.

    def memory_of(self, tensor: Tensor) -> Memory | None:
        if not tensor.numel():
            return None
        address = tensor.untyped_storage().data_ptr()
        if address not in self._memories:  # kept by a cache since an earlier simulation
            home = self.default_streams[tensor.device.index].timeline
            self._track(tensor, Memory(home, tensor.untyped_storage().nbytes()))
        return self._memories[address]

    def _track(self, tensor: Tensor, memory: Memory) -> None:
        storage = tensor.untyped_storage()
        self._memories[storage.data_ptr()] = memory
        weakref.finalize(storage, self._freed, storage.data_ptr(), memory).atexit = False

    def adopt(self, tensor: Tensor, device: torch.device, access: Access) -> Tensor:
        """Return fresh CPU memory as a tensor that an operation on a device allocated and wrote."""
        result = on_cuda(tensor, device.index)
        if tensor.numel():
            self._track(result, Memory(access.stream, result.untyped_storage().nbytes(), access))
        return result

    def _freed(self, address: int, memory: Memory) -> None:
        if self._memories.get(address) is memory:
            del self._memories[address]
        if (problem := memory.problem_when_freed(self.host)) is not None:
            self.faults.append(problem)

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        if (memory := self.memory_of(tensor)) is not None:
            memory.recorded.add(stream.timeline)

    def pin(self, tensor: Tensor) -> Tensor:
        """Mark the memory of a CPU tensor as pinned; return the tensor."""
        if self.current_stream().tape is not None:
            raise RuntimeError(f"{_CAPTURING}: allocation of pinned memory")
        storage = tensor.untyped_storage()
        if storage.nbytes():
            address = storage.data_ptr()
            _pinned[address] = storage.nbytes()
            weakref.finalize(storage, _pinned.pop, address, None).atexit = False
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        return any(start <= address < start + size for start, size in _pinned.copy().items())

    # Operations.

    def run(self, func: Any, args: Any, kwargs: Any, mode: TorchDispatchMode) -> Any:
        """Run an operation of PyTorch, or of a library, as a device does."""
        name = func._schema.name.partition("::")[2]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in ("is_pinned", "_pin_memory", "pin_memory"):
            return self._pinning(name, tensors[0])
        given = kwargs.get("device")
        target = None if given is None else self.resolve(given)
        if not any(x.is_cuda for x in tensors) and (target is None or target.type != "cuda"):
            return self._on_host(func, args, kwargs)
        if name == "record_stream":
            raise AssertionError("Tensor.record_stream is replaced")
        if func.namespace != "aten":
            return self._run_library(func, args, kwargs, mode)
        if func._can_decompose():  # below autograd, as in the body of an operator
            with mode:
                return func.decompose(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return torch.nn.attention.SDPBackend.MATH.value  # in terms of plain operations
        if torch.Tag.inplace_view in func.tags or returns_view(func):
            return func(*args, **kwargs)  # changes no memory
        if name in ("_to_copy", "copy_"):
            return self._copy(func, args, kwargs, target)
        return self._launch(func, args, kwargs, tensors, target)

    def _pinning(self, name: str, tensor: Tensor) -> Any:
        if name == "is_pinned":
            return not tensor.is_cuda and self.is_pinned(tensor)
        if tensor.is_cuda:
            raise RuntimeError(f"cannot pin {tensor.device} only dense CPU tensors can be pinned")
        return tensor if self.is_pinned(tensor) else self.pin(tensor.clone())

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        pin = kwargs.get("pin_memory")
        result = func(*args, **(kwargs | {"pin_memory": False} if pin else kwargs))
        return self.pin(result) if pin else result

    def _run_library(self, func: Any, args: Any, kwargs: Any, mode: TorchDispatchMode) -> Any:
        """Run the implementation of another library's operator, with its operations seen."""
        device = device_of(tree_leaves((args, kwargs)))
        access = self._access(func, args, kwargs, device)
        with mode, self._operator():
            result = func.redispatch(
                torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs
            )
        for output in tree_leaves(result):
            if isinstance(output, Tensor) and (memory := self.memory_of(output)) is not None:
                memory.access(access, write=True)
        return result

    @contextmanager
    def _operator(self) -> Iterator[None]:
        """Mark the body of an operator, whose schema says what it reads and writes."""
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            yield
        finally:
            self._thread.depth = depth

    def _addressed(self, tensors: Sequence[Tensor]) -> list[Memory]:
        """Return the memory whose addresses are in the int64 arguments of a kernel launch."""
        with _disable_current_modes():
            tables = [on_cpu(x).view(-1).tolist() for x in tensors if x.dtype == torch.int64]
        words = {word for table in tables for word in table}
        addresses = words | {word >> 2 for word in words}  # fastdino_kernels.pointer_table
        with self._lock:
            memories = self._memories.copy()  # the collection of garbage may remove entries
        known = sorted(memories.items(), key=itemgetter(0))
        starts = [start for start, _ in known]
        reached = []
        for address in addresses:
            start, memory = known[bisect.bisect(starts, address) - 1]
            if start <= address < start + memory.size:
                reached.append(memory)
        return reached

    def launch_kernel(self, name: str, launch: Callable[..., None], args: Any, kwargs: Any) -> None:
        """Run a Triton kernel, which writes only what its operator's schema says."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in tensors:
            if not x.is_cuda and not self.is_pinned(x):
                self.fault(f"kernel {name}: expected CUDA tensors, got {_describe(x)}")
            if x.is_cuda and x.device.index != self.current_device:
                self.fault(
                    f"kernel {name} is launched on device {self.current_device} with {_describe(x)}"
                )
        self.launches.append(name)
        stream = self.current_stream()
        memories = [(m, False) for x in tensors if x.is_cuda and (m := self.memory_of(x))]
        if not getattr(self._thread, "depth", 0):  # it may write all that it can address
            memories += [(memory, True) for memory in self._addressed(tensors)]
        self.note(stream, f"kernel {name}", memories)
        with _disable_current_modes():
            args, kwargs = tree_map(_to_cpu, (args, kwargs))

        def operation() -> None:
            with _disable_current_modes():
                launch(*args, **kwargs)

        operation()
        if stream.tape is not None:
            stream.tape.operations.append(operation)

    def _launch(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], target: Any) -> Any:
        self._check_devices(func, args, kwargs, tensors)
        device = target or device_of(tensors)
        if device.type != "cuda":
            raise AssertionError(f"{func} from CUDA tensors to {device}")
        stream = self.current_stream(device.index)
        if waits(func, args, kwargs):
            self.wait(str(func), stream)
        access = self._access(func, args, kwargs, device)
        if func._schema.name.partition("::")[2] in _PRODUCTS:
            self.products[tensors[-1].dtype] += 1
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("cpu")}
        cpu_args, cpu_kwargs = tree_map(_to_cpu, (args, kwargs))
        written = written_results(func, args, kwargs)
        func = _COMPUTED.get(func, func)
        result = func(*cpu_args, **cpu_kwargs)
        if stream.tape is not None:
            self._tape(
                stream.tape, func, cpu_args, cpu_kwargs, () if written is not None else result
            )
        if written is not None:
            return written
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((cpu_args, cpu_kwargs))
                  if isinstance(x, Tensor) and x.numel()}  # fmt: skip

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if x.numel() and x.untyped_storage().data_ptr() in inputs:
                return on_cuda(x, device.index)
            return self.adopt(x, device, access)

        return tree_map(wrap, result)

    def _copy(self, func: Any, args: Any, kwargs: Any, target: Any) -> Any:
        """Run _to_copy or copy_, which may cross the devices."""
        in_place = func is aten.copy_.default
        source = args[1] if in_place else args[0]
        device = args[0].device if in_place else target or source.device
        non_blocking = kwargs.get("non_blocking", False) or (in_place and len(args) > 2 and args[2])
        if source.is_cuda and device.type == "cuda":
            return self._launch(func, args, kwargs, [source], device)
        stream = self.current_stream((source if source.is_cuda else args[0]).device.index
                                     if source.is_cuda or in_place else device.index)  # fmt: skip
        if source.is_cuda:
            return self._to_host(func, args, kwargs, stream, source, non_blocking)
        if in_place and source.dim() == 0:
            return self._launch(func, args, kwargs, [args[0]], device)
        same_layout = source.is_contiguous() and not (in_place and source.dtype != args[0].dtype)
        if source.numel() and not (self.is_pinned(source) and same_layout):
            if non_blocking:
                kind = "memory that is not pinned" if same_layout else "a pageable temporary copy"
                self.fault(f"non_blocking copy of {_describe(source)} from {kind}")
            self.wait(f"copy of {_describe(source)} to {device}", stream)
        elif not non_blocking:
            self.wait(f"blocking copy of {_describe(source)} to {device}", stream)
        kwargs = {k: v for k, v in kwargs.items() if k != "non_blocking"}
        if in_place:
            result = self._launch(func, args[:2], kwargs, [args[0]], device)
        else:
            result = self._launch(func, args, kwargs, [], device)
        if non_blocking:
            access = Access(stream.timeline, stream.timeline.clock[stream.timeline], "a copy")
            with self._lock:
                self._in_flight.append((access, source.detach(), source.detach().clone()))
        return result

    def _to_host(
        self, func: Any, args: Any, kwargs: Any, stream: Stream, source: Tensor, non_blocking: bool
    ) -> Any:
        if non_blocking:
            self.fault("non_blocking copy to the host, whose end nothing waits for")
        self._note(stream, "copy to the host", [(source, False)])
        self.wait(f"copy of {_describe(source)} to the host", stream)
        args, kwargs = tree_map(_to_cpu, (args, kwargs))
        return func(*args, **kwargs)

    def _access(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Access:
        reads = arguments_of(func, args, kwargs, written=False)
        writes = arguments_of(func, args, kwargs, written=True)
        memories = [(x, False) for x in reads] + [(x, True) for x in writes]
        return self._note(self.current_stream(device.index), str(func), memories)

    def _note(
        self, stream: Stream, operation: str, tensors: Sequence[tuple[Tensor, bool]]
    ) -> Access:
        """Note an operation on a stream that reads and (True) writes tensors."""
        memories = [(self.memory_of(x), write) for x, write in tensors if x.is_cuda]
        return self.note(stream, operation, [(m, write) for m, write in memories if m is not None])

    def note(
        self, stream: Stream, operation: str, memories: Sequence[tuple[Memory, bool]]
    ) -> Access:
        with self._lock:
            timeline = stream.timeline
            timeline.wait(self.host.clock)
            access = Access(timeline, timeline.advance(), operation)
            problems = [memory.access(access, write=write) for memory, write in memories]
            if stream.tape is not None:
                stream.tape.accesses += memories
        for problem in filter(None, problems):
            self.fault(problem)
        return access

    @staticmethod
    def start(timeline: Timeline, operation: str) -> Access:
        """Start an operation of a library on a stream of its own."""
        return Access(timeline, timeline.advance(), operation)

    def _check_devices(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        if name.startswith("new_") or name.endswith("_like"):
            return  # reads no values
        devices = {x.device for x in tensors if x.is_cuda}
        if len(devices) > 1:
            self.fault(f"{func} on tensors of {', '.join(map(str, sorted(devices, key=str)))}")
        scalars = torch.Tag.pointwise in func.tags or name in TAKES_HOST_SCALARS
        scalars |= name.startswith(("_foreach_", "_fused_"))
        for x in tensors:
            if x.is_cuda or (x.dim() == 0 and scalars):
                continue
            if name in TAKES_HOST_INDICES and any(x is y for y in tree_leaves(args[1])):
                self.wait(f"copy of the indices {_describe(x)} to the device")
                continue
            self.fault(
                f"{func} expected all tensors to be on the same device, got {_describe(x)} among "
                f"those on {', '.join(map(str, devices))}"
            )

    # CUDA graphs.

    def begin_capture(self, stream: Stream) -> None:
        """Start a tape, and keep the content of all memory, as capture must not change it."""
        before = {
            address: (memory, ctypes.string_at(address, memory.size))
            for address, memory in self._memories.copy().items()
        }
        stream.tape = Tape(before=before)

    def _tape(self, tape: Tape, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        tape.fresh += outputs

        def operation() -> None:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for output, new in zip(outputs, again, strict=False):  # no outputs in place
                if output.data_ptr() != new.data_ptr():
                    output.copy_(new)

        tape.operations.append(operation)

    def end_capture(self, stream: Stream) -> Tape:
        """Undo the effects of capture, as a GPU only records; the graph's memory is not filled."""
        tape, stream.tape = stream.tape, None
        assert tape is not None
        with _disable_current_modes():
            for address, (memory, content) in tape.before.items():
                if self._memories.get(address) is memory:
                    ctypes.memmove(address, content, memory.size)
            for memory in tape.fresh:
                if memory.is_floating_point():
                    memory.fill_(float("nan"))
        tape.before.clear()
        return tape

    def replay(self, tape: Tape, stream: Stream) -> None:
        memories = list(dict.fromkeys(tape.accesses))
        self.note(stream, "a CUDA graph", memories)
        with _disable_current_modes():
            for operation in tape.operations:
                operation()


def _to_cpu(x: Any) -> Any:
    return on_cpu(x) if isinstance(x, Tensor) and x.is_cuda else x


def _same_bits(first: Tensor, second: Tensor) -> bool:
    with _disable_current_modes():
        return bool(torch.equal(first.contiguous().view(-1).view(torch.uint8),
                                second.contiguous().view(-1).view(torch.uint8)))  # fmt: skip


def _describe(x: Tensor) -> str:
    return f"{x.dtype}{list(x.shape)} on {x.device}"


def _where() -> str:
    """Return the innermost line of the project that is running."""
    here = str(Path(__file__).parent)
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(_ROOT)) and not path.startswith(here) and "/.venv/" not in path:
            return f"{Path(path).relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return traceback.extract_stack()[-1].name
