"""fastdino.data.loader: the shared behavior of the three loaders."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastdino.augmentation import dali_problem, fused_problem
from fastdino.data import loader_fused, loader_torchvision
from fastdino.data.image_dataset import scan_images
from fastdino.data.image_files import Conversion
from fastdino.errors import ConfigError, DataError
from tests.loaders import (
    all_loaders,
    assert_same,
    break_files,
    levels,
    needs_dali,
    odd_folder,
    photo,
    run_script,
    undrawn,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@all_loaders
def test_batch_shapes(photos, build, crops):
    loader = build(photos, crops=crops, batch_size_per_gpu=2, grad_accum=3)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch == 3
    for batch in batches:
        assert [tuple(crop.shape) for crop in batch] == [(6, 3, 48, 48)] * 2 + [(6, 3, 24, 24)] * 2
        assert all(crop.dtype == torch.float32 and crop.device.type == "cpu" for crop in batch)
        assert all(crop.is_contiguous() and crop.isfinite().all() for crop in batch)
    assert loader.dataset is photos
    assert loader.skipped == {}
    libraries = {"torchvision": "torchvision", "fused": "Numba", "dali": "DALI"}
    assert loader.description.startswith(f"{libraries[crops]} ")
    assert len(next(iter(build(photos, crops=crops, local_crops_number=0).epoch(0)))) == 2


@all_loaders
def test_epoch_started_at_any_step_matches_the_whole_epoch(photos, build, crops):
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
def test_number_of_workers_does_not_change_the_crops(photos, build, crops):
    none, two = (build(photos, crops=crops, num_workers=n) for n in (0, 2))
    assert_same(none.epoch(0), two.epoch(0))
    assert_same(none.epoch(1), two.epoch(1))


@all_loaders
def test_abandoned_epoch_does_not_affect_the_next(photos, build, crops):
    loader = build(photos, crops=crops, num_workers=2)
    expected = list(loader.epoch(1))
    for count in range(1, 4):
        abandoned = loader.epoch(0)
        for _ in range(count):
            next(abandoned)
        assert_same(loader.epoch(1), expected)
        with pytest.raises(RuntimeError, match="another epoch"):
            next(abandoned)


@all_loaders
def test_held_batches_do_not_change(photos, build, crops):
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
def test_closed_loader_raises(photos, build, crops):
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
def test_ranks_split_the_global_batch(photos, build, crops):
    whole = next(iter(build(photos, crops=crops, batch_size_per_gpu=18).epoch(2)))
    ranks = [build(photos, rank, 2, crops=crops, batch_size_per_gpu=9) for rank in range(2)]
    halves = [next(iter(loader.epoch(2))) for loader in ranks]
    for n in range(4):
        merged = torch.stack([half[n] for half in halves], dim=1).flatten(0, 1)
        assert torch.equal(merged, whole[n])


@all_loaders
def test_images_in_tars_give_the_same_crops_as_in_folders(photos, build, crops, tmp_path, make_tar):
    root = Path(photos.paths[0]).parents[1]
    for folder in sorted(root.iterdir()):
        members = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        make_tar(tmp_path / f"{folder.name}.tar", members)
    expected = list(build(photos, crops=crops).epoch(1))
    for workers in (0, 2):
        loader = build(scan_images(tmp_path), crops=crops, num_workers=workers)
        assert_same(loader.epoch(1), expected)
        assert_same(loader.epoch(1, 2), expected[2:])
    # A member that breaks after the scan is replaced too.
    tar = tmp_path / "class1.tar"
    dataset = scan_images(tmp_path)
    offset, length, _ = dataset.manifest.parts[8].tolist()
    data = bytearray(tar.read_bytes())
    data[offset : offset + length] = bytes(length)
    tar.write_bytes(data)
    loader = build(dataset, crops=crops, batch_size_per_gpu=18)
    assert len(list(loader.epoch(0))) == 1
    assert list(loader.skipped) == [dataset.paths[8]] == [str(tar / "07.jpg")]


@all_loaders
@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("PNG", "LA")],
    ids="-".join,
)
def test_exif_orientation_is_applied_only_on_request(
    tmp_path, build, monkeypatch, crops, form, mode
):
    undrawn(monkeypatch)
    image = photo(3).convert(mode)
    (tmp_path / "upright").mkdir()
    for value in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = value
        path = tmp_path / f"{value}.{form.lower()}"
        quality = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
        image.save(path, form, exif=exif, **quality)
        with Image.open(path) as stored:
            upright = ImageOps.exif_transpose(stored.convert("RGB"))
        upright.save(tmp_path / "upright" / f"{value}.png")
    expected_folder = tmp_path.parent / f"{tmp_path.name}-upright"
    shutil.move(tmp_path / "upright", expected_folder)
    expected_dataset, dataset = (
        scan_images(expected_folder),
        scan_images(tmp_path, conversion=Conversion(exif=True)),
    )
    assert dataset.sizes.tolist() == expected_dataset.sizes.tolist()
    options = {"batch_size_per_gpu": 8}
    (expected,) = build(expected_dataset, **options).epoch(0)
    (ours,) = build(dataset, crops=crops, **options).epoch(0)
    (stored,) = build(scan_images(tmp_path), crops=crops, **options).epoch(0)
    for b, index in enumerate(build(dataset, **options)._plan.batches(0, 0)[0]):
        assert levels(ours[0][b], expected[0][b]) < 0.5, dataset.paths[index]
        if form != "TIFF" and index > 0:  # Pillow always rotates TIFF.
            assert levels(stored[0][b], expected[0][b]) > 5, dataset.paths[index]


@all_loaders
def test_fewer_images_than_a_batch_is_an_error(photos, build, crops):
    with pytest.raises(DataError, match="18 images .*--batch_size_per_gpu"):
        build(photos, crops=crops, batch_size_per_gpu=64)


@all_loaders
def test_unusual_formats_are_read(tmp_path, build, crops):
    odd_folder(tmp_path)
    dataset = scan_images(tmp_path)
    assert len(dataset) == 18
    loader = build(dataset, crops=crops, batch_size_per_gpu=18)
    assert len(list(loader.epoch(0))) == 1
    assert loader.skipped == {}


@all_loaders
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_replaced_by_the_next_good_one(breakable, build, crops, workers):
    good = build(breakable, crops=crops, num_workers=0, batch_size_per_gpu=6)
    order = np.concatenate(good._plan.batches(0, 0)).tolist()
    before = [torch.cat(parts) for parts in zip(*good.epoch(0), strict=True)]
    broken = break_files(breakable, [(4, "cut"), (5, "text"), (9, "gone"), (17, "empty")])

    loader = build(breakable, crops=crops, num_workers=workers, batch_size_per_gpu=6)
    batches = list(loader.epoch(0))
    after = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    assert set(loader.skipped) == broken
    replacements = {4: 6, 5: 6, 9: 10, 17: 0}
    for position, index in enumerate(order):
        expected = order.index(replacements.get(index, index))
        for n in range(4):
            assert torch.equal(after[n][position], before[n][expected]), (position, index)
    assert_same(loader.epoch(0), batches)
    assert_same(loader.epoch(0, 2), batches[2:])


@all_loaders
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("broken", "share", "message"),
    [
        (range(3, 9), 0.2, r"of 18 images cannot be read.*0.2.*\.jpg "),
        (range(18), 1.0, "none of the 18 images"),
    ],
    ids=["too many", "all"],
)
def test_unreadable_files_end_the_run(breakable, build, crops, workers, broken, share, message):
    break_files(breakable, [(n, "text") for n in broken])
    loader = build(breakable, crops=crops, max_bad_share=share, num_workers=workers)
    with pytest.raises(DataError, match=message) as error:
        list(loader.epoch(0))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("crops", ["fused", pytest.param("dali", marks=needs_dali)])
def test_workers_can_be_forked_while_another_loader_has_threads(breakable, crops):
    code = """
dataset = t.scan_images(sys.argv[1])
loader = t.build_loader(t.make_config(crops=sys.argv[2], num_workers=2), dataset)
first = len(list(loader.epoch(0)))
other = t.build_loader(t.make_config(num_workers=2), dataset)
if sys.platform == "linux":
    other._loader.multiprocessing_context = "fork"
print(first, len(list(other.epoch(0))), len(list(loader.epoch(1))))
other.close()
loader.close()
"""
    done = run_script(code, Path(breakable.paths[0]).parent, crops)
    assert (done.returncode, done.stdout) == (0, "4 4 4\n"), done.stderr


@pytest.mark.parametrize("crops", ["torchvision", "fused"])
def test_error_during_an_epoch_ends_the_process(breakable, crops):
    code = """
dataset = t.scan_images(sys.argv[1])
loader = t.build_loader(t.make_config(num_workers=2, crops=sys.argv[2]), dataset)
for batch in loader.epoch(0):
    raise KeyError("a bug")
"""
    done = run_script(code, Path(breakable.paths[0]).parent, crops)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'a bug'\n")


@all_loaders
def test_max_bad_share_includes_files_skipped_by_the_scan(breakable, build, crops):
    break_files(breakable, [(n, "text") for n in range(3)])
    dataset = scan_images(Path(breakable.paths[0]).parent, max_bad_share=0.3)
    break_files(dataset, [(n, "text") for n in range(3)])
    with pytest.raises(DataError, match="6 of 18 images cannot be read"):
        list(build(dataset, crops=crops, max_bad_share=0.3).epoch(0))


@all_loaders
def test_memory_error_is_not_an_unreadable_file(photos, build, crops, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    loader = build(photos, crops=crops)
    with pytest.raises(MemoryError):
        list(loader.epoch(0))
    assert loader.skipped == {}


@all_loaders
def test_file_replaced_after_the_scan_is_cropped_at_its_new_size(breakable, build, crops):
    for path in breakable.paths:
        photo(0, (40, 30)).save(path)
    loader = build(breakable, crops=crops)
    assert len(list(loader.epoch(0))) == 4
    assert loader.skipped == {}


def test_auto_builds_the_fused_loader(photos, build):
    loader = build(photos, crops="auto", num_workers=1)
    assert isinstance(loader, loader_fused.FusedLoader)
    assert "on CPU, 1 threads" in loader.description


def fail_imports(monkeypatch, **errors):
    """Make the import of fastdino.augmentation.<name> raise an error."""
    real = importlib.import_module

    def fails(name):
        last = name.rpartition(".")[2]
        if name.startswith("fastdino.") and last in errors:
            raise errors[last]
        return real(name)

    monkeypatch.setattr(importlib, "import_module", fails)


def test_without_numba_auto_is_torchvision_and_fused_is_an_error(photos, build, monkeypatch):
    fail_imports(monkeypatch, cpu=ModuleNotFoundError("No module named 'numba'", name="numba"))
    loader = build(photos, crops="auto", num_workers=1)
    assert isinstance(loader, loader_torchvision.TorchvisionLoader)
    with pytest.raises(ConfigError, match=r'--crops fused: Numba is not .*"fastdino\[train\]"'):
        build(photos, crops="fused")


@pytest.mark.parametrize(
    ("cuda", "extra"), [("12.8", "cuda12"), ("13.2", "cuda13"), (None, "cuda13")]
)
def test_missing_dali_is_an_error_with_the_package_to_install(
    photos, build, monkeypatch, cuda, extra
):
    fail_imports(monkeypatch, dali=ModuleNotFoundError("No module named 'nvidia.dali'"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ConfigError, match=rf'--crops dali.*pip install "fastdino\[dali-{extra}\]"'):
        build(photos, crops="dali")


def test_broken_libraries_are_reported_with_the_first_line_of_their_error(monkeypatch):
    fail_imports(
        monkeypatch,
        cpu=ImportError("Numba needs another NumPy"),
        dali=RuntimeError("the driver is too old\nand more"),
    )
    assert fused_problem("cpu").endswith(": Numba needs another NumPy")
    assert dali_problem().endswith(": the driver is too old")


def test_fused_crops_on_cuda_need_triton(monkeypatch):
    assert fused_problem("cuda:0") is None
    monkeypatch.setattr("fastdino.augmentation.triton_problem", lambda _: "triton is not installed")
    assert "triton is not installed" in fused_problem("cuda:0")


def test_package_imports_without_dali():
    code = "import sys, fastdino.data; sys.exit(any('dali' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
