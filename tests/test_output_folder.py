"""The output folder of a run: lock, leftovers of killed runs, deletion during the run."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys

import pytest

from fastdino.errors import CheckpointError
from fastdino.training import output_folder
from fastdino.training.output_folder import OutputFolder
from tests.processes import locked_elsewhere

OURS = (
    "checkpoint.pth.part", "checkpoint0000.pth.part", "checkpoint12345.pth.part", "log.txt.part",
    "config.json.part", "images.npz.part",
)  # fmt: skip
OTHERS = (
    "checkpoint.pth", "checkpoint1.pth.part", "my_checkpoint.pth.part", "notes.part", "part",
    "checkpoint.pth.partial", "log.txt",
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A folder with temporary files of a killed run, and other files."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (*OURS, *OTHERS):
        (folder / name).write_text(name)
    return folder


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(run, tmp_path):
    other = tmp_path / "other.pth"
    for path in (other, other.with_name("other.pth.part"), tmp_path / "linked"):
        path.write_text("content")
    (run / "checkpoint0007.pth").symlink_to(other)  # its temporary file is next to its target
    (run / "checkpoint0008.pth.part").symlink_to(tmp_path / "linked")
    (run / "checkpoint0009.pth.part").mkdir()
    with OutputFolder(run):
        kept = {*OTHERS, "checkpoint0007.pth", "checkpoint0008.pth.part", "checkpoint0009.pth.part"}
        assert set(os.listdir(run)) == kept | {".lock"}
    assert set(os.listdir(tmp_path)) == {"run", "other.pth", "linked"}


def test_leftovers_are_kept_while_another_run_may_write_them(run, monkeypatch):
    with (
        locked_elsewhere(run / ".lock"),
        pytest.raises(CheckpointError, match="another run is writing there"),
        OutputFolder(run),
    ):
        pass
    assert set(OURS) <= set(os.listdir(run))

    def no_locks(*_args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with OutputFolder(run):
        assert set(OURS) <= set(os.listdir(run))


@pytest.fixture
def requeued(monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(output_folder, "LOCK_POLL_SECONDS", 0.01)


def test_a_requeued_run_waits_for_the_lock_of_its_last_start(requeued, run, capsys):
    with locked_elsewhere(run / ".lock", 0.5), OutputFolder(run):
        assert is_locked(run / ".lock")
    assert capsys.readouterr().err == (
        f"waiting up to 300 s for the lock of {run}, which the last start of this job may have "
        "left\n"
    )


def test_a_requeued_run_does_not_wait_for_another_run_without_a_limit(requeued, run, monkeypatch):
    monkeypatch.setattr(output_folder, "STALE_LOCK_SECONDS", 0.05)
    descriptors = len(os.listdir("/proc/self/fd"))
    with (
        locked_elsewhere(run / ".lock"),
        pytest.raises(CheckpointError, match="another run is writing there"),
        OutputFolder(run),
    ):
        pass
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("count", [None, "0"])
def test_a_run_that_is_not_requeued_does_not_wait_for_the_lock(run, monkeypatch, capsys, count):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if count:
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    with (
        locked_elsewhere(run / ".lock"),
        pytest.raises(CheckpointError, match="another run is writing there"),
        OutputFolder(run),
    ):
        pass
    assert capsys.readouterr().err == ""


def lose_folder(run):
    shutil.rmtree(run)


def replace_folder(run):
    shutil.rmtree(run)
    run.mkdir()


def lose_lock(run):
    (run / ".lock").unlink()


@pytest.mark.parametrize(
    ("fault", "is_new"), [(lose_folder, True), (replace_folder, True), (lose_lock, False)]
)
def test_deleted_folder_is_created_and_locked_again(tmp_path, fault, is_new):
    path = tmp_path / "run"
    with OutputFolder(path) as folder:
        assert folder.restore() is False
        fault(path)
        assert folder.restore() is is_new
        assert folder.restore() is False
        assert is_locked(path / ".lock")
    assert not is_locked(path / ".lock")


def test_folder_that_another_run_uses_or_without_a_parent_is_not_restored(tmp_path):
    path = tmp_path / "disk" / "run"
    with OutputFolder(path) as folder:
        replace_folder(path)
        with (
            locked_elsewhere(path / ".lock"),
            pytest.raises(CheckpointError, match="another run is writing there"),
        ):
            folder.restore()
        shutil.rmtree(path)
        path.write_text("a file")
        with pytest.raises(CheckpointError, match=r"run cannot be written \(.*Not a directory"):
            folder.restore()
        (tmp_path / "nowhere").symlink_to("missing")
        for other in (path, tmp_path / "nowhere"):
            message = f"{other} cannot be written .it is not a folder.: use another"
            with pytest.raises(CheckpointError, match=message), OutputFolder(other):
                pass
        (tmp_path / "nowhere").unlink()
        shutil.rmtree(path.parent)
        with pytest.raises(CheckpointError, match=r"run cannot be written \(.*No such file"):
            folder.restore()
    assert os.listdir(tmp_path) == []


def is_locked(path):
    """Return True if another process cannot lock the file."""
    code = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code, str(path)], capture_output=True)
    return b"BlockingIOError" in done.stderr
