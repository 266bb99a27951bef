"""fastdino.submit: the parameters given to submitit, and what the job does in each task."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdino import TrainConfig, cli, submit
from fastdino.submit import TrainingJob, log_folder, train_words
from fastdino.training import loop
from tests.commands import flags_of as parsed
from tests.flag_effects import flags_of

submitit = pytest.importorskip("submitit")
AutoExecutor = submitit.AutoExecutor  # replaced in the tests
RUN = ["submit", "--output_dir", "runs/%j"]


@pytest.fixture
def slurm(monkeypatch):
    """Replace submitit's executor; return what it was given, and set what sbatch answers."""
    seen = SimpleNamespace(answer="12")

    class Executor:
        def __init__(self, **options):
            seen.options = options

        def update_parameters(self, **parameters):
            seen.parameters = parameters

        def submit(self, function):
            seen.function = pickle.loads(pickle.dumps(function))
            if isinstance(seen.answer, Exception):
                raise seen.answer
            return SimpleNamespace(job_id=seen.answer)

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setattr(submit.shutil, "which", lambda name: f"/usr/bin/{name}")
    return seen


def test_the_papers_command_line_requests_what_run_with_submitit_requests(slurm, capsys):
    line = "--nodes 2 --ngpus 8 --use_volta32 --arch vit_base --data_path /data --epochs 400"
    assert cli.main(["submit", *line.split(), "--output_dir", "runs/%j"]) == 0
    assert slurm.options == {
        "folder": Path("runs/slurm"), "cluster": "slurm", "slurm_max_num_timeout": 30,
    }  # fmt: skip
    given = {key: value for key, value in slurm.parameters.items() if value is not None}
    assert given == {
        "name": "dino", "nodes": 2, "tasks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 10,
        "mem_gb": 320, "timeout_min": 2800, "slurm_constraint": "volta32gb",
        "slurm_srun_args": ["--cpus-per-task=10", "--kill-on-bad-exit=1"],
        "slurm_setup": ["export SUBMITIT_PREEMPT_SIGNAL=USR1"],
        "slurm_additional_parameters": {"signal": "USR1@120", "requeue": True},
    }  # fmt: skip
    config = ["--arch=vit_base", "--epochs=400", "--data_path=/data", "--output_dir=runs/%j"]
    assert sorted(slurm.function.words) == sorted(config)
    assert slurm.function.requeue
    assert capsys.readouterr().out.splitlines() == [
        "submitted job 12: 2 node(s) with 8 task(s) each",
        "output: runs/12",
        "log: runs/slurm/12_0_log.out",
    ]


# Flag: words, and the parameters that change.
FLAGS = {
    "nodes": ("--nodes 3", {"nodes": 3}),
    "ngpus": ("--ngpus 4", {"tasks_per_node": 4, "gpus_per_node": 4, "mem_gb": 160}),
    "timeout": ("--timeout 60", {"timeout_min": 60}),
    "signal_delay_s": (
        "--signal_delay_s 300",
        {"slurm_additional_parameters": {"signal": "USR1@300", "requeue": True}},
    ),
    "cpus_per_task": (
        "--cpus_per_task 7",
        {
            "cpus_per_task": 7,
            "slurm_srun_args": ["--cpus-per-task=7", "--kill-on-bad-exit=1"],
        },
    ),
    "mem_gb": ("--mem_gb 0", {"mem_gb": 0}),
    "partition": ("--partition gpu", {"slurm_partition": "gpu"}),
    "qos": ("--qos low", {"slurm_qos": "low"}),
    "account": ("--account lab", {"slurm_account": "lab"}),
    "constraint": ("--constraint a100", {"slurm_constraint": "a100"}),
    "comment": ("--comment deadline", {"slurm_comment": "deadline"}),
    "use_volta32": ("--use_volta32", {"slurm_constraint": "volta32gb"}),
    "requeue": (
        "--requeue false",
        {"slurm_additional_parameters": {"signal": "USR1@120", "no-requeue": True}},
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_the_job_changes_its_parameters(slurm, name):
    cli.main(RUN)
    usual = slurm.parameters
    words, changes = FLAGS[name]
    cli.main([*RUN, *words.split()])
    assert slurm.parameters == usual | changes
    assert slurm.function.requeue == (name != "requeue")
    assert slurm.function.words == ["--output_dir=runs/%j"]


def test_the_flags_are_those_of_the_job_and_of_train():
    assert flags_of("submit") == flags_of("train") | set(FLAGS)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("--requeue", {}),
        ("--use_volta32 --constraint volta32gb", {"slurm_constraint": "volta32gb"}),
        ("--device cpu", {"gpus_per_node": None}),
        (
            "--num_workers 0",
            {"cpus_per_task": 1, "slurm_srun_args": ["--cpus-per-task=1", "--kill-on-bad-exit=1"]},
        ),
    ],
)
def test_parameters_follow_from_other_flags(slurm, words, changes):
    cli.main(RUN)
    usual = slurm.parameters
    cli.main([*RUN, *words.split()])
    assert slurm.parameters == usual | changes


def test_submitit_writes_the_parameters_into_sbatchs_script(slurm, tmp_path):
    cli.main([*RUN, "--partition", "gpu", "--qos", "low", "--account", "lab", "--comment", "a b"])
    executor = AutoExecutor(tmp_path, cluster="slurm")
    executor.update_parameters(**slurm.parameters)
    script = executor._executor._make_submission_file_text("command", "0").splitlines()
    for line in (
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=10",
        "--mem=320GB", "--time=2800", "--partition=gpu", "--qos=low", "--account=lab",
        "--comment='a b'", "--signal=USR1@120", "--requeue", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in script
    assert any(line.startswith("srun ") and "--cpus-per-task=10" in line for line in script)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output_dir .", "needs --output_dir: runs/%j for a folder per job"),
        ("--nodes 0", "--nodes must be at least 1, got 0"),
        ("--ngpus 0", "--ngpus must be at least 1, got 0"),
        ("--timeout 0", "--timeout must be at least 1, got 0"),
        ("--cpus_per_task 0", "--cpus_per_task must be at least 1, got 0"),
        ("--mem_gb -1", "--mem_gb must be at least 0, got -1"),
        ("--timeout 2", "--signal_delay_s 120 must be below the time limit, --timeout 2 minutes"),
        ("--use_volta32 --constraint a100", "contradicts --constraint a100: remove one"),
        ("--epochs 0", "--epochs must be a finite number of at least 1"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_submitted(slurm, capsys, words, message):
    assert cli.main([*RUN, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not hasattr(slurm, "parameters")


@pytest.mark.parametrize("missing", ["sbatch", "srun"])
def test_without_slurm_one_line_says_so(slurm, monkeypatch, capsys, missing):
    monkeypatch.setattr(submit.shutil, "which", lambda name: None if name == missing else name)
    assert cli.main(RUN) == 2
    assert f"needs Slurm, and {missing} is not in PATH" in capsys.readouterr().err


def test_without_submitit_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main(RUN) == 2
    error = capsys.readouterr().err
    assert "needs submitit" in error
    assert 'pip install "fastdino[submit]"' in error
    assert error.count("\n") == 1


def test_a_refusal_of_sbatch_is_one_line(slurm, capsys):
    slurm.answer = submitit.core.utils.FailedJobError(
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed"
    )
    assert cli.main(RUN) == 2
    assert capsys.readouterr().err == (
        "fastdino submit: error: sbatch refused the job: invalid partition specified: x; "
        "Batch job submission failed\n"
    )


@pytest.mark.parametrize(
    ("output_dir", "logs"),
    [
        ("runs/s16", "runs/s16/slurm"), ("runs/%j", "runs/slurm"), ("/a/x%j/y%j", "/a/slurm"),
        ("%j", "slurm"),
    ],
)  # fmt: skip
def test_the_folder_of_the_logs_has_no_job_number(output_dir, logs):
    assert log_folder(output_dir) == Path(logs)


def test_every_training_setting_reaches_the_job():
    """Values that are no defaults are parsed back; some contradict each other, unchecked here."""
    config = TrainConfig()
    for field in fields(TrainConfig):
        value, choices = field.default, field.metadata["choices"]
        changed = "a b=c"
        if choices:
            changed = choices[-1]
        elif isinstance(value, bool):
            changed = not value
        elif isinstance(value, (int, float)):
            changed = value + 1
        elif isinstance(value, tuple):
            changed = (0.2, 0.3)
        object.__setattr__(config, field.name, changed)
    args = parsed(loop, *train_words(config))
    assert {name: getattr(args, name) for name in config.to_dict()} == config.to_dict()


class Task:
    """submitit's environment of a task, and Slurm's answers."""

    def __init__(self, monkeypatch, *, rank=0, status=75, state="RUNNING", array=False, failures=0):
        self.lines, self.signals, self.asked = [], [], []
        variables = {
            "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "14", "SLURM_PROCID": str(rank),
        }  # fmt: skip
        if array:
            variables |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        def train(words):
            self.lines.append(words)
            return status

        def run(command, **options):
            self.asked.append(command)
            if len(self.asked) <= failures:
                return subprocess.CompletedProcess(command, 1, stdout="")
            return subprocess.CompletedProcess(command, 0, stdout=f"{state}\n")

        monkeypatch.setattr(cli, "main", train)
        monkeypatch.setattr(submit.subprocess, "run", run)
        monkeypatch.setattr(submit, "SQUEUE_SECONDS", 0.0)
        monkeypatch.setattr(submit.signal, "raise_signal", self.signals.append)


@pytest.mark.parametrize(("array", "number"), [(False, "14"), (True, "12_3")])
def test_each_job_of_an_array_has_its_own_folder_and_requeues_itself_only(
    monkeypatch, array, number
):
    task = Task(monkeypatch, array=array)
    with pytest.raises(SystemExit):
        TrainingJob(["--output_dir=runs/%j/x", "--data_path=/data/%j"])()
    assert task.lines == [["train", f"--output_dir=runs/{number}/x", "--data_path=/data/%j"]]
    assert any(f"--jobs={number}" in word for word in task.asked[0])
    assert submitit.JobEnvironment().job_id == number  # what submitit requeues
    assert task.signals == [signal.SIGUSR1]


@pytest.mark.parametrize(
    ("options", "requeue", "status", "signals"),
    [
        ({"status": 0}, True, 0, []),
        ({"status": 2}, True, 2, []),
        ({"status": 2, "rank": 1}, True, 2, []),
        ({}, True, 75, [signal.SIGUSR1]),
        ({}, False, 75, []),
        ({"state": "COMPLETING"}, True, 75, []),  # scancel, scontrol requeue
        ({"state": ""}, True, 75, []),
        ({"failures": 2}, True, 75, [signal.SIGUSR1]),  # a busy controller
        ({"failures": 99}, True, 75, []),
        ({"rank": 1}, True, 0, []),  # only rank 0 requeues, and must not be killed before
    ],
)
def test_a_saved_run_is_requeued_by_rank_0_unless_slurm_ends_the_job(
    monkeypatch, options, requeue, status, signals
):
    task = Task(monkeypatch, **options)
    job = TrainingJob(["--output_dir=runs"], requeue=requeue)
    if status:
        with pytest.raises(SystemExit) as stop:
            job()
        assert stop.value.code == status
    else:
        job()
    assert task.signals == signals


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint/000002"])
def test_a_run_that_is_lost_again_and_again_without_a_checkpoint_is_not_requeued(
    monkeypatch, tmp_path, capsys, name
):
    task, job = Task(monkeypatch), TrainingJob([f"--output_dir={tmp_path}"])
    (tmp_path / "checkpoint").mkdir()
    saved, train = [False, False, True, False, False, False], cli.main

    def run(words):
        if saved[len(task.lines)]:
            (tmp_path / name).write_text("new")
        return train(words)

    monkeypatch.setattr(cli, "main", run)
    for _ in saved:
        job = pickle.loads(pickle.dumps(job.checkpoint().function))
        with pytest.raises(SystemExit) as stop:
            job()
        assert stop.value.code == 75
    assert len(task.signals) == len(saved) - 1
    assert "not requeued: 3 starts in a row ended without a checkpoint" in capsys.readouterr().err


def test_submitit_requeues_the_same_job_before_the_first_step():
    job = TrainingJob(["--output_dir=runs"])
    assert job.checkpoint().function is job
    assert TrainingJob([], requeue=False).checkpoint() is None
