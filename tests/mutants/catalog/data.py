"""Data: the order of samples, finding, reading and decoding images, and the loaders."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

DATA = "fastdino/data"
SETS = f"{DATA}/datasets"
SAMPLER = f"{DATA}/sampler.py"
FILES = f"{DATA}/image_files.py"
RGB = f"{DATA}/rgb_conversion.py"
DECODING = f"{DATA}/decoding.py"
SCANNING = f"{DATA}/scanning.py"
MANIFEST = f"{DATA}/manifest.py"
DATASET = f"{DATA}/image_dataset.py"
NAMES = f"{DATA}/image_names.py"
FOLDERS = f"{SETS}/folders.py"
TARS = f"{SETS}/tars.py"
ZIPS = f"{SETS}/zips.py"
BASE = f"{DATA}/loader_base.py"
FUSED = f"{DATA}/loader_fused.py"
CHAIN = f"{DATA}/loader_torchvision.py"

ARCHIVES = ("tests/test_archives.py",)
LOADERS = "tests/test_loaders.py"
REPLACED = (f"{LOADERS}::test_unreadable_files_are_replaced_by_the_next_good_one",)

MUTANTS = (
    # Order
    Mutant(
        SAMPLER,
        'samples = n // world if last_batch == "drop" else -(-n // world)',
        "samples = n // world",
    ),
    Mutant(
        SAMPLER, "if not 0 <= start_step <= self.steps:", "if not 0 <= start_step < self.steps:"
    ),
    Mutant(SAMPLER, "return -(-n // (batch * world))", "return -(-n // batch) // world"),
    Mutant(
        SAMPLER, "total or -(-n // world_size) * world_size", "-(-n // world_size) * world_size"
    ),
    Mutant(
        BASE,
        "config.split_batch(world_size).images_per_step",
        "config.split_batch(world_size).images",
        ("tests/test_loader_base.py",),
    ),
    Mutant(
        BASE,
        "config.seed, rank, world_size, last_batch",
        "config.seed, 0, world_size, last_batch",
        ("tests/test_loader_base.py",),
    ),
    Mutant(
        BASE,
        "config.seed, rank, world_size, last_batch",
        "0, rank, world_size, last_batch",
        ("tests/test_loader_base.py",),
    ),
    Mutant(
        BASE,
        "config.seed, rank, world_size, last_batch",
        'config.seed, rank, world_size, "paper"',
        ("tests/test_loader_base.py",),
    ),
    Mutant(
        BASE,
        "self._run += 1\n        self._stop()",
        "self._run += 1",
        ("tests/test_loaders.py::test_abandoned_epoch_does_not_affect_the_next",),
    ),
    Mutant(
        BASE,
        "if run != self._run:",
        "if run > self._run:",
        (f"{LOADERS}::test_abandoned_epoch_does_not_affect_the_next",),
    ),
    # Loaders
    Mutant(
        FUSED,
        'stream=self._backend.stream if decode == "gpu" else None',
        "stream=self._backend.stream",
        ("tests/test_loader.py",),
    ),
    Mutant(
        FUSED,
        'if self._device.type == "cuda":\n            self._backend = _CudaBackend',
        'if decode == "gpu":\n            self._backend = _CudaBackend',
        ("tests/test_loader.py",),
    ),
    Mutant(
        f"{DATA}/loader.py",
        '"world_size": world_size, "device": device}',
        '"world_size": world_size}',
        ("tests/test_loader.py",),
    ),
    Mutant(
        FUSED,
        "(picture.shape[0], picture.shape[1]) for",
        "(picture.shape[1], picture.shape[0]) for",
        ("tests/test_loader_fused.py::test_fused_crops_equal_torchvisions_bit_for_bit",),
    ),
    Mutant(
        FUSED,
        "if self._copied is not None:\n            self._copied.synchronize()",
        "",
        (
            "tests/test_loader_fused.py::test_pinned_memory_is_reused_after_its_copy_and_grows_with_room",
        ),
    ),
    Mutant(
        FUSED,
        "while self._held and (len(self._held) > keep or",
        "while self._held and (True or",
        ("tests/test_loader_fused.py::test_images_on_the_gpu_are_held_until_their_crops_are_made",),
    ),
    Mutant(CHAIN, "epoch, [used], [(image.height", "epoch, [index], [(image.height", REPLACED),
    Mutant(
        CHAIN,
        "[(image.height, image.width)]",
        "[(image.width, image.height)]",
        ("tests/test_pillow.py::test_torchvision_loader_makes_the_drawn_crops",),
    ),
    Mutant(
        CHAIN,
        "used if used >= index else used + len(self)",
        "max(used, index)",
        ("tests/test_pillow.py::test_sample_reports_every_unreadable_file_it_replaces",),
    ),
    Mutant(
        f"{DATA}/loader.py",
        "decode=decode, **options)",
        "**options)",
        ("tests/test_loader.py",),
    ),
    Mutant(
        f"{DATA}/workers.py",
        "if running is None or os.getpid() != owner:",
        "if running is None:",
        ("tests/test_workers.py",),
    ),
    # Unreadable images
    Mutant(
        f"{DATA}/bad_images.py",
        "if count > max_bad_share * total:",
        "if count >= max_bad_share * total:",
    ),
    Mutant(
        f"{DATA}/bad_images.py",
        "itertools.chain(range(index, self.n), range(index))",
        "range(index, self.n)",
    ),
    Mutant(
        f"{DATA}/bad_images.py",
        "count, total = len(bad) + broken, total + broken",
        "count, total = len(bad), total + broken",
    ),
    # Decoding
    Mutant(
        DECODING,
        "return position + 2 == len(data)",
        "return True",
        ("tests/test_decoding.py::test_other_data_is_not_a_complete_jpeg",),
    ),
    Mutant(DECODING, "not self._dataset.conversion.exif or orientation(image) == 1", "True"),
    Mutant(
        DECODING,
        'if image.format != "JPEG" or image.mode not in _MODES:',
        'if image.format != "JPEG":',
    ),
    Mutant(
        DECODING,
        "in_order = [done[position] for position in range(len(batch))]",
        "in_order = list(done.values())",
    ),
    Mutant(
        DECODING,
        "if match is None:\n                return False",
        "if match is None:\n                return True",
        ("tests/test_decoding.py::test_other_data_is_not_a_complete_jpeg",),
    ),
    # Conversion to RGB
    Mutant(
        RGB,
        "np.rint((values - low) * (255 / (high - low)))",
        "(values - low) * (255 / (high - low))",
    ),
    Mutant(RGB, "levels = 255 - levels", "pass"),
    Mutant(
        RGB,
        "return -float(2 ** (bits - 1)), 2.0 ** (bits - 1) - 1",
        "return 0.0, 2.0 ** (bits - 1) - 1",
    ),
    Mutant(RGB, "bits = _tag(image, _BITS) or 16", "bits = _tag(image, _BITS) or 8"),
    # Reading
    Mutant(FILES, "6: Image.Transpose.ROTATE_270", "6: Image.Transpose.ROTATE_90"),
    Mutant(
        FILES,
        "SWAPPED * (orientation(image) >= 5)",
        "SWAPPED * (orientation(image) > 5)",
        (
            "tests/test_image_files.py",
            f"{LOADERS}::test_exif_orientation_is_applied_only_on_request",
        ),
    ),
    Mutant(
        FILES,
        'if not data or image.format == "TIFF":',
        "if not data:",
        equivalent="Pillow 12 keeps the tags of a TIFF outside of info['exif'], so its orientation "
        "reads as 1 either way",
    ),
    Mutant(FILES, "for pause in (*PAUSES, None):", "for pause in (*PAUSES[1:], None):"),
    Mutant(
        FILES,
        "rgb = rgb if box is None else rgb.crop(box)",
        "pass",
    ),
    Mutant(FILES, "if len(inflated) < part.inflated:", "if len(inflated) > part.inflated:"),
    Mutant(
        FILES,
        "file.seek(-len(marker), os.SEEK_END)",
        "file.seek(-len(marker) - 1, os.SEEK_END)",
    ),
    # Names and their order
    Mutant(NAMES, '(int(part), "") if part.isdecimal()', "(0, part) if part.isdecimal()"),
    Mutant(NAMES, "return [*order, (-1, name)]", "return order"),
    Mutant(NAMES, "part.lower() in _LEFTOVERS", "part in _LEFTOVERS"),
    Mutant(
        FOLDERS,
        "images.append((current, sorted(names)))",
        "images.append((current, names))",
        ("tests/test_folders.py",),
    ),
    Mutant(
        FOLDERS,
        "sorted(names)))",
        "sorted(names, key=lambda name: (len(name), name))))",
        ("tests/test_folders.py",),
    ),
    Mutant(
        FOLDERS,
        "sorted(os.scandir(root), key=lambda entry: entry.name)",
        "sorted(os.scandir(root), key=lambda entry: entry.name.lower())",
        ("tests/test_folders.py",),
    ),
    Mutant(
        FOLDERS,
        "for current, names in sorted(images) for name",
        "for current, names in images for name",
        ("tests/test_folders.py",),
    ),
    # Scans and their cache
    Mutant(SCANNING, " & (stamps[:, 0] != _UNKNOWN)", "", ("tests/test_scan_cache.py",)),
    Mutant(
        SCANNING,
        "(cached.stamps[rows] == stamps).all(axis=1)",
        "(cached.stamps[rows] == stamps).any(axis=1)",
    ),
    Mutant(
        SCANNING,
        "and loaded.selection == files.selection",
        "",
        ("tests/test_yfcc.py::test_cache_is_not_reused_for_other_metadata",),
    ),
    Mutant(
        SCANNING,
        "if not changed and cached.files == images.files:",
        "if not changed:",
        ("tests/test_scan_cache.py",),
    ),
    Mutant(SCANNING, "images.stamps[images.file_ids[i]] = _UNKNOWN", "pass"),
    Mutant(
        SCANNING,
        "rows[changed] = len(cached.files) + np.arange(len(changed))",
        "rows[changed] = len(cached.files)",
    ),
    Mutant(MANIFEST, "reasons |= {first_image + i:", "reasons |= {first_file + i:"),
    Mutant(
        MANIFEST,
        'about["format"] != _FORMAT or about["pillow"] != PIL.__version__',
        'about["format"] != _FORMAT',
    ),
    # Datasets
    Mutant(DATASET, 'digest.update(images.headers[:, :2].astype("<i4").tobytes())', "pass"),
    Mutant(DATASET, "return kept[has_label], classes[:-1]", "return kept[has_label], classes"),
    Mutant(DATASET, "labels=labels[kept],", "labels=labels[: len(kept)],"),
    Mutant(
        TARS,
        "is_whole = offset + size <= length",
        "is_whole = offset + size < length",
        ("tests/test_tars.py",),
        reported=True,
    ),
    Mutant(TARS, "Part(start + offset, size), reason", "Part(offset, size), reason", ARCHIVES),
    Mutant(
        TARS,
        "if not member.isreg() or member.issparse():",
        "if not member.isreg():",
        ("tests/test_tars.py",),
    ),
    Mutant(TARS, "file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)", "True", ARCHIVES),
    Mutant(ZIPS, "_LOCAL_HEADER.size + sum(lengths)", "_LOCAL_HEADER.size + lengths[0]", ARCHIVES),
    Mutant(
        ZIPS,
        "elif not reason:\n            end = part.offset + part.length",
        "elif not reason:\n            end = part.offset",
        ARCHIVES,
    ),
    Mutant(
        f"{SETS}/webdataset.py",
        'if "." not in ext or key not in samples]',
        'if "." not in ext or key in samples]',
        ARCHIVES,
    ),
    Mutant(
        f"{SETS}/webdataset.py",
        'key, _, extension = base.partition(".")',
        'key, _, extension = base.rpartition(".")',
        ARCHIVES,
    ),
    Mutant(f"{SETS}/archives.py", "str(n).zfill(len(first))", "str(n)", ARCHIVES),
    Mutant(
        f"{SETS}/archives.py",
        "if len(names) < 2 or len(prefixes) > 1",
        "if len(prefixes) > 1",
        ARCHIVES,
    ),
    Mutant(
        f"{SETS}/file_list.py",
        "key=(lambda name: (int(name), name)) if numeric",
        "key=str if numeric",
        ("tests/test_registry.py",),
    ),
    Mutant(
        f"{SETS}/lists.py",
        'file, _, label = line.rpartition("\\t")',
        'file, _, label = line.partition("\\t")',
        ("tests/test_registry.py",),
    ),
    Mutant(
        f"{SETS}/splits.py",
        '("val", "validation", "valid", "test", "testing")',
        '("test", "val", "validation", "valid", "testing")',
        ("tests/test_data_path.py",),
    ),
    Mutant(
        f"{SETS}/splits.py",
        "if split is None and not role and len(splits) == 1:",
        "if split is None and len(splits) == 1:",
        ("tests/test_data_path.py",),
    ),
    Mutant(
        f"{SETS}/data_path.py",
        "if os.path.lexists(text):",
        "if os.path.isdir(text):",
        ("tests/test_data_path.py",),
    ),
)
