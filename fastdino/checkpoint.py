"""Save, load and validate checkpoints; loading never runs code from the file."""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdino import numpy_pickles
from fastdino.errors import CheckpointError, NonFiniteError, UserError
from fastdino.files import atomic_write, explain_write_errors

# Types allowed in a checkpoint in addition to torch's defaults. The paper's code saves its flags as
# a Namespace, on clusters with paths in it, and lr and weight decay as NumPy scalars. Both modules
# have two names, depending on the versions. Constructing any of these runs no code of the file.
_PATHS = {
    "PosixPath": PurePosixPath,
    "PurePosixPath": PurePosixPath,
    "WindowsPath": PureWindowsPath,
    "PureWindowsPath": PureWindowsPath,
}
SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    (numpy_pickles.PlainDtype, "numpy.dtype"),
    *((numpy_pickles.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(
        (path, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, path in _PATHS.items()
    ),
]


COPIED_AT_ONCE = 1 << 24  # bytes


def save(state: dict[str, Any], path: Path, *, also: Path | None = None) -> None:
    """Save `state` to `path`, and a copy to `also`; each write is atomic.

    Raises:
        NonFiniteError: a tensor of student, teacher, optimizer or dino_loss is not finite.
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    check_finite(state)
    write(state, path, also=also)


def write(state: dict[str, Any], path: Path, *, also: Path | None = None) -> None:
    """Save a state that is known to be finite, as `save` does; raise CheckpointError."""
    # `path` last: a run killed between the two writes resumes from the old one and repeats both.
    first = also or path
    with explain_write_errors(first), atomic_write(first) as file:
        torch.save(state, file)
    if also is not None:
        with explain_write_errors(path), open(also, "rb") as source, atomic_write(path) as file:
            shutil.copyfileobj(source, file, COPIED_AT_ONCE)


def check_finite(state: dict[str, Any]) -> None:
    """Raise NonFiniteError with the tensor's name if a weight, moment or center is not finite.

    It reads each tensor once, and waits once for each device.
    """
    finite: dict[torch.device, dict[str, Tensor]] = {}
    for key in ("student", "teacher", "optimizer", "dino_loss"):
        for name, tensor in _tensors(state.get(key), key):
            tensor = local_part(tensor)
            if tensor.is_floating_point() and tensor.numel():
                extremes = torch.stack(torch.aminmax(tensor))  # NaN if any value is
                finite.setdefault(tensor.device, {})[name] = torch.isfinite(extremes).all()
    for flags in finite.values():
        for name, good in zip(flags, torch.stack([*flags.values()]).tolist(), strict=True):
            if not good:
                raise NonFiniteError(f"{name} is not finite: the checkpoint is not written")


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, and other tensors as they are."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")


def load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Load a torch checkpoint or a .safetensors file onto the CPU.

    Args: mapped: read a tensor's values only when they are used, for callers that need few of them.

    Raises: CheckpointError: the file is missing, truncated, or contains anything but tensors and
        plain values.
    """
    state = _read(path, mapped)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dict of weights")
    return state


def load_tensor(path: Path) -> Tensor:
    """Load a file that contains a single tensor onto the CPU; raise CheckpointError as load()."""
    value = _read(path)
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a tensor")
    return value


def _read(path: Path, mapped: bool = False) -> Any:
    if path.exists() and not path.is_file():  # reading a pipe could block
        raise CheckpointError(f"{path} cannot be read: it is not a regular file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(SAFE_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        # torch's own message advises to disable weights_only, so it is not repeated.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise CheckpointError(
                f"{path} contains code ({code[1]}), which is not run: expected only tensors and "
                "plain values; use weights from a source that you trust, saved as a state_dict"
            ) from error
        reason = "unexpected content"
        cause: Exception = error
    except MemoryError:
        raise
    except Exception as error:  # a broken or crafted file raises many types
        reason = str(error).partition("\n")[0] or type(error).__name__
        cause = error
    raise CheckpointError(
        f"{path} cannot be read ({reason}): it is truncated or not a checkpoint written by "
        "torch.save or safetensors; use an older one, or move it away to start from scratch"
    ) from cause


@contextmanager
def explain_content(path: Path | str, todo: str = "use another file") -> Iterator[None]:
    """Convert an error from values of another type or size to a CheckpointError with the path.

    Args: todo: the end of the message.
    """
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, AttributeError) as e:
        reason = f"{type(e).__name__}: {e}".partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be used ({reason}): it is damaged, or has another structure; {todo}"
        ) from e


def check_count(state: dict[str, Any], name: str, default: int = 0) -> int:
    """Return a number of steps, epochs or images in a checkpoint; raise CheckpointError."""
    value = state.get(name, default)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{name} must be a whole number of at least 0, got {value!r:.40}")
    return value


def strip_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return `state` with `prefix` removed from the names that start with it.

    Raises: CheckpointError: `state`, which comes from a file, does not map names to tensors.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"expected tensors by name, got a {type(state).__name__}")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def add_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return `state` with `prefix` in front of every name."""
    return {prefix + name: tensor for name, tensor in state.items()}


def check_shapes(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Raise CheckpointError, listing up to three tensors, unless `state` fits `module`.

    Args: what: the start of the message.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not expected" for name in state if name not in own]
    problems += [
        f"{name} is a {kind}, expected a dense tensor of real numbers"
        for name in own
        if name in state and (kind := unsuitable_kind(state[name]))
    ]
    problems += [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if isinstance(tensor := state.get(name), Tensor) and tensor.shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{what}: the weights do not match the network: {'; '.join(problems[:3])}{more}"
        )


def unsuitable_kind(value: Any) -> str:
    """Return what a value is if it cannot be a weight, else "".

    A tensor with more elements than its storage repeats them: a copy could fill the memory.
    """
    if not isinstance(value, Tensor):
        return type(value).__name__
    value = local_part(value)
    if value.layout is not torch.strided or value.is_quantized:
        return "sparse or quantized tensor"
    if value.is_meta:
        return "tensor without data"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "tensor of repeated values"
    return "complex tensor" if value.is_complex() else ""
