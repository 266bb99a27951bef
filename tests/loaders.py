"""Helpers shared by the tests of loaders, decoders and crop backends."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import TrainConfig
from fastdino.augmentation import pillow
from fastdino.augmentation.params import draw_crops
from fastdino.data import loader_fused, loader_torchvision
from fastdino.data.image_dataset import scan_images as scan_images
from fastdino.data.loader import build_loader as build_resolved
from fastdino.runtime import resolve_crops

HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
all_loaders = pytest.mark.parametrize(
    "crops", ["torchvision", "fused", pytest.param("dali", marks=needs_dali)]
)


def make_config(**changes):
    values = {
        "batch_size_per_gpu": 4,
        "num_workers": 0,
        "local_crops_number": 2,
        "patch_size": 8,
        "global_crops_size": 48,
        "local_crops_size": 24,
        "crops": "torchvision",
        "max_bad_share": 0.3,
    }
    return TrainConfig(**(values | changes))


def build_loader(config, dataset, device="cpu", **options):
    """Build the loader that a run of this config has."""
    crops, decode = resolve_crops(config, device)
    return build_resolved(
        config, dataset, crops=crops.value, decode=decode.value, device=device, **options
    )


def photo(seed, size=(100, 75)):
    """An image with smooth colors, texture and hard edges, which resizing and blurring affect."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    pixels += rng.integers(-10, 11, pixels.shape)
    pixels[size[1] // 3 : size[1] // 2, size[0] // 4 : size[0] // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def assert_same(batches, others):
    for batch, other in itertools.zip_longest(batches, others):
        assert len(batch) == len(other)
        for crop, other_crop in zip(batch, other, strict=True):
            assert torch.equal(crop, other_crop)


def odd_folder(root):
    """Write 18 readable files of unusual formats and modes."""
    folder = root / "k"
    folder.mkdir(parents=True)
    image = photo(1)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.convert("L").save(folder / "gray.jpg", quality=95)
    image.convert("RGBA").save(folder / "rgba.png")
    image.quantize(32).save(folder / "palette.png")
    image.resize((1, 1)).save(folder / "pixel.png")
    image.save(folder / "named.jpg", format="PNG")
    image.save(folder / "progressive.jpg", progressive=True, quality=95)
    image.save(folder / "a.webp", lossless=True)
    image.save(folder / "a.tif")
    image.save(folder / "a.ppm")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif, quality=95)
    image.save(folder / "turned.tif", exif=exif)
    Image.fromarray(np.arange(7500, dtype=np.uint16).reshape(75, 100) * 8).save(folder / "deep.png")
    image.convert("LA").save(folder / "alpha.png")
    image.quantize(16).save(folder / "clear.png", transparency=3)
    image.convert("L").save(folder / "gray.bmp")
    image.save(folder / "moving.webp", save_all=True, append_images=[photo(2)], lossless=True)
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    return folder


def break_files(dataset, names):
    """Break the files of (index, "cut" | "gone" | "text" | "empty") pairs; return their paths."""
    for index, how in names:
        path = Path(dataset.paths[index])
        if how == "gone":
            path.unlink()
        else:
            contents = {"cut": path.read_bytes()[:-600], "text": b"not an image", "empty": b""}
            path.write_bytes(contents[how])
    return {dataset.paths[index] for index, _ in names}


def levels(crop, other):
    """Return the mean absolute difference in levels of 0..255."""
    std = torch.tensor(pillow.STD)[:, None, None] * 255
    return ((crop - other) * std).abs().mean().item()


def undrawn(monkeypatch, **kept):
    """Make the loaders draw plain boxes; `kept` sets other fields, or keeps them if None."""

    def plain(params):
        new = {}
        for name in ("flip", "jitter", "gray", "blur_radius", "solarize"):
            drawn = getattr(params, name)
            value = kept.get(name, 0)
            new[name] = drawn if value is None else torch.full_like(drawn, value)
        if "jitter_factor" in kept:
            neutral = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand_as(params.jitter_factor)
            mask = torch.tensor([n in kept["jitter_factor"] for n in range(4)])
            new["jitter"] = torch.ones_like(params.jitter)
            new["jitter_factor"] = torch.where(mask, params.jitter_factor, neutral)
            new["jitter_order"] = torch.arange(4).int().expand_as(params.jitter_order)
        return dataclasses.replace(params, **new)

    def draw(*args):
        return tuple(plain(params) for params in draw_crops(*args))

    for module in (loader_torchvision, loader_fused):
        monkeypatch.setattr(module, "draw_crops", draw)
    if HAS_DALI:
        monkeypatch.setattr("fastdino.data.loader_dali.draw_crops", draw)


# Forks for each line of its input: the code, the file of its output, and its arguments. The code
# runs as the main module. Prints its exit status and errors when no process holds their pipe.
SERVER = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests import loaders as t
for line in sys.stdin:
    code, output, *sys.argv[1:] = json.loads(line)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        break
    os.close(write)
    signal.alarm(100)
    with open(read) as pipe:
        errors = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(0)
    print(json.dumps([status, errors]), flush=True)
else:
    os._exit(0)
signal.alarm(90)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(os.open(output, os.O_WRONLY), 1)
os.dup2(write, 2)
os.close(read)
os.close(write)
exec(code)
"""


@functools.cache
def script_server():
    """Start the process that run_script forks: it has the imports. It ends with this process."""
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parents[1])]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def run_script(code, *args):
    """Run code in a process with a time limit; the code sees this module as `t`."""
    server = script_server()
    with tempfile.NamedTemporaryFile("r") as output:
        server.stdin.write(json.dumps([code, output.name, *map(str, args)]) + "\n")
        server.stdin.flush()
        status, errors = json.loads(server.stdout.readline())
        return SimpleNamespace(returncode=status, stdout=output.read(), stderr=errors)
