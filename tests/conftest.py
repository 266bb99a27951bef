from __future__ import annotations

import importlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import TrainConfig

if not torch.cuda.is_available():
    # Read when a module of kernels is first imported: they then run on the CPU, line by line.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def rounding_interpreter(monkeypatch) -> None:
    """Triton's interpreter truncates fp32 to bf16; a GPU, and PyTorch, round to nearest."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounding(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(values, source, target, mode)
        floats = torch.from_numpy(np.array(values).view(np.float32))
        return floats.bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture
def tiny() -> Callable[..., TrainConfig]:
    """The config of a network of a few tokens an image, and crops that suit it."""

    def make(**overrides: Any) -> TrainConfig:
        settings = {
            "arch": "vit_nano",
            "patch_size": 8,
            "out_dim": 64,
            "global_crops_size": 32,
            "local_crops_size": 16,
            "local_crops_number": 2,
            "batch_size_per_gpu": 4,
            "epochs": 3,
            "warmup_epochs": 1,
            "drop_path_rate": 0.0,
            "lr": 0.05,
            "device": "cpu",
            "crops": "torchvision",
            "num_workers": 0,
        }
        return TrainConfig(**(settings | overrides))

    return make


@pytest.fixture(
    params=[
        ("torch", "cpu"),
        ("triton", "cpu"),
        pytest.param(("torch", "cuda"), marks=pytest.mark.gpu),
        pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def target(request) -> dict[str, str]:
    """An implementation of the kernels and where it runs: {"impl": ..., "device": ...}."""
    impl, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if (impl, device) == ("triton", "cpu") and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here: the interpreter is for machines without one")
    return {"impl": impl, "device": device}


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Fresh memory holds NaN (integers: 77), so that what a kernel does not write shows."""
    empty = torch.empty

    def poisoned_empty(*args: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """18 small JPEGs of noise in 3 classes: 4 steps of 4 an epoch, 2 left over."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(18):
        folder = root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg")
    return root


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Encodes a small picture of noise."""

    def encode(
        seed: int = 0, size: tuple[int, int] = (20, 10), form: str = "JPEG", **options: Any
    ) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, form, **options)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def make_tar() -> Callable[..., Path]:
    """Writes a tar of named members: bytes, or a TarInfo of something without."""

    def make(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, mode) as tar:
            for name, content in members.items():
                info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo()
                info.name = name
                if isinstance(content, bytes):
                    info.size = len(content)
                tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
        return path

    return make


@pytest.fixture
def crops_of() -> Callable[..., list[torch.Tensor]]:
    """Makes normal noise in the shapes of a config's crops, in the default dtype."""

    def make(config: TrainConfig, iteration: int) -> list[torch.Tensor]:
        generator = np.random.default_rng([config.seed, iteration])
        globals_, locals_ = [config.global_crops_size] * 2, [config.local_crops_size]
        return [
            torch.from_numpy(generator.standard_normal((config.images_per_step, 3, size, size))).to(
                torch.get_default_dtype()
            )
            for size in globals_ + locals_ * config.local_crops_number
        ]

    return make
