"""fastdino.requeue: which jobs are requeued, and the reason that is printed for the others."""

from __future__ import annotations

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
    monkeypatch.setattr(requeue, "SECONDS", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
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
    end(status, tmp_path / "run")
    assert slurm.calls("squeue") == ["squeue --noheader --jobs=14 --format=%T"]
    assert slurm.calls("scontrol") == ["scontrol requeue 14"]
    line = capsys.readouterr().err
    assert line.startswith(f"fastdino: job 14 is requeued: srun ended with status {status}: ")
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


# scancel and scontrol requeue; a preemption by requeueing; a purged job.
@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", "PREEMPTED", ""])
def test_a_job_that_slurm_ends_or_requeues_is_left_alone(fake, capsys, tmp_path, state):
    slurm = fake(state=state)
    end(75, tmp_path / "run")
    assert slurm.calls("scontrol") == []
    assert f"Slurm ends or requeues it (state {state or 'unknown'})" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # the start is not counted


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_a_busy_controller_is_asked_again(fake, capsys, tmp_path, command):
    slurm = fake(busy={command: requeue.ATTEMPTS - 1})
    end(75, tmp_path)
    assert len(slurm.calls(command)) == requeue.ATTEMPTS
    assert slurm.calls("scontrol")[-1] == "scontrol requeue 14"
    assert "not requeued" not in capsys.readouterr().err
    assert requeue.count_start("14", tmp_path).empty == 2  # it was counted once


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_a_controller_that_does_not_answer_is_one_line(fake, capsys, tmp_path, command):
    slurm = fake(busy={command: 99})
    end(75, tmp_path)
    assert len(slurm.calls(command)) == requeue.ATTEMPTS
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"fastdino: the job is not requeued: {command} ")
    assert error.endswith(f" failed: {command}: error: {ERROR}")


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
    (slurm.folder / command).unlink()
    (slurm.folder / "cat").symlink_to(shutil.which("cat"))
    monkeypatch.setenv("PATH", str(slurm.folder))
    end(75, tmp_path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"not requeued: {command} cannot be run on this node (No such file" in error


def test_outside_a_job_one_line_says_so(fake, capsys, monkeypatch, tmp_path):
    fake()
    monkeypatch.delenv("SLURM_JOB_ID")
    end(75, tmp_path)
    assert "SLURM_JOB_ID is not set" in capsys.readouterr().err


def test_a_task_of_a_job_array_requeues_itself_only(fake, monkeypatch, tmp_path):
    slurm = fake()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    end(75, tmp_path)
    assert slurm.calls("squeue") == ["squeue --noheader --jobs=12_3 --format=%T"]
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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": "14"}', "\udcff"])
def test_an_unreadable_count_starts_anew(fake, tmp_path, content):
    slurm = fake()
    (tmp_path / requeue.RECORD).write_bytes(content.encode(errors="surrogateescape"))
    end(75, tmp_path)
    assert len(slurm.calls("scontrol")) == 1


def test_without_a_place_for_the_count_one_line_says_so(fake, capsys, tmp_path):
    slurm = fake()
    (tmp_path / "run").write_text("a file")
    end(75, tmp_path / "run")
    assert slurm.calls("scontrol") == []
    assert "the job is not requeued: " in (error := capsys.readouterr().err)
    assert requeue.RECORD in error


@pytest.mark.parametrize(("status", "requeued"), [(0, 0), (2, 0), (75, 1), (137, 1)])
def test_the_documented_script_requeues_and_keeps_the_status(fake, tmp_path, status, requeued):
    slurm = fake(status=status)
    (slurm.folder / "python").symlink_to(sys.executable)
    script = documented_script().replace("runs/b16", "run")
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert len(slurm.calls("srun")) == 1
    assert slurm.calls("scontrol") == ["scontrol requeue 14"] * requeued
    assert (tmp_path / "run" / requeue.RECORD).exists() == bool(requeued)
