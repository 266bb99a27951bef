from __future__ import annotations

import argparse
import errno
import math
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import checkpoint
from fastdino.errors import CheckpointError, NonFiniteError

STATE = {"student": {"w": torch.arange(4.0)}, "epoch": 3}


def test_save_and_load_round_trip_with_identical_copy(tmp_path):
    path, copy = tmp_path / "checkpoint.pth", tmp_path / "checkpoint0003.pth"
    checkpoint.save(STATE, path, also=copy)
    state = checkpoint.load(path)
    assert torch.equal(state["student"]["w"], STATE["student"]["w"])
    assert state["epoch"] == 3
    assert copy.read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", "checkpoint0003.pth"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_keeps_previous_checkpoint(tmp_path, monkeypatch, wrapped):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(STATE, path)

    def full(_state, file):
        file.write(b"half of it")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            if wrapped:  # as torch's zip writer does
                raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 2")

    monkeypatch.setattr(torch, "save", full)
    message = r"No space left on device\): .*free some space; the previous checkpoint.pth is intact"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(STATE, path)
    assert checkpoint.load(path)["epoch"] == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_write_to_full_device_is_reported(tmp_path):
    path = tmp_path / "checkpoint.pth"
    os.symlink("/dev/full", tmp_path / "checkpoint.pth.part")
    with pytest.raises(CheckpointError, match="cannot write .*free some space"):
        checkpoint.save({"student": {"w": torch.ones(1 << 18)}}, path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["student", "teacher", "optimizer", "dino_loss"])
def test_nonfinite_state_is_not_saved(tmp_path, value, where):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(STATE, path)
    with pytest.raises(NonFiniteError, match=rf"{where}.state.0.w is not finite"):
        checkpoint.save({where: {"state": {0: {"w": torch.tensor([1.0, value])}}}}, path)
    assert checkpoint.load(path)["epoch"] == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_kind_of_number_is_checked_and_integers_are_not(dtype):
    good = {"student": {"w": torch.ones(3, dtype=dtype), "n": torch.arange(3)}}
    checkpoint.check_finite(good)
    good["student"]["w"][2] = math.nan
    with pytest.raises(NonFiniteError, match=r"student\.w is not finite"):
        checkpoint.check_finite(good)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_pipes_are_not_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is not a regular file"):
        checkpoint.load(tmp_path / name)


def test_truncated_missing_and_unsuitable_files_are_reported(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"student": {"w": torch.ones(5000)}}, path)
    whole = path.read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    picture = (tmp_path / "photo.png").read_bytes()
    lengths = (0, 10, len(whole) // 2, len(whole) - 20)
    for content in (*(whole[:length] for length in lengths), picture):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="th cannot be read .*: it is truncated") as error:
            checkpoint.load(path)
        assert "weights_only" not in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="there is no file"):
        checkpoint.load(tmp_path / "none.pth")
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list, expected a dict"):
        checkpoint.load(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_code_in_a_file_is_rejected_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"student": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="expected only tensors and plain values") as error:
        checkpoint.load(tmp_path / "bomb.pth")
    assert "contains code (posix.mkdir), which is not run" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_paper_checkpoint_with_namespace_loads(tmp_path):
    path = tmp_path / "paper.pth"
    torch.save({"args": argparse.Namespace(arch="vit_small", patch_size=8)}, path)
    assert checkpoint.load(path)["args"].patch_size == 8


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_numpy_scalars_load_under_old_and_new_module_names(tmp_path, module):
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


@pytest.mark.parametrize(
    ("bias", "kind"),
    [
        (torch.zeros(2, device="meta"), "tensor without data"),
        (torch.zeros(2).to_sparse(), "sparse or quantized tensor"),
        (torch.zeros(2) + 0j, "complex"),
        (torch.zeros(1).expand(2), "tensor of repeated values"),
        ([0.0, 0.0], "list"),
    ],
)
def test_only_dense_tensors_of_real_numbers_are_weights(bias, kind):
    state = {"weight": torch.ones(2), "bias": bias}
    with pytest.raises(CheckpointError, match=f"bias is a {kind}.*, expected a dense tensor"):
        checkpoint.check_shapes(torch.nn.LayerNorm(2), state, "student")


@pytest.mark.parametrize("student", [3, ["w"], {3: torch.zeros(1)}, {"norm.weight": "text"}])
def test_content_of_other_types_is_an_error(student):
    module = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(2)})

    def check():
        checkpoint.check_shapes(module, checkpoint.strip_prefix(student, "module."), "student")

    with pytest.raises(CheckpointError, match="expected"):
        check()
