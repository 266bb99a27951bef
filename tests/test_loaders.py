"""fastdino.data.loader: the contract of the three loaders, and the choice between them."""

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
    offset, length, _ = source.manifest.parts[8].tolist()
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


@all_loaders
def test_odd_files_are_read(tmp_path, build, crops):
    odd_folder(tmp_path)
    source = scan_images(tmp_path)
    assert len(source) == 18
    loader = build(source, crops=crops, batch_size_per_gpu=18)
    assert len(list(loader.epoch(0))) == 1
    assert loader.skipped == {}


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


@pytest.mark.parametrize("crops", ["fused", pytest.param("dali", marks=needs_dali)])
def test_workers_are_forked_beside_the_threads_of_another_loader(breakable, crops):
    code = """
source = t.scan_images(sys.argv[1])
loader = t.build_loader(t.make_config(crops=sys.argv[2], num_workers=2), source)
first = len(list(loader.epoch(0)))
beside = t.build_loader(t.make_config(num_workers=2), source)
if sys.platform == "linux":
    beside._loader.multiprocessing_context = "fork"
print(first, len(list(beside.epoch(0))), len(list(loader.epoch(1))))
beside.close()
loader.close()
"""
    done = run_script(code, Path(breakable.paths[0]).parent, crops)
    assert (done.returncode, done.stdout) == (0, "4 4 4\n"), done.stderr


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


@all_loaders
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_when_every_file_is_broken_the_run_ends(breakable, build, crops, workers):
    break_files(breakable, [(n, "text") for n in range(18)])
    loader = build(breakable, crops=crops, max_bad_share=1.0, num_workers=workers)
    with pytest.raises(DataError, match="none of the 18 images"):
        list(loader.epoch(0))


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


def test_auto_takes_the_fused_crops_and_says_so(photos, build):
    loader = build(photos, crops="auto", num_workers=1)
    assert isinstance(loader, loader_fused.FusedLoader)
    assert loader.description.startswith("Numba ")
    assert "on CPU, 1 threads" in loader.description


def test_without_numba_auto_is_torchvision_and_fused_is_an_error(photos, build, monkeypatch):
    fail_imports(monkeypatch, cpu=ModuleNotFoundError("No module named 'numba'", name="numba"))
    loader = build(photos, crops="auto", num_workers=1)
    assert isinstance(loader, loader_torchvision.TorchvisionLoader)
    with pytest.raises(ConfigError, match=r'--crops fused: Numba is not .*"fastdino\[train\]"'):
        build(photos, crops="fused")


def fail_imports(monkeypatch, **errors):
    """Makes the import of fastdino.data.<name> raise its error."""
    real = importlib.import_module

    def fails(name):
        last = name.rpartition(".")[2]
        if name.startswith("fastdino.") and last in errors:
            raise errors[last]
        return real(name)

    monkeypatch.setattr(importlib, "import_module", fails)


@pytest.mark.parametrize(
    ("cuda", "extra"), [("12.8", "cuda12"), ("13.2", "cuda13"), (None, "cuda13")]
)
def test_missing_dali_is_an_error_with_the_package_to_install(
    photos, build, monkeypatch, cuda, extra
):
    missing = ModuleNotFoundError("No module named 'nvidia.dali'")
    fail_imports(monkeypatch, dali=missing)
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
    monkeypatch.setattr(
        "fastdino.augmentation.triton_problem", lambda kind: "triton is not installed"
    )
    assert "triton is not installed" in fused_problem("cuda:0")


def test_the_package_imports_without_dali():
    code = "import sys, fastdino.data; sys.exit(any('dali' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
