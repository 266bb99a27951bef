from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastdino.data import scan_images
from fastdino.data.image_files import Conversion
from fastdino.evals.feature_cache import FeatureCache, cache_key, labels_path
from tests.processes import run_two

IMAGES = torch.arange(30.0).view(10, 3, 1, 1)


def fill(path, stopped=lambda: False):
    cache = FeatureCache(lambda batch: batch.flatten(1), 3, 4, 0, torch.device("cpu"), stopped)
    return cache.load_or_write(path, TensorDataset(IMAGES, torch.arange(10)))


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_kill_while_a_resumed_cache_is_finished_loses_no_features(tmp_path, monkeypatch, kill_at):
    path = tmp_path / "val.npy"
    assert fill(path, stopped=lambda: True) is None
    calls = []

    def killing(call):
        def killed(*words, **options):
            calls.append(call)
            if len(calls) == kill_at:
                raise KeyboardInterrupt
            return call(*words, **options)

        return killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing(os.replace))
        patch.setattr(Path, "unlink", killing(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            fill(path)
    cached = fill(path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["val.labels.npy", "val.lock", "val.npy"]
    assert_complete(cached)


def assert_complete(cached):
    for index, (features, label) in enumerate(cached[i] for i in range(10)):
        assert torch.equal(features, IMAGES[index].flatten())
        assert label == index


@pytest.mark.parametrize("damage", ["cut", "empty", "no labels", "other shape", "garbage"])
def test_a_damaged_cache_is_written_again_with_a_warning(tmp_path, capsys, damage):
    path = tmp_path / "val.npy"
    fill(path)
    content = path.read_bytes()
    if damage == "no labels":
        (tmp_path / "val.labels.npy").unlink()
    elif damage == "other shape":
        np.save(path, np.zeros((9, 3), np.float32))
    else:
        path.write_bytes({"cut": content[:-20], "empty": b"", "garbage": b"x" * 200}[damage])
    assert_complete(fill(path))
    assert f"warning: {path} is damaged" in capsys.readouterr().err
    assert_complete(fill(path))
    assert capsys.readouterr().err == ""


def test_the_conversion_of_images_is_part_of_the_key(tmp_path, picture):
    (tmp_path / "a.jpg").write_bytes(picture())
    keys = [
        cache_key(torch.nn.Identity(), scan_images(tmp_path, conversion=conversion), {})
        for conversion in (
            Conversion(),
            Conversion(exif=True),
            Conversion(image_range="scale"),
            Conversion(),
        )
    ]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


def write_slowly(folder: Path) -> None:
    """Write the cache when both ranks are there; keep what is printed."""
    rank = int(os.environ["RANK"])
    (folder / f"started{rank}").touch()
    while not (folder / f"started{1 - rank}").exists():
        time.sleep(0.01)

    def slow(batch):
        time.sleep(0.3)
        return batch.flatten(1)

    cache = FeatureCache(slow, 3, 2, 0, torch.device("cpu"))
    images, printed = TensorDataset(IMAGES, torch.arange(10)), io.StringIO()
    with contextlib.redirect_stderr(printed):
        assert_complete(cache.load_or_write(folder / "val.npy", images))
    (folder / f"printed{rank}").write_text(printed.getvalue())


def test_of_two_writers_one_waits_for_the_other(tmp_path):
    run_two(write_slowly, tmp_path)
    printed = [(tmp_path / f"printed{rank}").read_text() for rank in (0, 1)]
    assert sorted("waiting for the process" in text for text in printed) == [False, True]


@pytest.mark.parametrize("damage", ["count", "too many", "no rows", "cut rows", "no labels"])
def test_a_damaged_unfinished_cache_is_written_from_the_start(tmp_path, capsys, damage):
    path = tmp_path / "val.npy"
    assert fill(path, stopped=lambda: True) is None
    part, done = tmp_path / "val.npy.part", tmp_path / "val.npy.done"
    assert part.exists()
    if damage in ("count", "too many"):
        done.write_text({"count": "[", "too many": "11"}[damage])
    elif damage == "no labels":
        labels_path(part).unlink()
    else:
        part.write_bytes(part.read_bytes()[:-8] if damage == "cut rows" else b"")
    assert_complete(fill(path))
    assert f"warning: {part} is damaged" in capsys.readouterr().err
