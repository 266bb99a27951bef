"""`fastdino submit`: run `fastdino train` as a Slurm job, requeued and resumed, through submitit.

The flags of the paper's run_with_submitit.py keep their names and, where they fit every cluster,
their defaults.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdino import cli
from fastdino.config import (
    TrainConfig,
    add_train_arguments,
    check_at_least,
    config_from_args,
    parse_bool,
)
from fastdino.errors import ConfigError, UserError
from fastdino.terminal import print_err, print_out

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

JOB = "%j"  # in --output_dir: the number of the job, 12, or 12_3 in a job array
OUTPUT = "--output_dir="
# A job that reaches its time limit more often is not requeued; the number is the paper's.
MAX_TIMEOUTS = 30
# A job whose run was lost so often without a new checkpoint, as by a lack of memory, ends.
MAX_LOST = 3
GB_PER_GPU = 40
VOLTA32 = "volta32gb"
SQUEUE_ATTEMPTS, SQUEUE_SECONDS = 4, 5.0


class TrainingJob:
    """`fastdino train` in every task of a Slurm job; submitit pickles and calls it.

    A run that a signal stopped and saved, or that lost a rank, is requeued by submitit and then
    resumes.

    Args:
        words: the command line of `fastdino train`, with JOB for the number of the job.
        requeue: False: a stopped job ends.

    Attributes: lost: times in a row that the run ended without a new checkpoint.
    """

    def __init__(self, words: list[str], *, requeue: bool = True) -> None:
        self.words, self.requeue, self.lost = words, requeue, 0

    def __call__(self) -> int:
        """Train; return the exit status, or exit with it."""
        from submitit import JobEnvironment

        from fastdino.signals import EXIT_INTERRUPTED  # loads torch: not needed to submit

        task = JobEnvironment()
        words = [_numbered(word, task.job_id) for word in self.words]
        before = _saves(words)
        status = cli.main(["train", *words])
        if status == EXIT_INTERRUPTED:
            if task.global_rank > 0:  # with a failing status, srun would kill rank 0
                return status
            self.lost = self.lost + 1 if _saves(words) == before else 0
            if self.lost == MAX_LOST:
                print_err(f"not requeued: {MAX_LOST} starts in a row ended without a checkpoint")
            elif self.requeue and _is_running(task.job_id):
                # submitit's handler, which training replaced and restored. It does not return.
                signal.raise_signal(signal.SIGUSR1)
        if status:
            sys.exit(status)
        return status

    def checkpoint(self) -> DelayedSubmission | None:
        """Return what submitit runs in the requeued job; None: it is not requeued."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self) if self.requeue else None


def _saves(words: list[str]) -> list[tuple[str, int]]:
    """Return the checkpoints in --output_dir, with their times."""
    folder = next((Path(w.partition("=")[2]) for w in words if w.startswith(OUTPUT)), Path())
    paths = [*folder.glob("checkpoint.pth"), *folder.glob("checkpoint/[0-9]*")]
    return [(path.name, path.stat().st_mtime_ns) for path in paths]


def _numbered(word: str, job: str) -> str:
    """Return the flag --output_dir with the number of the job; other flags as they are."""
    return word.replace(JOB, job) if word.startswith(OUTPUT) else word


def _is_running(job: str) -> bool:
    """Return False if Slurm ends the job, and requeues it itself if that is wanted.

    SIGTERM precedes the end of a cancelled or requeued job, and also a preemption.
    """
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    for attempt in range(SQUEUE_ATTEMPTS):
        if attempt:  # a busy controller does not answer, and without an answer the run would end
            time.sleep(SQUEUE_SECONDS)
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.split() == ["RUNNING"]
    return False


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino submit`: those of the job, and those of `fastdino train`."""
    group = parser.add_argument_group("Slurm", f"{JOB} in --output_dir is the number of the job.")
    for name, kind, default, about in (
        ("nodes", int, 2, "Number of nodes."),
        ("ngpus", int, 8, "GPUs and tasks per node, one task per GPU; tasks with --device cpu."),
        ("timeout", int, 2800, "Time limit in minutes; the job is requeued when it is reached."),
        ("signal_delay_s", int, 120, "Seconds before the time limit at which the run saves."),
        ("cpus_per_task", int, None, "CPUs per task (default: --num_workers, at least 1)."),
        ("mem_gb", int, None, f"Memory per node in GB, 0: all (default: {GB_PER_GPU} per task)."),
        ("partition", str, None, "Partition (default: the cluster's)."),
        ("qos", str, None, "Quality of service."),
        ("account", str, None, "Account to charge."),
        ("constraint", str, None, "Required features of the nodes."),
        ("comment", str, None, "Comment for the scheduler."),
    ):
        group.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="N" if kind is int else "STR",
            help=about if default is None else f"{about} (default: {default})",
        )
    group.add_argument(
        "--use_volta32", action="store_true", help=f"The same as --constraint {VOLTA32}."
    )
    group.add_argument(
        "--requeue",
        type=parse_bool,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="Requeue the job after its time limit, a preemption or the failure of a node; it "
        "resumes from its checkpoint. false: it ends. (default: true)",
    )
    add_train_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run `fastdino submit`: submit the job and print its number."""
    config = config_from_args(args)
    parameters = job_parameters(args, config)
    logs = log_folder(config.output_dir)
    job = _submit(TrainingJob(train_words(config), requeue=args.requeue), logs, parameters)
    print_out(
        f"submitted job {job}: {args.nodes} node(s) with {args.ngpus} task(s) each",
        f"output: {config.output_dir.replace(JOB, job)}",
        f"log: {logs / f'{job}_0_log.out'}",
    )
    return 0


def _submit(function: TrainingJob, logs: Path, parameters: dict[str, Any]) -> str:
    """Submit a job to Slurm and return its number; raise ConfigError."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'fastdino submit needs submitit ({error}): pip install "fastdino[submit]"'
        ) from error
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise ConfigError(
            f"fastdino submit needs Slurm, and {missing[0]} is not in PATH: submit from a login "
            "node of the cluster, or use fastdino train"
        )
    executor = submitit.AutoExecutor(
        folder=logs, cluster="slurm", slurm_max_num_timeout=MAX_TIMEOUTS
    )
    executor.update_parameters(**parameters)
    try:
        return str(executor.submit(function).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines()]
        raise UserError(f"sbatch refused the job: {'; '.join(filter(None, lines))}") from error


def job_parameters(args: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """Return the parameters of submitit's executor; raise ConfigError for contradictory flags."""
    if config.output_dir == TrainConfig().output_dir:
        raise ConfigError(
            f"fastdino submit needs --output_dir: runs/{JOB} for a folder per job, or the folder "
            "of a run to resume"
        )
    check_at_least(args, 1, "nodes", "ngpus", "timeout", "cpus_per_task")
    check_at_least(args, 0, "signal_delay_s", "mem_gb")
    if args.signal_delay_s >= 60 * args.timeout:
        raise ConfigError(
            f"--signal_delay_s {args.signal_delay_s} must be below the time limit, --timeout "
            f"{args.timeout} minutes"
        )
    if args.use_volta32 and args.constraint not in (None, VOLTA32):
        raise ConfigError(
            f"--use_volta32 means --constraint {VOLTA32} and contradicts --constraint "
            f"{args.constraint}: remove one"
        )
    cpus = args.cpus_per_task or max(1, config.num_workers)
    return {
        "name": "dino",
        "nodes": args.nodes,
        "tasks_per_node": args.ngpus,
        "gpus_per_node": None if config.device == "cpu" else args.ngpus,
        "cpus_per_task": cpus,
        "mem_gb": GB_PER_GPU * args.ngpus if args.mem_gb is None else args.mem_gb,
        "timeout_min": args.timeout,
        "slurm_partition": args.partition,
        "slurm_qos": args.qos,
        "slurm_account": args.account,
        "slurm_constraint": VOLTA32 if args.use_volta32 else args.constraint,
        "slurm_comment": args.comment or None,
        # srun does not take the CPUs from sbatch. A task that fails ends the others, which wait.
        "slurm_srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"],
        # The signal of a warning: submitit's default is SIGUSR2.
        "slurm_setup": ["export SUBMITIT_PREEMPT_SIGNAL=USR1"],
        "slurm_additional_parameters": {
            "signal": f"USR1@{args.signal_delay_s}",
            "requeue" if args.requeue else "no-requeue": True,
        },
    }


def log_folder(output_dir: str) -> Path:
    """Return the folder of the job's logs, which exists before the job has a number."""
    path = Path(output_dir)
    numbered = [one for one in (path, *path.parents) if JOB in one.name]
    return (numbered[-1].parent if numbered else path) / "slurm"


def train_words(config: TrainConfig) -> list[str]:
    """Return the flags of `fastdino train` whose values are not the defaults."""
    defaults, words = TrainConfig().to_dict(), []
    for name, value in config.to_dict().items():
        if value == defaults[name]:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return words
