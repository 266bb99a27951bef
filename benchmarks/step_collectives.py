"""Count the collectives and bytes of training steps on 2, 3 and 4 ranks, and compare a model.

    python -m benchmarks.step_collectives --write benchmarks/results/cpu

The collectives are those that PyTorch gives to gloo in `fastdino train`, with their tensors. The
bytes sent are those of the TCP connections of a rank, as Linux counts them, with headers and what
is sent again. The model is fastdino/bench/step_messages.py, which `fastdino bench --scaling` uses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import struct
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.command_line import command_line
from benchmarks.local_ranks import free_port, rank_variables
from fastdino import TrainConfig, Trainer, signals
from fastdino.bench.report import facts_table, log, table, wrap, write_report
from fastdino.bench.step_messages import step_messages
from fastdino.environment import environment
from fastdino.signals import StopSignals
from fastdino.training.loop import Run, train
from fastdino.training.resume import RunCheckpoint

RANKS = (2, 3, 4)
IMAGES_PER_STEP, STEPS = 24, 5
WARMUP_STEPS = 3  # in the first ones DDP also sends the order of its gradients
PRINT_FREQ = 4
NETWORK = {
    "arch": "vit_tiny", "patch_size": 16, "out_dim": 4096, "global_crops_size": 32,
    "local_crops_size": 16, "local_crops_number": 2, "epochs": 1, "warmup_epochs": 0,
    "freeze_last_layer": 0, "device": "cpu", "crops": "torchvision", "num_workers": 0,
    "print_freq": PRINT_FREQ, "last_batch": "drop", "logger": "none",
}  # fmt: skip
# Operators of a process group: their kinds, and the argument that holds the whole tensor.
KINDS = {
    "allreduce_": ("all-reduce", 0), "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0), "_reduce_scatter_base_": ("reduce-scatter", 1),
}  # fmt: skip
_TCP_INFO, _SENT, _INFO_SIZE = 11, 200, 256  # offset of tcpi_bytes_sent in struct tcp_info

Call = tuple[str, int]  # kind and bytes of the whole tensor


@dataclass(frozen=True)
class Case:
    """Flags of a counted run, in addition to those of NETWORK.

    passes: forward passes per step, by --grad_accum or with `by_global` by --global_batch_size.
    """

    mode: str
    fsdp: bool = False
    passes: int = 1
    by_global: bool = False
    sinkhorn: bool = False

    def config(self, ranks: int, data: Path, output: Path) -> TrainConfig:
        """Return the settings of a run; every step has IMAGES_PER_STEP images."""
        batch = {"batch_size_per_gpu": IMAGES_PER_STEP // (ranks * self.passes)}
        batch |= (
            {"global_batch_size": IMAGES_PER_STEP} if self.by_global
            else {"grad_accum": self.passes}
        )  # fmt: skip
        loss = {"centering": "sinkhorn", "koleo_weight": 0.1} if self.sinkhorn else {}
        folders = {"data_path": str(data), "output_dir": str(output)}
        return TrainConfig.from_dict(
            NETWORK | batch | loss | folders | {"mode": self.mode, "fsdp": self.fsdp}
        )

    def cells(self) -> list[str]:
        """Return the mode and the flags."""
        flags = ["--fsdp"] if self.fsdp else []
        if self.by_global:
            flags.append(f"--global_batch_size {IMAGES_PER_STEP}, {self.passes} passes")
        elif self.passes > 1:
            flags.append(f"--grad_accum {self.passes}")
        flags += ["--centering sinkhorn --koleo_weight 0.1"] if self.sinkhorn else []
        return [self.mode, " ".join(flags) or "-"]


CASES = (
    *(
        Case(mode, fsdp, passes, by_global)
        for mode in ("parity", "fast")
        for fsdp in (False, True)
        for passes, by_global in ((1, False), (2, False), (2, True))
    ),
    Case("fast", passes=2, sinkhorn=True),
)


class Collectives(TorchDispatchMode):
    """Records the collectives of this thread, those of DDP and FSDP included."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            kind, whole = KINDS.get(name, (name, 0))
            tensors = [x for x in tree_leaves(args[whole]) if isinstance(x, Tensor)]
            self._calls.append((kind, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def sent_bytes() -> int:
    """Return the bytes that this process has sent by its open TCP connections."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        if not link.is_socket():
            continue
        with socket.socket(fileno=os.dup(int(link.name))) as connection:
            if connection.family == socket.AF_INET and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _INFO_SIZE)
                total += struct.unpack_from("Q", info, _SENT)[0]
    return total


@contextlib.contextmanager
def counted(counts: dict[str, list[Any]]) -> Iterator[None]:
    """Count the collectives of `train`, in one list per step, for logging and for signals."""
    step, report, stop = Trainer.train_step, Run._report_steps, StopSignals.should_stop
    gather = dist.all_gather_object
    exchanged: list[list[Call]] = []

    def counted_step(trainer: Trainer, crops: Sequence[Tensor]) -> Tensor:
        calls: list[Call] = []
        before = sent_bytes()
        with Collectives(calls):
            loss = step(trainer, crops)
        counts["sent"].append(sent_bytes() - before)
        counts["step"].append(calls)
        return loss

    def counted_report(run: Run) -> None:
        calls: list[Call] = []
        with Collectives(calls):
            report(run)
        counts["logging"].append(calls)

    def counted_stop(signals: StopSignals) -> bool:
        exchanged.append([])
        try:
            return stop(signals)
        finally:
            counts["signals"].append(exchanged.pop())

    def counted_gather(*args: Any, **options: Any) -> None:  # in another thread
        with Collectives(exchanged[-1] if exchanged else []):
            gather(*args, **options)

    with (
        mock.patch.object(Trainer, "train_step", counted_step),
        mock.patch.object(Run, "_report_steps", counted_report),
        mock.patch.object(StopSignals, "should_stop", counted_stop),
        mock.patch.object(signals, "AGREE_SECONDS", 0.0),  # in every step
        mock.patch.object(dist, "all_gather_object", counted_gather),
        mock.patch.object(RunCheckpoint, "save", return_value=None),
    ):
        yield


def count_cases(cases: Sequence[Case], folder: Path) -> None:
    """Train with each case on this rank, and write what it counted to a file."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = []
    for i, case in enumerate(cases):
        counts: dict[str, list[Any]] = defaultdict(list)
        with counted(counts):
            train(case.config(ranks, folder / "data", folder / f"run{ranks}_{i}"))
        results.append(counts)
        if rank == 0:
            log(f"{ranks} ranks: {' '.join(case.cells())}")
    (folder / f"{ranks}_{rank}.json").write_text(json.dumps(results))


def write_images(folder: Path) -> None:
    """Write the images of one epoch."""
    folder.mkdir(parents=True)
    for i in range(IMAGES_PER_STEP * STEPS):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@dataclass(frozen=True)
class Count:
    """Counts of the ranks in the steps of a case after WARMUP_STEPS.

    Attributes:
        calls: those of a step, equal in all steps and on all ranks.
        problem: how the steps or ranks differ, or the model from them.
        sent: bytes per rank and step.
        ring: the same in rings, calculated from the calls.
        logging, signals: calls for the entropy, and for one exchange of signals.
    """

    ranks: int
    case: Case
    calls: Counter[Call]
    problem: str
    sent: float
    ring: float
    logging: list[Call]
    signals: list[Call]


def read_counts(cases: Sequence[Case], ranks: int, folder: Path) -> list[Count]:
    """Read the files of all ranks, and compare each case with the model."""
    files = [json.loads((folder / f"{ranks}_{rank}.json").read_text()) for rank in range(ranks)]
    return [_count(case, ranks, [file[i] for file in files]) for i, case in enumerate(cases)]


def _count(case: Case, ranks: int, of_ranks: list[dict[str, Any]]) -> Count:
    steps = [
        Counter((kind, size) for kind, size in calls)
        for counts in of_ranks
        for calls in counts["step"][WARMUP_STEPS:]
    ]
    sent = [value for counts in of_ranks for value in counts["sent"][WARMUP_STEPS:]]
    messages = step_messages(case.config(ranks, Path(), Path("run")), ranks, on_cpu=True)
    expected = Counter((message.kind, message.size) for message in messages)
    problem = "" if all(step == steps[0] for step in steps) else "the steps or ranks differ"
    if steps[0] != expected:
        missing, other = dict(steps[0] - expected), dict(expected - steps[0])
        problem = f"counted {missing}, modelled {other}"
    return Count(
        ranks, case, steps[0], problem, sum(sent) / len(sent),
        sum(message.sent(ranks) for message in messages),
        max(of_ranks[0]["logging"], key=len), of_ranks[0]["signals"][-1],
    )  # fmt: skip


def count_in_forks(ranks: int, folder: Path) -> list[Count]:
    """Count all cases in forked processes."""
    start_processes(_run_rank, (ranks, free_port(), folder), nprocs=ranks, start_method="fork")
    return read_counts(CASES, ranks, folder)


def _run_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    os.environ |= rank_variables(rank, ranks, port)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the output of the runs
    torch.set_num_threads(1)
    count_cases(CASES, folder)


def markdown(counts: Sequence[Count], command: str, facts: Mapping[str, str]) -> str:
    """Return collectives.md."""
    about = (
        f"Steps of `fastdino train` on 2 to 4 ranks of one machine (gloo): {NETWORK['arch']}, K = "
        f"{NETWORK['out_dim']}, crops of {NETWORK['global_crops_size']} and "
        f"{NETWORK['local_crops_size']} px, {IMAGES_PER_STEP} images per step. Collectives and MB: "
        "counted, of the whole tensors. Model: of `fastdino bench --scaling` "
        "(fastdino/bench/step_messages.py), equal in number, kind and bytes of each collective, or "
        "the difference. Sent: what a rank sent by TCP, counted, with headers and repetitions. "
        f"Ring: the same for rings, calculated. By `{command}`."
    )
    heads = ["ranks", "mode", "flags", "collectives", "MB", "model", "sent, MB", "ring, MB"]
    rows = [
        [
            str(count.ranks), *count.case.cells(), str(count.calls.total()),
            f"{sum(size * n for (_, size), n in count.calls.items()) / 1e6:.3f}",
            count.problem or "equal", f"{count.sent / 1e6:.3f}", f"{count.ring / 1e6:.3f}",
        ]
        for count in counts
    ]  # fmt: skip
    gloo = (
        "With --fsdp more is sent than in rings, because gloo makes a reduce-scatter by an "
        "all-reduce; nccl does not."
    )
    parts = ["# Collectives of a step", wrap(about), table(heads, rows), wrap(gloo)]
    for case in (Case("fast"), Case("fast", fsdp=True), CASES[-1]):
        parts += [f"2 ranks, --mode {' '.join(case.cells()).removesuffix(' -')}:", _purposes(case)]
    logging, stop = counts[0].logging, counts[0].signals
    other = (
        f"Every --print_freq steps, the entropy: {_calls(logging)}. About once per second, the "
        f"exchange of signals (2 ranks): {_calls(stop)}. Counted."
    )
    return "\n\n".join([*parts, wrap(other), facts_table(facts)]) + "\n"


def _purposes(case: Case) -> str:
    """Return the modelled collectives of a step by their purpose."""
    messages = step_messages(case.config(2, Path(), Path("run")), 2, on_cpu=True)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for message in messages:
        groups[message.purpose, message.kind].append(message.size)
    rows = [[*names, str(len(sizes)), f"{sum(sizes):,}"] for names, sizes in groups.items()]
    return table(["for", "kind", "number", "bytes"], rows)


def _calls(calls: Sequence[Call]) -> str:
    return " and ".join(f"{kind} of {size} bytes" for kind, size in calls) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Count; the exit status is 1 if the model differs from a count."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of ranks")
    parser.add_argument("--write", type=Path, help="folder of collectives.md and .json")
    options = parser.parse_args(arguments)
    counts: list[Count] = []
    with tempfile.TemporaryDirectory(prefix="collectives") as temporary:
        folder = Path(temporary)
        write_images(folder / "data")
        for ranks in options.ranks:
            counts += count_in_forks(ranks, folder)
    facts = environment(torch.device("cpu"), ("torch",), {})
    command = command_line("step_collectives", arguments)
    text = markdown(counts, command, facts)
    print(text)
    if options.write:
        record = {"command": command, "environment": facts, "counts": [_record(c) for c in counts]}
        write_report(options.write, "collectives", text, record)
    return int(any(count.problem for count in counts))


def _record(count: Count) -> dict[str, Any]:
    calls = [[kind, size, number] for (kind, size), number in sorted(count.calls.items())]
    return vars(count) | {"case": vars(count.case), "calls": calls}


if __name__ == "__main__":
    sys.exit(main())
