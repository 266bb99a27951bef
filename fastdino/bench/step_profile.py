"""The parts of a training step, from one profile, with its launches and host reads.

Each event of PyTorch's profiler belongs to one part. Hooks mark the heads, and the patch embeddings
and attention layers that are not compiled; the operations of a backward pass belong to the part of
the forward operation with the same sequence number. Events between the heads and the backward pass
are the loss, events after the backward pass the update. All others are classified by name.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function

from fastdino.bench.baselines.training_step import TrainingStep
from fastdino.bench.measurement import synchronize

UPDATE = "clip, optimizer, EMA"
ELEMENTWISE = "norms, elementwise"
PARTS = ("embedding", ELEMENTWISE, "GEMM", "attention", "head", "loss", UPDATE)

# Names of modules and their parts.
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
# Operators that compute nothing: they create a view or allocate memory.
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
    """Seconds of one step and of its parts.

    seconds: of the step under the profiler. parts: device time on a GPU, host time on a CPU.
    backward: of the backward pass.
    launches: kernels, copies and graphs on a GPU; innermost computing operators on a CPU.
    reads: values read back to the host.
    """

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    backward: float = 0.0
    launches: int = 0
    reads: int = 0

    @property
    def rest(self) -> float:
        """Return the seconds outside all parts: the host's work and waiting."""
        return max(0.0, self.seconds - sum(self.parts.values()))


def profile_step(step: TrainingStep, crops: Sequence[Tensor], device: torch.device) -> Breakdown:
    """Profile one step of a training step that has been warmed up."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with marked(step), profile(activities=activities, acc_events=True) as profiler:
        start = time.perf_counter()
        step.step(crops)
        synchronize(device)
        seconds = time.perf_counter() - start
    return break_down(list(profiler.events() or ()), seconds, on_gpu=device.type == "cuda")


@contextlib.contextmanager
def marked(step: TrainingStep) -> Iterator[None]:
    """Mark the modules of MARKS, and Tensor.tolist, which the profiler does not record."""
    hooks = []
    for network in (step.student, step.teacher):
        for module, part in markable(network):
            hooks += _mark(module, part)
    read_list = torch.Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        with record_function(_READ_LIST):
            return read_list(tensor)

    setattr(torch.Tensor, "tolist", tolist)  # noqa: B010, mypy rejects the assignment
    try:
        yield
    finally:
        del torch.Tensor.tolist
        for hook in hooks:
            hook.remove()


def markable(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules of MARKS and their parts; hooks would break compiled code."""
    for name, child in module.named_children():
        if name in MARKS and child._compiled_call_impl is None:
            yield child, MARKS[name]
        elif not is_compiled(child):
            yield from markable(child)


def is_compiled(module: nn.Module) -> bool:
    """Return True if torch.compile was applied to the module or its forward."""
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
    """Sum the profiler's FunctionEvents of one step by part."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    classifier = _Classifier(on_host)
    parts, backward, launches, reads = dict.fromkeys(PARTS, 0.0), 0.0, 0, 0
    for event in on_host:
        on_device = sum(kernel.duration for kernel in event.kernels)
        spent = 1e-6 * (on_device if on_gpu else event.self_cpu_time_total)
        if spent and not event.name.startswith(_MARK):
            parts[classifier.part_of(event)] += spent
        if _root(event).name.startswith(_BACKWARD):
            backward += spent
        if on_gpu:
            launches += event.name.startswith(_LAUNCHES)
        else:
            launches += _is_leaf_operator(event)
            reads += event.name in _READS and not _in_optimizer(event)
    if on_gpu:
        reads = sum(event.name.startswith("Memcpy DtoH") for event in events)
    return Breakdown(seconds, parts, backward, launches, reads)


class _Classifier:
    """Assign the events of one step to parts."""

    def __init__(self, events: Sequence[Any]):
        passes = [event.time_range for event in events if event.name.startswith(_BACKWARD)]
        self.backward_start = min((span.start for span in passes), default=float("inf"))
        self.backward_end = max((span.end for span in passes), default=float("inf"))
        heads = [event for event in events if event.name == _MARK + "head"]
        self.heads_end = max((event.time_range.end for event in heads), default=float("inf"))
        self._forward: dict[int, str] = {}  # sequence number -> part
        for event in events:
            if event.sequence_nr >= 0 and event.time_range.start < self.backward_start:
                part = self._part_by_context(event)
                if part:
                    self._forward[event.sequence_nr] = part

    def part_of(self, event: Any) -> str:
        root = _root(event)
        if root.name.startswith(_BACKWARD):
            part = self._forward.get(root.sequence_nr, "")
        else:
            part = self._part_by_context(event)
        if part not in ("", "attention"):
            return part
        kernels = " ".join(kernel.name for kernel in event.kernels)
        by_name = _part_by_name(event.name) or _part_by_name(kernels)
        if part == "attention" and by_name != "GEMM":
            return "attention"
        return by_name or ELEMENTWISE

    def _part_by_context(self, event: Any) -> str:
        """Return the part from the event's time and marks, or ""."""
        if event.time_range.start >= self.backward_end or _in_optimizer(event):
            return UPDATE
        for ancestor in _lineage(event):
            if ancestor.name.startswith(_MARK):
                return ancestor.name.removeprefix(_MARK)
        return "loss" if event.time_range.start >= self.heads_end else ""


def _part_by_name(name: str) -> str:
    """Return embedding, attention or GEMM from the name of an operator or a kernel, or ""."""
    return next((part for part, pattern in _PATTERNS if pattern.search(name)), "")


def _lineage(event: Any) -> Iterator[Any]:
    """Yield the event and its ancestors."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _root(event: Any) -> Any:
    *_, root = _lineage(event)
    return root


def _in_optimizer(event: Any) -> bool:
    return any(ancestor.name.startswith("Optimizer.") for ancestor in _lineage(event))


def _is_leaf_operator(event: Any) -> bool:
    def works(name: str) -> bool:
        space, _, operator = name.rpartition("::")
        return bool(space) and "autograd" not in space and operator not in _WORKLESS

    return works(event.name) and not any(works(child.name) for child in event.cpu_children)
