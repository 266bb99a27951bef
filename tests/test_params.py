"""fastdino.augmentation.params: the generator and the distributions of the crop parameters."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fastdino.augmentation import params as crops_module
from fastdino.augmentation.params import CropParams, draw_crops, philox4x32, select
from tests.loaders import make_config

ONES = 0xFFFFFFFF


def draw(n, size=(375, 500), epoch=0, **changes):
    return draw_crops(
        make_config(**({"local_crops_number": 8} | changes)),
        epoch,
        np.arange(n),
        np.tile(size, (n, 1)),
    )


def assert_equal(one: CropParams, other: CropParams):
    for field in dataclasses.fields(CropParams):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b), field.name


def ks(a, b):
    """Kolmogorov-Smirnov distance over its critical value at a false alarm rate of 1e-4."""
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    points = np.concatenate([a, b])
    cdf_a = np.searchsorted(a, points, side="right") / len(a)
    cdf_b = np.searchsorted(b, points, side="right") / len(b)
    return np.abs(cdf_a - cdf_b).max() / (2.23 * math.sqrt(1 / len(a) + 1 / len(b)))


def ks_uniform(a, low, high):
    grid = np.linspace(low, high, 200_000)
    assert a.min() >= np.float32(low)
    assert a.max() <= np.float32(high)
    return ks(a, grid)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_matches_the_test_vectors_of_random123(counter, key, words):
    assert tuple(philox4x32(np.array(counter, dtype=np.uint64), key)) == words
    many = philox4x32(np.tile(np.array(counter, dtype=np.uint64), (2, 3, 1)), key)
    assert (many == np.array(words, dtype=np.uint64)).all()


def test_shapes_and_dtypes_of_the_fields():
    for params, n in zip(draw(3, local_crops_number=5), (2, 5), strict=True):
        dtypes = dict.fromkeys(("flip", "jitter", "gray", "solarize"), torch.bool)
        dtypes |= dict.fromkeys(("jitter_factor", "blur_radius"), torch.float32)
        for field in dataclasses.fields(CropParams):
            tensor, per_operation = getattr(params, field.name), field.name.startswith("jitter_")
            assert tensor.shape == ((3, n, 4) if per_operation else (3, n)), field.name
            assert tensor.dtype == dtypes.get(field.name, torch.int32), field.name
        assert (params.jitter_order.sort(dim=-1).values == torch.arange(4)).all()


def test_crops_of_a_sample_do_not_depend_on_the_batch():
    ids, sizes = np.array([7, 3, 90_000, 3]), np.array([[60, 80], [375, 500], [9, 9], [375, 500]])
    together = draw_crops(make_config(), 4, ids, sizes)
    for row in range(4):
        alone = draw_crops(make_config(), 4, ids[row : row + 1], sizes[row : row + 1])
        for one, other in zip(together, alone, strict=True):
            assert_equal(select(one, slice(row, row + 1)), other)


def test_number_of_local_crops_does_not_change_the_others():
    many, few = draw(4), draw(4, local_crops_number=3)
    assert_equal(many[0], few[0])
    assert_equal(select(many[1], crops=slice(0, 3)), few[1])
    assert draw(4, local_crops_number=0)[1].top.shape == (4, 0)


def test_seed_epoch_sample_and_crop_all_change_the_draws():
    base = draw(1)
    others = [draw(1, epoch=1), draw(1, seed=1), draw(1, seed=1 << 32), draw(2)]
    factors = [base[0].jitter_factor[0, n, 0] for n in range(2)]
    factors += [base[1].jitter_factor[0, n, 0] for n in range(8)]
    factors += [params.jitter_factor[-1, 0, 0] for params, _ in others]
    assert len({float(factor) for factor in factors}) == 14
    assert_equal(draw(2)[1], draw(2)[1])


def test_of_sample_returns_the_rows_of_the_tensors():
    params = draw(2)[1]
    crop = params.of_sample(1)[5]
    assert len(params.of_sample(1)) == 8
    for field in dataclasses.fields(CropParams):
        assert getattr(crop, field.name) == getattr(params, field.name)[1, 5].tolist()


@pytest.mark.parametrize("size", [(375, 500), (500, 64), (40, 900)])
@pytest.mark.parametrize("kind", ["global", "local"])
def test_boxes_follow_torchvisions_random_resized_crop(size, kind):
    n = 3000
    scale = {"global": (0.4, 1.0), "local": (0.05, 0.4)}[kind]
    params = draw(n, size, local_crops_number=1)[kind == "local"]
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)]
    )
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks(getattr(params, name)[:, 0], theirs[:, column]) < 1, name
    area = params.height[:, 0] * params.width[:, 0]
    assert ks(area, theirs[:, 2] * theirs[:, 3]) < 1


def box_of(uniform, size, scale):
    """RandomResizedCrop.get_params of one image, for given uniform numbers: (area, box)."""
    height, width = size
    for area, ratio, row, column in np.reshape(uniform, (10, 4)).tolist():
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(row * (height - h + 1)), int(column * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(375, 500), (31, 42), (9, 64), (200, 13), (7, 7), (1, 3)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4), (1.0, 1.0)])
def test_boxes_equal_a_plain_loop_over_the_attempts(size, scale):
    uniform = crops_module._uniform(0, 0, np.arange(200, dtype=np.uint64), 3)
    boxes = np.stack(crops_module._boxes(uniform[..., :40], np.tile(size, (200, 1)), scale), -1)
    expected = [[box_of(crop[:40], size, scale) for crop in sample] for sample in uniform]
    assert boxes.tolist() == [[list(box) for box in sample] for sample in expected]


# The largest number below 1 that the generator draws.
TOP = 1 - 2.0**-32


@pytest.mark.parametrize(
    ("area", "ratio", "height", "width"),
    [
        (0.0, 0.0, 258, 194),  # 0.05 of the area, 3/4
        (0.0, TOP, 194, 258),  # 0.05 of the area, 4/3
        (TOP, 0.0, 730, 548),  # 0.4 of the area, 3/4
        (TOP, TOP, 548, 730),  # 0.4 of the area, 4/3
        (TOP, 0.5, 632, 632),
    ],
)
@pytest.mark.parametrize(("row", "column"), [(0.0, 0.0), (0.0, TOP), (TOP, 0.0), (TOP, TOP)])
def test_boxes_reach_both_ends_of_the_ranges_and_every_corner(
    area, ratio, row, column, height, width
):
    uniform = np.tile([area, ratio, row, column], 10).reshape(1, 1, 40)
    box = crops_module._boxes(uniform, np.array([[1000, 1000]]), (0.05, 0.4))
    top, left = int(row > 0) * (1000 - height), int(column > 0) * (1000 - width)
    assert [int(value) for value in np.ravel(box)] == [top, left, height, width]


def test_drawn_boxes_come_close_to_both_ends_of_the_ranges():
    """The largest and smallest of many draws: the scale and ratio are those of the crop's kind."""
    scales = ((0.4, 1.0), (0.05, 0.4))
    for params, (low, high) in zip(
        draw(4000, (1000, 1000), local_crops_number=2), scales, strict=True
    ):
        area = params.height.double() * params.width / 1e6
        ratio = params.width.double() / params.height
        for values, ends in ((area, (low, high)), (ratio, (3 / 4, 4 / 3))):
            assert values.min() == pytest.approx(ends[0], rel=0.01)
            assert values.max() == pytest.approx(ends[1], rel=0.01)
            assert ends[0] * 0.995 <= values.min()
            assert values.max() <= ends[1] * 1.005
        for start, length in ((params.top, params.height), (params.left, params.width)):
            assert (start == 0).any()
            assert (start + length == 1000).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (3, 2), (10_000, 10_000)])
def test_boxes_are_inside_any_image(size):
    for params in draw(200, size):
        rows, columns = (params.top, params.height), (params.left, params.width)
        for (begin, length), whole in zip((rows, columns), size, strict=True):
            assert ((length >= 1) & (begin >= 0) & (begin + length <= whole)).all()


def test_fallback_box_is_torchvisions_central_one():
    wide, tall = draw(50, (10, 1000), local_crops_number=0), draw(50, (1000, 10))
    image = torch.empty(3, 10, 1000)
    expected = RandomResizedCrop.get_params(image, [0.4, 1.0], [3 / 4, 4 / 3])
    for n, name in enumerate(("top", "left", "height", "width")):
        assert (getattr(wide[0], name) == expected[n]).all()
    assert (tall[0].height == 13).all()
    assert (tall[0].top == 493).all()


def test_probabilities_match_the_paper():
    n = 4000
    global_params, local_params = draw(n, local_crops_number=2)

    def near(drawn, p):
        return abs(drawn.float().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / drawn.numel())

    for params in (global_params, local_params):
        assert near(params.flip, 0.5)
        assert near(params.jitter, 0.8)
        assert near(params.gray, 0.2)
        both = params.flip & params.gray
        assert near(both, 0.1), "flip and gray are independent"
    blurred = global_params.blur_radius > 0
    assert blurred[:, 0].all()
    assert near(blurred[:, 1], 0.1)
    assert near(local_params.blur_radius > 0, 0.5)
    assert not global_params.solarize[:, 0].any()
    assert near(global_params.solarize[:, 1], 0.2)
    assert not local_params.solarize.any()


def test_factors_and_radii_are_uniform_over_the_papers_ranges():
    global_params, local_params = draw(4000, local_crops_number=1)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for n, (low, high) in enumerate(ranges):
        assert ks_uniform(local_params.jitter_factor[:, 0, n].numpy(), low, high) < 1
    assert ks_uniform(global_params.blur_radius[:, 0].numpy(), 0.1, 2.0) < 1


def test_radii_of_every_kind_of_crop_are_uniform_over_the_papers_range():
    """The radius does not depend on the draw that decides about the blur."""
    global_params, local_params = draw(8000, local_crops_number=1)
    for radius in (*global_params.blur_radius.unbind(1), local_params.blur_radius[:, 0]):
        drawn = radius[radius > 0].numpy()
        assert ks_uniform(drawn, 0.1, 2.0) < 1
        assert drawn.min() < 0.12
        assert drawn.max() > 1.98


def test_draws_of_a_crop_are_independent():
    """No two of them share a uniform number: they are uncorrelated, and stay so after switches."""
    n = 8000
    for params in draw(n, (1000, 1000), local_crops_number=1):
        columns = {
            name: getattr(params, name)[:, -1].double()
            for name in ("flip", "jitter", "gray", "solarize", "top", "left", "height", "width")
        }
        for start, length in (("top", "height"), ("left", "width")):
            columns[start] /= (1000 - columns[length]).clamp(min=1)  # from 0 to 1
        columns["blur"] = (params.blur_radius[:, -1] > 0).double()
        columns["radius"] = params.blur_radius[:, -1].double()
        for k in range(4):
            columns[f"factor {k}"] = params.jitter_factor[:, -1, k].double()
            columns[f"order {k}"] = params.jitter_order[:, -1, k].double()
        dependent = [
            {"blur", "radius"},
            {"height", "width"},
            *({f"order {j}", f"order {k}"} for j in range(4) for k in range(4)),
        ]
        for one, x in columns.items():
            for other, y in columns.items():
                if one < other and {one, other} not in dependent and x.std() * y.std() > 0:
                    correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
                    assert abs(correlation) < 5 / math.sqrt(n), (one, other)


def test_orders_of_the_color_operations_are_equally_likely():
    orders = draw(6000, local_crops_number=0)[0].jitter_order[:, 0]
    counts = torch.unique(orders, dim=0, return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    chi_square = ((counts - 250) ** 2 / 250).sum().item()
    assert chi_square < 58  # 23 degrees of freedom, false alarm rate 1e-4


def test_batch_is_drawn_in_one_call_of_the_generator(monkeypatch):
    calls = []
    monkeypatch.setattr(
        crops_module, "philox4x32", lambda *args: calls.append(1) or philox4x32(*args)
    )
    draw(500)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [1, 2]}, "image_sizes"),
        ({"sizes": [[3, 4, 5]]}, "image_sizes"),
        ({"sizes": [[0, 4]]}, "1 x 1"),
        ({"ids": [2**32]}, "sample_ids"),
        ({"ids": [-1]}, "sample_ids"),
        ({"epoch": 2**32}, "epoch must be from 0 to 2"),
        ({"epoch": -1}, "epoch must be from 0 to 2"),
        ({"seed": 2**64}, "seed must be from 0 to 2"),
        ({"seed": -1}, "seed must be from 0 to 2"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(changes, message):
    largest = {"seed": 2**64 - 1, "epoch": 2**32 - 1, "ids": [2**32 - 1], "sizes": [[3, 4]]}

    def draw_these(seed, epoch, ids, sizes):
        config = SimpleNamespace(**vars(make_config()) | {"seed": seed})  # TrainConfig has bounds
        draw_crops(config, epoch, ids, sizes)

    draw_these(**largest)
    with pytest.raises(ValueError, match=message):
        draw_these(**(largest | changes))
