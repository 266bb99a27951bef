"""Folders of shards: written by two ranks, read by any number; failed and killed writes."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastdino import checkpoint
from fastdino.errors import CheckpointError, NonFiniteError
from fastdino.training import shard_files
from fastdino.training.host_copy import HostCopy
from tests.processes import run_two
from tests.runs import differences


def state_of(seed, wrap=lambda tensor: tensor):
    """A state with 7 rows, which split unevenly, and 1 row, which rank 1 does not have."""
    generator = torch.Generator().manual_seed(seed)
    rows, row = (torch.randn(n, 5, generator=generator) for n in (7, 1))
    return {
        "student": {"module.rows": wrap(rows), "module.row": wrap(row)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": wrap(rows + 1)}},
                      "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]},
        "generators": [{"cpu": torch.arange(9, dtype=torch.uint8)}] * 2,
        "iteration": seed,
        "left_out": [],
    }  # fmt: skip


def of_two(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    group, host = shard_files.new_group(1), HostCopy()

    def sharded(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    def write(seed, path):
        state = state_of(seed, sharded)
        copied = host.copy(state)
        for tensor in state["student"].values():
            tensor.to_local().zero_()
        shard_files.write(copied, path, group)

    write(1, folder / "000001")
    write(2, folder / "000002")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:

            def full(_descriptor):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="000003 .No space left on device.*free some"):
            write(3, folder / "000003")
    read = shard_files.read(
        folder / "000002",
        lambda place, size, dtype: (
            sharded(torch.zeros(size)) if place[-1] in ("module.rows", "module.row", "exp_avg")
            else shard_files.whole(place, size, dtype)
        ),
    )  # fmt: skip
    expected = state_of(2, sharded)
    assert read["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for ours, theirs in (
        (read["student"]["module.rows"], expected["student"]["module.rows"]),
        (read["student"]["module.row"], expected["student"]["module.row"]),
        (read["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"]),
    ):
        assert torch.equal(ours.to_local(), theirs.to_local())
    broken = state_of(4, sharded)
    if rank == 1:
        broken["student"]["module.rows"].to_local()[-1, -1] = float("inf")
        with pytest.raises(NonFiniteError, match=r"student.module.rows is not finite"):
            checkpoint.check_finite(broken)
    else:
        checkpoint.check_finite(broken)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two saves of two ranks, and a third that failed."""
    path: Path = tmp_path_factory.mktemp("checkpoint")
    run_two(of_two, path)
    return path


def test_newest_complete_save_counts_and_leftovers_are_removed(folder):
    assert sorted(os.listdir(folder)) == ["000002", "000003.part"]
    assert shard_files.newest(folder) == folder / "000002"
    assert shard_files.newest(folder / "nowhere") is None
    assert shard_files.next_save(folder) == folder / "000003"
    assert os.listdir(folder) == ["000002"]


def test_of_several_saves_the_one_of_the_highest_number_counts(tmp_path):
    for name in ("999999", "1000000", "000002", "1000001.part", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "2000000").touch()  # a file, not a save
    assert shard_files.newest(tmp_path) == tmp_path / "1000000"
    assert shard_files.next_save(tmp_path) == tmp_path / "1000001"


def test_one_process_reads_whole_tensors_of_two_ranks(folder):
    state = shard_files.read(folder / "000002", shard_files.whole)
    assert differences(state, state_of(2)) == []


def test_missing_files_are_named(folder, tmp_path):
    copy = tmp_path / "000002"
    shutil.copytree(folder / "000002", copy)
    (copy / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError) as error:
        shard_files.read(copy, shard_files.whole)
    assert re.match(
        rf"{copy} cannot be used \(.*FileNotFoundError: .*__1_0\.distcp'\): it is damaged",
        str(error.value),
    )
    (copy / "rest.pth").unlink()
    with pytest.raises(CheckpointError, match=f"there is no file {copy}/rest.pth"):
        shard_files.read(copy, shard_files.whole)


def test_reading_leaves_the_filters_of_warnings_to_the_other_threads(folder, monkeypatch):
    filters, seen, read_data = warnings.filters, [], shard_files.FileSystemReader.read_data

    def observed(*args):
        seen.append(warnings.filters is filters)
        return read_data(*args)

    monkeypatch.setattr(shard_files.FileSystemReader, "read_data", observed)
    shard_files.read(folder / "000002", shard_files.whole)
    assert seen == [True]


def test_saves_are_removed_by_a_process_that_can_be_killed(folder, tmp_path, monkeypatch):
    copy, rmtree, removed = tmp_path / "checkpoint", shutil.rmtree, []
    shutil.copytree(folder, copy)
    (copy / "000001").mkdir()
    (copy / "000001.part").mkdir()
    (copy / "of the user").touch()

    def killed(path, *args, **options):
        saves = [save for save in copy.iterdir() if save.name.isdigit() and any(save.iterdir())]
        assert all((save / ".metadata").exists() for save in saves)
        assert Path(path).name.endswith(".part")
        removed.append(Path(path).name)
        rmtree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    shard_files.remove_saves(copy)
    assert removed == ["000001.part", "000001.part", "000002.part"]
    assert os.listdir(copy) == ["of the user"]
    (copy / "of the user").unlink()
    shard_files.remove_saves(copy)
    assert not copy.exists()


def test_damaged_saves_and_code_in_them_are_reported(folder, tmp_path):
    path = folder / "000002"
    metadata = (path / ".metadata").read_bytes()

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for content, message in (
        (pickle.dumps(Bomb()), r"contains code \(posix.mkdir\), which is not run"),
        (metadata[:50], r"\.metadata cannot be read"),
        (pickle.dumps({}), r"\.metadata holds a dict: it is damaged"),
    ):
        (path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            shard_files.read(path, shard_files.whole)
    (path / ".metadata").write_bytes(metadata)
    assert not (tmp_path / "exploded").exists()
    shards = path / "__1_0.distcp"
    shards.write_bytes(shards.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="000002 cannot be used"):
        shard_files.read(path, shard_files.whole)
