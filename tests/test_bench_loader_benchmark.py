"""`fastdino bench --loader`: the whole command, its figures, its report, its errors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu.subprocesses import MARK, marked_processes
from fastdino import cli
from fastdino.bench import loader_benchmark
from fastdino.bench.baselines import loaders
from fastdino.bench.harness import Outcome, Sample
from fastdino.bench.measurement import DeviceTime
from fastdino.data import scan_images
from tests.loaders import HAS_DALI, build_loader

TINY = [
    "bench", "--loader", "--images", "8", "--batch_size_per_gpu", "4", "--num_workers", "1",
    "--global_crops_size", "32", "--local_crops_size", "16", "--local_crops_number", "2",
    "--rounds", "2", "--seconds", "0.05", "--device", "cpu", "--timeout", "600",
]  # fmt: skip


def has(package):
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize(
    ("module", "crops", "decode"),
    [
        ("data.loader_dali", "dali", "auto"),
        ("data.loader_dali", "fused", "gpu"),
        ("augmentation.cpu_kernels", "fused", "auto"),
    ],
)
def test_a_loader_needs_its_packages(module, crops, decode, monkeypatch):
    monkeypatch.setitem(sys.modules, f"fastdino.{module}", None)
    task = SimpleNamespace(on_gpu=False)
    with pytest.raises(ModuleNotFoundError, match=module):  # reported as skipped by the worker
        loaders.OwnLoader(task, crops, decode)


def test_the_command_measures_every_loader(pictures, tiny, tmp_path, capsys):
    # The threads of an open loader must not block the workers of the baselines.
    other = build_loader(tiny(crops="dali" if HAS_DALI else "auto"), scan_images(pictures))
    next(other.epoch(0))
    assert cli.main([*TINY, "--output", str(tmp_path / "new")]) == 0
    other.close()

    text = (tmp_path / "new" / "loader.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    record = json.loads((tmp_path / "new" / "loader.json").read_text())
    assert set(record) == {"environment", "settings", "images", "arms"}
    assert {"processor", "cores", "commit", "torch", "pillow"} <= set(record["environment"])
    assert record["settings"]["num_workers"] == 1
    assert record["images"]["number"] == 8
    assert "noise with detail at all scales" in text
    on_cpu = [name for name in loaders.BASELINES if name not in loaders.GPU_ONLY]
    assert list(record["arms"]) == on_cpu
    for name, result in record["arms"].items():
        assert f"| {name} | " in text
        if result["status"] == "skipped":
            assert "not installed" in result["reason"]
            assert not all(has(package) for package in ("lightly", "numba", "nvidia"))
            continue
        assert result["status"] == "measured"
        low, high = result["range"]
        assert 0 < low <= result["images_per_second"] <= high
        assert len(result["rounds"]) == 2
        assert all(one["images"] % 4 == 0 for one in result["rounds"])
        if sys.platform == "linux":
            # One processor; a clock tick of 10 ms for each process.
            assert all(0 <= one["cpu_seconds"] < one["seconds"] + 0.1 for one in result["rounds"])
    assert record["arms"]["paper"]["times_paper"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_the_command_ends_and_leaves_no_process(tmp_path):
    """Loaders with worker processes and with threads, and their fork server."""
    variables = {MARK: "a-loader-benchmark", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "output").open("w") as output:
        command = [sys.executable, "-m", "fastdino", *TINY, "--baselines", "paper,torchvision"]
        done = subprocess.run(
            command, stdout=output, stderr=output, env=os.environ | variables, timeout=600
        )
    assert done.returncode == 0, (tmp_path / "output").read_text()
    for _ in range(300):  # the fork server ends after its client
        if not list(marked_processes(variables[MARK])):
            return
        time.sleep(0.1)
    pytest.fail(f"left over: {list(marked_processes(variables[MARK]))}")


def test_data_path_accepts_a_tar(pictures, make_tar, tmp_path):
    files = {file.name: file.read_bytes() for file in sorted(pictures.rglob("*.jpg"))}
    make_tar(tmp_path / "shard.tar", files)
    command = [*TINY, "--baselines", "decode-pillow", "--output", str(tmp_path)]
    assert cli.main([*command, "--data_path", str(tmp_path / "shard.tar")]) == 0
    record = json.loads((tmp_path / "loader.json").read_text())
    assert list(record["arms"]) == ["decode-pillow"]
    assert record["arms"]["decode-pillow"]["times_paper"] is None
    sizes = [len(data) for data in files.values()]
    evenly = np.linspace(0, len(files) - 1, 8).round().astype(int)
    assert record["images"]["number"] == 8
    assert record["images"]["mean_bytes"] == round(np.mean([sizes[i] for i in evenly]))
    assert (record["images"]["width"], record["images"]["height"]) == (48, 40)


def test_the_table_shows_the_figures_and_a_failure_fails_the_command(monkeypatch, capsys):
    outcomes = {
        "paper": Outcome(samples=[Sample(140, 2.0, 3.9), Sample(120, 2.0, 4.0)]),
        "lightly": Outcome(status="skipped", reason="lightly is not installed"),
        "torchvision": Outcome(status="failed", reason="no answer within 120 s"),
        "fused": Outcome(samples=[Sample(700, 2.0, 3.8), Sample(660, 2.0, 4.0)]),
        "decode-pillow": Outcome(samples=[Sample(100, 2.0)]),
    }
    monkeypatch.setattr(loader_benchmark, "measure_workers", lambda *_, **options: outcomes)
    assert cli.main(TINY) == 1
    text = capsys.readouterr().out
    for line in (
        "8 images, 500 x 375 px (median), ",
        "2 crops of 32 px and 2 of 16 px per image, batches of 4, 1 workers or threads, ",
        "| paper | 65 | 60 - 70 | 1.00 | 1.98 | 30.60 | 1.00 | the reference |",
        "| lightly | skipped | - | - | - | - | - | - |",
        "lightly is not installed |",
        "| torchvision | failed | - | - | - | - | - | - | ours, --crops torchvision",
        "no answer within 120 s |",
        "| fused | 340 | 330 - 350 | 5.25 | 1.95 | 5.74 | 5.32 | equal | ours, --crops fused |",
        "| decode-pillow | 50 | 50 - 50 | 0.71 | - | - | - | - |",
    ):
        assert line in text, line


def test_the_kernel_baseline_makes_the_crops(pictures, tiny, monkeypatch, crops_by_pil):
    queued = []

    def device_time(calls, device, sleep):
        queued.append(len(calls))
        return DeviceTime(0.001 * len(queued), queued=True)

    monkeypatch.setattr(loaders, "device_time", device_time)
    config = tiny(global_crops_size=10, local_crops_size=8, batch_size_per_gpu=2)
    dataset = scan_images(pictures)
    kernel = loaders.KernelTimer(loaders.LoaderTask(dataset, config, "cpu"))
    sample = kernel(120)
    assert queued == [50, 50, 20]  # no more than fit into the queue of a GPU
    assert (sample.count, sample.seconds) == (240, pytest.approx(0.05 + 0.1 + 0.06))
    pictures_of = []
    for _ in range(4):
        images, groups = next(kernel._batches)
        made = loaders.multi_crop_groups(images, groups, mean=loaders.MEAN, std=loaders.STD)
        assert [tuple(crops.shape) for crops in made] == [(2, 2, 3, 10, 10), (2, 2, 3, 8, 8)]
        for crops, (params, size) in zip(made, groups, strict=True):
            assert torch.equal(crops, crops_by_pil(images, params, size))
        pictures_of.append([image.numpy().tobytes() for image in images])
    assert pictures_of[3] == pictures_of[0]  # three batches in turn, of different images
    expected = [np.array(dataset.read_rgb(i)).tobytes() for i in range(6)]
    assert [image for batch in pictures_of[:3] for image in batch] == expected
    assert [tuple(crops.shape) for crops in kernel.make()] == [(2, 2, 3, 10, 10), (2, 2, 3, 8, 8)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_command_on_a_gpu(tmp_path):
    command = [word if word != "cpu" else "cuda" for word in TINY]
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "loader.json").read_text())
    assert list(record["arms"]) == list(loaders.BASELINES)
    for name in ("paper", "fused-pillow", "kernel"):
        assert record["arms"][name]["images_per_second"] > 0
