"""fastdino.submit: the parameters given to submitit, and what the job does in each task."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdino import TrainConfig, cli, requeue, submit
from fastdino.submit import TrainingJob, log_folder, train_arguments
from fastdino.training import loop
from tests.commands import flags_of as parsed
from tests.fake_slurm import FakeSlurm
from tests.flag_effects import flags_of

submitit = pytest.importorskip("submitit")
AutoExecutor = submitit.AutoExecutor  # replaced in the tests
RUN = ["submit", "--output_dir", "runs/%j"]
SRUN_ARGS = ["--cpus-per-task=10", "--kill-on-bad-exit=0", "--wait=660"]
REQUEUE = f'{sys.executable} -m fastdino.requeue $? {Path.cwd()}/runs/"$SLURM_JOB_ID"'


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
            seen.environ = dict(os.environ)
            if isinstance(seen.answer, Exception):
                raise seen.answer
            return SimpleNamespace(job_id=seen.answer)

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setattr(submit.shutil, "which", lambda name: f"/usr/bin/{name}")
    return seen


def test_the_papers_command_line_requests_what_run_with_submitit_requests(slurm, capsys):
    line = "--nodes 2 --ngpus 8 --use_volta32 --arch vit_base --data_path /data --epochs 400"
    assert cli.main(["submit", *line.split(), "--output_dir", "runs/%j"]) == 0
    assert slurm.options == {"folder": Path.cwd() / "runs/slurm", "cluster": "slurm"}
    given = {key: value for key, value in slurm.parameters.items() if value is not None}
    assert given == {
        "name": "dino", "nodes": 2, "tasks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 10,
        "mem_gb": 320, "timeout_min": 2800, "slurm_constraint": "volta32gb",
        "slurm_srun_args": SRUN_ARGS, "slurm_teardown": [REQUEUE],
        "slurm_additional_parameters": {"signal": "USR1@120", "requeue": True},
    }  # fmt: skip
    config = ["--arch=vit_base", "--epochs=400", "--data_path=/data", "--output_dir=runs/%j"]
    assert sorted(slurm.function.arguments) == sorted(config)
    assert capsys.readouterr().out.splitlines() == [
        "submitted job 12: 2 node(s) with 8 task(s) each",
        "output: runs/12",
        "log of rank 0: runs/slurm/12_0_log.out",
        "errors and requeues: runs/slurm/12_*_log.err",
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
        {"cpus_per_task": 7, "slurm_srun_args": ["--cpus-per-task=7", *SRUN_ARGS[1:]]},
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
        {
            "slurm_additional_parameters": {"signal": "USR1@120", "no-requeue": True},
            "slurm_teardown": None,
        },
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_the_job_changes_its_parameters(slurm, name):
    cli.main(RUN)
    usual = slurm.parameters
    words, changes = FLAGS[name]
    cli.main([*RUN, *words.split()])
    assert slurm.parameters == usual | changes
    assert slurm.function.arguments == ["--output_dir=runs/%j"]


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
            {"cpus_per_task": 1, "slurm_srun_args": ["--cpus-per-task=1", *SRUN_ARGS[1:]]},
        ),
        ("--dist_timeout_minutes 0.01", {"slurm_srun_args": [*SRUN_ARGS[:2], "--wait=61"]}),
        *((f"--{name}=", {}) for name in ("partition", "qos", "account", "constraint", "comment")),
        ("--use_volta32 --constraint=", {"slurm_constraint": "volta32gb"}),
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
        ("--output_dir .", "and not the working directory: runs/%j for a folder per job"),
        ("--output_dir ./", "and not the working directory: runs/%j for a folder per job"),
        ("--output_dir runs/..", "and not the working directory"),
        (f"--output_dir {Path.cwd()}", "and not the working directory"),
        ("--timeout 99999999999999", "--timeout must be at most 525600, got 99999999999999"),
        (f"--mem_gb {10**30}", "--mem_gb must be at most 2147483647, got 10000"),
        (f"--cpus_per_task {10**20}", "--cpus_per_task must be at most 65533, got 10000"),
        ("--cpus_per_task 65534", "--cpus_per_task must be at most 65533, got 65534"),
        (f"--nodes {10**20}", "--nodes must be at most 65533, got 10000"),
        ("--ngpus 65534", "--ngpus must be at most 65533, got 65534"),
        ("--signal_delay_s 65536", "--signal_delay_s must be at most 65535, got 65536"),
        ("--dist_timeout_minutes 1e12", "--dist_timeout_minutes must be at most 525600, got 1000"),
        ("--nodes 0", "--nodes must be at least 1, got 0"),
        ("--ngpus 0", "--ngpus must be at least 1, got 0"),
        ("--timeout 0", "--timeout must be at least 1, got 0"),
        ("--cpus_per_task 0", "--cpus_per_task must be at least 1, got 0"),
        ("--mem_gb -1", "--mem_gb must be at least 0, got -1"),
        ("--timeout 2", "--timeout 2 minutes is too short for --signal_delay_s 120"),
        ("--timeout 3", "a run needs 60 s to start; use --timeout 4 or more"),
        ("--timeout 4 --signal_delay_s 121", "use --timeout 5 or more"),
        ("--output_dir=", "needs --output_dir, and not the working directory: runs/%j"),
        ("--nodes 3 --global_batch_size 1024", "cannot be divided equally among 24 processes"),
        (
            "--nodes 1 --ngpus 2 --global_batch_size 2 --koleo_weight 0.1",
            "gives passes of one image with 2 process(es)",
        ),
        ("--nodes 1 --ngpus 1 --fsdp true", "--fsdp true needs several processes"),
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


JOB_TEXTS = ("partition", "qos", "account", "constraint", "comment", "output_dir")


@pytest.mark.parametrize("text", ["a\nb", "a\n", "a\rb"])
@pytest.mark.parametrize("name", JOB_TEXTS)
def test_a_line_break_does_not_reach_sbatchs_script(slurm, capsys, name, text):
    assert cli.main([*RUN, f"--{name}={text}"]) == 2
    assert f"--{name} must be one line, got {text!r}" in capsys.readouterr().err
    assert not hasattr(slurm, "parameters")


@pytest.mark.parametrize("text", ["\udcff", "\udcff/%j"])
@pytest.mark.parametrize("name", JOB_TEXTS)
def test_text_that_the_script_cannot_contain_is_one_line(slurm, capsys, name, text):
    assert cli.main([*RUN, f"--{name}={text}"]) == 2
    error = capsys.readouterr().err
    assert f"--{name} " in error
    assert "cannot be written into the script of the job: it is not " in error
    assert error.count("\n") == 1
    assert not hasattr(slurm, "parameters")


@pytest.mark.parametrize("name", JOB_TEXTS)
def test_text_beyond_the_encoding_of_the_locale_is_one_line(slurm, monkeypatch, capsys, name):
    monkeypatch.setattr(submit.locale, "getpreferredencoding", lambda set_locale: "ascii")
    assert cli.main([*RUN, f"--{name}=é"]) == 2
    assert "it is not ascii; use other characters, or a UTF-8" in capsys.readouterr().err
    assert cli.main([*RUN, "--data_path=é"]) == 0  # pickled


def test_a_working_directory_that_the_script_cannot_contain_is_one_line(
    slurm, monkeypatch, capsys, tmp_path
):
    folder = tmp_path / "\udcff"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert cli.main(RUN) == 2
    assert "the path of --output_dir, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "output_dir", ["runs/%A_%a", "runs/50%t", "runs/lr%x", "%A/%j", "100%", "a\\b", "/%%/x"]
)
def test_a_folder_of_logs_that_slurm_would_replace_is_refused(slurm, capsys, output_dir):
    assert cli.main(["submit", "--output_dir", output_dir]) == 2
    assert "which Slurm replaces in the names of files" in capsys.readouterr().err
    assert not hasattr(slurm, "parameters")


@pytest.mark.parametrize("output_dir", ["runs/%j", "/tmp/%j/lr%x", "runs"])
def test_other_folders_may_contain_a_percent_sign(slurm, capsys, output_dir):
    assert cli.main(["submit", "--output_dir", output_dir]) == 0


@pytest.mark.parametrize(("output_dir", "status"), [("run", 2), ("%j", 2), ("/tmp/%j", 0)])
def test_the_working_directory_is_part_of_the_folder_of_the_logs(
    slurm, monkeypatch, tmp_path, output_dir, status
):
    (tmp_path / "50%j").mkdir()
    monkeypatch.chdir(tmp_path / "50%j")
    assert cli.main(["submit", "--output_dir", output_dir]) == status


ALWAYS = (
    "SIGNAL", "REQUEUE", "NO_REQUEUE", "TIMELIMIT", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK",
    "CPUS_PER_GPU", "MEM_PER_CPU", "MEM_PER_GPU", "MEM_PER_NODE", "OUTPUT", "ERROR", "OPEN_MODE",
    "GRES", "WAIT",
)  # fmt: skip


@pytest.mark.parametrize(
    ("names", "words", "ignored"),
    [
        (ALWAYS, "", True),
        (("PARTITION",), "--partition gpu", True),
        (("QOS",), "--qos low", True),
        (("ACCOUNT",), "--account lab", True),
        (("CONSTRAINT",), "--constraint a100", True),
        (("CONSTRAINT",), "--use_volta32", True),
        (("PARTITION", "QOS", "ACCOUNT", "CONSTRAINT", "RESERVATION"), "", False),
        (("PARTITION",), "--partition=", False),
        (("GPUS", "GPUS_PER_NODE", "GRES"), "--device cpu", False),
    ],
)
def test_variables_of_sbatch_do_not_override_the_flags(
    slurm, monkeypatch, capsys, names, words, ignored
):
    variables = {f"SBATCH_{name}": "value" for name in names}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*RUN, *words.split()]) == 0
    assert (set(variables) & set(slurm.environ)) == (set() if ignored else set(variables))
    assert variables.items() <= os.environ.items()  # afterwards
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == sorted(
        f"fastdino submit: {name}=value is ignored: use the flags of fastdino submit"
        for name in variables
        if ignored
    )


def test_a_job_array_is_refused(slurm, monkeypatch, capsys):
    monkeypatch.setenv("SBATCH_ARRAY_INX", "1-4")
    assert cli.main(RUN) == 2
    assert "SBATCH_ARRAY_INX=1-4 asks for one: unset it" in capsys.readouterr().err
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
    args = parsed(loop, *train_arguments(config))
    assert {name: getattr(args, name) for name in config.to_dict()} == config.to_dict()


@pytest.fixture
def job(monkeypatch):
    """Replace `fastdino train`; return its command lines, its status, and the signals' handlers."""
    seen = SimpleNamespace(lines=[], status=0, handlers=[])

    def train(words):
        seen.lines.append(words)
        seen.handlers += map(signal.getsignal, submit.HANDLED_SIGNALS)
        if isinstance(seen.status, Exception):
            raise seen.status
        return seen.status

    monkeypatch.setattr("fastdino.__main__.main", train)
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    former = {number: signal.getsignal(number) for number in submit.HANDLED_SIGNALS}
    yield seen
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("status", [0, 2, 75])
def test_a_task_ends_with_the_status_of_the_training(job, status):
    job.status = status
    with pytest.raises(SystemExit) as stop:
        TrainingJob(["--output_dir=runs/%j/x", "--data_path=/data/%j"])()
    assert stop.value.code == status
    assert job.lines == [["train", "--output_dir=runs/14/x", "--data_path=/data/%j"]]


def test_a_bug_is_a_traceback_and_status_1(job, capsys):
    job.status = RuntimeError("a bug")
    with pytest.raises(SystemExit) as stop:
        TrainingJob([])()
    assert stop.value.code == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_a_task_ends_in_spite_of_abandoned_threads(job, monkeypatch):
    """They may be in calls of C++ that block the interpreter's exit."""
    ended = []

    def leave(status):
        ended.append(status)
        raise SystemExit(status)

    monkeypatch.setattr("fastdino.__main__.exit_process", leave)
    job.status = 75
    with pytest.raises(SystemExit):
        TrainingJob([])()
    assert ended == [75]


@pytest.mark.parametrize("preempt", ["USR1", "USR2"])
def test_no_handler_of_submitit_is_left_in_a_task(job, monkeypatch, preempt):
    """It would requeue the job, and ignore the SIGTERM of scancel before the first step."""
    environment = submitit.core.job_environment.JobEnvironment
    monkeypatch.setattr(environment, "USR_SIG", preempt)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    submission = submitit.core.utils.DelayedSubmission(TrainingJob([]))
    submitit.JobEnvironment()._handle_signals(None, submission)
    assert signal.getsignal(getattr(signal, f"SIG{preempt}")) != signal.SIG_DFL
    with pytest.raises(SystemExit):
        submission.result()
    assert job.handlers == [signal.SIG_DFL] * len(submit.HANDLED_SIGNALS)


# The folders of two runs: their names are special in a shell.
@pytest.mark.parametrize("output_dir", ["runs/%j", "it's $HOME %j/a b", "-run"])
@pytest.mark.parametrize(
    ("flags", "status", "state", "requeued"),
    [
        ("", 75, "RUNNING", True),
        ("", 137, "RUNNING", True),
        ("", 2, "RUNNING", False),
        ("", 0, "RUNNING", False),
        ("", 75, "COMPLETING", False),
        ("--requeue false", 75, "RUNNING", False),
    ],
)
def test_the_script_requeues_the_job_after_srun(
    slurm, monkeypatch, tmp_path, output_dir, flags, status, state, requeued
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", f"--output_dir={output_dir}", *flags.split()]) == 0
    executor = AutoExecutor(tmp_path / "slurm", cluster="slurm")
    executor.update_parameters(**slurm.parameters)
    script = executor._executor._make_submission_file_text("command", "0")
    commands = FakeSlurm(tmp_path / "bin", monkeypatch, status=status, state=state)
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    run = tmp_path / output_dir.replace("%j", "14")
    run.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["bash", "-c", script], check=False)
    assert done.returncode == status
    assert commands.calls("scontrol") == ["scontrol requeue 14"] * requeued
    assert (run / requeue.RECORD).exists() == requeued
