"""Runs of commands that record what they wrote, and how they computed it."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fastdino import cli
from fastdino.evals import options
from fastdino.models.vit import VisionTransformer
from fastdino.models.weights import load_backbone
from fastdino.waiting import DaemonExecutor

Answer = dict[str, Any]
UNSTABLE = (".lock", ".mp4", ".avi", ".pt", ".onnx")  # of no interest, or with times in them


@dataclass
class Ran:
    """A command that has run.

    Attributes:
        folder: its output folder.
        images: the batches that a ViT took.
        workers: what was asked of each data loader or pool of threads.
        compared_on: the device for comparisons of features if there were a GPU.
        places: paths of the data by name.
    """

    folder: Path
    status: int = 0
    out: str = ""
    err: str = ""
    images: list[torch.Tensor] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)
    compared_on: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """Return the paths of the files written."""
        found = [path for path in self.folder.rglob("*") if path.is_file()]
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file without its settings."""
        text = (self.folder / name).read_text().replace(str(self.folder), "{out}")
        return {key: value for key, value in json.loads(text).items() if key != "settings"}

    @property
    def answer(self) -> Answer:
        """Return what was written, without settings, as arrays and text by name."""
        assert self.status == 0, self.err
        answer: Answer = {}
        for name in self.files:
            if not name.endswith(UNSTABLE):
                answer |= _content(self, name)
        return answer

    def nano(self) -> VisionTransformer:
        """Return the network of the file `nano`, in eval mode."""
        backbone = load_backbone(
            self.places["nano"], checkpoint_key=None, arch="vit_nano", patch_size=8
        )
        assert isinstance(backbone.module, VisionTransformer)
        return backbone.module

    def batch_sizes(self) -> list[int]:
        return [len(images) for images in self.images]


def _content(ran: Ran, name: str) -> Answer:
    path = ran.folder / name
    suffix = path.suffix
    if suffix == ".json":
        return _flat(ran.json(name), name)
    if suffix in (".png", ".jpg"):
        with Image.open(path) as image:
            return {name: np.asarray(image).astype(float)}
    if suffix == ".npy":
        # The folder's name is a hash of the settings.
        return {f"{path.parent.name.partition('-')[0]}/{path.name}": np.load(path)}
    if suffix == ".npz":
        with np.load(path) as file:
            return {f"{name}:{k}": file[k] for k in file.files if file[k].dtype.kind == "f"}
    if suffix in (".pth", ".tar"):
        return _flat(torch.load(path, weights_only=True), name)
    if name.endswith("log.txt"):
        return _flat([json.loads(line) for line in path.read_text().splitlines()], name)
    return {name: path.read_bytes()}


def _flat(value: Any, name: str) -> Answer:
    """Return the leaves of nested dicts and lists by their paths."""
    if isinstance(value, dict):
        pairs = [(key, one) for key, one in value.items() if key != "protocol"]
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    elif isinstance(value, (torch.Tensor, int, float)):
        return {name: np.asarray(value, np.float64)}
    else:
        return {name: str(value)}
    return {k: v for key, one in pairs for k, v in _flat(one, f"{name}:{key}").items()}


def same(answer: Answer, other: Answer) -> bool:
    """Return True if two answers are equal."""
    return answer.keys() == other.keys() and all(
        np.array_equal(answer[name], other[name], equal_nan=isinstance(answer[name], np.ndarray))
        for name in answer
    )


def close(answer: Answer, other: Answer) -> bool:
    """Return True if two answers are equal up to rounding."""
    if answer.keys() != other.keys():
        return False
    return all(_close(answer[name], other[name]) for name in answer)


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, np.ndarray):
        return bool(a == b)
    picture: NDArray[Any] = a
    if picture.ndim > 1 and picture.dtype == float and picture.max() > 2:  # a picture, in levels
        return a.shape == b.shape and float(np.abs(a - b).mean()) < 2
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-2, atol=1e-3, equal_nan=True)


def run_command(
    words: str,
    folder: Path,
    environment: dict[str, str] | None = None,
    places: dict[str, str] | None = None,
) -> Ran:
    """Run a command line of `fastdino` in this process.

    Args:
        words: {out} stands for `folder`.
        environment: variables to set.
        places: of the result.
    """
    ran = Ran(folder, places=places or {})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        _record(patch, ran)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            ran.status = cli.main(shlex.split(words.replace("{out}", str(folder))))
    ran.out, ran.err = out.getvalue(), err.getvalue()
    return ran


def _record(patch: pytest.MonkeyPatch, ran: Ran) -> None:
    """Keep what passes through the network, the loaders and comparison_device; change nothing."""

    def before(owner: Any, name: str, note: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            note(*args, **kwargs)
            return original(*args, **kwargs)

        patch.setattr(owner, name, call)

    def note_device(args: Any, device: torch.device) -> None:
        ran.compared_on.append(choose(args, torch.device("cuda")).type)

    choose = options.comparison_device
    before(VisionTransformer, "embed", lambda _, images: ran.images.append(images.detach().clone()))
    before(
        torch.utils.data.DataLoader,
        "__init__",
        lambda *_, num_workers=0, **__: ran.workers.append(num_workers),
    )
    before(DaemonExecutor, "__init__", lambda _, workers: ran.workers.append(workers))
    before(options, "comparison_device", note_device)
