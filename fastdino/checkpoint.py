"""Checkpoints on disk: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.errors import CheckpointError, NonFiniteError

# What a file may hold beside tensors and plain values: the paper's code saves its flags as a
# Namespace, on clusters with paths in it, and lr and weight decay as NumPy scalars, of either of
# the names that NumPy's versions give them. Making any of these runs no code of the file's.
_SCALAR = np.float64(0).__reduce__()[0]
SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    PosixPath,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


def save(state: dict[str, Any], path: Path, *, also: Path | None = None) -> None:
    """Writes `state` to `path`, and the same file to `also`: a kill at any moment leaves either the
    old file or the new one.

    Raises:
        NonFiniteError: a tensor of student, teacher, optimizer or dino_loss is not finite.
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    check_finite(state)
    # `path` last: a run that is killed in between makes both again.
    first = also or path
    with explained(first), replacing(first) as file:
        torch.save(state, file)
    if also is not None:
        with explained(path), open(also, "rb") as source, replacing(path) as file:
            shutil.copyfileobj(source, file)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` if the block ends well, and is gone if it does not."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a failed write into a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:  # a defect, not the disk
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        todo = "the disk is full: make room" if full else "check the folder and its permissions"
        kept = f"; the {path.name} of before is still there" if path.is_file() else ""
        reason = cause.strerror or str(cause)
        if cause.filename not in (None, path, str(path)):
            reason += f": {cause.filename}"
        raise CheckpointError(f"cannot write {path} ({reason}): {todo}{kept}") from error


def write_json(value: Any, path: Path) -> None:
    """Writes a result, whole or not at all, into a folder that is made where there is none.

    Raises: CheckpointError: it cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch.save hides it behind a RuntimeError of its writer."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def check_finite(state: dict[str, Any]) -> None:
    """Raises NonFiniteError, naming the tensor, where a checkpoint would be poisoned."""
    for key in ("student", "teacher", "optimizer", "dino_loss"):
        for name, tensor in _tensors(state.get(key), key):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{name} is not finite: the checkpoint is not written")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU: torch's, or a .safetensors.

    Raises: CheckpointError: no such file, truncated, or holding more than tensors and plain values
        (nothing in the file is run).
    """
    state = _read(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dict of weights")
    return state


def load_tensor(path: Path) -> Tensor:
    """Reads a file that holds one tensor onto the CPU; raises CheckpointError as load does."""
    value = _read(path)
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a tensor")
    return value


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise CheckpointError(
                f"{path} holds more than tensors and plain values: code ({code[1]}), which is not "
                "run; take weights from a source that you trust, saved as a state_dict"
            ) from error
        # What torch says of it advises to run what the file holds.
        raise CheckpointError(
            f"{path} is truncated or no checkpoint, which torch.save or safetensors writes: take "
            "an older one, or move it away to start again"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({_first(error)}): it is truncated or no checkpoint; "
        "take an older one, or move it away to start again"
    )


def _first(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).partition("\n")[0]


def strip_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`state` with `prefix` taken off the names that begin with it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def check_shapes(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Raises CheckpointError where `state` does not fit `module`, naming up to three tensors."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not expected" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{what}: the weights are of another network: {'; '.join(problems[:3])}{more}"
        )
