"""fastdino_kernels.multi_crop equals Pillow and torchvision to the last bit."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
import os

import numpy as np
import pytest
import torch
from fastdino_kernels import CropParams, crop_table, multi_crop, multi_crop_groups, multi_crop_torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from benchmarks.gpu.option_calls import crop_params
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.data import draw_crops
from tests.interpreter import patch_interpreter
from tests.processes import run_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu
PLAIN = {"flip": False, "jitter": False, "gray": False, "blur_radius": 0, "solarize": False}
STAGES = {
    "resize": {},
    "flip": {"flip": True},
    "jitter": {"jitter": True},
    "gray": {"gray": True},
    "blur": {"blur_radius": 1.3},
    "solarize": {"solarize": True},
}


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    return request.param


def crops(images, params, size, **options):
    return multi_crop(
        [image.to(DEVICE) for image in images], params, size=size, mean=MEAN, std=STD, **options
    ).cpu()


def assert_equal(ours, theirs):
    assert ours.shape == theirs.shape
    wrong = (ours != theirs).flatten(2).any(-1).nonzero().tolist()
    assert not wrong, f"crops that differ, as [image, crop]: {wrong}"


def affordable(images, impl):
    """Select a few small images for the interpreter, which needs about a second per large box."""
    return [images[i] for i in (5, 9)] if impl == "triton" and DEVICE == "cpu" else images


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_matches_pillow(stage, impl, ragged_images, draw_any_crops, crops_by_pil):
    images = affordable(ragged_images, impl)
    params = draw_any_crops(images, 2, **(PLAIN | STAGES[stage]))
    assert_equal(crops(images, params, 17, impl=impl), crops_by_pil(images, params, 17))


@pytest.mark.parametrize(("n", "size"), [(20, 24), (10, 1), (10, 2), (10, 35)])
def test_crops_match_pillow(n, size, impl, ragged_images, draw_any_crops, crops_by_pil):
    images = affordable(ragged_images, impl)
    params = draw_any_crops(images, n if images is ragged_images else 2, seed=size)
    assert_equal(crops(images, params, size, impl=impl), crops_by_pil(images, params, size))


@pytest.mark.accuracy
def test_crops_of_every_image_match_pillow(impl, ragged_images, draw_any_crops, crops_by_pil):
    params = draw_any_crops(ragged_images, 1, seed=7)
    ours = crops(ragged_images, params, 48, impl=impl)
    assert_equal(ours, crops_by_pil(ragged_images, params, 48))


@pytest.mark.accuracy
@pytest.mark.parametrize(("kind", "size"), [(0, 224), (1, 96)])
def test_paper_sized_crops_match_pillow(kind, size, impl, ragged_images, tiny, crops_by_pil):
    images = ragged_images[:1]
    config = tiny(local_crops_number=2)
    params = draw_crops(config, 0, [3], [image.shape[:2] for image in images])[kind]
    params = dataclasses.replace(params, jitter=torch.ones_like(params.jitter))
    assert_equal(crops(images, params, size, impl=impl), crops_by_pil(images, params, size))


def test_every_order_of_the_jitter(impl, ragged_images, draw_any_crops, crops_by_pil):
    orders = torch.cartesian_prod(*[torch.arange(4, dtype=torch.int32)] * 4)
    orders = orders[(orders.sort(-1).values == torch.arange(4)).all(-1)]
    if impl == "triton" and DEVICE == "cpu":
        orders = orders[::3]
    images = ragged_images[3:4]
    box = {"top": 3, "left": 5, "height": 8, "width": 9}
    params = draw_any_crops(images, len(orders), **(PLAIN | {"jitter": True} | box))
    params = dataclasses.replace(params, jitter_order=orders[None])
    assert_equal(crops(images, params, 8, impl=impl), crops_by_pil(images, params, 8))


def test_several_sizes_in_one_call_equal_separate_calls(impl, ragged_images, draw_any_crops):
    images = affordable(ragged_images, impl)
    groups = [(draw_any_crops(images, n, seed=n), size) for n, size in ((2, 40), (0, 9), (3, 7))]
    made = multi_crop_groups(
        [image.to(DEVICE) for image in images], groups, mean=MEAN, std=STD, impl=impl
    )
    assert len(made) == 3
    for ours, (params, size) in zip(made, groups, strict=True):
        assert_equal(ours.cpu(), crops(images, params, size, impl=impl))
        assert all(ours[:, n].is_contiguous() for n in range(ours.shape[1]))


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 1, 1), (74, 99, 1, 1), (0, 0, 1, 100), (0, 7, 75, 1), (10, 20, 16, 16),
        (0, 0, 75, 100), (40, 60, 35, 40),
    ],
)  # fmt: skip
def test_extreme_boxes(box, impl, ragged_images, draw_any_crops, crops_by_pil):
    images = ragged_images[:1]
    fixed = dict(zip(("top", "left", "height", "width"), box, strict=True))
    params = draw_any_crops(images, 2, **fixed)
    assert_equal(crops(images, params, 16, impl=impl), crops_by_pil(images, params, 16))


@pytest.mark.parametrize(("height", "equal"), [(200, True), (201, False)])
def test_boxes_match_pillow_up_to_100_times_as_tall_as_wide(
    height, equal, impl, draw_any_crops, crops_by_pil
):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (height, 2, 3), dtype=torch.uint8, generator=generator)]
    box = {"top": 0, "left": 0, "height": height, "width": 2}
    params = draw_any_crops(images, 1, **(PLAIN | box))
    ours, theirs = crops(images, params, 17, impl=impl), crops_by_pil(images, params, 17)
    assert torch.equal(ours, theirs) == equal
    torch.testing.assert_close(ours, theirs, rtol=0, atol=10 / 255 / min(STD))


def test_extreme_jitter_factors(impl, ragged_images, draw_any_crops, crops_by_pil):
    ends = torch.tensor([[0, 0, 0, -0.5], [1, 1, 1, 0], [2, 3, 5, 0.5], [0.5, 0.5, 0.5, -1e-3]])
    images = ragged_images[:1]
    params = draw_any_crops(images, 4, **(PLAIN | {"jitter": True}))
    params = dataclasses.replace(params, jitter_factor=ends[None])
    assert_equal(crops(images, params, 16, impl=impl), crops_by_pil(images, params, 16))


def strided(image):
    """Return views of an image by name, and whether the pixels of each row are contiguous."""
    return {
        "transposed": (image.transpose(0, 1), False),
        "planes": (image.permute(2, 0, 1).contiguous().permute(1, 2, 0), False),
        "every second column": (image[:, ::2], False),
        "every second row": (image[::2], True),
        "window at an odd byte": (image[3:7, 5:11], True),
        "one row repeated": (image[2:3].expand(9, -1, -1), True),
        "one column": (image[:, 4:5], True),
    }


@pytest.mark.parametrize("name", strided(torch.zeros(9, 12, 3)))
def test_images_of_any_strides(name, impl, ragged_images, draw_any_crops, monkeypatch):
    image, in_place = strided(ragged_images[-1].to(DEVICE))[name]
    params = draw_any_crops([image], 2)
    expected = crops([image.contiguous()], params, 8, impl=impl)
    read = []
    real = crop_table.crop_table
    monkeypatch.setattr(
        "fastdino_kernels.multi_crop_triton.crop_table",
        lambda outs, images, *rest: (read.extend(images), real(outs, images, *rest))[1],
    )
    assert_equal(crops([image], params, 8, impl=impl), expected)
    if impl == "triton":
        assert (read[0].data_ptr() == image.data_ptr()) is in_place


# Parameters on a device are not checked, so the kernels must not index outside for any value. The
# second member of a pair is the value that they use instead.
UNCHECKED = [
    ({"jitter_order": 5}, {"jitter_order": 1}),
    ({"jitter_order": -(2**31)}, {"jitter_order": 0}),
    ({"jitter_order": 2**31 - 1}, {"jitter_order": 3}),
    ({"jitter_factor": math.nan}, {"jitter_factor": 0.0}),
    ({"jitter_factor": math.inf}, {"jitter_factor": 0.0}),
    ({"jitter_factor": -math.inf}, {"jitter_factor": 0.0}),
    ({"jitter_factor": 0.75, "jitter_order": 3}, {"jitter_factor": 0.0, "jitter_order": 3}),
    ({"blur_radius": math.nan}, {"blur_radius": 0.0}),
    ({"blur_radius": -1.0}, {"blur_radius": 0.0}),
    ({"blur_radius": math.inf}, {"blur_radius": 100.0}),
    ({"top": -5, "left": -(2**31)}, {"top": 0, "left": 0, "height": 4, "width": 5}),
    ({"height": 2**31 - 1, "width": 99}, {"top": 3, "left": 2, "height": 6, "width": 10}),
    ({"height": -1, "width": 0}, {"top": 3, "left": 2, "height": 1, "width": 1}),
    ({"top": 2**31 - 1}, {"top": 8, "left": 2, "height": 1, "width": 5}),
]


@pytest.mark.parametrize(("values", "used"), UNCHECKED)
def test_unchecked_values_stay_inside(values, used, ragged_images, draw_any_crops, monkeypatch):
    from fastdino_kernels import multi_crop_triton

    real = crop_table.crop_table

    def device_table(outs, images, packed, *rest):
        """Plan for any box and a blur, and leave the parameters, as for those on a device."""
        height, width, _ = images[0].shape
        whole = {"top": 0, "left": 0, "height": height, "width": width, "blur_radius": 1.0}
        worst = draw_any_crops(images, 1, **whole).pack().flatten(0, 1)
        table, _, words = real(outs, images, worst, *rest)
        return table, packed, words

    monkeypatch.setattr(multi_crop_triton, "crop_table", device_table)
    image = ragged_images[-1].to(DEVICE)  # 9 x 12
    box = {"top": 3, "left": 2, "height": 4, "width": 5}
    order = torch.tensor([2, 0, 1, 3], dtype=torch.int32).expand(1, 1, 4)

    def make(changes):
        params = draw_any_crops([image], 1, **(PLAIN | {"jitter": True} | box | changes))
        if "jitter_order" not in changes:
            params = dataclasses.replace(params, jitter_order=order)
        out = torch.empty(1, 1, 3, 8, 8, device=DEVICE)
        levels = torch.arange(256.0, device=DEVICE).expand(3, 256).contiguous()
        packed = params.pack().flatten(0, 1).to(DEVICE)
        multi_crop_triton.multi_crop_([out], [image], packed, levels)
        return out

    made = make(values)
    assert ((made >= 0) & (made <= 255)).all()
    assert torch.equal(made, make(used))


def test_heavy_crops_come_first(ragged_images, draw_any_crops):
    images = ragged_images[:4]
    groups = [(draw_any_crops(images, n, seed=n), size) for n, size in ((3, 64), (9, 30))]
    packed = torch.cat([params.pack().transpose(0, 1).flatten(0, 1) for params, _ in groups])
    outs = [torch.empty(params.top.shape[1], 4, 3, size, size) for params, size in groups]
    table, same, _ = crop_table.crop_table(outs, images, packed, 64, 32)
    assert torch.equal(same, packed)
    assert sorted(table[:, crop_table.PARAMS].tolist()) == list(range(48))
    rows = [
        (size, *box, jitter & 2, blur != 0)
        for size, (box, jitter, blur) in zip(
            table[:, crop_table.SIZE].tolist(),
            [(row[2:4], row[4], row[13]) for row in packed[table[:, crop_table.PARAMS]].tolist()],
            strict=True,
        )
    ]
    for i, lighter in enumerate(rows):
        for heavier in rows[i + 1 :]:  # no later crop exceeds an earlier one in every respect
            exceeds = all(a > b for a, b in zip(heavier[:3], lighter[:3], strict=True))
            assert not (exceeds and heavier[3:] >= lighter[3:] and heavier[4] >= lighter[4])


@pytest.mark.parametrize("seed", range(12))
def test_scratch_is_sufficient(seed, draw_any_crops, monkeypatch):
    """No launch writes outside a crop's two areas of scratch."""
    from fastdino_kernels import multi_crop_triton

    rng = np.random.default_rng(seed)
    shape, size = rng.integers(1, 200, 2), int(rng.integers(1, 90))
    image = torch.from_numpy(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).to(DEVICE)
    params = draw_any_crops([image], 1, seed=seed, blur_radius=seed % 2)
    guard, marker, kept = 4096, 123456789, []
    real = crop_table.crop_table

    def spread(*args):
        """Move the areas apart, with guarded words around each."""
        table, packed, words = real(*args)
        first, second = (int(table[0, column]) for column in (crop_table.PIXELS, crop_table.WORK))
        table[0, crop_table.PIXELS] += guard
        table[0, crop_table.WORK] += 2 * guard
        kept[:] = [(first, second + guard), (second + guard, words + 2 * guard)]
        return table, packed, words + 3 * guard

    memory = []

    def marked(*args, **options):
        memory.append(torch.full(args, marker, **options))
        return memory[-1]

    monkeypatch.setattr(multi_crop_triton, "crop_table", spread)
    monkeypatch.setattr(multi_crop_triton.torch, "empty", marked)
    out = torch.zeros(1, 1, 3, size, size, device=DEVICE)
    levels = torch.zeros(3, 256, device=DEVICE)
    multi_crop_triton.multi_crop_([out], [image], params.pack().flatten(0, 1), levels)
    words = memory[-1].cpu()
    assert (words != marker).any()
    for start, end in ((0, guard), (kept[0][1], kept[0][1] + guard), (len(words) - guard, None)):
        assert (words[start:end] == marker).all()


def test_addresses_are_64_bit():
    outs = [torch.empty(2, 4096, 3, 1024, 1024, device="meta")]
    images = [torch.empty(3000, 4000, 3, dtype=torch.uint8, device="meta")] * 4096
    rows = crop_table._unsorted_rows(outs, images)
    assert rows[:, crop_table.OUT].diff().unique().tolist() == [3 * 1024 * 1024 * 4]
    stretches = torch.full((8192, 2), 3.0, dtype=torch.float64)
    blurred = torch.ones(8192, dtype=torch.bool)
    words = crop_table._assign_scratch(rows, stretches, 4 * stretches, blurred, 64, 32)
    pixels, work = rows[:, crop_table.PIXELS], rows[:, crop_table.WORK]
    assert words > 2 * 8192 * 1024 * 1024 > 2**33
    assert (work - pixels >= 1024 * 1024).all()
    assert (pixels[1:] - work[:-1] >= 1024 * 1024).all()
    assert words - work[-1] >= 1024 * 1024


def test_parameters_reach_a_device_in_one_pinned_copy(ragged_images, draw_any_crops, monkeypatch):
    images = [image.to("meta") for image in ragged_images[:3]]
    packed = draw_any_crops(ragged_images[:3], 2).pack().transpose(0, 1).flatten(0, 1)
    memory, copies = crop_table._memory_to_copy, []
    real_to = torch.Tensor.to

    def to(tensor, *args, **options):
        copies.append((tensor is pinned[-1], args, options))
        return real_to(tensor, *args, **options)

    pinned = []
    monkeypatch.setattr(
        crop_table, "_memory_to_copy", lambda *args: (pinned.append(memory(*args)), pinned[-1])[1]
    )
    outs = [torch.empty(2, 3, 3, 8, 8, device="meta")]
    monkeypatch.setattr(torch.Tensor, "to", to)
    table, moved, _ = crop_table.crop_table(outs, images, packed, 64, 32)
    assert (table.device.type, moved.device.type) == ("meta", "meta")
    assert moved.shape == (6, 14)
    assert copies == [(True, (torch.device("meta"),), {"non_blocking": True})]


def test_memory_to_copy_to_a_gpu_is_pinned(monkeypatch):
    options = []
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: options.append(kwargs))
    for device in ("cpu", "meta", "cuda:1"):
        crop_table._memory_to_copy(3, torch.device(device))
    assert [kwargs["pin_memory"] for kwargs in options] == [False, False, True]


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fp32_rounded_once(dtype, impl, ragged_images, draw_any_crops):
    images = ragged_images[3:4]
    params = draw_any_crops(images, 2)
    exact = crops(images, params, 8, impl=impl)
    assert_equal(crops(images, params, 8, impl=impl, dtype=dtype), exact.to(dtype))


@pytest.mark.parametrize(("b", "n"), [(0, 3), (2, 0)])
def test_no_crops(b, n, impl, ragged_images, draw_any_crops):
    images = ragged_images[:b]
    assert crops(images, draw_any_crops(images, n), 8, impl=impl).shape == (b, n, 3, 8, 8)


def test_resize_and_blur_match_pillow_for_random_sizes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 150, 2)
        size, radius = int(rng.integers(1, 60)), float(np.float32(rng.uniform(0, 9)))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = F.resize(Image.fromarray(pixels), [size, size], InterpolationMode.BICUBIC)
        ours = multi_crop_torch.resize(torch.from_numpy(pixels.astype(np.int32)), size)
        assert np.array_equal(ours.numpy(), np.asarray(image))
        blurred = multi_crop_torch.gaussian_blur(ours, radius)
        assert np.array_equal(blurred.numpy(), image.filter(ImageFilter.GaussianBlur(radius)))


def all_colours(step):
    """Return all colours whose levels are multiples of `step`: uint8 [n, 4096, 3]."""
    levels = torch.arange(0, 256, step, dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels)
    padded = torch.zeros(-(-len(colours) // 4096) * 4096, 3, dtype=torch.uint8)
    padded[: len(colours)] = colours
    return padded.view(-1, 4096, 3)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_hsv_conversions_match_pillow_for_every_colour(step):
    for rows in all_colours(step).split(256):
        pixels, array = rows.int(), rows.numpy()
        hsv = np.asarray(Image.fromarray(array).convert("HSV"))
        assert np.array_equal(multi_crop_torch.rgb_to_hsv(pixels).numpy(), hsv)
        back = Image.frombytes("HSV", (4096, len(rows)), array.tobytes()).convert("RGB")
        assert np.array_equal(multi_crop_torch.hsv_to_rgb(pixels).numpy(), np.asarray(back))


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_hue_matches_pillow_for_every_colour(step, impl, draw_any_crops, crops_by_pil):
    colours = all_colours(step).flatten(0, 1)
    side = math.isqrt(len(colours))
    image = colours[: side * side].view(side, side, 3)
    box = {"top": 0, "left": 0, "height": side, "width": side}
    params = draw_any_crops([image], 1, **(PLAIN | {"jitter": True} | box))
    turned = torch.tensor([[[1.0, 1.0, 1.0, 0.0713]]])
    params = dataclasses.replace(params, jitter_factor=turned)
    ours = crops([image], params, side, impl=impl)
    assert_equal(ours, crops_by_pil([image], params, side))


def test_compiles_as_one_graph(ragged_images, draw_any_crops):
    images = ragged_images[:2]
    params = draw_any_crops(images, 2)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(images, params):
        return 2 * multi_crop(images, params, size=8, mean=MEAN, std=STD, impl="torch")

    assert torch.equal(compiled(images, params), 2 * crops(images, params, 8, impl="torch"))


def test_opcheck(ragged_images, draw_any_crops):
    op = torch.ops.fastdino_kernels.multi_crop.default
    packed = draw_any_crops(ragged_images[:2], 3).pack().transpose(0, 1).contiguous()
    arguments = (ragged_images[:2], packed, [1, 2], [8, 5], MEAN, STD, torch.bfloat16, "torch")
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": -1}, r"must be inside its image, got \[-1, .* for crop 0 of images\[0\], 9 x 12"),
        ({"height": 0}, "must be inside its image"),
        ({"top": 2**31 - 1}, "must be inside its image"),
        ({"width": 13}, "must be inside its image"),
        ({"jitter_order": 1}, r"permutation of 0, 1, 2, 3, got \[1, 1, 1, 1\]"),
        ({"jitter_factor": 0.6, "jitter": True}, "the hue's from -0.5 to 0.5"),
        ({"jitter_factor": float("nan"), "jitter": True}, "must be finite"),
        ({"blur_radius": -1.0}, "from 0 to 100, got -1.0"),
        ({"blur_radius": float("nan")}, "from 0 to 100, got nan"),
    ],
)
def test_invalid_values_raise(impl, changes, message, ragged_images, draw_any_crops):
    images = ragged_images[-1:]
    params = draw_any_crops(images, 1, **changes)
    with pytest.raises(ValueError, match=message):
        crops(images, params, 8, impl=impl)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be from 1 to 4096, got 0"),
        ({"size": 8.0}, TypeError, "size must be an int, got float"),
        ({"mean": (0.5,)}, ValueError, "3 numbers each, got 1 and 3"),
        ({"std": (1, 0, 1)}, ValueError, "std > 0"),
        ({"dtype": torch.float64}, ValueError, "dtype must be one of"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"images": [torch.zeros(4, 4, 3)]}, TypeError, r"must be torch.uint8, got torch.float32"),
        ({"images": [np.zeros((4, 4, 3))]}, TypeError, r"must be a torch.Tensor, got ndarray"),
        (
            {"images": [torch.zeros(3, 4, 4, dtype=torch.uint8)]},
            ValueError,
            r"images\[0\] must be \[H, W, 3\] with H, W >= 1, got shape \(3, 4, 4\)",
        ),
        ({"images": []}, ValueError, r"with B = 0 like the images, got top of shape \(1, 2\)"),
        ({"params": None}, TypeError, "params must be CropParams, got NoneType"),
    ],
)
def test_invalid_arguments_raise(changes, error, message, ragged_images, draw_any_crops):
    arguments = {
        "images": ragged_images[:1],
        "params": draw_any_crops(ragged_images[:1], 2),
        "size": 8,
        "mean": MEAN,
        "std": STD,
    }
    arguments |= changes
    with pytest.raises(error, match=message):
        multi_crop(arguments.pop("images"), arguments.pop("params"), **arguments)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CropParams)])
def test_invalid_fields_of_params_raise(field, ragged_images, draw_any_crops):
    params = draw_any_crops(ragged_images[:1], 2)
    value = getattr(params, field)
    if field != "top":
        short = dataclasses.replace(params, **{field: value[:, :1]})
        with pytest.raises(ValueError, match=rf"params.{field} must have shape .* got \(1, 1"):
            crops(ragged_images[:1], short, 8)
    wide = dataclasses.replace(params, **{field: value.double()})
    with pytest.raises(TypeError, match=f"params.{field} must be torch.*, got torch.float64"):
        crops(ragged_images[:1], wide, 8)


@pytest.mark.parametrize(
    ("devices", "got"), [([], "got params on none"), (["cpu", "meta"], "got params on cpu, meta")]
)
def test_groups_without_params_or_on_several_devices_raise(devices, got, draw_any_crops):
    params = draw_any_crops([], 2)
    names = [field.name for field in dataclasses.fields(params)]
    groups = [
        (CropParams(*(getattr(params, name).to(device) for name in names)), 8) for device in devices
    ]
    with pytest.raises(ValueError, match=f"at least one pair .* on one device, {got}"):
        multi_crop_groups([], groups, mean=MEAN, std=STD)


def read_guarded() -> None:
    """Make crops of images that begin or end at a page which must not be touched."""
    patch_interpreter(pytest.MonkeyPatch())
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, 3 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pixels = torch.frombuffer(memory, dtype=torch.uint8)[page : 2 * page]
    pixels.copy_(torch.from_numpy(np.random.default_rng(0).integers(0, 256, page, dtype=np.uint8)))
    for number in (0, 2):
        assert libc.mprotect(ctypes.c_void_p(begin + number * page), page, 0) == 0
    for height, width in ((1, 1), (5, 7), (20, 33), (2, 150)):
        count = 3 * height * width
        for image in (pixels[:count], pixels[-count:]):
            image = image.view(height, width, 3)
            params = crop_params([(height, width)], 2)
            made, expected = (
                multi_crop([image], params, size=9, mean=MEAN, std=STD, impl=impl)
                for impl in ("triton", "torch")
            )
            assert torch.equal(made, expected), (height, width)
    os._exit(0)  # the memory cannot be freed


@pytest.mark.skipif(DEVICE == "cuda", reason="guards the memory of the interpreter")
def test_no_other_memory_than_the_image_is_read():
    run_ranks(1, read_guarded)
