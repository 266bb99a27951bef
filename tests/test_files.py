from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from fastdino.errors import CheckpointError
from fastdino.files import (
    atomic_write,
    check_writable,
    explain_write_errors,
    file_lock,
    write_json,
)
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


def test_symbolic_links_stay_and_their_targets_are_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "file"
    for link, to in (("absolute", target), ("relative", "elsewhere/file"), ("chain", "absolute")):
        path = tmp_path / link
        path.symlink_to(to)
        target.unlink(missing_ok=True)  # the first write follows a dangling link
        for content in (b"first", b"second"):
            before = target.stat().st_ino if target.exists() else None
            with atomic_write(path) as file:
                file.write(content)
            assert path.is_symlink()
            assert target.read_bytes() == content
            assert target.stat().st_ino != before
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


def test_devices_and_pipes_are_written_directly_and_folders_not_at_all(tmp_path):
    with atomic_write(Path(os.devnull)) as file:
        file.write(b"nothing")
    assert not Path(os.devnull).is_file()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(tmp_path / "pipe") as file:
        file.write(b"content")
    assert os.read(reader, 10) == b"content"
    os.close(reader)
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize(
    ("number", "raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_file_systems_that_cannot_sync_a_folder_are_supported(
    tmp_path, monkeypatch, number, raised
):
    sync = os.fsync

    def fail_for_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    expected = pytest.raises(OSError, match="put/output") if raised else nullcontext()
    with expected, atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("number", "todo"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EDQUOT, "the quota is used up: free some space"),
        (errno.EFBIG, "raise the limit of the file size"),
        (errno.EIO, "check the disk"),
        (errno.EROFS, "check the folder's permissions"),
    ],
)
def test_write_errors_say_what_to_do(tmp_path, number, todo):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError) as error, explain_write_errors(path):
        raise OSError(number, os.strerror(number))
    assert f"cannot write {path} ({os.strerror(number)}): {todo}" in str(error.value)
    assert str(error.value).endswith("; the previous file is intact")


def test_file_over_the_size_limit_keeps_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(CheckpointError, match="limit of the file size"),
            explain_write_errors(path),
            atomic_write(path) as file,
        ):
            file.write(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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


WRITER = """
import os, sys
from pathlib import Path
from fastdino.files import atomic_write
for i in range(50):
    with atomic_write(Path(sys.argv[1])) as file:
        for _ in range(20):
            file.write(sys.argv[2].encode() * 5000)
            file.flush()
"""


def test_of_several_writers_of_a_file_each_writes_it_whole(tmp_path):
    """With one temporary file between them, they truncated and removed each other's."""
    path = tmp_path / "file"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stderr=subprocess.PIPE)
        for name in "abc"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        with suppress(FileNotFoundError):
            seen.add(path.read_bytes())
    errors = [writer.communicate()[1] for writer in writers]
    assert errors == [b"", b"", b""]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen <= {name * 100_000 for name in (b"a", b"b", b"c")}
    assert os.listdir(tmp_path) == ["file"]


def test_unwritable_paths_are_known_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "a/b/c", Path("new")):
        check_writable(path)
    for path in (tmp_path, tmp_path / "a/b/c"):
        check_writable(path, folder=True)
    with pytest.raises(CheckpointError, match=r"cannot write .*file/a/b \(Not a dir.*: .*/file\)"):
        check_writable(tmp_path / "file/a/b")
    with pytest.raises(CheckpointError, match="Not a directory"):
        check_writable(tmp_path / "file", folder=True)
    with pytest.raises(CheckpointError, match="Is a directory"):
        check_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)  # root may write all
    with pytest.raises(CheckpointError, match="Permission denied.*: check the folder's permiss"):
        check_writable(tmp_path / "a/b")
    assert os.listdir(tmp_path) == ["file"]
