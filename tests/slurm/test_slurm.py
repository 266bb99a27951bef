"""Runs on a real Slurm: started by srun, by `fastdino submit` and by the batch script of the docs,
preempted, requeued, cancelled, and with a lost rank.

`make test-slurm` installs Slurm and runs these tests.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import documented_script
from tests.runs import assert_same_run
from tests.slurm.cluster import output_of, problem, processes_with, running_cluster, wait_for

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
TRAIN = [
    "--arch=vit_nano", "--patch_size=8", "--out_dim=64", "--global_crops_size=32",
    "--local_crops_size=16", "--local_crops_number=2", "--batch_size_per_gpu=2", "--epochs=6",
    "--warmup_epochs=1", "--lr=0.05", "--device=cpu", "--crops=torchvision", "--num_workers=0",
    "--saveckp_freq=0", "--logger=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    if reason := problem():
        pytest.skip(reason)
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch, running_cluster():
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def uninterrupted(cluster, pictures, tmp_path_factory):
    """Return the output folder of a run of one task on each of two nodes, started with srun."""
    run = tmp_path_factory.mktemp("srun")
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-u", "-m", "fastdino"]
    command += ["train", *TRAIN, f"--data_path={pictures}", f"--output_dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    return run


def submit(pictures, folder, *flags):
    """Submit a run of one task on each of two nodes; return the job and its output folder."""
    command = [sys.executable, "-m", "fastdino", "submit", "--nodes=2", "--ngpus=1"]
    command += ["--timeout=10", "--signal_delay_s=90", "--mem_gb=0", "--cpus_per_task=1", *TRAIN]
    command += [f"--data_path={pictures}", f"--output_dir={folder}/%j", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    job = re.search(r"submitted job (\d+)", done.stdout)[1]
    return job, folder / job


def submit_documented_script(pictures, run):
    """Submit the batch script of docs/clusters.md with the flags of these tests; return the job.

    With `set -e`, and with variables that filter squeue's output, which sbatch exports.
    """
    script = documented_script()
    for was, became in (
        ("status=0\n", "set -e\nstatus=0\n"),
        ("--ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=10", "--ntasks-per-node=1"),
        ("srun --cpus-per-task=10", "srun"),
        ("python -u", f"{sys.executable} -u"),
        ("--arch vit_base --data_path ...", f"{' '.join(TRAIN)} --data_path {pictures}"),
        ("--output_dir runs/b16", f"--output_dir {run}"),
        (
            "python -m fastdino.requeue $status runs/b16",
            f"{sys.executable} -m fastdino.requeue $status {run}",
        ),
    ):
        assert script.count(was) == 1
        script = script.replace(was, became)
    command = ["sbatch", "--parsable", f"--output={run.parent}/slurm/%j_log.out"]
    (run.parent / "slurm").mkdir()
    environ = os.environ | {"SQUEUE_STATES": "PENDING", "SQUEUE_USERS": "nobody"}
    return subprocess.run(
        command, input=script, capture_output=True, text=True, check=True, env=environ
    ).stdout.strip()


def field_of(job, field):
    return output_of("squeue", "--noheader", "--states=all", f"--jobs={job}", f"--format={field}")


def set_limit(job, minutes):
    subprocess.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"], check=True)


def freeze_in_epoch(epoch, job, run):
    """Stop the processes of both ranks after that many epochs.

    Slurm's signals come with SIGCONT: the run continues when it is preempted, and no earlier.
    """
    log = run / "log.txt"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= epoch, f"epoch {epoch}", 300)
    for task in tasks_of(job):
        os.kill(task, signal.SIGSTOP)


def tasks_of(job, *more):
    return processes_with(f"SLURM_JOB_ID={job}", "SLURM_STEP_ID=0", *more)


def wait_for_end(job, state):
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    wait_for(lambda: field_of(job, "%T") in ended, "end of the job", 300)
    assert field_of(job, "%T") == state


def logs_of(folder):
    return "\n".join(path.read_text() for path in sorted((folder / "slurm").glob("*_log.*")))


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ("kill -9 $$", "exit 75", 137), ("kill -9 $$", "exit 2", 137), ("kill -9 $$", "", 137),
        ("exit 75", "exit 2", 75), ("exit 75", "exit 1", 75),
    ],
)  # fmt: skip
def test_sruns_status_is_the_highest_of_its_tasks(cluster, first, second, status):
    script = f'if [ "$SLURM_PROCID" = 0 ]; then {first}; else sleep 0.5; {second or "true"}; fi'
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "bash", "-c"]
    done = subprocess.run([*command, script], capture_output=True, timeout=60, check=False)
    assert done.returncode == status


def test_a_run_preempted_twice_ends_with_the_bits_of_an_uninterrupted_one(
    uninterrupted, pictures, tmp_path
):
    job, run = submit(pictures, tmp_path)
    freeze_in_epoch(1, job, run)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for(lambda: "resumed" in logs_of(tmp_path), "resumed run after scontrol requeue", 300)
    assert "requeueing job" not in logs_of(tmp_path)  # by Slurm only
    freeze_in_epoch(3, job, run)
    # One to two minutes from now. Slurm sends the warning of 90 s up to 30 s early: at once.
    *_, minutes, _ = ["0", *field_of(job, "%M").split(":")]
    set_limit(job, int(minutes) + 2)
    wait_for(lambda: f"requeueing job {job}" in logs_of(tmp_path), "requeued job", 300)
    wait_for(lambda: field_of(job, "%T") == "PENDING", "pending job", 300)
    set_limit(job, 10)
    wait_for(lambda: logs_of(tmp_path).count("resumed") == 2, "resumed run after the limit", 300)
    wait_for_end(job, "COMPLETED")
    logs = logs_of(tmp_path)
    assert re.findall(r"stopped by (SIG\w+) and saved", logs) == ["SIGTERM", "SIGUSR1"]
    assert logs.count("requeueing job") == 1
    assert_same_run(run, uninterrupted)


def continue_tasks(job, *more):
    for task in tasks_of(job, *more):
        os.kill(task, signal.SIGCONT)


def test_after_the_loss_of_rank_0_the_job_is_requeued_and_ends(uninterrupted, pictures, tmp_path):
    """Two jobs at once: rank 0 of the first is stopped and killed by srun, that of the other lost.

    srun waits for the first one for --dist_timeout_minutes and 60 s.
    """
    stopped, stopped_run = submit(pictures, tmp_path / "stopped", "--dist_timeout_minutes=0.1")
    freeze_in_epoch(2, stopped, stopped_run)
    continue_tasks(stopped, "SLURM_PROCID=1")
    killed, killed_run = submit(pictures, tmp_path / "killed")
    freeze_in_epoch(2, killed, killed_run)
    (rank_0,) = tasks_of(killed, "SLURM_PROCID=0")
    os.kill(rank_0, signal.SIGKILL)
    continue_tasks(killed)
    for job, run in ((killed, killed_run), (stopped, stopped_run)):
        wait_for_end(job, "COMPLETED")
        logs = logs_of(run.parent)
        assert f"requeueing job {job}: srun ended with status " in logs
        assert logs.count("requeueing job") == logs.count("resumed") == 1
    assert_same_run(killed_run, uninterrupted)


def test_after_an_error_of_the_training_the_job_is_not_requeued(cluster, tmp_path):
    job, _ = submit("/nowhere", tmp_path)
    wait_for_end(job, "FAILED")
    logs = logs_of(tmp_path)
    assert "there is no file or folder /nowhere" in logs
    assert "the job is not requeued: srun ended with status 2, an error" in logs


def test_a_cancelled_run_is_saved_and_not_requeued(cluster, pictures, tmp_path):
    job, run = submit(pictures, tmp_path)
    freeze_in_epoch(1, job, run)
    subprocess.run(["scancel", job], check=True)
    wait_for_end(job, "CANCELLED")
    assert "stopped by SIGTERM and saved" in logs_of(tmp_path)
    assert "requeueing job" not in logs_of(tmp_path)
    assert (run / "checkpoint.pth").exists()


def test_the_documented_script_resumes_after_a_signal(uninterrupted, pictures, tmp_path):
    run = tmp_path / "run"
    job = submit_documented_script(pictures, run)
    freeze_in_epoch(2, job, run)
    continue_tasks(job)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)  # to the tasks, as the warning
    wait_for_end(job, "COMPLETED")
    logs = logs_of(tmp_path)
    assert re.findall(r"stopped by (SIG\w+) and saved", logs) == ["SIGUSR1"]
    assert f"requeueing job {job}: srun ended with status 75" in logs
    assert_same_run(run, uninterrupted)
