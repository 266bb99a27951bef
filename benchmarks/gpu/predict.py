"""Predict the time of the kernels by a static model of their machine code, without a GPU.

    python -m benchmarks.gpu.predict [NAME ...] [--before FILE] [--write FOLDER]

The loss is simulated (sass_model.py). For the other kernels the table has what decides their time:
registers, resident warps, waves and the bytes that must move. Nothing here is a measurement.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from fastdino_kernels import (
    adamw_ema_update_,
    clip_grad_norm_,
    dino_loss,
    ema_update_,
    pairwise_triton,
    patch_loss,
)

from benchmarks.gpu.kernel_calls import BF16, FP16, FP32, NAMES
from benchmarks.gpu.recording_driver import Launch, record_launches
from benchmarks.gpu.sass import instruction_listing, read_cubin
from benchmarks.gpu.sass_model import H100, H200, LANES, QUARTERS, Gpu, estimate, parse
from benchmarks.networks import Size

ARCH = 90
IMAGES, TEACHER_CROPS = 64, 2
LABEL = "Predicted by a static model, not measured."


@dataclass(frozen=True)
class Work:
    """The work of one launch of a kernel; trips: iterations of its loops, if it is simulated."""

    elements: int
    bytes: int
    trips: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """A call that launches kernels, and the work of each kernel that is to be predicted."""

    name: str
    call: Callable[[], object]
    work: Callable[[Launch], Work | None]


@dataclass(frozen=True)
class Prediction:
    """One kernel of one case. Times are in microseconds, per GPU; None if not simulated."""

    kernel: str
    case: str
    registers: int
    spilled_bytes: int
    warps: int  # per program
    programs: int
    resident_warps: int  # per SM
    waves: float
    floor: dict[str, float]
    kilobytes_in_flight: float | None = None  # per SM, if the memory's rate were unlimited
    instructions: dict[str, float] | None = None  # per element, by pipe
    time: dict[str, float] | None = None
    limit: str | None = None


def cases() -> Iterator[Case]:
    """Yield all cases at the sizes of training."""
    for prototypes in (65536, 65537, 4104, 1000):
        for dtype in (BF16, FP16, FP32):
            for crops in (10, 12):
                yield loss_case(dtype, crops, prototypes)
    for dtype in (BF16, FP32):
        yield patch_case(dtype, 3771, 65536)
    yield patch_case(BF16, 2496, 131072)
    for arch in ("vit_small", "vit_base"):
        yield from network_cases(arch)


def loss_case(dtype: torch.dtype, crops: int, prototypes: int) -> Case:
    """Return the loss's forward and backward pass at B = 64 and T = 2."""
    rows, width = (crops + TEACHER_CROPS) * IMAGES, dtype.itemsize
    logits = rows * prototypes

    def call() -> None:
        student = torch.empty(crops, IMAGES, prototypes, dtype=dtype, requires_grad=True)
        teacher = torch.empty(TEACHER_CROPS, IMAGES, prototypes, dtype=dtype)
        center = torch.empty(prototypes)
        loss, _ = dino_loss(
            student, teacher, center, student_temp=0.1, teacher_temp=0.04, impl="triton"
        )
        loss.backward()

    def work(launch: Launch) -> Work | None:
        groups = launch.grid[1]
        if launch.kernel == "pairwise_forward_kernel":
            return Work(logits, logits * width, (math.ceil(IMAGES / groups), crops))
        if launch.kernel == "pairwise_finish_kernel":
            chunks = math.ceil(prototypes / pairwise_triton.FORWARD_BLOCK)
            sums = min(IMAGES, max(1, pairwise_triton.FORWARD_PROGRAMS // chunks))
            values = 2 * TEACHER_CROPS + (2 + TEACHER_CROPS) * crops
            read = IMAGES * chunks * values + sums * prototypes
            return Work(read, 4 * read, (math.ceil(sums / pairwise_triton.SUM_GROUPS),))
        if launch.kernel == "pairwise_backward_kernel":
            gradient = crops * IMAGES * prototypes * width
            return Work(logits, logits * width + gradient, ())
        return None

    return Case(f"{NAMES[dtype]} S{crops} K{prototypes}", call, work)


def patch_case(dtype: torch.dtype, tokens: int, prototypes: int) -> Case:
    """Return the loss of masked patch tokens with weights, forward and backward."""
    logits, width = 2 * tokens * prototypes, dtype.itemsize

    def call() -> None:
        student = torch.empty(tokens, prototypes, dtype=dtype, requires_grad=True)
        teacher = torch.empty(tokens, prototypes, dtype=dtype)
        loss, _ = patch_loss(
            student, teacher, torch.empty(prototypes),
            student_temp=0.1, teacher_temp=0.07, weights=torch.ones(tokens), impl="triton",
        )  # fmt: skip
        loss.backward()

    def work(launch: Launch) -> Work | None:
        if launch.kernel == "pairwise_forward_kernel":
            return Work(logits, logits * width, (math.ceil(tokens / launch.grid[1]), 1))
        if launch.kernel == "pairwise_finish_kernel":
            chunks = math.ceil(prototypes / pairwise_triton.FORWARD_BLOCK)
            sums = pairwise_triton.SINGLE_CROP_PROGRAMS // chunks
            read = tokens * chunks * 5 + sums * prototypes
            return Work(read, 4 * read, (math.ceil(sums / pairwise_triton.SUM_GROUPS),))
        if launch.kernel == "pairwise_backward_kernel":
            return Work(logits, logits * width * 3 // 2, ())
        return None

    return Case(f"{NAMES[dtype]} patches N{tokens} K{prototypes}", call, work)


def network_cases(arch: str) -> Iterator[Case]:
    """Yield the EMA, the clip and AdamW with the EMA in fp32, for all parameters of a network."""
    size = Size(arch)
    count = sum(size.counts)

    def tensors() -> list[torch.Tensor]:
        return [torch.empty(shape) for shape in size.shapes]

    def ema() -> None:
        ema_update_(tensors(), tensors(), 0.9, impl="triton")

    def clip() -> None:
        parameters = tensors()
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        clip_grad_norm_(parameters, 3.0, impl="triton")

    def adamw() -> None:
        groups = [tensors() for _ in range(5)]
        steps = torch.zeros(len(size.shapes))
        options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "teachers": groups[4]}
        adamw_ema_update_(*groups[:4], steps, **options, impl="triton")

    # Bytes per parameter: reads and writes of fp32.
    moved = {"ema_kernel": 12, "sum_squares_kernel": 4, "scale_kernel": 8, "adamw_ema_kernel": 36}

    def work(launch: Launch) -> Work | None:
        per_parameter = moved.get(launch.kernel)
        return None if per_parameter is None else Work(count, count * per_parameter)

    yield Case(f"ema {arch} fp32", ema, work)
    yield Case(f"clip {arch} fp32", clip, work)
    yield Case(f"adamw_ema {arch} fp32", adamw, work)


def resident_programs(registers: int, warps: int, shared_bytes: int, gpu: Gpu) -> int:
    """Return how many programs an SM holds at a time."""
    per_warp = math.ceil(registers / 8) * 8 * 32
    by_registers = QUARTERS * (gpu.registers // QUARTERS // per_warp)  # a warp stays in a quarter
    return min(
        gpu.programs,
        min(gpu.warps, by_registers) // warps,
        (gpu.shared_bytes + 1024) // (shared_bytes + 1024),
    )


def predict(case: str, launch: Launch, work: Work) -> Prediction:
    """Predict one launch on every GPU."""
    code = read_cubin(launch.binary)
    programs, warps = math.prod(launch.grid), launch.num_warps
    resident = resident_programs(code.registers, warps, launch.shared_bytes, H200)
    prediction = Prediction(
        launch.kernel,
        case,
        code.registers,
        code.stack,
        warps,
        programs,
        resident * warps,
        programs / (resident * H200.multiprocessors),
        {gpu.name: work.bytes / gpu.bytes_per_second * 1e6 for gpu in (H200, H100)},
    )
    return prediction if work.trips is None else simulated(prediction, launch, work, work.trips)


def simulated(
    prediction: Prediction, launch: Launch, work: Work, trips: tuple[int, ...]
) -> Prediction:
    """Add the model's results."""
    code = parse(instruction_listing(launch.binary))
    warps = math.ceil(prediction.programs / H200.multiprocessors) * prediction.warps

    def run(gpu: Gpu) -> Any:
        resident = math.ceil(prediction.resident_warps / QUARTERS)
        warp_bytes = work.bytes / prediction.programs / prediction.warps
        return estimate(code, resident, math.ceil(warps / QUARTERS), trips, gpu, warp_bytes)

    unlimited = run(replace(H200, bytes_per_second=1e18))
    times = {gpu.name: run(gpu).cycles / gpu.hertz * 1e6 for gpu in (H200, H100)}
    issued = sum(unlimited.issued.values())
    # The busiest SM runs a whole number of programs, so its share of the elements is larger.
    share = math.ceil(warps / QUARTERS) / (prediction.programs * prediction.warps)
    elements = work.elements / LANES * share
    return replace(
        prediction,
        time=times,
        kilobytes_in_flight=unlimited.bytes_in_flight / 1024,
        instructions={pipe: count / elements for pipe, count in unlimited.issued.items()},
        limit=limit(times["H200"], prediction.floor["H200"], issued / H200.hertz * 1e6),
    )


def limit(time: float, floor: float, issue: float) -> str:
    """Name what takes most of the time: the memory's rate, the issue slots, or neither."""
    share, name = max((floor / time, "memory"), (issue / time, "issue"))
    return name if share > 0.8 else "latency"


COLUMNS: dict[str, Callable[[Prediction], object]] = {
    "registers": lambda p: p.registers,
    "spilled B": lambda p: p.spilled_bytes,
    "warps / SM": lambda p: p.resident_warps,
    "waves": lambda p: f"{p.waves:.2f}",
    "KB in flight / SM": lambda p: _number(p.kilobytes_in_flight),
    "instructions / element": lambda p: _number(
        sum(p.instructions.values()) if p.instructions else None
    ),
    "H200 floor, us": lambda p: _number(p.floor["H200"]),
    "H200, us": lambda p: _number(p.time["H200"] if p.time else None),
    "H100 floor, us": lambda p: _number(p.floor["H100"]),
    "H100, us": lambda p: _number(p.time["H100"] if p.time else None),
    "limit": lambda p: p.limit or "-",
}


def table(predictions: Sequence[Prediction], before: Sequence[Prediction] = ()) -> str:
    """Format predictions as a Markdown table, with earlier ones of the same kernel and case."""
    earlier = {(p.kernel, p.case): p for p in before}
    lines = [
        "| kernel | case | " + " | ".join(COLUMNS) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for p in predictions:
        old = earlier.get((p.kernel, p.case))
        cells = [p.kernel, p.case]
        for value in COLUMNS.values():
            then, now = str(value(old or p)), str(value(p))
            cells.append(now if then == now else f"{then} -> {now}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def write(predictions: Sequence[Prediction], before: Sequence[Prediction], folder: Path) -> None:
    """Write predictions.md and predictions.json."""
    text = (
        "# Predicted times of the kernels\n\n"
        f"**{LABEL}** Written without a GPU by `python -m benchmarks.gpu.predict`,\n"
        f"with Triton {triton.__version__} for sm_90. B = 64, T = 2; S = T = 1 for patches.\n\n"
        "- Floor: the bytes over the rate of a copy, 4.3 TB/s on an H200 and 3.0 on an H100.\n"
        "- KB in flight: what an SM's loads would keep in flight if memory were infinitely fast.\n"
        "  The copy's rate and a latency of 700 cycles need 12 on an H200 and 9 on an H100.\n"
        "- Launches are not included.\n"
        "- `a -> b`: `predictions_before.json`, of commit 4538aea, and now.\n\n"
        f"{table(predictions, before)}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.md").write_text(text, encoding="utf-8")
    record = {
        "note": LABEL,
        "triton": triton.__version__,
        "predictions": [asdict(prediction) for prediction in predictions],
    }
    (folder / "predictions.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def read(file: Path) -> list[Prediction]:
    """Read predictions.json."""
    return [Prediction(**entry) for entry in json.loads(file.read_text("utf-8"))["predictions"]]


def predict_case(case: Case) -> list[Prediction]:
    """Record the launches of a case and predict those whose work is known."""
    with record_launches(ARCH) as launches:
        case.call()
        works = [(launch, case.work(launch)) for launch in launches]
    return [predict(case.name, launch, work) for launch, work in works if work is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["*"], help='cases, as "bf16*K65536"')
    parser.add_argument("--before", type=Path, help="predictions.json to compare with")
    parser.add_argument("--write", type=Path, help="folder for predictions.md and .json")
    options = parser.parse_args(arguments)
    chosen = [c for c in cases() if any(fnmatch.fnmatch(c.name, n) for n in options.names)]
    predictions = [prediction for case in chosen for prediction in predict_case(case)]
    before = read(options.before) if options.before else []
    print(LABEL)
    print(table(predictions, before))
    if options.write:
        write(predictions, before, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
