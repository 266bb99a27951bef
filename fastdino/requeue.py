"""`python -m fastdino.requeue STATUS OUTPUT_DIR`: requeue the Slurm job of a run that can continue.

It is the last command of a batch script, after srun: the script outlives all tasks, so a job is
requeued no matter which rank was lost. It prints the reason in one line and exits with STATUS.

STATUS is the exit status of srun, the highest one of its tasks; a task that was ended by a signal
has 128 and the number of the signal. An error of one rank (2) is thus hidden if another rank is
lost (75) or killed (137).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastdino.errors import ConfigError, RankLostError, UserError
from fastdino.files import write_json
from fastdino.launch import restart_count
from fastdino.terminal import print_err

# Starts in a row without a new checkpoint after which a job ends: the run may lack memory.
MAX_EMPTY = 3
# Starts in a row without a finished epoch after which a job ends: an evaluation may take longer
# than the time limit. The number is that of the paper's run_with_submitit.py.
MAX_STARTS = 30
# A busy controller does not answer, and without an answer the job would end.
RETRIES, RETRY_SECONDS = 7, 15.0
# Errors of squeue and scontrol that a retry does not change.
PERMANENT_ERRORS = (
    "Invalid job id", "Requested operation is presently disabled", "Access/permission denied",
    "Invalid user id",
)  # fmt: skip
RECORD = "requeues.json"  # in OUTPUT_DIR


class StartCounts(NamedTuple):
    """The starts of a run that made no progress, and what the next start is compared with.

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


class Answer(NamedTuple):
    """The output of a command of Slurm, and its error; "" if it succeeded."""

    output: str
    error: str


class NotRequeuedError(UserError):
    """A job that is not requeued; the message is the reason."""


def main(argv: Sequence[str] | None = None) -> int:
    """Requeue the job, or print why it is not requeued; return the status of srun."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdino.requeue",
        description="Requeue the Slurm job of a run that was interrupted or lost a rank.",
    )
    parser.add_argument("status", type=int, metavar="STATUS", help="Exit status of srun.")
    parser.add_argument(
        "output_dir", type=Path, metavar="OUTPUT_DIR", help="Output folder of the run."
    )
    args = parser.parse_args(argv)
    if args.status:
        try:
            job = job_number()
            requeue(job, args.status, args.output_dir)
        except UserError as error:
            print_err(f"fastdino: the job is not requeued: {error}")
    return args.status


def job_number(environ: Mapping[str, str] = os.environ) -> str:
    """Return the number of this job, 12, or that of this task of a job array, 12_3.

    Raises: ConfigError: the variables of a Slurm job are missing.
    """
    is_array = bool(environ.get("SLURM_ARRAY_JOB_ID"))
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if is_array else ("SLURM_JOB_ID",)
    if missing := [name for name in names if not environ.get(name)]:
        raise ConfigError(
            f"{missing[0]} is not set: run this command in the batch script of a Slurm job"
        )
    return "_".join(environ[name] for name in names)


def requeue(job: str, status: int, output_dir: Path) -> None:
    """Requeue a job.

    Raises: UserError: it is not requeued.
    """
    cause = _cause(status)
    _check_running(job)
    _check_progress(job, output_dir)

    def attempt() -> Answer:
        _check_running(job)  # scontrol would also requeue a job that was cancelled meanwhile
        return _run("scontrol", "requeue", job)

    print_err(f"fastdino: requeueing job {job}: {cause}")  # a success ends this script
    _retry(attempt)


def _cause(status: int) -> str:
    """Return why a run with this status can continue."""
    if status == RankLostError.exit_status:
        return f"srun ended with status {status}: the run was interrupted, or lost a rank"
    if status > 128:
        return f"srun ended with status {status}: a signal ended a task"
    raise NotRequeuedError(f"srun ended with status {status}, an error that would occur again")


def _check_running(job: str) -> None:
    """Raise NotRequeuedError if Slurm ends the job, and requeues it itself if that is wanted."""
    output = _retry(lambda: _run("squeue", "--noheader", f"--jobs={job}", "--format=%T"))
    states = set(output.split())  # one line per part of a heterogeneous job
    if not states:
        raise NotRequeuedError(f"squeue does not list job {job}: Slurm has ended it")
    if states != {"RUNNING"}:
        raise NotRequeuedError(
            f"Slurm ends or requeues it (state {', '.join(sorted(states))}), as after scancel"
        )


def _check_progress(job: str, output_dir: Path) -> None:
    """Count this start; raise NotRequeuedError if the last ones did not advance the run."""
    if not os.path.exists(output_dir):
        # A run that was lost early, or a wrong path, which must not become a folder.
        if (starts := restart_count() + 1) >= MAX_EMPTY:
            raise NotRequeuedError(
                f"{starts} starts ended without the folder {output_dir}: use the --output_dir of "
                "the run"
            )
        print_err(f"fastdino: there is no folder {output_dir} to count the starts in")
        return
    counts = count_start(job, output_dir)
    if counts.empty >= MAX_EMPTY:
        raise NotRequeuedError(
            f"{counts.empty} starts in a row ended without a new checkpoint in {output_dir}"
        )
    if counts.in_epoch >= MAX_STARTS:
        raise NotRequeuedError(f"{counts.in_epoch} starts in a row did not finish an epoch")


def count_start(job: str, output_dir: Path) -> StartCounts:
    """Compare a run with its state after the last start, and record the new one."""
    path = output_dir / RECORD
    before = _read_record(path) or StartCounts(job, [], 0, 0, 0)
    if before.job != job:
        before = before._replace(job=job, empty=0, in_epoch=0)
    try:
        checkpoints, epochs = _checkpoints(output_dir), _epochs(output_dir)
        counts = StartCounts(
            job,
            checkpoints,
            epochs,
            empty=before.empty + 1 if checkpoints == before.checkpoints else 0,
            in_epoch=before.in_epoch + 1 if epochs <= before.epochs else 0,
        )
        write_json(counts._asdict(), path)
    except OSError as error:
        raise NotRequeuedError(f"its starts cannot be counted in {path} ({error})") from error
    return counts


def _read_record(path: Path) -> StartCounts | None:
    """Return the counts after the last start; None if there are none, or if they are invalid."""
    try:
        record: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or set(record) != set(StartCounts._fields):
        return None
    counts = StartCounts(**record)
    numbers = (counts.epochs, counts.empty, counts.in_epoch)
    are_counts = all(type(number) is int and number >= 0 for number in numbers)
    return counts if are_counts and isinstance(counts.checkpoints, list) else None


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


def _retry(attempt: Callable[[], Answer]) -> str:
    """Return the output of a command of Slurm, and repeat it while the controller is busy.

    Raises: NotRequeuedError: it fails in every attempt.
    """
    answer = attempt()
    for _ in range(RETRIES):
        if not answer.error:
            break
        time.sleep(RETRY_SECONDS)
        answer = attempt()
    if answer.error:
        raise NotRequeuedError(answer.error)
    return answer.output


def _run(*command: str) -> Answer:
    """Run a command of Slurm.

    Raises: NotRequeuedError: it fails with an error that a retry does not change.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=_without_filters(os.environ),
            check=False,
        )
    except OSError as error:
        raise NotRequeuedError(
            f"{command[0]} cannot be run on this node ({error.strerror})"
        ) from error
    if not done.returncode:
        return Answer(done.stdout, "")
    reason = done.stderr.strip().rpartition("\n")[2] or f"status {done.returncode}"
    failure = f"{' '.join(command)} failed: {reason}"
    if any(permanent in done.stderr for permanent in PERMANENT_ERRORS):
        raise NotRequeuedError(failure)
    return Answer("", failure)


def _without_filters(environ: Mapping[str, str]) -> dict[str, str]:
    """Remove the variables by which squeue would leave out this job, or ask another cluster.

    sbatch exports those of the shell in which the job was submitted.
    """
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith("SQUEUE_") and name != "SLURM_CLUSTERS"
    }


if __name__ == "__main__":
    sys.exit(main())
