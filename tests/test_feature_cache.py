from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from fastdino.evals.feature_cache import FeatureCache

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
    assert sorted(file.name for file in tmp_path.iterdir()) == ["val.labels.npy", "val.npy"]
    for index, (features, label) in enumerate(cached[i] for i in range(10)):
        assert torch.equal(features, IMAGES[index].flatten())
        assert label == index
