"""Loaders and evaluations on a simulated GPU: see test_cuda_path.py."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import re
from collections import deque

import pytest
import torch

from fastdino.data import loader_fused
from tests.commands import write_colours
from tests.loaders import assert_same, build_loader, make_config, needs_dali, photo

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="simulates a GPU with Triton's interpreter, on machines without one",
)
if importlib.util.find_spec("triton") is not None:
    from tests.simulated_cuda.objects import Stream
    from tests.simulated_cuda.streams import CudaError

# Loaders.

SMALL = {
    "patch_size": 4, "global_crops_size": 8, "local_crops_size": 4, "local_crops_number": 1,
    "batch_size_per_gpu": 2, "num_workers": 2,
}  # fmt: skip
LAST = 6  # the step from which three batches remain


@pytest.fixture
def nvjpeg(gpu, monkeypatch):
    fake = pytest.importorskip("tests.simulated_cuda.dali")
    monkeypatch.setattr(
        "fastdino.data.dali_decoding._pipeline", functools.partial(fake.FakeNvjpeg, gpu)
    )


def used_on_the_gpu(loader, start_step: int = LAST) -> list[list[torch.Tensor]]:
    """Return the crops after the main thread's stream has used them, and close the loader."""
    with contextlib.closing(loader):
        used = [
            [crop.to("cuda", non_blocking=True) * 1 for crop in batch]
            for batch in loader.epoch(0, start_step)
        ]
    return [[crop.cpu() for crop in batch] for batch in used]


@pytest.mark.parametrize(
    ("crops", "decode"),
    [
        ("torchvision", "auto"),
        ("fused", "pillow"),
        pytest.param("fused", "gpu", marks=needs_dali),
    ],
)
def test_loader_hands_exact_crops_over_to_the_step(gpu, photos, request, crops, decode):
    if decode == "gpu":
        request.getfixturevalue("nvjpeg")
    sizes = SMALL | {"num_workers": 0 if crops == "torchvision" else 2}
    expected = list(build_loader(make_config(**SMALL | {"num_workers": 0}), photos).epoch(0, LAST))
    loader = build_loader(make_config(crops=crops, decode=decode, **sizes), photos, device="cuda")
    assert_same(used_on_the_gpu(loader), expected)
    if crops == "fused":
        assert all("cuda" in part for part in loader.description.split(" on ")[1:2])
        assert all(kernel.startswith("multi_crop_") for kernel in gpu.launches)


@needs_dali
def test_dali_loader_hands_its_crops_over_to_the_step(gpu, photos, monkeypatch):
    dali = importlib.import_module("fastdino.augmentation.dali")
    fake = importlib.import_module("tests.simulated_cuda.dali")
    config = make_config(crops="dali", **SMALL)
    expected = [[c.clone() for c in batch] for batch in build_loader(config, photos).epoch(0, LAST)]
    pipeline = functools.partial(fake.FakeCropPipeline, gpu, dali.crop_pipeline)
    monkeypatch.setattr(dali, "crop_pipeline", pipeline)
    assert_same(used_on_the_gpu(build_loader(config, photos, device="cuda")), expected)


def without_record_stream(monkeypatch, loader):
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)


def without_wait_event(monkeypatch, loader):
    monkeypatch.setattr(Stream, "wait_event", lambda *_: None)


def without_wait_for_copies(monkeypatch, loader):
    never = property(lambda _: None, lambda *_: None)
    monkeypatch.setattr(loader_fused._Staging, "_copied", never, raising=False)


def without_held_images(monkeypatch, loader):
    loader._backend._held = deque(maxlen=0)


@pytest.mark.parametrize(
    ("break_loader", "message"),
    [
        (without_record_stream, "record_stream is missing"),
        (without_wait_event, "wait_stream or wait_event is missing"),
        (without_wait_for_copies, "pinned memory was rewritten while a copy on stream 1"),
        pytest.param(
            without_held_images, "allocated on DALI's stream was freed while .*multi_crop",
            marks=needs_dali,
        ),
    ],
)  # fmt: skip
def test_mistake_in_the_fused_loader_is_reported(
    gpu, photos, monkeypatch, request, break_loader, message
):
    decode = "pillow"
    if break_loader is without_held_images:
        decode = "gpu"
        request.getfixturevalue("nvjpeg")
    monkeypatch.setattr(gpu, "launch_kernel", lambda *_: None)  # the pixels do not matter
    config = make_config(crops="fused", decode=decode, **SMALL)
    loader = build_loader(config, photos, device="cuda")
    break_loader(monkeypatch, loader)
    with contextlib.suppress(CudaError):
        used_on_the_gpu(loader, 0)
    with contextlib.suppress(CudaError):
        gpu.check_copies(finished=True)
    assert any(re.search(message, fault) for fault in gpu.faults), gpu.faults
    gpu.faults.clear()


# Evaluations.


def on_both(gpu, run, *words) -> list[tuple[int, str, str]]:
    """Run a command on the CPU and on the GPU, and check that it used the latter."""
    results = [run(*words, "--device", "cpu")]
    before = len(gpu.waits)
    results.append(run(*words, "--device", "cuda"))
    assert len(gpu.waits) > before
    assert [status for status, *_ in results] == [0, 0], results
    return results


def test_knn_on_a_gpu_is_that_on_the_cpu(gpu, run_nano, tmp_path):
    root = write_colours(tmp_path)
    words = [
        "--data_path",
        root,
        "--resize",
        36,
        "--crop",
        32,
        "--num_workers",
        0,
        "--nb_knn",
        1,
        3,
    ]
    cpu, cuda = on_both(gpu, run_nano, "knn", *words, "--batch_size_per_gpu", 5)
    assert cuda == cpu
    assert "3-NN classifier result" in cuda[1]


def test_attention_on_a_gpu_is_that_on_the_cpu(gpu, run_nano, tmp_path):
    photo(0).save(tmp_path / "photo.png")
    words = ["--image_path", tmp_path / "photo.png", "--image_size", 32, 48]
    words += ["--output_dir", tmp_path / "out"]
    statistics = []
    for device in ("cpu", "cuda"):
        status, _, error = run_nano("attention", *words, "--device", device)
        assert status == 0, error
        (image,) = json.loads((tmp_path / "out/attention.json").read_text())["images"]
        statistics.append(
            [value for head in image["heads"] for value in (*head.pop("peak"), *head.values())]
        )
    assert statistics[1] == pytest.approx(statistics[0], rel=1e-4)
    assert gpu.waits


def test_linear_probe_on_a_gpu_is_that_on_the_cpu(gpu, run_nano, tmp_path):
    words = ["--data_path", write_colours(tmp_path), "--num_workers", 0, "--epochs", 2]
    words += ["--batch_size_per_gpu", 4]
    logs = []
    for device in ("cpu", "cuda"):
        status, _, error = run_nano(
            "linear", *words, "--output_dir", tmp_path / device, "--device", device
        )
        assert status == 0, error
        lines = (tmp_path / device / "log.txt").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert logs[1] == [pytest.approx(epoch, rel=1e-4) for epoch in logs[0]]
    assert any(wait.where.startswith("fastdino/evals/linear_probe.py") for wait in gpu.waits)
