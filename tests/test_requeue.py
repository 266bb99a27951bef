"""fastdino.requeue: which jobs are requeued, and the reason that is printed for the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from fastdino import requeue
from tests.documents import documented_script
from tests.fake_slurm import ERROR, FakeSlurm


@pytest.fixture(autouse=True)
def job(monkeypatch):
    monkeypatch.setattr(requeue, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a function that installs the commands of Slurm; its options are FakeSlurm's."""
    return lambda **options: FakeSlurm(tmp_path / "bin", monkeypatch, **options)


def end(status, run):
    assert requeue.main([str(status), str(run)]) == status


# 137: rank 0 was killed. 143, 138: SIGTERM or SIGUSR1 before the first step. 253: out of memory.
@pytest.mark.parametrize("status", [75, 137, 138, 139, 143, 253])
def test_a_job_whose_run_can_continue_is_requeued(fake, capsys, tmp_path, status):
    slurm = fake()
    end(status, tmp_path)
    assert slurm.calls("squeue") == ["squeue --noheader --jobs=14 --format=%T"] * 2
    assert slurm.calls("scontrol") == ["scontrol requeue 14"]
    line = capsys.readouterr().err
    assert line.startswith(f"fastdino: requeueing job 14: srun ended with status {status}: ")
    assert line.count("\n") == 1


@pytest.mark.parametrize("status", [1, 2, 126, 127, 128])
def test_a_job_whose_run_has_an_error_is_not_requeued(fake, capsys, tmp_path, status):
    slurm = fake()
    end(status, tmp_path / "run")
    assert slurm.calls("scontrol") == []
    expected = f"fastdino: the job is not requeued: srun ended with status {status}, an error"
    assert capsys.readouterr().err.startswith(expected)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_no_message(fake, capsys, tmp_path):
    slurm = fake()
    end(0, tmp_path)
    assert slurm.calls("squeue") == slurm.calls("scontrol") == []
    assert capsys.readouterr().err == ""


# scancel and scontrol requeue; a preemption by requeueing; a part of a heterogeneous job.
@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", "PREEMPTED", "RUNNING\nCOMPLETING"])
def test_a_job_that_slurm_ends_or_requeues_is_left_alone(fake, capsys, tmp_path, state):
    slurm = fake(state=state)
    end(75, tmp_path)
    assert slurm.calls("scontrol") == []
    states = ", ".join(sorted(state.split()))
    assert f"Slurm ends or requeues it (state {states})" in capsys.readouterr().err
    assert not (tmp_path / requeue.RECORD).exists()  # the start is not counted


def test_a_heterogeneous_job_is_requeued_if_all_parts_run(fake, tmp_path):
    slurm = fake(state="RUNNING\nRUNNING")
    end(75, tmp_path)
    assert slurm.calls("scontrol") == ["scontrol requeue 14"]


def test_a_job_that_squeue_does_not_list_is_not_requeued(fake, capsys, tmp_path):
    slurm = fake(state="")
    end(75, tmp_path)
    assert slurm.calls("scontrol") == []
    assert "squeue does not list job 14: Slurm has ended it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["SQUEUE_STATES", "SQUEUE_PARTITION", "SQUEUE_USERS", "SQUEUE_FORMAT", "SLURM_CLUSTERS"]
)
def test_variables_that_filter_jobs_do_not_reach_the_commands(fake, monkeypatch, tmp_path, name):
    slurm = fake()
    for command in ("squeue", "scontrol"):
        script = slurm.folder / command
        script.write_text(script.read_text().replace("\ncd", f'\n[ -z "${name}" ] || exit 0\ncd'))
    monkeypatch.setenv(name, "other")
    end(75, tmp_path)
    assert slurm.calls("scontrol") == ["scontrol requeue 14"]
    assert os.environ[name] == "other"


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_output_that_is_not_text_is_no_traceback(fake, capsys, tmp_path, command):
    slurm = fake()
    script = slurm.folder / command
    script.write_text(
        script.read_text().replace("\ncd", "\nprintf '\\377'; printf '\\377' >&2\ncd")
    )
    end(75, tmp_path)
    error = capsys.readouterr().err
    assert ("not requeued" in error) == (command == "squeue")


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_a_busy_controller_is_asked_again(fake, capsys, tmp_path, command):
    slurm = fake(busy={command: requeue.RETRIES})
    end(75, tmp_path)
    # The state is checked before the start is counted, and before each attempt.
    squeue = requeue.RETRIES + 2
    expected = {"squeue": (squeue, 1), "scontrol": (squeue, requeue.RETRIES + 1)}[command]
    assert (len(slurm.calls("squeue")), len(slurm.calls("scontrol"))) == expected
    assert slurm.calls("scontrol")[-1] == "scontrol requeue 14"
    assert "not requeued" not in capsys.readouterr().err
    assert requeue.count_start("14", tmp_path).empty == 2  # it was counted once


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_a_controller_that_does_not_answer_is_one_line(fake, capsys, tmp_path, command):
    slurm = fake(busy={command: 99})
    end(75, tmp_path)
    assert len(slurm.calls(command)) == requeue.RETRIES + 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"fastdino: the job is not requeued: {command} ")
    assert error.endswith(f" failed: {command}: error: {ERROR}")


@pytest.mark.parametrize(
    "error",
    [
        "Invalid job id specified for job 14",
        "slurm_load_jobs error: Invalid job id specified",
        "Requested operation is presently disabled for job 14",
        "Access/permission denied for job 14",
    ],
)
@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_an_error_that_would_occur_again_is_not_retried(fake, capsys, tmp_path, command, error):
    slurm = fake(busy={command: 99}, error=error)
    end(75, tmp_path)
    assert len(slurm.calls(command)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fastdino: the job is not requeued: {command} ")
    assert last.endswith(error)


def test_a_job_that_is_cancelled_while_its_start_is_counted_is_not_requeued(
    fake, capsys, monkeypatch, tmp_path
):
    slurm, count = fake(), requeue.count_start

    def count_and_cancel(*args):
        slurm.set("state", "COMPLETING")
        return count(*args)

    monkeypatch.setattr(requeue, "count_start", count_and_cancel)
    end(75, tmp_path)
    assert slurm.calls("scontrol") == []
    assert "(state COMPLETING)" in capsys.readouterr().err


def test_a_job_that_is_cancelled_while_scontrol_fails_is_not_requeued(fake, capsys, tmp_path):
    slurm = fake(busy={"scontrol": 99})
    script = slurm.folder / "scontrol"
    script.write_text(script.read_text().replace("exit 1", "echo COMPLETING > state; exit 1"))
    end(75, tmp_path)
    assert len(slurm.calls("scontrol")) == 1
    assert "(state COMPLETING)" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_a_node_without_the_command_is_one_line(fake, capsys, monkeypatch, tmp_path, command):
    slurm = fake()
    monkeypatch.setattr(requeue.time, "sleep", lambda seconds: pytest.fail("retried"))
    (slurm.folder / command).unlink()
    (slurm.folder / "cat").symlink_to(shutil.which("cat"))
    monkeypatch.setenv("PATH", str(slurm.folder))
    end(75, tmp_path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"not requeued: {command} cannot be run on this node (No such file" in error


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({}, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12"}, "SLURM_ARRAY_TASK_ID"),
        ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": ""}, "SLURM_ARRAY_TASK_ID"),
    ],
)
def test_without_the_variables_of_a_job_one_line_says_so(
    fake, capsys, monkeypatch, tmp_path, variables, missing
):
    slurm = fake()
    monkeypatch.delenv("SLURM_JOB_ID")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    end(75, tmp_path)
    assert slurm.calls("scontrol") == []
    error = capsys.readouterr().err
    assert f"not requeued: {missing} is not set: run this command in the batch script" in error
    assert error.count("\n") == 1


def test_a_task_of_a_job_array_requeues_itself_only(fake, monkeypatch, tmp_path):
    slurm = fake()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    end(75, tmp_path)
    assert slurm.calls("squeue") == ["squeue --noheader --jobs=12_3 --format=%T"] * 2
    assert slurm.calls("scontrol") == ["scontrol requeue 12_3"]


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint/000002"])
@pytest.mark.parametrize("status", [75, 137, 138])
def test_a_run_that_is_lost_again_and_again_without_a_checkpoint_is_not_requeued(
    fake, capsys, tmp_path, name, status
):
    slurm, run = fake(), tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    for saved in (False, False, True, False, False, False):
        if saved:
            (run / name).write_text("new")
        end(status, run)
    assert len(slurm.calls("scontrol")) == 5
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"3 starts in a row ended without a new checkpoint in {run}" in last


@pytest.mark.parametrize(("found", "requeued"), [(False, 2), (True, 3)])
def test_a_checkpoint_that_a_job_finds_counts_as_progress_once(fake, tmp_path, found, requeued):
    """Before the first start is counted, its checkpoints cannot be told from earlier ones."""
    slurm = fake()
    if found:
        (tmp_path / "checkpoint.pth").write_text("of another job")
    for _ in range(4):
        end(137, tmp_path)
    assert len(slurm.calls("scontrol")) == requeued


@pytest.mark.parametrize(("restarts", "requeued"), [("", 1), ("0", 1), ("1", 1), ("2", 0)])
def test_a_folder_that_does_not_exist_is_not_created(
    fake, capsys, monkeypatch, tmp_path, restarts, requeued
):
    slurm = fake()
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    end(75, tmp_path / "rnu")
    assert not (tmp_path / "rnu").exists()
    assert len(slurm.calls("scontrol")) == requeued
    error = capsys.readouterr().err
    if requeued:
        assert f"there is no folder {tmp_path / 'rnu'} to count the starts in" in error
    else:
        assert f"3 starts ended without the folder {tmp_path / 'rnu'}: use the --outp" in error


def test_an_incomplete_folder_of_shards_is_no_checkpoint(fake, tmp_path):
    slurm, run = fake(), tmp_path / "run"
    for number in range(4):
        (run / f"checkpoint/00000{number}.part").mkdir(parents=True)
        end(75, run)
    assert len(slurm.calls("scontrol")) == 2


def test_a_run_that_does_not_finish_an_epoch_in_30_starts_is_not_requeued(fake, capsys, tmp_path):
    slurm = fake()
    for start in range(34):
        (tmp_path / "checkpoint.pth").touch()
        os.utime(tmp_path / "checkpoint.pth", ns=(start, start))
        if start == 2:
            (tmp_path / "log.txt").write_text("{}\n")
        end(75, tmp_path)
    assert len(slurm.calls("scontrol")) == 32
    assert "30 starts in a row did not finish an epoch" in capsys.readouterr().err


def test_another_job_in_the_same_folder_counts_anew(fake, monkeypatch, tmp_path):
    slurm = fake()
    for _ in range(3):
        end(75, tmp_path)
    assert len(slurm.calls("scontrol")) == 2
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    end(75, tmp_path)
    assert slurm.calls("scontrol")[2:] == ["scontrol requeue 15"]


RECORD = {"job": "14", "checkpoints": [], "epochs": 0, "empty": 1, "in_epoch": 1}


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"job": "14"}', "\udcff", "[" * 100000, '"text"', "null",
        *(
            json.dumps(RECORD | change)
            for change in (
                {"epochs": "x"}, {"epochs": None}, {"empty": None}, {"empty": 1.5},
                {"empty": True}, {"empty": -9}, {"in_epoch": []}, {"checkpoints": 1}, {"more": 1},
            )
        ),
    ],
)  # fmt: skip
def test_an_invalid_record_starts_anew(fake, tmp_path, content):
    slurm = fake()
    (tmp_path / requeue.RECORD).write_bytes(content.encode(errors="surrogateescape"))
    end(75, tmp_path)
    assert len(slurm.calls("scontrol")) == 1
    assert json.loads((tmp_path / requeue.RECORD).read_bytes()) == RECORD


def test_a_valid_record_is_continued(fake, tmp_path):
    fake()
    (tmp_path / requeue.RECORD).write_text(json.dumps(RECORD))
    end(75, tmp_path)
    record = json.loads((tmp_path / requeue.RECORD).read_bytes())
    assert record == RECORD | {"empty": 2, "in_epoch": 2}


def test_without_a_place_for_the_count_one_line_says_so(fake, capsys, tmp_path):
    slurm = fake()
    (tmp_path / "run").write_text("a file")
    end(75, tmp_path / "run")
    assert slurm.calls("scontrol") == []
    assert "the job is not requeued: " in (error := capsys.readouterr().err)
    assert requeue.RECORD in error


@pytest.mark.parametrize("options", ["", "set -e\n", "set -euo pipefail\n"])
@pytest.mark.parametrize(("status", "requeued"), [(0, 0), (2, 0), (75, 1), (137, 1)])
def test_the_documented_script_requeues_and_keeps_the_status(
    fake, tmp_path, status, requeued, options
):
    slurm = fake(status=status)
    python = slurm.folder / "python"  # a link would not have the packages of the environment
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "run").mkdir()
    script = options + documented_script().replace("runs/b16", "run")
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert len(slurm.calls("srun")) == 1
    assert slurm.calls("scontrol") == ["scontrol requeue 14"] * requeued
    assert (tmp_path / "run" / requeue.RECORD).exists() == bool(requeued)
