"""fastdino.augmentation.dali: the inputs of the pipeline, without running it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdino.augmentation.params import draw_crops
from tests.loaders import HAS_DALI, make_config

if not HAS_DALI:
    pytest.skip("DALI is not installed", allow_module_level=True)

from fastdino.augmentation import dali


def test_inputs_are_the_drawn_numbers_of_each_crop():
    """A gray crop has no saturation, one without jitter has factors that change nothing."""
    sizes = np.tile([200, 300], (40, 1))
    drawn = draw_crops(make_config(), 0, np.arange(40), sizes)
    batch = dali.pack_batch(["image"] * 40, drawn, dali.SOLARIZED)
    images, solarized, *inputs = batch
    assert images == ["image"] * 40
    assert np.array_equal(solarized, drawn[0].solarize[:, 1].numpy())
    assert len(inputs) == 4 * len(dali._CROP_INPUTS)
    crops = [(params, n) for params in drawn for n in range(params.top.shape[1])]
    for k, (params, n) in enumerate(crops):
        own = inputs[k * len(dali._CROP_INPUTS) : (k + 1) * len(dali._CROP_INPUTS)]
        for b in range(40):
            crop = params.of_sample(b)[n]
            brightness, contrast, saturation, hue = (
                crop.jitter_factor if crop.jitter else (1.0, 1.0, 1.0, 0.0)
            )
            expected = [
                [crop.top, crop.left], [crop.height, crop.width], int(crop.flip),
                brightness, contrast, 0.0 if crop.gray else saturation, hue * 360, crop.blur_radius,
            ]  # fmt: skip
            for value, right in zip(own, expected, strict=True):
                assert value[b].tolist() == pytest.approx(right, rel=1e-6), (k, b)


def test_the_device_of_a_pipeline_is_the_current_gpu_or_the_given_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    devices = [torch.device(name) for name in ("cpu", "cuda", "cuda:1")]
    assert [dali.device_index(device) for device in devices] == [None, 3, 1]
