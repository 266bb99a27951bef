"""Faults of one rank of a training run: how long the other ranks go on, and what they print.

    python -m benchmarks.rank_faults --write benchmarks/results/cpu

Every run has a fault at iteration 5, or at its start, and is then resumed by the same command. Its
checkpoints, log.txt and config.json must equal those of an uninterrupted run bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import killed_runs
from benchmarks.command_line import command_line
from benchmarks.killed_runs import BLOCKS, COMMAND, RUN, differences, iteration_of, small_head
from benchmarks.local_ranks import free_port, rank_variables
from fastdino import Trainer, cli
from fastdino.bench.report import facts_table, log, table, wrap, write_report
from fastdino.data.image_dataset import ImageDataset
from fastdino.environment import cpu_count, environment
from fastdino.models import backbones
from fastdino.models.vit import VIT_ARCHS

FLAGS = ["--crops", "torchvision", "--num_workers", "0", "--last_batch", "drop"]
# By number of ranks. More than two take longer to start where they share the cores. An epoch has 2
# or 3 steps.
MORE = "--batch_size_per_gpu 1 --dist_timeout_minutes 0.3"
FLAGS_OF = {
    2: "--batch_size_per_gpu 2 --dist_timeout_minutes 0.1", 3: MORE, 4: f"{MORE} --fsdp true"
}  # fmt: skip
ITERATION = 5  # of a fault; the last save is that of iteration 4, of 3 ranks 3
STUCK_SECONDS = 180.0
NETWORK = "10.231.7."  # of two network namespaces
_NEW_MOUNTS, _NEW_NETWORK = 0x20000, 0x40000000  # flags of unshare and setns


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: what is done.
        rank: the rank that it hits; the others are timed.
        expected: words of a line that is printed; "" for none.
        start: called in each rank before the command, with the rank.
        step: called in the rank that is hit, at the iteration.
        save: called in rank 0 before the first checkpoint after the iteration is put in its place.
        variables: environment of a rank, in addition to torchrun's; None: it is not started.
        statuses: expected exit statuses, one per rank; None: any.
        root: needs the rights of the super user.
    """

    name: str
    expected: str
    statuses: tuple[int | None, ...]
    rank: int = 1
    start: Callable[[int], None] = lambda rank: None
    step: Callable[[], None] = lambda: None
    save: Callable[[Sequence[int]], None] | None = None
    variables: Callable[[int], dict[str, str] | None] = lambda rank: {}
    root: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.statuses)


@dataclass
class Result:
    """Outcome of a fault and of the run that was resumed after it.

    Attributes:
        seconds: until the last of the other ranks ended; -1: one of them did not.
        lost: iterations that the resumed run repeated.
        resumed: "equal", or how the resumed run differs from an uninterrupted one.
    """

    name: str
    seconds: float = 0.0
    statuses: tuple[int, ...] = ()
    lines: tuple[str, ...] = ()
    lost: int = 0
    resumed: str = ""
    problem: str = ""


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def use_up_memory() -> None:
    """Allocate more than this process may have."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.empty(1 << 32)


def fill_disk() -> None:
    """Fill the file system of the output folder."""
    with contextlib.suppress(OSError), open(Path(RUN) / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def break_images() -> None:
    mock.patch.object(ImageDataset, "read_rgb", side_effect=OSError("a bad sector")).start()


def fail() -> None:
    raise KeyError("a bug")


def shift_clocks(rank: int) -> None:
    """Set the clocks of rank 1 a day ahead."""
    if rank == 1:
        wall, monotonic = time.time, time.monotonic
        time.time = lambda: wall() + 86400.0
        time.monotonic = lambda: monotonic() + 86400.0


def hide(folder: str) -> Callable[[int], None]:
    """Return a function that makes a folder empty, for rank 1 only."""

    def mount(rank: int) -> None:
        if rank == 1:
            _check(ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS))
            run("mount --make-rprivate /")
            run(f"mount -t tmpfs none {folder}")

    return mount


def enter_network(rank: int) -> None:
    """Move to the network namespace of the rank."""
    with open(f"/var/run/netns/fastdino{rank}") as namespace:
        _check(ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NEW_NETWORK))


def cut_network() -> None:
    run("ip link set fastdino1 down")


def in_network(rank: int) -> dict[str, str]:
    return {"MASTER_ADDR": f"{NETWORK}1", "GLOO_SOCKET_IFNAME": f"fastdino{rank}"}


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run(command: str) -> None:
    """Run a command of the system."""
    subprocess.run(command.split(), check=True, capture_output=True)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Two network namespaces that are connected."""
    run("ip netns add fastdino0")
    try:
        run("ip netns add fastdino1")
        run("ip link add fastdino0 netns fastdino0 type veth peer name fastdino1 netns fastdino1")
        for i in (0, 1):
            run(f"ip -n fastdino{i} addr add {NETWORK}{i + 1}/24 dev fastdino{i}")
            run(f"ip -n fastdino{i} link set fastdino{i} up")
            run(f"ip -n fastdino{i} link set lo up")
        yield
    finally:
        for i in (0, 1):
            subprocess.run(["ip", "netns", "del", f"fastdino{i}"], capture_output=True)


def _kill_rank_1(pids: Sequence[int]) -> None:
    os.kill(pids[1], signal.SIGKILL)
    time.sleep(1.0)


def of_three_and_four() -> list[Fault]:
    """Return kills, stops and an error of a rank's own in runs of three and four ranks."""
    faults = []
    for ranks, flags in ((3, ""), (4, ", --fsdp")):
        for name, step, own in (("SIGKILL", kill_itself, -9), ("SIGSTOP", stop_itself, None)):
            statuses = (75, own, *[75] * (ranks - 2))
            name = f"{ranks} ranks{flags}: {name} of rank 1"
            faults.append(Fault(name, SILENT, statuses, step=step))
        name, statuses = f"{ranks} ranks{flags}: a bug on rank 1", (2, 1, *[2] * (ranks - 2))
        faults.append(Fault(name, "KeyError", statuses, step=fail))
    return faults


SILENT, UNREACHABLE = "rank 1 gave no sign of life", "rank 0, or its launcher, cannot"
FAULTS = (
    Fault("SIGKILL of rank 1 in a step", SILENT, (75, -9), step=kill_itself),
    Fault("SIGKILL of rank 0 in a step", UNREACHABLE, (-9, 75), rank=0, step=kill_itself),
    Fault("SIGKILL of rank 1 while rank 0 saves", SILENT, (75, -9), save=_kill_rank_1),
    Fault("SIGKILL of rank 0 while it saves", UNREACHABLE, (-9, 75), rank=0,
          save=lambda pids: kill_itself()),
    Fault("SIGSTOP of rank 1 in a step", SILENT, (75, None), step=stop_itself),
    Fault("SIGSTOP of rank 0 in a step", UNREACHABLE, (None, 75), rank=0, step=stop_itself),
    Fault("out of memory on rank 1 (RLIMIT_AS)", "rank 1: out of memory", (2, 2),
          step=use_up_memory),
    Fault("images that only rank 1 cannot read", "rank 1: ", (2, 2), step=break_images),
    Fault("a bug on rank 1", "KeyError: 'a bug'", (2, 1), step=fail),
    Fault("disk full (rank 0 saves)", "No space left on device", (2, 2), rank=0, step=fill_disk,
          root=True),
    Fault(
        "network of rank 1 cut", SILENT, (75, 75), start=enter_network, step=cut_network,
        variables=in_network, root=True,
    ),
    Fault("rank 1 never starts", "rank 1 of 2 did not come within", (2, None),
          variables=lambda rank: None if rank else {}),
    Fault(
        "wrong MASTER_ADDR on rank 1", "rank 1 of 2 cannot join", (2, 2),
        variables=lambda rank: {"MASTER_ADDR": "192.0.2.1"} if rank else {},
    ),
    Fault("WORLD_SIZE 2 on rank 0, 3 on rank 1", "start all ranks with the same", (2, 2),
          variables=lambda rank: {"WORLD_SIZE": str(2 + rank)}),
    Fault("no dataset on the machine of rank 1", "every node needs the dataset", (2, 2),
          start=hide("../data"), root=True),
    Fault("clocks of rank 1 a day ahead", "", (0, 0), start=shift_clocks),
    *of_three_and_four(),
)  # fmt: skip


class Moment:
    """The time of a fault, and the progress of rank 0, in shared memory."""

    _TIME, _STEPS = struct.Struct("d"), struct.Struct("q")  # written by two processes

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._TIME.size + self._STEPS.size)

    def mark(self) -> None:
        """Record that the fault happens now."""
        self._TIME.pack_into(self._memory, 0, time.clock_gettime(time.CLOCK_MONOTONIC))

    def reach(self, iteration: int) -> None:
        """Record that rank 0 has done the steps before an iteration."""
        self._STEPS.pack_into(self._memory, self._TIME.size, iteration)

    def read(self) -> tuple[float, int]:
        """Return the time of the fault, 0 without one, and the iteration."""
        (seconds,) = self._TIME.unpack_from(self._memory, 0)
        (iteration,) = self._STEPS.unpack_from(self._memory, self._TIME.size)
        return seconds, iteration


class Ranks:
    """The processes of one start.

    Args: fault: None for a start without one.
    """

    def __init__(self, folder: Path, world_size: int, fault: Fault | None = None) -> None:
        self.folder, self.fault, self.moment = folder, fault, Moment()
        self.world_size = world_size
        self.started = time.monotonic()
        self.pids: dict[int, int] = {}
        self.ends: dict[int, tuple[int, float]] = {}  # exit status and time
        port = free_port()
        for rank in reversed(range(world_size)):
            more = fault.variables(rank) if fault else {}
            if more is not None:
                self.pids[rank] = self._fork(rank, rank_variables(rank, world_size, port) | more)

    def _fork(self, rank: int, variables: dict[str, str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.chdir(self.folder)
            output = os.open(f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ |= variables
            torch.set_num_threads(1)  # after a fork torch renews its threads
            if self.fault:
                self.fault.start(rank)
            with self._instrumented(rank):
                status = cli.main([*COMMAND, *FLAGS, *FLAGS_OF[self.world_size].split()])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    @contextlib.contextmanager
    def _instrumented(self, rank: int) -> Iterator[None]:
        step, replace, fault = Trainer.train_step, os.replace, self.fault

        def faulty_step(trainer: Trainer, crops: Sequence[Tensor]) -> Tensor:
            if fault and rank == fault.rank and trainer.iteration == ITERATION:
                self.moment.mark()
                fault.step()
            loss = step(trainer, crops)
            if rank == 0:
                self.moment.reach(trainer.iteration)
            return loss

        def faulty_replace(source: Any, target: Any) -> None:
            late = rank == 0 and iteration_of(Path(RUN)) == ITERATION - 1
            if fault and fault.save and late and str(target).endswith("checkpoint.pth"):
                self.moment.mark()
                fault.save([os.getpid(), self.pids[1]])
            replace(source, target)

        with (
            mock.patch.object(backbones, "DINOHead", small_head),
            mock.patch.dict(VIT_ARCHS["vit_nano"], depth=BLOCKS),
            mock.patch.object(Trainer, "train_step", faulty_step),
            mock.patch.object(os, "replace", faulty_replace),
        ):
            yield

    def wait(self, ranks: Sequence[int], seconds: float) -> bool:
        """Wait until these ranks have ended; return False if one of them has not in time."""
        end = time.monotonic() + seconds
        while not set(ranks) <= self.ends.keys() and time.monotonic() < end:
            for rank in self.pids.keys() - self.ends.keys():
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    self.ends[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
            time.sleep(0.01)
        return set(ranks) <= self.ends.keys()

    def kill(self) -> None:
        """Kill the ranks that run."""
        for rank in self.pids.keys() - self.ends.keys():
            os.kill(self.pids[rank], signal.SIGKILL)
        self.wait([*self.pids], STUCK_SECONDS)

    def lines(self) -> tuple[str, ...]:
        """Return the errors and the last lines of tracebacks that the ranks printed."""
        found = []
        for rank in sorted(self.pids):
            lines = (self.folder / f"rank{rank}.txt").read_text(errors="replace").splitlines()
            found += [line for line in lines if ": error: " in line]
            found += lines[-1:] if any("Traceback" in line for line in lines) else []
        return tuple(found)


def try_fault(fault: Fault, folder: Path, expected: Path) -> Result:
    """Run with a fault, and then without it until the end."""
    result = Result(fault.name)
    ranks = Ranks(folder, fault.world_size, fault)
    others = [rank for rank in ranks.pids if rank != fault.rank] or [*ranks.pids]
    ended = ranks.wait(others, STUCK_SECONDS)
    ranks.wait([*ranks.pids], 1.0 if None in fault.statuses else STUCK_SECONDS)
    ranks.kill()
    at, iteration = ranks.moment.read()
    last = max(ranks.ends[rank][1] for rank in others)
    result.seconds = last - (at or ranks.started) if ended else -1.0
    result.statuses = tuple(ranks.ends[rank][0] for rank in sorted(ranks.ends))
    result.lines = ranks.lines()
    result.lost = max(iteration - iteration_of(folder / RUN), 0)
    (folder / RUN / "filler").unlink(missing_ok=True)
    result.problem = _problem(fault, result)
    if any(fault.statuses):
        again = Ranks(folder, fault.world_size)
        again.wait([*again.pids], STUCK_SECONDS)
        again.kill()
        if any(status for status, _ in again.ends.values()):
            result.resumed = f"failed: {again.lines()}"
            return result
    result.resumed = "; ".join(differences(folder / RUN, expected / RUN)) or "equal"
    return result


def _problem(fault: Fault, result: Result) -> str:
    """Return how the result differs from what is expected."""
    statuses = result.statuses
    for rank, (status, wanted) in enumerate(zip(statuses, fault.statuses, strict=False)):
        if wanted not in (None, status):
            return f"rank {rank} ended with {status}, expected {wanted}"
    if result.seconds < 0:
        return "another rank did not end"
    if not any(fault.expected in line for line in (*result.lines, "")):
        return f"expected a line with {fault.expected!r}"
    return ""


def run_faults(names: Sequence[str]) -> list[Result]:
    """Run the faults with these words in their names; all without names."""
    results = []
    selected = [f for f in FAULTS if not names or any(name in f.name for name in names)]
    with tempfile.TemporaryDirectory(prefix="faults") as temporary:
        folder = Path(temporary)
        killed_runs.write_images(folder / "data")
        killed_runs.prepare()
        for ranks in sorted({fault.world_size for fault in selected}):
            _run_uninterrupted(folder / f"uninterrupted{ranks}", ranks)
        for i, fault in enumerate(selected):
            own = folder / str(i)
            (own / RUN).mkdir(parents=True)
            with _surroundings(fault, own / RUN) as missing:
                result = Result(fault.name, problem=missing)
                if not missing:
                    expected = folder / f"uninterrupted{fault.world_size}"
                    result = try_fault(fault, own, expected)
            log(f"{result}")
            results.append(result)
            shutil.rmtree(own)
    return results


def _run_uninterrupted(folder: Path, ranks: int) -> None:
    folder.mkdir()
    run = Ranks(folder, ranks)
    if not run.wait([*run.pids], STUCK_SECONDS) or any(s for s, _ in run.ends.values()):
        raise RuntimeError(f"the uninterrupted run failed: {run.lines()}")


@contextlib.contextmanager
def _surroundings(fault: Fault, run_folder: Path) -> Iterator[str]:
    """Prepare the disk or the network of a fault; yield why that is not possible, else ""."""
    if fault.root and os.geteuid():
        yield "not run: needs root"
        return
    try:
        with contextlib.ExitStack() as stack:
            if fault.step is fill_disk:
                run(f"mount -t tmpfs -o size=24m none {run_folder}")
                stack.callback(run, f"umount -l {run_folder}")
            if fault.step is cut_network:
                stack.enter_context(network())
            yield ""
    except subprocess.CalledProcessError as error:
        yield f"not run: {error.stderr.decode().strip()}"


def markdown(results: Sequence[Result], command: str, facts: Mapping[str, str]) -> str:
    """Return rank_faults.md."""
    about = (
        "Runs of two ranks (gloo) with --dist_timeout_minutes 0.1, or of 3 and 4 with 0.3, 4 with "
        "--fsdp, on one machine: a fault at iteration 5 or at the start, then the same command "
        "again. Seconds: from the fault, or the start, until the last rank that it does not hit "
        "has ended. Lost: steps that are repeated. Equal: checkpoints, log.txt and config.json of "
        f"the finished run are those of an uninterrupted run, bit for bit. By `{command}`."
    )
    heads = ["fault", "seconds", "exit statuses", "lost steps", "resumed run", "printed"]
    rows = [
        [
            result.name,
            f"{result.seconds:.1f}" if result.statuses else "-",
            ", ".join(map(str, result.statuses)),
            str(result.lost),
            result.resumed,
            "<br>".join(filter(None, (*result.lines, result.problem))).replace("|", "\\|"),
        ]
        for result in results
    ]
    note = (
        "A status of -9 is that of SIGKILL. After SIGKILL or a closed connection, a rank is lost "
        "once it has given no sign of life for 6 rounds: 1 s each, or less with a short timeout."
    )
    load, cores = os.getloadavg()[1], cpu_count()
    if load > cores:
        note += f" Other work shared the machine: its load was {load:.1f} on {cores} cores."
    parts = ["# Faults of a rank", wrap(about), table(heads, rows), wrap(note), facts_table(facts)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the faults; the exit status is 1 if one of them had another result than expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="*", help="words of their names (default: all)")
    parser.add_argument("--write", type=Path, help="folder of rank_faults.md and .json")
    options = parser.parse_args(arguments)
    results = run_faults(options.faults)
    facts = environment(torch.device("cpu"), ("torch",), {})
    command = command_line("rank_faults", arguments)
    text = markdown(results, command, facts)
    print(text)
    if options.write:
        record = {"command": command, "environment": facts, "faults": [*map(asdict, results)]}
        write_report(options.write, "rank_faults", text, record)
    bad = [r for r in results if r.problem.startswith(("rank", "another", "expected"))]
    return int(bool(bad) or any(r.resumed not in ("", "equal") for r in results))


if __name__ == "__main__":
    sys.exit(main())
