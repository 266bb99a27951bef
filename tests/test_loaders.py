"""fastdino.data.loader and the loaders: the crops of a step, exact and near, of which images."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from fastdino.data import fused_loader, pil
from fastdino.data import loader as loader_module
from fastdino.data.crops import draw_crops
from fastdino.data.loader import build_loader
from fastdino.data.order import EpochPlan
from fastdino.data.sources import ImageSource, scan_images
from fastdino.errors import ConfigError, DataError

HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
all_loaders = pytest.mark.parametrize(
    "crops", ["torchvision", "fused", pytest.param("dali", marks=needs_dali)]
)


def make_config(**changes):
    values = {
        "seed": 0,
        "batch_size_per_gpu": 4,
        "grad_accum": 1,
        "num_workers": 0,
        "global_crops_scale": (0.4, 1.0),
        "local_crops_scale": (0.05, 0.4),
        "local_crops_number": 2,
        "global_crops_size": 48,
        "local_crops_size": 24,
        "crops": "torchvision",
        "max_bad_share": 0.3,
        "last_batch": "paper",
    }
    return types.SimpleNamespace(**(values | changes))


def photo(seed, size=(100, 75)):
    """Smooth colours, some texture, hard edges: what resizing and blurring can get wrong."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    pixels += rng.integers(-10, 11, pixels.shape)
    pixels[size[1] // 3 : size[1] // 2, size[0] // 4 : size[0] // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for n in range(18):
        folder = root / f"class{n % 3}"
        folder.mkdir(exist_ok=True)
        photo(n, (100 + n, 75 + 3 * n)).save(folder / f"{n:02}.jpg", quality=92)
    return scan_images(root)


@pytest.fixture
def build():
    """build_loader, closed when the test ends."""
    built = []

    def build_one(source, rank=0, world_size=1, **changes):
        built.append(
            build_loader(
                make_config(**changes), source, rank=rank, world_size=world_size, device="cpu"
            )
        )
        return built[-1]

    yield build_one
    for one in built:
        one.close()


def assert_same(batches, others):
    for batch, other in itertools.zip_longest(batches, others):
        assert len(batch) == len(other)
        for crop, other_crop in zip(batch, other, strict=True):
            assert torch.equal(crop, other_crop)


class PaperBlur:
    """GaussianBlur of the paper's utils.py."""

    def __init__(self, p, radius_min, radius_max):
        self.prob, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, img):
        if random.random() > self.prob:
            return img
        radius = random.uniform(self.radius_min, self.radius_max)
        return img.filter(ImageFilter.GaussianBlur(radius=radius))


class PaperSolarization:
    """Solarization of the paper's utils.py."""

    def __init__(self, p):
        self.p = p

    def __call__(self, img):
        return ImageOps.solarize(img) if random.random() < self.p else img


def paper_chain(crop, size):
    """The paper's Compose, with probabilities 0 or 1 and get_params answering what was drawn."""
    resized_crop = transforms.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC)
    resized_crop.get_params = lambda *_: (crop.top, crop.left, crop.height, crop.width)
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    jitter.get_params = lambda *_: (torch.tensor(crop.jitter_order), *crop.jitter_factor)
    return transforms.Compose(
        [
            resized_crop,
            transforms.RandomHorizontalFlip(p=float(crop.flip)),
            transforms.RandomApply([jitter], p=float(crop.jitter)),
            transforms.RandomGrayscale(p=float(crop.gray)),
            PaperBlur(float(crop.blur_radius > 0), crop.blur_radius, crop.blur_radius),
            PaperSolarization(float(crop.solarize)),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def test_crops_equal_the_papers_chain_bit_for_bit():
    image = photo(0, (300, 200))
    drawn = draw_crops(make_config(), 0, np.arange(20), np.tile([200, 300], (20, 1)))
    kinds = set()
    for params, size in zip(drawn, (224, 96), strict=True):
        for crop in itertools.chain.from_iterable(params.of_sample(b) for b in range(20)):
            ours = pil.make_crop(image, crop, size)
            assert ours.shape == (3, size, size)
            assert ours.dtype == torch.float32
            assert torch.equal(ours, paper_chain(crop, size)(image)), crop
            kinds |= {("flip", crop.flip), ("jitter", crop.jitter), ("gray", crop.gray)}
            kinds |= {("blur", crop.blur_radius > 0), ("solarize", crop.solarize)}
    assert len(kinds) == 10, "every branch was taken"


def test_torchvision_loader_makes_the_crops_that_were_drawn(photos, build):
    config = make_config()
    loader = build(photos)
    batch = next(iter(loader.epoch(3)))
    ids = loader._plan.batches(3, 0)[0]
    drawn = draw_crops(config, 3, ids, photos.sizes[ids])
    for b, index in enumerate(ids):
        image = Image.open(photos.paths[index]).convert("RGB")
        crops = drawn[0].of_sample(b) + drawn[1].of_sample(b)
        for n, (crop, size) in enumerate(zip(crops, (48, 48, 24, 24), strict=True)):
            assert torch.equal(batch[n][b], pil.make_crop(image, crop, size))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_each_image_is_decoded_once(photos, build, monkeypatch):
    decoded = []
    real = ImageSource.read_rgb
    monkeypatch.setattr(ImageSource, "read_rgb", lambda self, i: decoded.append(i) or real(self, i))
    assert len(list(build(photos).epoch(0))) == 4
    assert len(decoded) == len(set(decoded)) == 16


@all_loaders
def test_batches_have_the_promised_shape(photos, build, crops):
    loader = build(photos, crops=crops, batch_size_per_gpu=2, grad_accum=3)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch == 3
    for batch in batches:
        assert [tuple(crop.shape) for crop in batch] == [(6, 3, 48, 48)] * 2 + [(6, 3, 24, 24)] * 2
        assert all(crop.dtype == torch.float32 and crop.device.type == "cpu" for crop in batch)
        assert all(crop.is_contiguous() and crop.isfinite().all() for crop in batch)
    assert loader.source is photos
    assert loader.skipped == {}


@all_loaders
def test_no_local_crops(photos, build, crops):
    assert len(next(iter(build(photos, crops=crops, local_crops_number=0).epoch(0)))) == 2


@all_loaders
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_an_epoch_can_be_taken_up_at_any_step_bit_for_bit(photos, build, crops):
    loader = build(photos, crops=crops, num_workers=1)
    whole = list(loader.epoch(1))
    for start in range(5):
        assert_same(loader.epoch(1, start_step=start), whole[start:])
    assert_same(build(photos, crops=crops).epoch(1, 2), whole[2:])
    with pytest.raises(ValueError, match="from 0 to 4, got 5"):
        loader.epoch(1, 5)
    with pytest.raises(AssertionError):
        assert_same(loader.epoch(2), whole)


@all_loaders
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_number_of_workers_changes_nothing(photos, build, crops):
    none, two = (build(photos, crops=crops, num_workers=n) for n in (0, 2))
    assert_same(none.epoch(0), two.epoch(0))
    assert_same(none.epoch(1), two.epoch(1))


@all_loaders
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_an_epoch_left_early_does_not_disturb_the_next(photos, build, crops):
    loader = build(photos, crops=crops, num_workers=2)
    expected = list(loader.epoch(1))
    for taken in range(1, 4):
        left = loader.epoch(0)
        for _ in range(taken):
            next(left)
        assert_same(loader.epoch(1), expected)
        with pytest.raises(RuntimeError, match="another epoch"):
            next(left)


@all_loaders
def test_batches_that_are_kept_do_not_change(photos, build, crops):
    loader = build(photos, crops=crops)
    kept, copies = [], []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            kept.append(batch)
            copies.append([crop.clone() for crop in batch])
    assert_same(kept, copies)
    loader.close()
    assert_same(kept, copies)


@all_loaders
def test_a_closed_loader_says_so(photos, build, crops):
    loader = build(photos, crops=crops)
    running = loader.epoch(0)
    next(running)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader.epoch(0)))
    with pytest.raises(RuntimeError):
        next(running)


@all_loaders
def test_the_processes_split_the_samples(photos, build, crops):
    alone = build(photos, crops=crops, batch_size_per_gpu=18)
    parts = [build(photos, 0, 2, crops=crops, batch_size_per_gpu=9)]
    parts.append(build(photos, 1, 2, crops=crops, batch_size_per_gpu=9))
    whole = next(iter(alone.epoch(2)))
    halves = [next(iter(part.epoch(2))) for part in parts]
    for n in range(4):
        merged = torch.stack([half[n] for half in halves], dim=1).flatten(0, 1)
        assert torch.equal(merged, whole[n]), "same crops whatever the world size, each sample once"


@pytest.mark.parametrize("last_batch", ["paper", "drop", "pad"])
def test_an_epoch_is_taken_up_by_another_number_of_processes(photos, build, last_batch):
    settings = {"last_batch": last_batch, "local_crops_number": 0}
    whole = list(build(photos, batch_size_per_gpu=12, **settings).epoch(1))
    assert len(whole) == (2 if last_batch == "pad" else 1)
    for world in (2, 3):
        parts = [
            build(photos, rank, world, batch_size_per_gpu=12 // world, **settings)
            for rank in range(world)
        ]
        for start in range(len(whole)):
            rests = [list(part.epoch(1, start)) for part in parts]
            for step, expected in enumerate(whole[start:]):
                for n in range(2):
                    merged = torch.stack([rest[step][n] for rest in rests], dim=1).flatten(0, 1)
                    assert torch.equal(merged, expected[n])


@all_loaders
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_images_in_tars_give_the_crops_of_those_in_folders(
    photos, build, crops, tmp_path, make_tar
):
    root = Path(photos.paths[0]).parents[1]
    for folder in sorted(root.iterdir()):
        members = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        make_tar(tmp_path / f"{folder.name}.tar", members)
    expected = list(build(photos, crops=crops).epoch(1))
    for workers in (0, 2):
        loader = build(scan_images(tmp_path), crops=crops, num_workers=workers)
        assert_same(loader.epoch(1), expected)
        assert_same(loader.epoch(1, 2), expected[2:])
    # One that breaks after the scan gives way here too.
    tar = tmp_path / "class1.tar"
    source = scan_images(tmp_path)
    offset, length = source.in_tars.parts[8].tolist()
    data = bytearray(tar.read_bytes())
    data[offset : offset + length] = bytes(length)
    tar.write_bytes(data)
    loader = build(source, crops=crops, batch_size_per_gpu=18)
    assert len(list(loader.epoch(0))) == 1
    assert list(loader.skipped) == [source.paths[8]] == [str(tar / "07.jpg")]


@all_loaders
@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("PNG", "LA")],
    ids="-".join,
)
def test_orientation_is_applied_by_every_loader_where_it_is_asked_for(
    tmp_path, build, monkeypatch, crops, form, mode
):
    undrawn(monkeypatch)
    image = photo(3).convert(mode)
    for value in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = value
        suffix = form.lower()
        quality = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
        image.save(tmp_path / f"{value}.{suffix}", form, exif=exif, **quality)
        # The same pixels, turned before: what a loader should see. PNG, as JPEG would lose twice.
        with Image.open(tmp_path / f"{value}.{suffix}") as stored:
            turned = ImageOps.exif_transpose(stored.convert("RGB"))
        (tmp_path / "turned").mkdir(exist_ok=True)
        turned.save(tmp_path / "turned" / f"{value}.png")
    shutil.move(tmp_path / "turned", tmp_path.parent / f"{tmp_path.name}-turned")
    expected_source = scan_images(tmp_path.parent / f"{tmp_path.name}-turned")
    source = scan_images(tmp_path, exif=True)
    assert source.sizes.tolist() == expected_source.sizes.tolist()
    options = {"batch_size_per_gpu": 8}
    (expected,) = build(expected_source, **options).epoch(0)
    (ours,) = build(source, crops=crops, **options).epoch(0)
    (stored,) = build(scan_images(tmp_path), crops=crops, **options).epoch(0)
    order = build(source, **options)._plan.batches(0, 0)[0]
    for b, index in enumerate(order):
        assert levels(ours[0][b], expected[0][b]) < 0.5, source.paths[index]
        if form != "TIFF" and index > 0:  # Pillow turns TIFF in any case.
            assert levels(stored[0][b], expected[0][b]) > 5, source.paths[index]


@all_loaders
def test_fewer_images_than_a_batch_is_an_error_when_it_is_built(photos, build, crops):
    with pytest.raises(DataError, match="18 images .*--batch_size_per_gpu"):
        build(photos, crops=crops, batch_size_per_gpu=64)


def odd_folder(root):
    """Good files of odd kinds, 18 of them."""
    folder = root / "k"
    folder.mkdir(parents=True)
    image = photo(1)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.convert("L").save(folder / "gray.jpg", quality=95)
    image.convert("RGBA").save(folder / "rgba.png")
    image.quantize(32).save(folder / "palette.png")
    image.resize((1, 1)).save(folder / "pixel.png")
    image.save(folder / "named.jpg", format="PNG")
    image.save(folder / "progressive.jpg", progressive=True, quality=95)
    image.save(folder / "a.webp", lossless=True)
    image.save(folder / "a.tif")
    image.save(folder / "a.ppm")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif, quality=95)
    image.save(folder / "turned.tif", exif=exif)
    Image.fromarray(np.arange(7500, dtype=np.uint16).reshape(75, 100) * 8).save(folder / "deep.png")
    image.convert("LA").save(folder / "alpha.png")
    image.quantize(16).save(folder / "clear.png", transparency=3)
    image.convert("L").save(folder / "gray.bmp")
    image.save(folder / "moving.webp", save_all=True, append_images=[photo(2)], lossless=True)
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    return folder


@all_loaders
def test_odd_files_are_read(tmp_path, build, crops):
    odd_folder(tmp_path)
    source = scan_images(tmp_path)
    assert len(source) == 18
    loader = build(source, crops=crops, batch_size_per_gpu=18)
    assert len(list(loader.epoch(0))) == 1
    assert loader.skipped == {}


@needs_dali
def test_odd_files_are_the_same_pictures_for_dali(tmp_path, build, monkeypatch):
    odd_folder(tmp_path)
    (tmp_path / "k" / "huge.png").unlink()
    undrawn(monkeypatch)
    source = scan_images(tmp_path)
    exact, near = (
        next(iter(build(source, crops=crops, batch_size_per_gpu=17).epoch(0)))
        for crops in ("torchvision", "dali")
    )
    order = build(source, batch_size_per_gpu=17)._plan.batches(0, 0)[0]
    for b, index in enumerate(order):
        for n in range(4):
            assert levels(exact[n][b], near[n][b]) < 0.5, source.paths[index]


def break_files(source, names):
    """Overwrites good images with a cut JPEG, text and nothing, or removes them: (index, path)s."""
    broken = []
    for index, how in names:
        path = Path(source.paths[index])
        if how == "cut":
            path.write_bytes(path.read_bytes()[:-600])
        elif how == "gone":
            path.unlink()
        else:
            path.write_bytes({"text": b"this is no image", "empty": b""}[how])
        broken.append(path)
    return {str(path) for path in broken}


@pytest.fixture
def breakable(tmp_path):
    for n in range(18):
        photo(n).save(tmp_path / f"{n:02}.jpg", quality=92)
    return scan_images(tmp_path)


@all_loaders
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_give_way_to_the_next_good_one(breakable, build, crops, workers):
    good = build(breakable, crops=crops, num_workers=0, batch_size_per_gpu=6)
    order = np.concatenate(good._plan.batches(0, 0)).tolist()
    before = [torch.cat(parts) for parts in zip(*good.epoch(0), strict=True)]
    broken = break_files(breakable, [(4, "cut"), (5, "text"), (9, "gone"), (17, "empty")])

    loader = build(breakable, crops=crops, num_workers=workers, batch_size_per_gpu=6)
    batches = list(loader.epoch(0))
    after = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    assert set(loader.skipped) == broken
    stand_ins = {4: 6, 5: 6, 9: 10, 17: 0}
    for place, index in enumerate(order):
        source_place = order.index(stand_ins.get(index, index))
        for n in range(4):
            assert torch.equal(after[n][place], before[n][source_place]), (place, index)
    assert_same(loader.epoch(0), batches)
    assert_same(loader.epoch(0, 2), batches[2:])


@all_loaders
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_files_end_the_run_with_their_names(breakable, build, crops, workers):
    break_files(breakable, [(n, "text") for n in range(3, 9)])
    loader = build(breakable, crops=crops, max_bad_share=0.2, num_workers=workers)
    with pytest.raises(DataError, match=r"of 18 images cannot be read.*0.2.*\.jpg ") as error:
        list(loader.epoch(0))
    assert "Traceback" not in str(error.value)


def run_script(code, *args):
    """Runs code, with this module as `t`, in a process of its own, which has to end."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import test_loaders as t\n" + code
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", code, here, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_fused_crops_are_torchvisions_bit_for_bit(tmp_path, build, workers):
    (odd_folder(tmp_path) / "huge.png").unlink()
    for n in range(19):
        photo(n, (100 + n, 75 + 3 * n)).save(tmp_path / "k" / f"{n:02}.jpg", quality=92)
    source = scan_images(tmp_path)
    sizes = {"global_crops_size": 96, "local_crops_size": 40, "local_crops_number": 4}
    exact, ours = (
        build(source, crops=crops, num_workers=workers, batch_size_per_gpu=6, **sizes)
        for crops in ("torchvision", "fused")
    )
    break_files(source, [(4, "cut"), (9, "gone"), (30, "text")])
    assert exact.steps_per_epoch == ours.steps_per_epoch == 6
    for epoch, start in ((0, 0), (1, 0), (1, 4)):
        assert_same(exact.epoch(epoch, start), ours.epoch(epoch, start))
    assert exact.skipped.keys() == ours.skipped.keys()
    assert len(ours.skipped) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fused_crops_on_a_gpu_are_torchvisions_whatever_its_streams_do(photos, build):
    exact = list(build(photos).epoch(0))
    config = make_config(crops="fused", num_workers=2)
    loader = build_loader(config, photos, device="cuda")
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        kept = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for batch in loader.epoch(0):
                busy @ busy  # so that the stream is behind when the next batch is made
                kept.append([crop.clone() for crop in batch])
                assert all(crop.is_cuda and crop.is_contiguous() for crop in batch)
                del batch  # its memory is free for the next one, as the caching allocator sees it
            torch.cuda.current_stream().synchronize()
        assert_same([[crop.cpu() for crop in batch] for batch in kept], exact)
    loader.close()


@needs_dali
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_breaks_after_the_scan_does_not_crash_dali(tmp_path, workers):
    for n in range(192):
        photo(n, (64, 48)).save(tmp_path / f"{n:03}.jpg")
    code = """
source = t.scan_images(sys.argv[1])
config = t.make_config(crops="dali", batch_size_per_gpu=64, num_workers=int(sys.argv[2]))
loader = t.build_loader(config, source)
for index in (5, 6, 100, 191):
    t.Path(source.paths[index]).write_text("bad")
print(len(list(loader.epoch(0))), len(loader.skipped))
loader.close()
"""
    done = run_script(code, tmp_path, workers)
    assert (done.returncode, done.stdout) == (0, "3 4\n"), done.stderr


@pytest.mark.parametrize("crops", ["torchvision", "fused"])
def test_an_error_in_the_middle_of_an_epoch_ends_the_process(breakable, crops):
    code = """
source = t.scan_images(sys.argv[1])
loader = t.build_loader(t.make_config(num_workers=2, crops=sys.argv[2]), source)
for batch in loader.epoch(0):
    raise KeyError("a bug")
"""
    done = run_script(code, Path(breakable.paths[0]).parent, crops)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'a bug'\n")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_sigterm_leaves_the_workers_to_their_epoch(photos, build):
    loader = build(photos, num_workers=2)
    batches = loader.epoch(0)
    next(batches)
    workers = loader._loader._iterator._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 3
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_can_be_spawned(photos, build):
    assert len(pickle.loads(pickle.dumps(pil._CropDataset(make_config(), photos)))) == 18
    loader = build(photos, num_workers=1)
    loader._loader.multiprocessing_context = "spawn"
    assert_same(loader.epoch(0), build(photos).epoch(0))


@all_loaders
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_when_every_file_is_broken_the_run_ends(breakable, build, crops, workers):
    break_files(breakable, [(n, "text") for n in range(18)])
    loader = build(breakable, crops=crops, max_bad_share=1.0, num_workers=workers)
    with pytest.raises(DataError, match="none of the 18 images"):
        list(loader.epoch(0))


def test_a_sample_reports_every_broken_file_it_passed_over(breakable):
    dataset = pil._CropDataset(make_config(), breakable)
    break_files(breakable, [(17, "text"), (0, "text")])
    for _ in range(2):  # Known ones too: an epoch left early may have kept the first report.
        assert [index for index, _ in dataset[0, 17][1]] == [17, 0]


@all_loaders
def test_what_the_scan_skipped_counts_in_the_run(breakable, build, crops):
    break_files(breakable, [(n, "text") for n in range(3)])
    source = scan_images(Path(breakable.paths[0]).parent, max_bad_share=0.3)
    break_files(source, [(n, "text") for n in range(3)])
    with pytest.raises(DataError, match="6 of 18 images cannot be read"):
        list(build(source, crops=crops, max_bad_share=0.3).epoch(0))


@all_loaders
def test_no_memory_is_not_a_broken_file(photos, build, crops, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    loader = build(photos, crops=crops)
    with pytest.raises(MemoryError):
        list(loader.epoch(0))
    assert loader.skipped == {}


@all_loaders
def test_a_file_replaced_after_the_scan_is_cropped_at_its_real_size(breakable, build, crops):
    for path in breakable.paths:
        photo(0, (40, 30)).save(path)
    loader = build(breakable, crops=crops)
    assert len(list(loader.epoch(0))) == 4
    assert loader.skipped == {}


@needs_dali
def test_what_only_pillow_decodes_is_handed_to_dali(photos, build, monkeypatch, tmp_path):
    dali = importlib.import_module("fastdino.data.dali")
    undrawn(monkeypatch)
    for n in range(5):
        photo(n).save(tmp_path / f"{n}.png")
    odd = tmp_path / "5.png"
    photo(9).save(odd, format="GIF")
    source = scan_images(tmp_path)
    assert len(source) == 6
    expected = list(build(source, batch_size_per_gpu=3).epoch(0))
    loader = build(source, crops="dali", batch_size_per_gpu=3)
    ours = list(loader.epoch(0))
    assert isinstance(loader, dali.DaliLoader)
    assert loader.skipped == {}
    for batch, other in zip(ours, expected, strict=True):
        assert all(levels(a, b) < 0.5 for a, b in zip(batch, other, strict=True))
    assert_same(loader.epoch(0, 1), ours[1:])


@needs_dali
def test_dali_crops_are_those_of_the_loader(photos, build):
    from fastdino.data.dali import dali_crops

    config = make_config()
    batch = next(iter(build(photos, crops="dali").epoch(3)))
    order = EpochPlan(len(photos), 4, 0, 0, 1, "paper").batches(3, 0)[0]
    images = [np.asarray(photos.read_rgb(index)) for index in order]
    drawn = draw_crops(config, 3, order, [image.shape[:2] for image in images])
    ours = dali_crops(images, list(zip(drawn, (48, 24), strict=True)))
    assert_same([batch], [[crop for crops in ours for crop in crops.unbind(1)]])


def levels(crop, other):
    """Mean absolute difference in levels of 0..255."""
    std = torch.tensor(pil.STD)[:, None, None] * 255
    return ((crop - other) * std).abs().mean().item()


def undrawn(monkeypatch, **kept):
    """Makes the loaders draw boxes, and what `kept` says: field -> value, or None as drawn."""

    def plain(params):
        new = {}
        for name in ("flip", "jitter", "gray", "blur_radius", "solarize"):
            drawn = getattr(params, name)
            value = kept.get(name, 0)
            new[name] = drawn if value is None else torch.full_like(drawn, value)
        if "jitter_factor" in kept:
            neutral = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand_as(params.jitter_factor)
            mask = torch.tensor([n in kept["jitter_factor"] for n in range(4)])
            new["jitter"] = torch.ones_like(params.jitter)
            new["jitter_factor"] = torch.where(mask, params.jitter_factor, neutral)
            new["jitter_order"] = torch.arange(4).int().expand_as(params.jitter_order)
        return dataclasses.replace(params, **new)

    def draw(*args):
        return tuple(plain(params) for params in draw_crops(*args))

    monkeypatch.setattr(pil, "draw_crops", draw)
    monkeypatch.setattr(fused_loader, "draw_crops", draw)
    if HAS_DALI:
        monkeypatch.setattr("fastdino.data.dali.draw_crops", draw)


def both(photos, build, crops=("torchvision", "dali")):
    sizes = {"global_crops_size": 112, "batch_size_per_gpu": 18}
    return [next(iter(build(photos, crops=name, **sizes).epoch(0))) for name in crops]


@needs_dali
@pytest.mark.parametrize(
    ("kept", "bound"),
    [
        ({}, 0.3),
        ({"flip": None}, 0.3),
        ({"jitter_factor": (0,)}, 0.8),
        ({"jitter_factor": (1,)}, 0.8),
        ({"jitter_factor": (2,)}, 0.8),
        ({"jitter_factor": (0, 1, 2)}, 2.5),
        ({"gray": 1}, 0.5),
        ({"blur_radius": None}, 0.8),
        ({"blur_radius": 2.0}, 1.6),
    ],
    ids=str,
)
def test_dali_is_near_pil(photos, build, monkeypatch, kept, bound):
    undrawn(monkeypatch, **kept)
    # Pillow's turn by 0 goes through HSV and is lossy; hue is compared on its own.
    monkeypatch.setattr(pil, "_JITTER", (*pil._JITTER[:3], lambda image, _: image))
    for exact, near in zip(*both(photos, build), strict=True):
        assert levels(exact, near) < bound
    if kept:
        undrawn(monkeypatch)
        plain = both(photos, build, ["dali"])[0]
        assert levels(plain[0], near_first(photos, build, monkeypatch, kept)) > 2 * bound


def near_first(photos, build, monkeypatch, kept):
    undrawn(monkeypatch, **kept)
    return both(photos, build, ["dali"])[0][0]


@needs_dali
def test_dali_solarizes_the_second_global_crop_as_pil(photos, build, monkeypatch):
    undrawn(monkeypatch, solarize=1)
    exact, near = both(photos, build)
    # Where a level falls on the other side of the threshold, it jumps: rarely.
    assert levels(exact[1], near[1]) < 0.8
    undrawn(monkeypatch)
    assert levels(both(photos, build, ["dali"])[0][1], near[1]) > 20


@needs_dali
def test_dali_turns_hue_in_the_direction_of_pil(photos, build, monkeypatch):
    undrawn(monkeypatch, jitter_factor=(3,))
    exact, near = both(photos, build)
    turned = pil._JITTER[3]
    monkeypatch.setattr(pil, "_JITTER", (*pil._JITTER[:3], lambda i, factor: turned(i, -factor)))
    opposite = both(photos, build, ["torchvision"])[0]
    assert levels(exact[0], near[0]) < 0.7 * levels(opposite[0], near[0])


def test_auto_takes_the_fused_crops_and_says_so(photos, build):
    loader = build(photos, crops="auto", num_workers=1)
    assert isinstance(loader, fused_loader.FusedLoader)
    assert "fused, Numba" in loader.description
    assert "on CPU, 1 threads (the paper's crops, exact)" in loader.description


@needs_dali
def test_without_numba_auto_takes_dali_and_fused_is_an_error(photos, build, monkeypatch):
    fail_imports(monkeypatch, fused=ModuleNotFoundError("No module named 'numba'", name="numba"))
    loader = build(photos, crops="auto", num_workers=1)
    assert type(loader).__name__ == "DaliLoader"
    assert "DALI" in loader.description
    assert "on CPU, 1 threads" in loader.description
    assert "--crops torchvision" in loader.description
    assert "Numba is not installed: pip install" in loader.description
    with pytest.raises(ConfigError, match=r'--crops fused: Numba is not .*"fastdino\[train\]"'):
        build(photos, crops="fused")


def fail_imports(monkeypatch, **errors):
    """Makes the import of fastdino.data.<name> raise its error."""
    real = importlib.import_module

    def fails(name):
        package, _, last = name.rpartition(".")
        if package == "fastdino.data" and last in errors:
            raise errors[last]
        return real(name)

    monkeypatch.setattr(loader_module.importlib, "import_module", fails)


NO_NUMBA = ImportError("Numba needs another NumPy")


@pytest.mark.parametrize(
    ("cuda", "extra"), [("12.8", "cuda12"), ("13.2", "cuda13"), (None, "cuda13")]
)
def test_without_both_auto_takes_torchvision_and_dali_is_an_error(
    photos, build, monkeypatch, cuda, extra
):
    missing = ModuleNotFoundError("No module named 'nvidia.dali'")
    fail_imports(monkeypatch, fused=NO_NUMBA, dali=missing)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    loader = build(photos, crops="auto")
    assert isinstance(loader, pil.TorchvisionLoader)
    assert "Numba does not work here: Numba needs another NumPy;" in loader.description
    assert f'DALI is not installed: pip install "fastdino[dali-{extra}]"' in loader.description
    with pytest.raises(ConfigError, match=rf'--crops dali.*pip install "fastdino\[dali-{extra}\]"'):
        build(photos, crops="dali")


def test_where_dali_does_not_work_auto_says_why(photos, build, monkeypatch):
    fail_imports(monkeypatch, fused=NO_NUMBA, dali=RuntimeError("the driver is too old\nand more"))
    loader = build(photos, crops="auto")
    assert "DALI does not work here: the driver is too old)" in loader.description
    with pytest.raises(ConfigError, match="--crops dali: DALI does not work here: the driver"):
        build(photos, crops="dali")


def test_a_cuda_run_needs_triton_for_the_fused_crops(monkeypatch):
    monkeypatch.setattr(loader_module, "dali_problem", lambda device: "no DALI")
    assert loader_module.choose_crops("auto", "cuda")[0] == "fused"
    monkeypatch.setattr(loader_module, "triton_problem", lambda kind: "triton is not installed")
    assert loader_module.choose_crops("auto", "cuda") == (
        "torchvision",
        "the paper's chain, exact; no fused crops on CUDA: triton is not installed; no DALI",
    )
    with pytest.raises(ConfigError, match="--crops fused: no fused crops on CUDA: triton is not"):
        loader_module.choose_crops("fused", "cuda:0")


def test_torchvision_says_what_it_is(photos, build):
    description = build(photos, crops="torchvision").description
    assert "torchvision" in description
    assert "exact" in description
    assert "DALI" not in description


def test_the_package_imports_without_dali():
    code = "import sys, fastdino.data; sys.exit(any('dali' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
