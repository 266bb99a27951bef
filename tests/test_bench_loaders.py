"""`fastdino bench --loader`: the whole command, its figures, its report, its refusals."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdino import cli
from fastdino.bench import arms, loaders
from fastdino.bench.report import Report
from fastdino.bench.stages import STAGES, StageTimes
from fastdino.bench.timing import Outcome, Sample
from fastdino.data import scan_images
from tests.loaders import HAS_DALI, build_loader

TINY = [
    "bench", "--loader", "--images", "8", "--batch_size_per_gpu", "4", "--num_workers", "1",
    "--global_crops_size", "32", "--local_crops_size", "16", "--local_crops_number", "2",
    "--rounds", "2", "--seconds", "0.05", "--device", "cpu", "--timeout", "600",
]  # fmt: skip
CPU_ARMS = [name for name in arms.ARMS if name not in arms.GPU_ARMS]


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
def test_an_arm_whose_package_is_missing_is_skipped(module, crops, decode, monkeypatch):
    monkeypatch.setitem(sys.modules, f"fastdino.{module}", None)
    task = SimpleNamespace(on_gpu=False)
    with pytest.raises(ModuleNotFoundError, match=module):  # which isolated.py tells as skipped
        arms.OwnLoader(task, crops, decode)


def test_the_whole_command_beside_a_loader_that_is_open(pictures, tiny, tmp_path, capsys):
    # Its threads must not keep the workers of others waiting.
    beside = build_loader(tiny(crops="dali" if HAS_DALI else "auto"), scan_images(pictures))
    next(beside.epoch(0))
    assert cli.main([*TINY, "--stages", "--output", str(tmp_path / "new")]) == 0
    beside.close()

    text = (tmp_path / "new" / "loader.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    record = json.loads((tmp_path / "new" / "loader.json").read_text())
    assert set(record) == {"environment", "settings", "images", "arms", "stages"}
    assert {"processor", "cores", "commit", "torch", "pillow"} <= set(record["environment"])
    assert record["settings"]["num_workers"] == 1
    assert record["images"]["number"] == 8
    assert "noise with detail at all scales" in text
    assert list(record["arms"]) == CPU_ARMS
    for name, arm in record["arms"].items():
        assert f"| {name} | " in text
        if arm["status"] == "skipped":
            assert "not installed" in arm["reason"]
            assert not all(has(package) for package in ("lightly", "numba", "nvidia"))
            continue
        assert arm["status"] == "measured"
        low, high = arm["range"]
        assert 0 < low <= arm["images_per_second"] <= high
        assert len(arm["rounds"]) == 2
        assert all(one["images"] % 4 == 0 for one in arm["rounds"])
        if sys.platform == "linux":
            # One processor; the clock ticks every 10 ms, for each of its processes.
            assert all(0 <= one["cpu_seconds"] < one["seconds"] + 0.1 for one in arm["rounds"])
    assert record["arms"]["paper"]["times_paper"] == 1
    if has("numba"):
        assert set(record["stages"]["by_stage"]) == set(STAGES)
        assert record["stages"]["by_stage"]["crop + resize"]["fused_ms"] > 0


def test_data_path_takes_what_train_takes(pictures, make_tar, tmp_path):
    files = {file.name: file.read_bytes() for file in sorted(pictures.rglob("*.jpg"))}
    make_tar(tmp_path / "shard.tar", files)
    command = [*TINY, "--arms", "decode-pillow", "--output", str(tmp_path)]
    assert cli.main([*command, "--data_path", str(tmp_path / "shard.tar")]) == 0
    record = json.loads((tmp_path / "loader.json").read_text())
    assert list(record["arms"]) == ["decode-pillow"]
    assert record["arms"]["decode-pillow"]["times_paper"] is None
    sizes = [len(data) for data in files.values()]
    evenly = np.linspace(0, len(files) - 1, 8).round().astype(int)
    assert record["images"]["number"] == 8
    assert record["images"]["mean_bytes"] == round(np.mean([sizes[i] for i in evenly]))
    assert (record["images"]["width"], record["images"]["height"]) == (48, 40)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--arms paper,ffcv", "there is no arm 'ffcv'; there are paper, lightly"),
        ("--arms kernel", "kernel needs a GPU"),
        ("--images 3", "3 images are fewer than a batch of 4"),
        ("--images 0", "--images must be at least 1, got 0"),
        ("--num_workers 0", "--num_workers must be at least 1, got 0"),
        ("--rounds 0", "--rounds must be at least 1"),
        ("--seconds nan", "--seconds must be a finite number above 0, got nan"),
        ("--timeout 0", "--timeout must be a finite number above 0"),
        ("--local_crops_scale 0.5 0.1", "--local_crops_scale must be 0 < smallest"),
        ("--data_path /nowhere", "/nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(words, message, capsys):
    assert cli.main([*TINY, *words.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastdino bench: error: ")
    assert message in error


def test_an_arm_that_fails_makes_the_command_fail(monkeypatch, capsys):
    failed = Outcome(status="failed", reason="no answer within 120 s")
    good = Outcome(samples=[Sample(100, 2.0, None)])
    monkeypatch.setattr(loaders, "take_turns", lambda *_: {"paper": failed, "decode-pillow": good})
    assert cli.main([*TINY, "--arms", "paper,decode-pillow"]) == 1
    out = capsys.readouterr().out
    assert "| paper | failed | - | - | - | - | - | - | the paper's loader" in out
    assert "no answer within 120 s |" in out
    assert "| decode-pillow | 50 | 50 - 50 | - | - | - | - | - |" in out


def report(**changes):
    """One of known figures."""
    fields = {
        "environment": {"processor": "A CPU"},
        "settings": {
            "batch_size_per_gpu": 64, "num_workers": 2, "global_crops_size": 224,
            "local_crops_size": 96, "local_crops_number": 8, "device": "cpu", "rounds": 3,
            "seconds": 3.0,
        },
        "images": {"number": 200, "width": 500, "height": 375, "mean_bytes": 70123, "kind": "k"},
        "arms": {
            "paper": Outcome(samples=[Sample(140, 2.0, 3.9), Sample(120, 2.0, 4.0)]),
            "lightly": Outcome(status="skipped", reason="lightly is not installed"),
            "fused": Outcome(samples=[Sample(700, 2.0, 3.8), Sample(660, 2.0, 4.0)]),
        },
        "stages": StageTimes(
            images=24, rounds=5, pillow=dict.fromkeys(STAGES, 5.0),
            fused=dict.fromkeys(STAGES, 1.0) | {"hue": 0.0}, whole=4.321,
        ),
    }  # fmt: skip
    return Report(**(fields | changes))


def test_the_table_says_the_figures():
    text = report().markdown()
    for line in (
        "| processor | A CPU |",
        "200 images, 500 x 375 px (median), 70 KB (mean); k.",
        "| paper | 65 | 60 - 70 | 1.00 | 1.98 | 30.60 | 1.00 | the reference |",
        "| lightly | skipped | - | - | - | - | - | - |",
        "lightly is not installed |",
        "| fused | 340 | 330 - 350 | 5.25 | 1.95 | 5.74 | 5.32 | equal | ours, --crops fused |",
        "| blur | 5.00 | 1.00 | 5.0 | 8.7 | 1.74 |",
        "| hue | 5.00 | 0.00 | - | 3.8 | - |",
        "fused takes 4.32 ms for the crops",
    ):
        assert line in text, line
    assert "2 workers or threads" in text


def test_the_report_does_without_stages_and_says_why():
    assert "## Stages" not in report(stages=None).markdown()
    assert report(stages=None).as_json()["stages"] is None
    text = report(stages="numba is not installed").markdown()
    assert text.endswith("## Stages\n\nNot measured: numba is not installed.\n")


class FakeEvent:
    """A CUDA event whose interval lasts 5 ms."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 5.0


def test_the_kernel_alone_makes_the_crops_of_the_images(pictures, tiny, monkeypatch, crops_by_pil):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    config = tiny(global_crops_size=10, local_crops_size=8, batch_size_per_gpu=2)
    source = scan_images(pictures)
    kernel = arms.KernelAlone(arms.Task(source, config, "cpu"))
    sample = kernel(3)
    assert (sample.images, sample.seconds) == (6, 0.005)
    images = [torch.from_numpy(np.array(source.read_rgb(i))) for i in range(2)]
    made = kernel._make()
    assert [tuple(crops.shape) for crops in made] == [(2, 2, 3, 10, 10), (2, 2, 3, 8, 8)]
    for crops, (params, size) in zip(made, kernel._launches, strict=True):
        assert torch.equal(crops, crops_by_pil(images, params, size))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_command_on_a_gpu(tmp_path):
    command = [word if word != "cpu" else "cuda" for word in TINY]
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "loader.json").read_text())
    assert list(record["arms"]) == list(arms.ARMS)
    for name in ("paper", "fused-pillow", "kernel"):
        assert record["arms"][name]["images_per_second"] > 0
