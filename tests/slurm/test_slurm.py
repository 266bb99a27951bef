"""Runs on a real Slurm: started by srun and by `fastdino submit`, preempted, requeued, cancelled.

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


def start_uninterrupted(pictures, run):
    """Start a run of one task on each of two nodes with srun."""
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-u", "-m", "fastdino"]
    command += ["train", *TRAIN, f"--data_path={pictures}", f"--output_dir={run}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def submit(pictures, folder):
    """Submit a run of one task on each of two nodes; return the job and its output folder."""
    command = [sys.executable, "-m", "fastdino", "submit", "--nodes=2", "--ngpus=1"]
    command += ["--timeout=10", "--signal_delay_s=90", "--mem_gb=0", "--cpus_per_task=1", *TRAIN]
    command += [f"--data_path={pictures}", f"--output_dir={folder}/%j"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    job = re.search(r"submitted job (\d+)", done.stdout)[1]
    return job, folder / job


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
    tasks = processes_with(f"SLURM_JOB_ID={job}", "SLURM_STEP_ID=0")
    for task in tasks:
        os.kill(task, signal.SIGSTOP)


def logs_of(folder):
    return "\n".join(path.read_text() for path in sorted((folder / "slurm").glob("*_log.*")))


def test_a_run_preempted_twice_ends_with_the_bits_of_an_uninterrupted_one(
    cluster, pictures, tmp_path
):
    uninterrupted = start_uninterrupted(pictures, tmp_path / "srun")
    job, run = submit(pictures, tmp_path)
    freeze_in_epoch(1, job, run)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for(lambda: "resumed" in logs_of(tmp_path), "resumed run after scontrol requeue", 300)
    freeze_in_epoch(3, job, run)
    # One to two minutes from now. Slurm sends the warning of 90 s up to 30 s early: at once.
    *_, minutes, _ = ["0", *field_of(job, "%M").split(":")]
    set_limit(job, int(minutes) + 2)
    wait_for(lambda: "Requeued job" in logs_of(tmp_path), "requeued job", 300)
    wait_for(lambda: field_of(job, "%T") == "PENDING", "pending job", 300)
    set_limit(job, 10)
    wait_for(lambda: logs_of(tmp_path).count("resumed") == 2, "resumed run after the limit", 300)
    wait_for(lambda: field_of(job, "%T") == "COMPLETED", "end of the job", 300)
    logs = logs_of(tmp_path)
    assert re.findall(r"stopped by (SIG\w+) and saved", logs) == ["SIGTERM", "SIGUSR1"]
    printed, _ = uninterrupted.communicate(timeout=300)
    assert uninterrupted.returncode == 0, printed
    assert "2 process(es)" in printed
    assert_same_run(run, tmp_path / "srun")


def test_a_cancelled_run_is_saved_and_not_requeued(cluster, pictures, tmp_path):
    job, run = submit(pictures, tmp_path)
    freeze_in_epoch(1, job, run)
    subprocess.run(["scancel", job], check=True)
    wait_for(lambda: field_of(job, "%T") == "CANCELLED", "end of the job", 300)
    assert "stopped by SIGTERM and saved" in logs_of(tmp_path)
    assert "Requeued" not in logs_of(tmp_path)
    assert (run / "checkpoint.pth").exists()
