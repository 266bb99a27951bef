"""fastdino_kernels.crop_table: what the table plans for parameters that it cannot read."""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels import crop_table, multi_crop_triton


def plan(images, params, size, device="cpu"):
    """Return the words of scratch of each crop; on "meta" no parameter can be read."""
    packed = params.pack().transpose(0, 1).flatten(0, 1).to(device)
    count, batch = params.top.shape[1], len(images)
    outs = [torch.empty(count, batch, 3, size, size, device="meta")]
    images = [image.to("meta") for image in images]
    band, strip = multi_crop_triton.BAND, multi_crop_triton.STRIP
    _, _, words = crop_table.crop_table(outs, images, packed, band, strip)
    return words


@pytest.mark.parametrize("size", [1, 7, 64, 65, 130])
def test_scratch_for_parameters_on_a_device_is_enough_for_any_crop(
    size, ragged_images, draw_any_crops
):
    """Every box of every image, blurred or not."""
    for image in ragged_images:
        anything = plan([image], draw_any_crops([image], 1), size, "meta")
        height, width, _ = image.shape
        whole = {"top": 0, "left": 0, "height": height, "width": width}
        for seed in range(5):
            for changes in ({}, {"blur_radius": 3.0}, whole, whole | {"blur_radius": 3.0}):
                params = draw_any_crops([image], 1, seed=seed, **changes)
                assert plan([image], params, size) <= anything
        blurred = draw_any_crops([image], 1, **(whole | {"blur_radius": 3.0}))
        assert plan([image], blurred, size) == anything


def test_a_larger_box_and_a_blur_need_more_scratch(ragged_images, draw_any_crops):
    images = ragged_images[:1]  # 75 x 100
    box = {"top": 0, "left": 0, "height": 10, "width": 10}
    small, tall, wide = (
        plan(images, draw_any_crops(images, 1, **(box | {"blur_radius": 0} | changes)), 8)
        for changes in ({}, {"height": 75}, {"width": 100})
    )
    assert small < min(tall, wide)
    plain, blurred = (
        plan(images, draw_any_crops(images, 1, **(box | {"blur_radius": radius})), 300)
        for radius in (0, 1.0)
    )
    assert plain < blurred
