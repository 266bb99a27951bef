"""Checkpoints of sharded runs (--fsdp): each rank writes its own shards into a shared folder.

    checkpoint/000007/__0_0.distcp, .metadata   tensors, by torch.distributed.checkpoint
    checkpoint/000007/rest.pth                  everything else, by torch.save

A save is complete when its folder has its final name, and the newest one counts. Any number of
ranks can read it, sharded or not.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from fastdino import checkpoint
from fastdino.distributed import UNLIMITED
from fastdino.errors import CheckpointError
from fastdino.files import PART, explain_write_errors, os_error_of, sync_folder
from fastdino.training.host_copy import Place, tensors_of

REST = "rest.pth"
# What a .metadata file, which is a pickle, may construct in addition to dtypes.
SAFE_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        )
    ),
}  # fmt: skip

Like = Callable[[Place, torch.Size, torch.dtype], Tensor]


def newest(folder: Path) -> Path | None:
    """Return the newest complete save in `folder`; None without any."""
    return max(_saves(folder), key=_number, default=None)


def next_save(folder: Path) -> Path:
    """Return the path of the next save; remove what killed writes left.

    Raises: CheckpointError: the folder cannot be written.
    """
    with explain_write_errors(folder):
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*" + PART):
            shutil.rmtree(path)
    last = newest(folder)
    return folder / f"{_number(last) + 1 if last else 1:06}"


def remove_saves(folder: Path) -> None:
    """Remove all saves in `folder`, and the folder if nothing else is in it, as far as possible."""
    with suppress(OSError):  # also without the folder
        for path in folder.glob("*" + PART):
            shutil.rmtree(path)
        for save in sorted(_saves(folder), key=_number):
            part = save.with_name(save.name + PART)
            os.replace(save, part)  # it counts only with all of its files
            shutil.rmtree(part)
        folder.rmdir()


def _saves(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]


def _number(save: Path) -> int:
    return int(save.name)


def new_group(timeout_minutes: float) -> dist.ProcessGroup:
    """Return a group of all ranks for `write`; all ranks must call it."""
    seconds = min(60 * timeout_minutes, UNLIMITED.total_seconds())
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    assert isinstance(group, dist.ProcessGroup)  # this rank is in it
    return group


def write(state: dict[str, Any], path: Path, group: dist.ProcessGroup) -> None:
    """Write the shards of `state` to a new folder `path`, and then remove the older saves.

    All ranks must call it, also in a thread, and no other thread may use the group meanwhile.

    Raises: CheckpointError: on all ranks, if one of them cannot write.
    """
    tensors = {_name(place): tensor for place, tensor in tensors_of(state)}
    with explain_write_errors(path):
        try:
            save_shards(
                tensors,
                storage_writer=_Writer(path, _without_tensors(state)),
                process_group=group,
            )
        except CheckpointException as error:
            first = error.failures[min(error.failures)][0]
            if isinstance(first, (OSError, CheckpointError)):
                raise first from None
            raise CheckpointError(f"cannot write {path} ({first!r})") from None


class _Writer(FileSystemWriter):
    """Writes to a temporary folder; the coordinating rank then gives it its name."""

    def __init__(self, path: Path, rest: dict[str, Any]) -> None:
        super().__init__(path.with_name(path.name + PART))
        self._target, self._rest = path, rest

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # of torch.save; the other ranks do not get its cause
            raise os_error_of(error) or error from None

    def finish(self, metadata: Metadata, results: Any) -> None:
        part, target = Path(self.path), self._target
        try:
            checkpoint.write(self._rest, part / REST)
        except CheckpointError as error:  # its cause would not reach the other ranks
            raise os_error_of(error) or error from None
        super().finish(metadata, results)  # last: PyTorch warns where a next try finds its metadata
        sync_folder(part)
        shutil.rmtree(target, ignore_errors=True)  # of a try that failed after the next line
        os.replace(part, target)
        sync_folder(target.parent)
        for save in _saves(target.parent):
            if _number(save) < _number(target):
                shutil.rmtree(save, ignore_errors=True)


def read(path: Path, like: Like) -> dict[str, Any]:
    """Read a save; no other rank takes part.

    Args: like: makes the tensor to read into, sharded or whole, from its keys, shape and dtype.

    Raises: CheckpointError: it is damaged, or contains anything but tensors and plain values.
    """
    state = checkpoint.load(path / REST)
    places = state.pop("places", None)
    reader = _Reader(path)
    with checkpoint.explain_content(path):
        saved = reader.sizes()
        tensors = {
            name: like(tuple(place), saved[name].size, saved[name].properties.dtype)
            for name, place in places.items()
        }
        try:
            _read_tensors(reader, tensors)
        except OSError as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        for name, place in places.items():
            _set(state, place, tensors[name])
    return state


def _read_tensors(reader: _Reader, tensors: dict[str, Tensor]) -> None:
    """Read without the other ranks.

    torch.distributed.checkpoint.load does the same, but warns, and filters of warnings are not for
    threads.
    """
    planner, metadata = DefaultLoadPlanner(), reader.read_metadata()
    planner.set_up_planner(tensors, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    (plan,) = reader.prepare_global_plan(plans)
    reader.read_data(planner.finish_plan(plan), planner).wait()


def whole(_place: Place, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Make a whole tensor on the CPU, for `read`."""
    return torch.empty(size, dtype=dtype)


class _Reader(FileSystemReader):
    """Reads a save without running code from its metadata."""

    def sizes(self) -> dict[str, TensorStorageMetadata]:
        """Return what is known of each tensor."""
        saved = self.read_metadata().state_dict_metadata
        return {k: v for k, v in saved.items() if isinstance(v, TensorStorageMetadata)}

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # a broken or crafted file raises many types
            raise CheckpointError(f"{path} cannot be read ({error}): it is damaged") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} holds a {type(metadata).__name__}: it is damaged")
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in SAFE_NAMES:
            raise pickle.UnpicklingError(f"it contains code ({module}.{name}), which is not run")
        return super().find_class(module, name)


def _name(place: Place) -> str:
    return "/".join(map(str, place))


def _without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` with None instead of its tensors, and their keys by name in "places"."""

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor):
            return None
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(strip(item) for item in value)
        return value

    places = {_name(place): list(place) for place, _ in tensors_of(state)}
    return {**strip(state), "places": places}


def _set(state: Any, place: list[Any], tensor: Tensor) -> None:
    *parents, last = place
    for key in parents:
        state = state[key]
    state[last] = tensor
