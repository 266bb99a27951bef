from __future__ import annotations

import argparse
import errno
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import checkpoint
from fastdino.errors import CheckpointError, NonFiniteError

STATE = {"student": {"w": torch.arange(4.0)}, "epoch": 3}


def test_what_is_saved_comes_back_and_the_copy_is_the_same_file(tmp_path):
    path, copy = tmp_path / "checkpoint.pth", tmp_path / "checkpoint0003.pth"
    checkpoint.save(STATE, path, also=copy)
    state = checkpoint.load(path)
    assert torch.equal(state["student"]["w"], STATE["student"]["w"])
    assert state["epoch"] == 3
    assert copy.read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", "checkpoint0003.pth"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space")])
def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(STATE, path)
    before = path.read_bytes()

    def cut_off(_fd):
        raise error

    monkeypatch.setattr(os, "fsync", cut_off)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        checkpoint.save({"student": {"w": torch.ones(99)}}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_a_full_disk_says_so_and_that_the_last_checkpoint_is_there(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(STATE, path)

    def full(_state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="make room; the checkpoint.pth of before is"):
        checkpoint.save(STATE, path)
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 3


def test_a_full_disk_behind_an_error_of_torchs_writer_is_still_a_full_disk(tmp_path, monkeypatch):
    def full(_state, _file):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 2 vs 1")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device.*make room"):
        checkpoint.save(STATE, tmp_path / "checkpoint.pth")


def test_an_error_that_is_not_the_disks_stays_itself(tmp_path, monkeypatch):
    def broken(_state, _file):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        checkpoint.save(STATE, tmp_path / "checkpoint.pth")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_torch_reports_a_device_that_is_really_full(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    os.symlink("/dev/full", tmp_path / "checkpoint.pth.part")
    with pytest.raises(CheckpointError, match="cannot write .*make room"):
        checkpoint.save({"student": {"w": torch.ones(1 << 18)}}, path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["student", "optimizer"])
def test_a_poisoned_state_is_never_written(tmp_path, value, where):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(STATE, path)
    with pytest.raises(NonFiniteError, match=rf"{where}.state.0.w is not finite"):
        checkpoint.save({where: {"state": {0: {"w": torch.tensor([1.0, value])}}}}, path)
    assert checkpoint.load(path)["epoch"] == 3


def test_a_truncated_file_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"student": {"w": torch.ones(5000)}}, path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint.pth (cannot be read|is truncated)"):
            checkpoint.load(path)


def test_a_file_that_is_not_there_and_a_file_of_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        checkpoint.load(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list, expected a dict"):
        checkpoint.load(tmp_path / "list.pth")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_code_in_a_file_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"student": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="more than tensors and plain values") as error:
        checkpoint.load(tmp_path / "bomb.pth")
    assert "code (posix.mkdir), which is not run" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_the_papers_namespace_of_flags_is_read(tmp_path):
    path = tmp_path / "paper.pth"
    torch.save({"args": argparse.Namespace(arch="vit_small", patch_size=8)}, path)
    assert checkpoint.load(path)["args"].patch_size == 8


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_the_papers_numpy_scalars_are_read_under_either_name(tmp_path, module):
    groups = [{"lr": np.float64(0.25), "weight_decay": np.float32(0.5), "params": [0]}]
    torch.save({"optimizer": {"param_groups": groups}}, tmp_path / "now.pth")
    with (
        zipfile.ZipFile(tmp_path / "now.pth") as now,
        zipfile.ZipFile(tmp_path / "paper.pth", "w") as paper,
    ):
        for name in now.namelist():
            content = now.read(name)
            if name.endswith("data.pkl"):
                assert b".multiarray\nscalar" in content
                content = content.replace(b"numpy._core", module).replace(b"numpy.core", module)
            paper.writestr(name, content)
    group = checkpoint.load(tmp_path / "paper.pth")["optimizer"]["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)


def test_a_picture_for_weights_is_told_without_torchs_advice_to_run_it(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(CheckpointError, match="photo.png is truncated or no checkpoint") as found:
        checkpoint.load(path)
    assert "weights_only" not in str(found.value)
    assert "\n" not in str(found.value)


def test_a_result_is_written_whole_into_a_folder_that_is_made(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b" / "found.json"
    checkpoint.write_json({"k": [1, 2]}, path)
    assert json.loads(path.read_text()) == {"k": [1, 2]}
    with pytest.raises(TypeError):
        checkpoint.write_json({"k": path}, path)
    assert json.loads(path.read_text()) == {"k": [1, 2]}
    assert os.listdir(path.parent) == ["found.json"]
    with pytest.raises(
        CheckpointError, match=r"cannot write /dev/null/a/x.json \(Not a dir.*: che"
    ):
        checkpoint.write_json({}, Path("/dev/null/a/x.json"))
