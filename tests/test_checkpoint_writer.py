"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import json
import os
import signal
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdino import TrainConfig, Trainer, checkpoint, files
from fastdino.errors import CheckpointError
from fastdino.training import host_copy, resume, shard_files
from fastdino.training.checkpoint_writer import CheckpointWriter
from fastdino.training.loop import train
from tests.processes import run_two
from tests.runs import (
    STEPS,
    assert_same_run,
    before_step,
    differences,
    fail,
    interrupt,
    losses_of,
    weights_of,
)
from tests.small_networks import shrink_networks

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture
def gate(monkeypatch):
    """Writes wait until it is set; it is set at first."""
    opened, write = threading.Event(), checkpoint.write

    def gated(*args, **options):
        assert opened.wait(60)
        write(*args, **options)

    opened.set()
    monkeypatch.setattr(checkpoint, "write", gated)
    return opened


@pytest.fixture
def writer():
    """A writer, and the list of its warnings."""
    warnings = []
    made = CheckpointWriter(warnings.append)
    made.warnings = warnings
    return made


def save(writer, state, path):
    writer.start(state, *(lambda copied: checkpoint.write(copied, path) for _ in range(2)))


def end(writer):
    if not writer.finish():
        writer.repeat()


def state_of(value, **more):
    return {"student": {"w": torch.full((3,), float(value))}, "left_out": [value], **more}


def test_later_changes_do_not_reach_the_file(tmp_path, gate, writer):
    path, state = tmp_path / "checkpoint.pth", state_of(1)
    gate.clear()
    save(writer, state, path)
    state["student"]["w"].fill_(2)
    state["left_out"].append(5)
    assert not path.exists()
    gate.set()
    end(writer)
    loaded = checkpoint.load(path)
    assert loaded["student"]["w"].tolist() == [1.0] * 3
    assert loaded["left_out"] == [1]


def test_buffers_are_used_again_and_follow_the_state(tmp_path, writer):
    path = tmp_path / "checkpoint.pth"
    seen = []
    for value in (1, 2):
        save(writer, state_of(value), path)
        end(writer)
        seen.append({b.data_ptr() for b in writer._host._buffers.values()})
    assert seen[0] == seen[1]
    moments = {"state": {0: {"mu": torch.ones(1, 4).expand(2, 4), "step": torch.tensor(3.0)}}}
    save(writer, {"student": {"w": torch.ones(5)}, "optimizer": moments, "pair": (1, "a")}, path)
    end(writer)
    loaded = checkpoint.load(path)
    assert loaded["student"]["w"].shape == (5,)
    assert loaded["optimizer"]["state"][0]["mu"].is_contiguous()
    assert loaded["optimizer"]["state"][0]["step"] == 3
    assert loaded["pair"] == (1, "a")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("passing", [True, False])
def test_failed_write_keeps_the_old_file_and_is_repeated_once(
    tmp_path, monkeypatch, writer, number, passing
):
    path, replace, failures = tmp_path / "checkpoint.pth", os.replace, [1 if passing else 9]
    save(writer, state_of(1), path)
    end(writer)

    def failing(*args):
        if failures[0]:
            failures[0] -= 1
            raise OSError(number, os.strerror(number))
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    save(writer, state_of(2), path)
    writer.finish()
    assert "the previous checkpoint.pth is intact; the run continues" in writer.warnings[0]
    assert checkpoint.load(path)["left_out"] == [1]
    if passing:
        end(writer)
        assert checkpoint.load(path)["left_out"] == [2]
    else:
        with pytest.raises(CheckpointError, match=os.strerror(number)):
            end(writer)
        assert checkpoint.load(path)["left_out"] == [1]
    assert len(writer.warnings) == 1
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_a_run_that_ended_leaves_no_thread_and_no_state_in_memory(config, monkeypatch):
    threads, trainers, copies = set(threading.enumerate()), [], []
    state_dict, start = Trainer.state_dict, CheckpointWriter.start

    def kept(self, **options):
        trainers.append(weakref.ref(self))
        return state_dict(self, **options)

    def started(self, *args, **options):
        start(self, *args, **options)
        copies.extend(weakref.ref(buffer) for buffer in self._host._buffers.values())

    monkeypatch.setattr(Trainer, "state_dict", kept)
    monkeypatch.setattr(CheckpointWriter, "start", started)
    train(config(epochs=1))
    gc.collect()
    started_threads = {thread.name for thread in set(threading.enumerate()) - threads}
    assert started_threads <= {"tqdm_monitor"}
    assert trainers
    assert copies
    assert {reference() for reference in [*trainers, *copies]} == {None}


def test_without_memory_for_a_later_copy_the_former_is_freed(tmp_path, monkeypatch, writer):
    path = tmp_path / "checkpoint.pth"
    save(writer, state_of(1), path)
    end(writer)
    former = [weakref.ref(buffer) for buffer in writer._host._buffers.values()]
    monkeypatch.setattr(host_copy, "available_memory", lambda: 0.0)
    save(writer, {"student": {"w": torch.ones(3), "more": torch.ones(5)}}, path)
    gc.collect()
    assert [reference() for reference in former] == [None]
    assert checkpoint.load(path)["student"]["more"].shape == (5,)


def test_without_memory_for_a_copy_it_writes_directly_and_warns_once(tmp_path, monkeypatch, writer):
    monkeypatch.setattr(host_copy, "available_memory", lambda: 0.0)
    for value in (1, 2):
        save(writer, state_of(value), tmp_path / "checkpoint.pth")
        assert checkpoint.load(tmp_path / "checkpoint.pth")["left_out"] == [value]
    assert len(writer.warnings) == 1
    assert "no host memory for a copy of the checkpoint" in writer.warnings[0]


@pytest.mark.parametrize(
    ("text", "direct"),
    [("can't allocate memory", True), ("CUDA error: out of memory", True), ("a bug", False)],
)
def test_only_a_lack_of_memory_makes_it_write_directly(tmp_path, monkeypatch, writer, text, direct):
    path = tmp_path / "checkpoint.pth"

    def broken(tensor):
        raise RuntimeError(text)

    monkeypatch.setattr(host_copy, "local_part", broken)
    if direct:
        save(writer, state_of(1), path)
        assert text in writer.warnings[0]
        assert checkpoint.load(path)["left_out"] == [1]
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            save(writer, state_of(1), path)
        assert writer.warnings == []


def train_without_memory_on_rank_1(settings):
    """Have no memory for copies on rank 1; write how the ranks wrote, and the warnings."""
    patch, rank = pytest.MonkeyPatch(), int(os.environ["RANK"])
    shrink_networks(patch)
    if rank == 1:
        patch.setattr(host_copy, "available_memory", lambda: 0.0)
    write, direct, printed = shard_files.write, [], io.StringIO()

    def noted(*args):
        direct.append(threading.current_thread() is threading.main_thread())
        write(*args)

    patch.setattr(shard_files, "write", noted)
    run = TrainConfig.from_dict(settings)
    with contextlib.redirect_stderr(printed):
        assert train(run) == "finished"
    result = json.dumps([direct, printed.getvalue()])
    Path(run.output_dir, f"result{rank}").write_text(result)


def test_ranks_of_a_sharded_run_write_directly_if_one_of_them_has_no_memory(config, tmp_path):
    settings = config(epochs=2, batch_size_per_gpu=2, fsdp=True)
    run_two(train_without_memory_on_rank_1, settings.to_dict())
    results = [json.loads((tmp_path / f"run/result{rank}").read_text()) for rank in range(2)]
    assert [direct for direct, _ in results] == [[True, True]] * 2
    assert results[0][1].count("no host memory for a copy on rank 1: the training waits") == 1
    assert results[1][1] == ""


def slowly(monkeypatch, gate):
    """Open the gate when the training waits for a write, or after one more step."""
    step, finish = Trainer.train_step, CheckpointWriter.finish
    states = SimpleNamespace(steps_during_writes=0, waits=0)

    def counted(self, crops):
        states.steps_during_writes += not gate.is_set()
        return step(self, crops)

    def opening(self):
        states.waits += not gate.is_set()
        gate.set()
        finished = finish(self)
        gate.clear()
        return finished

    gate.clear()
    monkeypatch.setattr(Trainer, "train_step", counted)
    monkeypatch.setattr(CheckpointWriter, "finish", opening)
    return states


def test_a_run_trains_during_its_writes_and_waits_before_the_next_one(
    config, tmp_path, monkeypatch, gate
):
    """Each write ends only when something waits for it; a stop and a rollback do."""
    settings = {"on_nonfinite": "rollback", "saveckp_freq": 1}
    expected = config(
        output_dir=str(tmp_path / "expected"), saveckp_in_background=False, **settings
    )
    run = config(**settings)
    for one in (expected, run):
        with monkeypatch.context() as patch:
            states = slowly(patch, gate) if one is run else None
            fail(patch, [STEPS + 1], "crops")
            interrupt(patch, 2 * STEPS + 1, signal.SIGTERM)
            assert train(one) == "interrupted"
            assert weights_of(tmp_path / ("run" if states else "expected"))["iteration"] == 10
            assert train(one) == "finished"
        gate.set()
    assert_same_run(tmp_path / "run", tmp_path / "expected")
    assert weights_of(tmp_path / "run")["left_out"] == [STEPS + 1]
    names = [f"checkpoint000{epoch}.pth" for epoch in range(3)]
    for name in names:
        ours, theirs = (checkpoint.load(tmp_path / of / name) for of in ("run", "expected"))
        assert ours["iteration"] == theirs["iteration"]
    assert states.steps_during_writes > 2 * STEPS


def test_a_run_that_fails_finishes_its_write_first(config, tmp_path, monkeypatch, gate):
    finish = CheckpointWriter.finish

    def opening(self):
        gate.set()
        return finish(self)

    def broken(self, crops):
        if self.iteration == STEPS:
            raise ValueError("broken step")
        gate.clear()
        return step(self, crops)

    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", broken)
    monkeypatch.setattr(CheckpointWriter, "finish", opening)
    with pytest.raises(ValueError, match="broken step"):
        train(config())
    assert weights_of(tmp_path / "run")["iteration"] == STEPS


def test_a_run_ends_in_one_line_if_its_last_write_fails_twice(
    config, tmp_path, monkeypatch, capsys
):
    replace, slept = os.replace, []

    def full(part, target):
        if target.name == "checkpoint.pth" and checkpoints[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        checkpoints[0] += target.name == "checkpoint.pth"
        replace(part, target)

    checkpoints = [0]
    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(
        resume, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic)
    )
    with pytest.raises(CheckpointError, match="No space left on device.*previous .* is intact"):
        train(config(epochs=2))
    assert slept == list(resume.SECONDS_UNTIL_RETRY)
    assert weights_of(tmp_path / "run")["iteration"] == STEPS
    assert len(losses_of(tmp_path / "run")) == 2
    assert "the run continues, and the next save writes it again" in capsys.readouterr().err


def fail_on_rank_1(settings):
    """Write no shards on rank 1 from the second epoch on; keep the error of each rank."""
    patch, rank = pytest.MonkeyPatch(), int(os.environ["RANK"])
    shrink_networks(patch)
    patch.setattr(resume, "SECONDS_UNTIL_RETRY", (0.01,))

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == 1:
        before_step(patch, STEPS + 1, lambda: patch.setattr(os, "fsync", full))
    run = TrainConfig.from_dict(settings)
    with pytest.raises(CheckpointError) as error:
        train(run)
    Path(run.output_dir, f"error{rank}").write_text(str(error.value))


def test_a_failed_write_of_one_rank_ends_a_sharded_run_on_all_with_one_message(config, tmp_path):
    settings = config(epochs=2, batch_size_per_gpu=2, fsdp=True, saveckp_every_steps=2).to_dict()
    run_two(fail_on_rank_1, settings)
    errors = [(tmp_path / "run" / f"error{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert "checkpoint/000003 (No space left on device): the disk is full" in errors[0]
    shards = shard_files.newest(tmp_path / "run/checkpoint")
    assert shard_files.read(shards, shard_files.whole)["iteration"] == STEPS
    assert weights_of(tmp_path / "run")["iteration"] == STEPS
    finish_killed_export(config(epochs=1, saveckp_freq=1), tmp_path / "run")


def fill_disk_for_rest(settings, failures):
    """Let `failures` writes of rest.pth fail from the second epoch on; keep the error of a rank."""
    patch, left = pytest.MonkeyPatch(), [failures]
    shrink_networks(patch)
    patch.setattr(resume, "SECONDS_UNTIL_RETRY", (0.01, 0.01))
    write = io.FileIO.write

    class FullDisk(io.FileIO):
        def write(self, content):
            if left[0] > 0 and len(content) > 1:
                left[0] -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, content)

    def opened(descriptor, mode):
        is_rest = os.readlink(f"/proc/self/fd/{descriptor}").endswith("rest.pth.part")
        return FullDisk(descriptor, mode) if is_rest else os.fdopen(descriptor, mode)

    fake = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
    fake.fdopen = opened
    before_step(patch, STEPS + 1, lambda: patch.setattr(files, "os", fake))
    run, printed, error = TrainConfig.from_dict(settings), io.StringIO(), ""
    with contextlib.redirect_stderr(printed):
        try:
            train(run)
        except CheckpointError as raised:
            error = str(raised)
    result = json.dumps([error, printed.getvalue()])
    Path(run.output_dir, f"result{os.environ['RANK']}").write_text(result)


@pytest.mark.parametrize("failures", [1, 99])
def test_a_full_disk_for_the_rest_of_a_sharded_save_is_tried_again_and_keeps_the_last_save(
    config, tmp_path, failures
):
    settings = config(epochs=2, batch_size_per_gpu=2, fsdp=True, saveckp_in_background=False)
    run_two(fill_disk_for_rest, settings.to_dict(), failures)
    run = tmp_path / "run"
    results = [json.loads((run / f"result{rank}").read_text()) for rank in range(2)]
    errors, printed = [error for error, _ in results], "".join(text for _, text in results)
    warning = "000002 (No space left on device): the disk is full: free some space; the next try"
    assert printed.count(warning) == min(failures, 2)
    assert "existing checkpoint" not in printed  # of PyTorch
    last = shard_files.newest(run / "checkpoint")
    saved = shard_files.read(last, shard_files.whole)["iteration"]
    if failures == 1:
        assert errors == ["", ""]
        assert (last.name, saved) == ("000002", 2 * STEPS)
        assert os.listdir(run / "checkpoint") == ["000002"]
    else:
        assert errors[0] == errors[1]
        assert "checkpoint/000002 (No space left on device): the disk is full" in errors[0]
        assert (last.name, saved) == ("000001", STEPS)
        assert weights_of(run)["iteration"] == STEPS


def train_with_huge_timeout(settings):
    shrink_networks(pytest.MonkeyPatch())
    assert train(TrainConfig.from_dict(settings)) == "finished"


def test_a_huge_timeout_is_no_limit_also_of_a_sharded_run(config, tmp_path):
    huge = {"dist_timeout_minutes": 1e300, "batch_size_per_gpu": 2, "fsdp": True}
    run_two(train_with_huge_timeout, config(epochs=1, **huge).to_dict())
    assert weights_of(tmp_path / "run")["iteration"] == STEPS


def finish_killed_export(run, folder):
    """The run ends here; it was killed after its last shards and before their single file."""
    expected = weights_of(folder)
    for file in folder.glob("checkpoint*.pth"):
        file.unlink()
    (folder / "checkpoint/notes").write_text("of the user")
    assert train(run) == "finished"
    for name in ("checkpoint.pth", "checkpoint0000.pth"):
        written = checkpoint.load(folder / name)
        assert differences(written["student"], expected["student"]) == []
        moments, wanted = (state["optimizer"]["state"] for state in (written, expected))
        assert differences(moments, wanted) == []  # the learning rate is that of another schedule
    assert os.listdir(folder / "checkpoint") == ["notes"]
