"""fastdino_kernels.crop_table: the scratch that the table plans."""

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


@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 64), (8, 14, 43), (9, 90, 88)])
def test_scratch_of_enlarged_boxes_is_sufficient(height, width, size, draw_any_crops, monkeypatch):
    """Without a blur, whose area would be larger, the resize writes nothing after the scratch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    marker, planned, memory = 123456789, [], []
    real = crop_table.crop_table

    def with_more_words(*args):
        table, packed, words = real(*args)
        planned.append(words)
        return table, packed, words + 4096

    def marked(*shape, **options):
        memory.append(torch.full(shape, marker, **options))
        return memory[-1]

    image = torch.zeros(height, width, 3, dtype=torch.uint8, device=device)
    whole = {"top": 0, "left": 0, "height": height, "width": width, "blur_radius": 0}
    packed = draw_any_crops([image], 1, **whole).pack().flatten(0, 1)
    out = torch.zeros(1, 1, 3, size, size, device=device)
    levels = torch.zeros(3, 256, device=device)
    monkeypatch.setattr(multi_crop_triton, "crop_table", with_more_words)
    monkeypatch.setattr(multi_crop_triton.torch, "empty", marked)
    multi_crop_triton.multi_crop_([out], [image], packed, levels)
    scratch = memory[-1].cpu()
    assert (scratch[: planned[0]] != marker).any()
    assert (scratch[planned[0] :] == marker).all()
