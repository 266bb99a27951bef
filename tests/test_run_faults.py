"""Runs whose output folder, log, saves or streams fail."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import sys
import time
from types import SimpleNamespace

import pytest

from fastdino import checkpoint
from fastdino.errors import CheckpointError
from fastdino.training import resume
from fastdino.training.loop import train
from tests.processes import locked_elsewhere
from tests.runs import STEPS, before_step, interrupt, losses_of, weights_of

pytestmark = pytest.mark.usefixtures("small_networks")


def delete(run):
    shutil.rmtree(run)


def replace(run):
    run.rename(run.with_name("moved"))
    run.mkdir()


def delete_events(run):
    shutil.rmtree(run / "tensorboard")


def replace_log(run):
    (run / "log.txt").unlink()
    (run / "log.txt").mkdir()


@pytest.mark.parametrize(
    ("fault", "warning", "lines"),
    [
        (delete, "was deleted or replaced during the run", 2),
        (replace, "was deleted or replaced during the run", 2),
        (delete_events, "TensorBoard events cannot be written", 3),
        (replace_log, "cannot write .*log.txt .*the run continues", None),
    ],
)
def test_run_continues_if_its_output_vanishes(
    config, tmp_path, capsys, fault, warning, lines, monkeypatch
):
    run = tmp_path / "run"
    before_step(monkeypatch, STEPS + 1, lambda: fault(run))
    assert train(config(saveckp_freq=1)) == "finished"
    assert len(re.findall(warning, capsys.readouterr().err)) == (2 if fault is replace_log else 1)
    assert weights_of(run)["iteration"] == 3 * STEPS
    expected = {"checkpoint.pth", "checkpoint0001.pth", "checkpoint0002.pth", "config.json",
                ".lock", "log.txt"}  # fmt: skip
    assert expected <= set(os.listdir(run))
    if lines is None:
        unwritten = weights_of(run)["progress"]["unwritten"]
        assert [json.loads(line)["epoch"] for line in unwritten] == [1, 2]
    else:
        assert len(losses_of(run)) == lines


@pytest.mark.parametrize(
    ("number", "failures"),
    [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EDQUOT, 1000), (errno.EROFS, 1)],
)
def test_failed_saves_are_repeated_or_end_in_one_line(
    config, tmp_path, monkeypatch, capsys, number, failures
):
    left = [failures]
    sync = os.fsync

    def failing(descriptor):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    slept = []
    # Not time.sleep itself, which threads of other libraries call too.
    monkeypatch.setattr(
        resume, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic)
    )
    before_step(monkeypatch, STEPS + 1, lambda: monkeypatch.setattr(os, "fsync", failing))
    run = config(epochs=2, saveckp_in_background=False)
    if failures == 1 and number != errno.EROFS:
        assert train(run) == "finished"
        message = capsys.readouterr().err
        assert weights_of(tmp_path / "run")["iteration"] == 2 * STEPS
        assert slept == [1.0]
        assert "the next try is in 1 s" in message
    else:
        with pytest.raises(CheckpointError) as error:
            train(run)
        message = str(error.value)
        assert weights_of(tmp_path / "run")["iteration"] == STEPS
        assert slept == ([] if number == errno.EROFS else list(resume.SECONDS_UNTIL_RETRY))
    assert f"checkpoint.pth ({os.strerror(number)})" in message
    assert "the previous checkpoint.pth is intact" in message
    assert not list((tmp_path / "run").glob("*.part"))


def test_run_ends_in_one_line_if_its_folder_becomes_a_file_or_another_run_uses_it(
    config, tmp_path, monkeypatch
):
    run = tmp_path / "run"

    def become_file():
        shutil.rmtree(run)
        run.write_text("a file")

    before_step(monkeypatch, STEPS + 1, become_file)
    with pytest.raises(CheckpointError, match=r"run cannot be written \(.*Not a directory"):
        train(config())
    run.unlink()
    with contextlib.ExitStack() as stack:

        def start_another():
            shutil.rmtree(run)
            run.mkdir()
            stack.enter_context(locked_elsewhere(run / ".lock"))

        before_step(monkeypatch, STEPS + 1, start_another)
        with pytest.raises(CheckpointError, match="another run is writing there"):
            train(config(saveckp_in_background=False))
        assert os.listdir(run) == [".lock"]


def test_links_to_the_folder_and_the_checkpoint_stay(config, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run").symlink_to(disk)
    (disk / "checkpoint.pth").symlink_to("weights.pth")  # the target does not exist yet
    (disk / "checkpoint.pth.part").write_text("of a killed run")
    (disk / "weights.pth.part").write_text("of a killed run")
    interrupt(monkeypatch, STEPS + 1)
    assert train(config(epochs=2)) == "interrupted"
    assert train(config(epochs=2)) == "finished"
    assert (tmp_path / "run").is_symlink()
    assert os.readlink(disk / "checkpoint.pth") == "weights.pth"
    assert checkpoint.load(disk / "weights.pth")["iteration"] == 2 * STEPS
    assert not [*disk.glob("weights.pth.part"), *disk.glob("log.txt.part")]


@pytest.mark.parametrize(
    ("stream", "gone"), [("stdout", True), ("stdout", False), ("stderr", True)]
)
def test_run_continues_if_its_output_stream_is_closed(config, tmp_path, monkeypatch, stream, gone):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # of a terminal

    def close():
        monkeypatch.setattr(sys, stream, Gone() if gone else None)

    before_step(monkeypatch, 1, close)
    assert train(config(epochs=2, on_nonfinite="rollback")) == "finished"
    assert len(losses_of(tmp_path / "run")) == 2


def test_output_folder_in_use_is_rejected_and_an_old_log_is_renamed(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.txt").write_text("another log")
    with (
        locked_elsewhere(run / ".lock"),
        pytest.raises(CheckpointError, match="another run is writing there"),
    ):
        train(config())
    assert train(config(epochs=1)) == "finished"
    assert (run / "log.old.txt").read_text() == "another log"
    assert len(losses_of(run)) == 1
