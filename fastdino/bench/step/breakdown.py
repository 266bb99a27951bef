"""Where the time of a step goes: its parts, from one profile; launches, reads, memory for backward.

Each event of PyTorch's profiler falls into one part. Hooks mark the heads, and patch embeddings and
attention layers that are not compiled; what a backward pass does belongs where the forward
operation of the same sequence number was. What comes after the heads and before the backward pass
is the loss, what comes after the backward pass is the update. All else goes by its name.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function

from fastdino.bench.step.arm import Arm

UPDATE = "clip, optimizer, EMA"
ELEMENTWISE = "norms, elementwise"
PARTS = ("embedding", ELEMENTWISE, "GEMM", "attention", "head", "loss", UPDATE)

# Names of modules, and their parts.
MARKS = {"head": "head", "attn": "attention", "patch_embed": "embedding"}
_MARK = "fastdino part: "
_READ_LIST = "fastdino read"
_READS = ("aten::_local_scalar_dense", _READ_LIST)
_BACKWARD = "autograd::engine::evaluate_function"
_PATTERNS = (
    ("embedding", re.compile(r"conv|upsample|im2col|col2im", re.IGNORECASE)),
    ("attention", re.compile(r"attention|softmax|bmm|flash|fmha", re.IGNORECASE)),
    ("GEMM", re.compile(r"(^|::|add|^Add)mm|linear|gemm|nvjet|cublas|cutlass", re.IGNORECASE)),
)
# Operators that do no work of their own: they make another view of memory, or memory.
_WORKLESS = {
    "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "flatten",
    "item", "lift_fresh", "_local_scalar_dense", "new_empty", "new_empty_strided", "permute",
    "reshape", "resize_", "resolve_conj", "result_type", "select", "set_", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsafe_chunk",
    "unsafe_split", "unsqueeze", "view", "view_as", "_unsafe_view",
}  # fmt: skip
_LAUNCHES = (
    "cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync",
)  # fmt: skip


@dataclass(frozen=True)
class Breakdown:
    """One step, in seconds.

    seconds: of the step under the profiler; its parts: device time on a GPU, else host time.
    backward: of the backward pass. What no part has is the host's, or waiting.
    launches: kernels, copies and graphs on a GPU; on a CPU operators that work, innermost ones.
    reads: values read back to the host, which waits for the device meanwhile.
    """

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    backward: float = 0.0
    launches: int = 0
    reads: int = 0

    @property
    def rest(self) -> float:
        """Seconds in no part."""
        return max(0.0, self.seconds - sum(self.parts.values()))


def profile_step(arm: Arm, crops: Sequence[Tensor], device: torch.device) -> Breakdown:
    """Profiles one step; the arm has made some before."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with marked(arm), profile(activities=activities, acc_events=True) as profiler:
        start = time.perf_counter()
        arm.step(crops)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return break_down(list(profiler.events() or ()), seconds, on_gpu=device.type == "cuda")


@contextlib.contextmanager
def marked(arm: Arm) -> Iterator[None]:
    """Marks modules of MARKS for the profiler, and reads of many values, which it would not see."""
    hooks = []
    for network in (arm.student, arm.teacher):
        for module, part in markable(network):
            hooks += _mark(module, part)
    read_list = torch.Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        with record_function(_READ_LIST):
            return read_list(tensor)

    setattr(torch.Tensor, "tolist", tolist)  # noqa: B010, which mypy would not have
    try:
        yield
    finally:
        del torch.Tensor.tolist
        for hook in hooks:
            hook.remove()


def markable(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules that MARKS names, but none within compiled code, which a hook would break."""
    for name, child in module.named_children():
        if name in MARKS and child._compiled_call_impl is None:
            yield child, MARKS[name]
        elif not is_compiled(child):
            yield from markable(child)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was given the module, or its forward."""
    by_forward = hasattr(module.forward, "_torchdynamo_orig_callable")
    return module._compiled_call_impl is not None or by_forward


def _mark(module: nn.Module, part: str) -> list[Any]:
    ranges: list[record_function] = []

    def enter(*_: object) -> None:
        ranges.append(record_function(_MARK + part))
        ranges[-1].__enter__()

    def leave(*_: object) -> None:
        ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def break_down(events: Sequence[Any], seconds: float, *, on_gpu: bool) -> Breakdown:
    """The parts of the profiler's FunctionEvents of one step."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    sorter = _Sorter(on_host)
    parts, backward, launches, reads = dict.fromkeys(PARTS, 0.0), 0.0, 0, 0
    for event in on_host:
        spent = _device_seconds(event) if on_gpu else event.self_cpu_time_total * 1e-6
        if spent and not event.name.startswith(_MARK):
            parts[sorter.part_of(event)] += spent
        if root_of(event).name.startswith(_BACKWARD):
            backward += spent
        if on_gpu:
            launches += event.name.startswith(_LAUNCHES)
        else:
            launches += _is_leaf_operator(event)
            reads += event.name in _READS and not _in_optimizer(event)
    if on_gpu:
        reads = sum(event.name.startswith("Memcpy DtoH") for event in events)
    return Breakdown(seconds, parts, backward, launches, reads)


class _Sorter:
    """Finds the part of an event of one step."""

    def __init__(self, events: Sequence[Any]):
        passes = [event.time_range for event in events if event.name.startswith(_BACKWARD)]
        self.backward_start = min((span.start for span in passes), default=float("inf"))
        self.backward_end = max((span.end for span in passes), default=float("inf"))
        heads = [event for event in events if event.name == _MARK + "head"]
        self.heads_end = max((event.time_range.end for event in heads), default=float("inf"))
        self._forward: dict[int, str] = {}
        for event in events:
            if event.sequence_nr >= 0 and event.time_range.start < self.backward_start:
                place = self._place(event)
                if place:
                    self._forward[event.sequence_nr] = place

    def part_of(self, event: Any) -> str:
        root = root_of(event)
        if root.name.startswith(_BACKWARD):
            place = self._forward.get(root.sequence_nr, "")
        else:
            place = self._place(event)
        if place not in ("", "attention"):
            return place
        kernels = " ".join(kernel.name for kernel in event.kernels)
        by_name = part_by_name(event.name) or part_by_name(kernels)
        if place == "attention" and by_name != "GEMM":
            return "attention"
        return by_name or ELEMENTWISE

    def _place(self, event: Any) -> str:
        """The part by where an event lies, before or after the backward pass; "" for none."""
        if event.time_range.start >= self.backward_end or _in_optimizer(event):
            return UPDATE
        for ancestor in lineage(event):
            if ancestor.name.startswith(_MARK):
                return ancestor.name.removeprefix(_MARK)
        return "loss" if event.time_range.start >= self.heads_end else ""


def part_by_name(name: str) -> str:
    """embedding, attention or GEMM by the name of an operation or a kernel; "" for the others."""
    return next((part for part, pattern in _PATTERNS if pattern.search(name)), "")


def lineage(event: Any) -> Iterator[Any]:
    """The event, and those in which it happened."""
    while event is not None:
        yield event
        event = event.cpu_parent


def root_of(event: Any) -> Any:
    """The outermost of them."""
    *_, root = lineage(event)
    return root


def _in_optimizer(event: Any) -> bool:
    return any(ancestor.name.startswith("Optimizer.") for ancestor in lineage(event))


def _device_seconds(event: Any) -> float:
    return sum(kernel.duration for kernel in event.kernels) * 1e-6


def _is_leaf_operator(event: Any) -> bool:
    def works(name: str) -> bool:
        space, _, operator = name.rpartition("::")
        return bool(space) and "autograd" not in space and operator not in _WORKLESS

    return works(event.name) and not any(works(child.name) for child in event.cpu_children)


def saved_bytes(step: Callable[[], object], own: Sequence[Tensor]) -> int:
    """Bytes that a step keeps for its backward pass, but those of `own` tensors; each once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(saved.values())
