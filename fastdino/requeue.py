"""`python -m fastdino.requeue STATUS OUTPUT_DIR`: requeue the Slurm job of a run that can continue.

It is the last command of a batch script, after srun: the script outlives all tasks, so a job is
requeued no matter which rank was lost. It prints the reason in one line and exits with STATUS.

STATUS is the exit status of srun, which is the highest one of the tasks, or 128 and the number of
a signal if signals ended all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fastdino.errors import ConfigError, RankLostError, UserError
from fastdino.files import write_json
from fastdino.terminal import print_err

# A run that is lost so often without a new checkpoint, as by a lack of memory, is not repeated.
MAX_EMPTY = 3
# Nor is one that needs so many starts for one epoch, such as one with an evaluation that is longer
# than the time limit. The number is that of the paper's run_with_submitit.py.
MAX_STARTS = 30
# A busy controller does not answer, and without an answer the job would end.
ATTEMPTS, SECONDS = 8, 15.0
RECORD = "requeues.json"  # in OUTPUT_DIR


class Starts(NamedTuple):
    """The last starts of a run.

    Attributes:
        job: number of the Slurm job.
        checkpoints: names and times of the checkpoints after the last start.
        epochs: finished epochs after it.
        empty: starts in a row without a new checkpoint.
        in_epoch: starts in a row without another finished epoch.
    """

    job: str
    checkpoints: list[list[str | int]]
    epochs: int
    empty: int
    in_epoch: int


class Command(NamedTuple):
    """The answer of a command of Slurm; error: why there is none."""

    output: str
    error: str


class NotRequeuedError(UserError):
    """Why a job is not requeued."""


def main(argv: Sequence[str] | None = None) -> int:
    """Requeue the job, or print why it is not requeued; return the status of srun."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdino.requeue",
        description="Requeue the Slurm job of a run that was interrupted or lost a rank.",
    )
    parser.add_argument("status", type=int, metavar="STATUS", help="Exit status of srun.")
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="That of the run.")
    args = parser.parse_args(argv)
    if args.status:
        try:
            job = job_number()
            requeue(job, args.status, args.output_dir)
        except UserError as error:
            print_err(f"fastdino: the job is not requeued: {error}")
    return args.status


def job_number(environ: Mapping[str, str] = os.environ) -> str:
    """Return the number of this job, 12, or that of this task of a job array, 12_3."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(environ)
    if "SLURM_JOB_ID" not in environ:
        raise ConfigError("SLURM_JOB_ID is not set: this command belongs into a batch script")
    return environ["SLURM_JOB_ID"]


def requeue(job: str, status: int, output_dir: Path) -> None:
    """Requeue a job.

    Raises: UserError: it is not requeued.
    """
    cause = _cause(status)
    _check_running(job)
    _check_progress(job, output_dir)
    print_err(f"fastdino: job {job} is requeued: {cause}")
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(SECONDS)
            _check_running(job)  # scontrol would also requeue a job that was cancelled meanwhile
        answer = _run("scontrol", "requeue", job)
        if not answer.error:
            return
    raise NotRequeuedError(answer.error)


def _cause(status: int) -> str:
    """Return why a run with this status can continue."""
    if status == RankLostError.exit_status:
        return f"srun ended with status {status}: the run was interrupted, or lost a rank"
    if status > 128:
        return f"srun ended with status {status}: a signal ended a task"
    raise NotRequeuedError(f"srun ended with status {status}, an error that would occur again")


def _check_running(job: str) -> None:
    """Raise NotRequeuedError if Slurm ends the job, and requeues it itself if that is wanted."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(SECONDS)
        answer = _run("squeue", "--noheader", f"--jobs={job}", "--format=%T")
        if not answer.error:
            break
    else:
        raise NotRequeuedError(answer.error)
    state = answer.output.strip()
    if state != "RUNNING":
        raise NotRequeuedError(
            f"Slurm ends or requeues it (state {state or 'unknown'}), as after scancel"
        )


def _check_progress(job: str, output_dir: Path) -> None:
    """Count this start; raise NotRequeuedError if the last ones did not advance the run."""
    starts = count_start(job, output_dir)
    if starts.empty >= MAX_EMPTY:
        raise NotRequeuedError(
            f"{starts.empty} starts in a row ended without a new checkpoint in {output_dir}"
        )
    if starts.in_epoch >= MAX_STARTS:
        raise NotRequeuedError(f"{starts.in_epoch} starts in a row did not finish an epoch")


def count_start(job: str, output_dir: Path) -> Starts:
    """Compare a run with its state after the last start, and record the new one."""
    path, before = output_dir / RECORD, Starts(job, [], 0, 0, 0)
    with suppress(OSError, ValueError, TypeError):
        before = Starts(**json.loads(path.read_bytes()))
    if before.job != job:
        before = before._replace(job=job, empty=0, in_epoch=0)
    try:
        checkpoints, epochs = _checkpoints(output_dir), _epochs(output_dir)
        starts = Starts(
            job,
            checkpoints,
            epochs,
            empty=before.empty + 1 if checkpoints == before.checkpoints else 0,
            in_epoch=before.in_epoch + 1 if epochs <= before.epochs else 0,
        )
        write_json(starts._asdict(), path)
    except OSError as error:
        raise NotRequeuedError(f"its starts cannot be counted in {path} ({error})") from error
    return starts


def _checkpoints(output_dir: Path) -> list[list[str | int]]:
    shards = [path for path in output_dir.glob("checkpoint/*") if path.name.isdecimal()]
    paths = [*output_dir.glob("checkpoint.pth"), *sorted(shards)]
    return [[path.name, path.stat().st_mtime_ns] for path in paths]


def _epochs(output_dir: Path) -> int:
    """Return the number of lines of log.txt."""
    try:
        return (output_dir / "log.txt").read_bytes().count(b"\n")
    except OSError:
        return 0


def _run(*command: str) -> Command:
    """Run a command of Slurm."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return Command("", f"{command[0]} cannot be run on this node ({error.strerror})")
    reason = answer.stderr.strip().rpartition("\n")[2] or f"status {answer.returncode}"
    failed = f"{' '.join(command)} failed: {reason}"
    return Command(answer.stdout, failed if answer.returncode else "")


if __name__ == "__main__":
    sys.exit(main())
