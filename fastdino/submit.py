"""`fastdino submit`: run `fastdino train` as a Slurm job, requeued and resumed, through submitit.

The flags of the paper's run_with_submitit.py keep their names and, where they fit every cluster,
their defaults.
"""

from __future__ import annotations

import argparse
import locale
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fastdino.config import (
    LARGEST_SIZE,
    TrainConfig,
    add_train_arguments,
    check_at_least,
    check_at_most,
    config_from_args,
    parse_bool,
)
from fastdino.errors import ConfigError, UserError
from fastdino.terminal import print_err, print_out

JOB = "%j"  # in --output_dir: the number of the job
OUTPUT = "--output_dir="
GB_PER_GPU = 40
VOLTA32 = "volta32gb"
# Slurm sends its warning up to EARLY_SECONDS before the requested time; a run needs START_SECONDS
# until it can save.
EARLY_SECONDS = START_SECONDS = 60
# After the first task, the other ones end within --dist_timeout_minutes and these seconds. Those
# that do not, such as a stopped process, are killed.
END_SECONDS = 60
# Slurm stores these numbers in 16 bits, of which it reserves the highest two values, and prints a
# longer time limit than a year as INVALID.
LARGEST_COUNT, LARGEST_DELAY, YEAR_MINUTES = 2**16 - 3, 2**16 - 1, 365 * 24 * 60
# submitit installs handlers that requeue the job, or ignore the signal.
HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2)
# Variables of sbatch, which override the options in a script, by the parameter of submitit whose
# option they replace or contradict.
SBATCH_VARIABLES = {
    "gpus_per_node": ("GPUS", "GPUS_PER_NODE", "GPUS_PER_SOCKET", "GPUS_PER_TASK", "GRES"),
    "cpus_per_task": ("CPUS_PER_GPU",),
    "mem_gb": ("MEM_PER_CPU", "MEM_PER_GPU", "MEM_PER_NODE"),
    "timeout_min": ("TIMELIMIT",),
    "slurm_partition": ("PARTITION",),
    "slurm_qos": ("QOS",),
    "slurm_account": ("ACCOUNT",),
    "slurm_constraint": ("CONSTRAINT",),
    "slurm_additional_parameters": ("SIGNAL", "REQUEUE", "NO_REQUEUE"),
    "name": ("OUTPUT", "ERROR", "OPEN_MODE", "WAIT"),  # submitit names the logs, and does not wait
}
ARRAY = "SBATCH_ARRAY_INX"


class TrainingJob:
    """`fastdino train` in every task of a Slurm job; submitit pickles and calls it.

    Args: arguments: of `fastdino train`, with JOB for the number of the job in --output_dir.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def __call__(self) -> NoReturn:
        """Train, and exit with the status of `fastdino train`."""
        from fastdino.__main__ import run

        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        job = os.environ["SLURM_JOB_ID"]
        run(["train", *(_numbered(argument, job) for argument in self.arguments)])


def _numbered(argument: str, job: str) -> str:
    """Return the flag --output_dir with the number of the job; other flags unchanged."""
    return argument.replace(JOB, job) if argument.startswith(OUTPUT) else argument


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
        help="Requeue the job after its time limit, a preemption, a lost rank or the failure "
        "of a node; it resumes from its checkpoint. false: it ends. (default: true)",
    )
    add_train_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run `fastdino submit`: submit the job and print its number."""
    config = config_from_args(args)
    parameters = job_parameters(args, config)
    logs = log_folder(config.output_dir)
    job = _submit(TrainingJob(train_arguments(config)), logs, parameters)
    print_out(
        f"submitted job {job}: {args.nodes} node(s) with {args.ngpus} task(s) each",
        f"output: {config.output_dir.replace(JOB, job)}",
        f"log of rank 0: {logs / f'{job}_0_log.out'}",
        f"errors and requeues: {logs / f'{job}_*_log.err'}",
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
    if ARRAY in os.environ:
        raise ConfigError(
            f"fastdino submit makes no job array, and {ARRAY}={os.environ[ARRAY]} asks for one: "
            "unset it"
        )
    executor = submitit.AutoExecutor(folder=logs.absolute(), cluster="slurm")
    executor.update_parameters(**parameters)
    try:
        with without_variables(overriding_variables(parameters)):
            return str(executor.submit(function).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines()]
        raise UserError(f"sbatch refused the job: {'; '.join(filter(None, lines))}") from error


def overriding_variables(parameters: dict[str, Any]) -> list[str]:
    """Return the variables in the environment that would override these parameters."""
    return [
        f"SBATCH_{name}"
        for parameter, names in SBATCH_VARIABLES.items()
        for name in names
        if parameters[parameter] is not None and f"SBATCH_{name}" in os.environ
    ]


@contextmanager
def without_variables(names: Sequence[str]) -> Iterator[None]:
    """Remove variables from the environment during the block, and report it."""
    removed = {name: os.environ.pop(name) for name in names}
    for name, value in removed.items():
        print_err(f"fastdino submit: {name}={value} is ignored: use the flags of fastdino submit")
    try:
        yield
    finally:
        os.environ.update(removed)


def job_parameters(args: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """Return the parameters of submitit's executor; raise ConfigError for contradictory flags."""
    _check(args, config)
    cpus = args.cpus_per_task or max(1, config.num_workers)
    wait = math.ceil(60 * config.dist_timeout_minutes) + END_SECONDS
    return {
        "name": "dino",
        "nodes": args.nodes,
        "tasks_per_node": args.ngpus,
        "gpus_per_node": None if config.device == "cpu" else args.ngpus,
        "cpus_per_task": cpus,
        "mem_gb": GB_PER_GPU * args.ngpus if args.mem_gb is None else args.mem_gb,
        "timeout_min": args.timeout,
        "slurm_partition": args.partition or None,
        "slurm_qos": args.qos or None,
        "slurm_account": args.account or None,
        "slurm_constraint": VOLTA32 if args.use_volta32 else args.constraint or None,
        "slurm_comment": args.comment or None,
        # srun does not take the CPUs from sbatch. The first task that fails must not end the
        # others: their statuses show whether an error or a lost rank ended the run.
        "slurm_srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=0", f"--wait={wait}"],
        "slurm_teardown": [requeue_command(config.output_dir)] if args.requeue else None,
        "slurm_additional_parameters": {
            "signal": f"USR1@{args.signal_delay_s}",
            "requeue" if args.requeue else "no-requeue": True,
        },
    }


def _check(args: argparse.Namespace, config: TrainConfig) -> None:
    """Raise ConfigError for flags of the job that are impossible or contradict each other."""
    if os.path.realpath(config.output_dir) == os.path.realpath(os.curdir):
        raise ConfigError(
            "fastdino submit needs --output_dir, and not the working directory: "
            f"runs/{JOB} for a folder per job, or the folder of a run to resume"
        )
    check_at_least(args, 1, "nodes", "ngpus", "timeout", "cpus_per_task")
    check_at_least(args, 0, "signal_delay_s", "mem_gb")
    check_at_most(args, LARGEST_COUNT, "nodes", "ngpus", "cpus_per_task")
    check_at_most(args, LARGEST_DELAY, "signal_delay_s")
    check_at_most(args, LARGEST_SIZE, "mem_gb")
    check_at_most(args, YEAR_MINUTES, "timeout", "dist_timeout_minutes")
    config.check_world_size(args.nodes * args.ngpus)
    _check_texts(args, config)
    least = args.signal_delay_s + EARLY_SECONDS + START_SECONDS
    if 60 * args.timeout < least:
        raise ConfigError(
            f"--timeout {args.timeout} minutes is too short for --signal_delay_s "
            f"{args.signal_delay_s}: Slurm may send its signal {EARLY_SECONDS} s earlier, and a "
            f"run needs {START_SECONDS} s to start; use --timeout {math.ceil(least / 60)} or more"
        )
    if args.use_volta32 and args.constraint not in (None, "", VOLTA32):
        raise ConfigError(
            f"--use_volta32 means --constraint {VOLTA32} and contradicts --constraint "
            f"{args.constraint}: remove one"
        )
    logs = str(log_folder(config.output_dir).absolute())
    if special := [character for character in "%\\" if character in logs]:
        raise ConfigError(
            f"the folder of the logs, {logs}, contains {special[0]!r}, which Slurm replaces in the "
            f"names of files: use another --output_dir, or {JOB} for the number of the job"
        )


def _check_texts(args: argparse.Namespace, config: TrainConfig) -> None:
    """Raise ConfigError for texts that cannot be written into the script of the job."""
    for name in ("partition", "qos", "account", "constraint", "comment", "output_dir"):
        text = getattr(args, name)
        if text and text.splitlines() != [text]:
            raise ConfigError(f"--{name} must be one line, got {text!r}")
        _check_encoding(f"--{name}", text or "")
    _check_encoding("the path of --output_dir,", os.path.abspath(config.output_dir))
    _check_encoding("the path of Python,", sys.executable)


def _check_encoding(name: str, text: str) -> None:
    encoding = locale.getpreferredencoding(False)  # in which submitit writes the script
    try:
        text.encode(encoding)
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} {text} cannot be written into the script of the job: it is not {encoding}; "
            "use other characters, or a UTF-8 locale"
        ) from error


def requeue_command(output_dir: str) -> str:
    """Return the command that follows srun in the job's script."""
    parts = os.path.abspath(output_dir).split(JOB)
    folder = '"$SLURM_JOB_ID"'.join(part and shlex.quote(part) for part in parts)
    return f"{shlex.quote(sys.executable)} -m fastdino.requeue $? {folder}"


def log_folder(output_dir: str) -> Path:
    """Return the folder of the job's logs, which exists before the job has a number."""
    path = Path(output_dir)
    numbered = [one for one in (path, *path.parents) if JOB in one.name]
    return (numbered[-1].parent if numbered else path) / "slurm"


def train_arguments(config: TrainConfig) -> list[str]:
    """Return the flags of `fastdino train` whose values are not the defaults."""
    defaults, arguments = TrainConfig().to_dict(), []
    for name, value in config.to_dict().items():
        if value == defaults[name]:
            continue
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            text = str(value).lower() if isinstance(value, bool) else value
            arguments.append(f"--{name}={text}")
    return arguments
