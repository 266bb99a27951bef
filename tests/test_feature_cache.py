"""Features on disk: test_linear has the command's caches, this the moments a kill may come at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from fastdino.evals.feature_cache import cached

IMAGES = torch.arange(30.0).view(10, 3, 1, 1)


def fill(path, stopped=lambda: False):
    options = {"dim": 3, "batch_size": 4, "workers": 0, "device": torch.device("cpu")}
    images = TensorDataset(IMAGES, torch.arange(10))
    return cached(path, lambda batch: batch.flatten(1), images, stopped=stopped, **options)


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_kill_while_a_cache_that_was_stopped_is_put_in_place(tmp_path, monkeypatch, kill_at):
    path = tmp_path / "val.npy"
    assert fill(path, stopped=lambda: True) is None
    calls = []

    def dies(call):
        def dying(*words, **options):
            calls.append(call)
            if len(calls) == kill_at:
                raise KeyboardInterrupt
            return call(*words, **options)

        return dying

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies(os.replace))
        patch.setattr(Path, "unlink", dies(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            fill(path)
    found = fill(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["val.labels.npy", "val.npy"]
    for index, (features, label) in enumerate(found[i] for i in range(10)):
        assert torch.equal(features, IMAGES[index].flatten())
        assert label == index
