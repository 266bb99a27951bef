from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from fastdino.errors import CheckpointError
from fastdino.files import atomic_write, explain_write_errors, file_lock, write_json
from tests.processes import locked_elsewhere


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space")])
def test_interrupted_write_keeps_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(_fd):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_errors_unrelated_to_the_disk_are_not_converted(tmp_path):
    with pytest.raises(RuntimeError, match="illegal memory"), explain_write_errors(tmp_path):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_write_json_is_atomic_and_creates_folders(tmp_path):
    path = tmp_path / "a" / "b" / "result.json"
    write_json({"k": [1, 2]}, path)
    with pytest.raises(TypeError):
        write_json({"k": path}, path)
    assert json.loads(path.read_text()) == {"k": [1, 2]}
    assert os.listdir(path.parent) == ["result.json"]
    with pytest.raises(CheckpointError, match=r"cannot write /dev/null/a/x.json \(Not a dir.*: ch"):
        write_json({}, Path("/dev/null/a/x.json"))


def test_lock_excludes_other_processes_until_released(tmp_path, capsys):
    path = tmp_path / "lock"
    with (
        locked_elsewhere(path),
        pytest.raises(BlockingIOError, match="another process holds"),
        file_lock(path, wait=False),
    ):
        pass
    with file_lock(path, wait=False):
        pass
    with locked_elsewhere(path, seconds=0.5), file_lock(path, wait=True):
        pass
    assert f"waiting for the process that holds {path}" in capsys.readouterr().err
