"""Tests of fastdino.data.datasets.torchvision_sets.

The files are generated, so torchvision's checksums do not match: the fixture `unchecked` disables
them, and one test checks that they are verified otherwise.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import pickle
import struct
import urllib.error

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision.datasets import cifar, flowers102, mnist, stl10, svhn

from fastdino.data.datasets import torchvision_sets
from fastdino.data.datasets.data_path import parse
from fastdino.data.datasets.torchvision_sets import SETS, default_root, find_torchvision
from fastdino.data.image_dataset import scan_images
from fastdino.errors import DataError
from fastdino.evals.options import scan_splits

N = 7  # images per split


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDINO_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def unchecked(monkeypatch):
    """Disable checksums: a file that exists is complete."""
    for module in (cifar, flowers102, mnist, stl10, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


@pytest.fixture
def offline(monkeypatch):
    """Make every download fail as without a network."""

    def fails(url, *_, **__):
        raise urllib.error.URLError("[Errno -2] Name or service not known")

    for module in (
        "cifar", "dtd", "eurosat", "flowers102", "imagenette", "inaturalist", "mnist",
        "oxford_iiit_pet", "stl10",
    ):  # fmt: skip
        one = getattr(torchvision.datasets, module)
        monkeypatch.setattr(one, "download_and_extract_archive", fails)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_cifar(root, name="CIFAR10", n=N):
    kind = getattr(torchvision.datasets, name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    labels = "labels" if name == "CIFAR10" else "fine_labels"
    for seed, (file, _) in enumerate(kind.train_list + kind.test_list):
        batch = {"data": noise(seed, n, 3072), labels: [(seed + i) % 3 for i in range(n)]}
        (folder / file).write_bytes(pickle.dumps(batch))
    names = {kind.meta["key"]: ["airplane", "bird", "cat", "dog"]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    for seed, split in enumerate(("train", "test", "unlabeled")):
        noise(seed, N, 3, 96, 96).tofile(folder / f"{split}_X.bin")
        (np.arange(N, dtype=np.uint8) % 3 + 1).tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")


def write_mnist(root, name, files=("train", "t10k")):
    folder = root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for part, magic, data in (
        ("images-idx3", (0x803, N, 28, 28), noise(1, N, 28, 28)),
        ("labels-idx1", (0x801, N), np.arange(N, dtype=np.uint8) % 3),
    ):
        for split in files:
            header = struct.pack(f">{len(magic)}i", *magic)
            (folder / f"{split}-{part}-ubyte").write_bytes(header + data.tobytes())


def write_svhn(root):
    savemat = pytest.importorskip("scipy.io").savemat
    for seed, split in enumerate(("train", "test", "extra")):
        labels = np.arange(N)[:, None] % 3 + 1
        savemat(root / f"{split}_32x32.mat", {"X": noise(seed, 32, 32, 3, N), "y": labels})


def write_pets(root):
    folder = root / "oxford-iiit-pet"
    for below in ("images", "annotations"):
        (folder / below).mkdir(parents=True)
    for seed, split in enumerate(("trainval", "test")):
        lines = []
        for i in range(N):
            breed = ("Abyssinian", "basset_hound", "Bombay")[i % 3]
            lines.append(f"{breed}_{N * seed + i} {i % 3 + 1} {1 + (i % 3 == 1)} 1")
            picture = Image.fromarray(noise(N * seed + i, 20 + i, 30, 3))
            picture.save(folder / "images" / f"{breed}_{N * seed + i}.jpg")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines))


WRITERS = {
    "OxfordIIITPet": write_pets,
    "EMNIST": lambda root: write_mnist(
        root, "EMNIST", [f"emnist-{split}" for split in SETS["EMNIST"].splits]
    ),
    "CIFAR10": write_cifar,
    "CIFAR100": lambda root: write_cifar(root, "CIFAR100"),
    "STL10": write_stl10,
    "SVHN": write_svhn,
    **{
        name: lambda root, n=name: write_mnist(root, n)
        for name in ("MNIST", "FashionMNIST", "KMNIST")
    },
}


def write_files(root, name, picture):
    """Write image files, two classes of two per split; return the classes."""
    suffix = {"RenderedSST2": "png", "Imagenette": "JPEG"}.get(name, "jpg")
    folder, classes = {
        "Country211": ("country211/{split}/{c}", ["AD", "ZW"]),
        "DTD": ("dtd/dtd/images/{c}", ["banded", "dotted"]),
        "EuroSAT": ("eurosat/2750/{c}", ["Forest", "River"]),
        "FGVCAircraft": ("fgvc-aircraft-2013b/data/images", ["707-320", "A340"]),
        "Flowers102": ("flowers-102/jpg", ["pink primrose", "hard-leaved pocket orchid"]),
        "Food101": ("food-101/images/{c}", ["apple_pie", "waffles"]),
        "Imagenette": ("imagenette2/{split}/{c}", ["n01440764", "n02102040"]),
        "INaturalist": ("{split}/{taxon}", ["00000_k_p_c_o_f_g_s", "00001_k_p_c_o_f_g_s"]),
        "RenderedSST2": ("rendered-sst2/{folder}/{c}", ["negative", "positive"]),
        "SUN397": ("SUN397/{c[0]}/{c}", ["abbey", "zoo"]),
    }[name]
    files = {}
    for s, split in enumerate(SETS[name].splits):
        folder_of = {"val": "valid"}.get(split, split)
        for c, label in enumerate(classes):
            for i in range(2):
                number = 4 * s + 2 * c + i + 1
                taxon = label if "2021" in split else f"Plantae/{label[:5]}"
                below = root / folder.format(split=split, folder=folder_of, c=label, taxon=taxon)
                below.mkdir(parents=True, exist_ok=True)
                stem = {"SUN397": f"sun_{number}", "Flowers102": f"image_{number:05}"}.get(name)
                path = below / f"{stem or number}.{suffix}"
                path.write_bytes(picture(number, form="PNG" if suffix == "png" else "JPEG"))
                files.setdefault(split, []).append((path, label))
    write_lists(root, name, files, classes)
    named = {"Imagenette": ["tench", "English springer"], "INaturalist": ["0", "1"]}
    return named.get(name, classes)


def write_lists(root, name, files, classes):
    """Write the metadata files of a dataset."""
    for split, pairs in files.items():
        if name == "DTD":
            (root / "dtd/dtd/labels").mkdir(exist_ok=True)
            lines = [f"{label}/{path.name}" for path, label in pairs]
            (root / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(lines))
        if name == "FGVCAircraft":
            data = root / "fgvc-aircraft-2013b/data"
            lines = [f"{path.stem} {label}" for path, label in pairs]
            (data / f"images_variant_{split}.txt").write_text("\n".join(lines))
            (data / "variants.txt").write_text("\n".join(classes))
        if name == "Food101":
            (root / "food-101/meta").mkdir(exist_ok=True)
            listed = {c: [f"{c}/{p.stem}" for p, one in pairs if one == c] for c in classes}
            (root / f"food-101/meta/{split}.json").write_text(json.dumps(listed))
    if name == "SUN397":
        lines = "\n".join(f"/{label[0]}/{label}" for label in classes)
        (root / "SUN397/ClassName.txt").write_text(lines)
    if name == "Flowers102":
        savemat = pytest.importorskip("scipy.io").savemat
        numbers = {s: [int(p.stem[6:]) for p, _ in pairs] for s, pairs in files.items()}
        labels = [classes.index(label) + 1 for pairs in files.values() for _, label in pairs]
        savemat(root / "flowers-102/imagelabels.mat", {"labels": [labels]})
        sets = {"trnid": numbers["train"], "valid": numbers["val"], "tstid": numbers["test"]}
        savemat(root / "flowers-102/setid.mat", sets)


@pytest.mark.parametrize("name", WRITERS)
def test_arrays_are_converted_without_loss_and_with_labels(root, name, unchecked):
    WRITERS[name](root)
    for split, arguments in SETS[name].splits.items():
        dataset = scan_images(f"torchvision:{name}?split={split}")
        theirs = getattr(torchvision.datasets, name)(root, **arguments)
        assert len(dataset) == len(theirs)
        assert dataset.paths[0].endswith(".pgm" if "MNIST" in name else ".ppm"), "gray or RGB"
        for i, (picture, label) in enumerate(theirs):
            assert np.array_equal(dataset.read_rgb(i), np.asarray(picture.convert("RGB")))
            if label >= 0:
                expected = theirs.classes[label] if hasattr(theirs, "classes") else str(label)
                assert dataset.classes[dataset.labels[i]] == expected
    written = sorted(p.name for p in (root / "fastdino").iterdir() if p.suffix == ".tar")
    assert written == sorted(f"{name}-{split}.tar" for split in SETS[name].splits)
    assert all(p.suffix in (".tar", ".json", ".lock") for p in (root / "fastdino").iterdir())


def test_converted_dataset_is_used_without_the_originals(root, unchecked):
    write_cifar(root)
    first = scan_images("torchvision:CIFAR10")
    for path in (root / "cifar-10-batches-py").iterdir():
        path.unlink()
    again = scan_images("torchvision:cifar10?split=train", cache=root / "images.npz")
    assert first.fingerprint == again.fingerprint
    assert again.kind == "torchvision CIFAR10, train"
    assert again.classes == ["airplane", "bird", "cat", "dog"], (
        "in their order, also without images"
    )


def test_unlabelled_images_are_a_separate_class(root, unchecked):
    write_stl10(root)
    alone = scan_images("torchvision:STL10?split=unlabeled")
    assert (len(alone), len(alone.classes)) == (N, 1)
    both = scan_images("torchvision:STL10?split=train+unlabeled")
    assert both.classes == ["airplane", "bird", "car", "unlabelled"]
    assert both.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] + [3] * N


FILE_SETS = [name for name, one in SETS.items() if not one.arrays]


@pytest.mark.parametrize("name", FILE_SETS)
def test_image_files_are_read_in_place(root, name, picture, unchecked):
    classes = write_files(root, name, picture)
    for s, split in enumerate(SETS[name].splits):
        dataset = scan_images(f"torchvision:{name}?split={split}")
        assert dataset.files == dataset.paths
        numbers = [4 * s + i + 1 for i in range(4)]
        form = "PNG" if name == "RenderedSST2" else "JPEG"
        assert sorted(dataset.read_bytes(i) for i in range(4)) == sorted(
            picture(n, form=form) for n in numbers
        )
        for path, label in zip(dataset.paths, dataset.labels, strict=True):
            assert (int(os.path.basename(path).split(".")[0].split("_")[-1]) - 1) // 2 % 2 == label
        assert dataset.classes[:2] == classes
    assert not (root / "fastdino").exists()


def test_evaluation_uses_train_and_val_or_test(root, picture, unchecked):
    write_cifar(root)
    train, val = (scan_images("torchvision:CIFAR10", role=role) for role in ("train", "val"))
    assert [len(train), len(val)] == [5 * N, N]
    assert val.kind == "torchvision CIFAR10, test"
    args = argparse.Namespace(data_path="torchvision:CIFAR10", num_workers=1)
    splits = scan_splits(args)
    assert {name: len(one) for name, one in splits.items()} == {"train": 5 * N, "val": N}
    assert splits["train"].classes == splits["val"].classes
    write_files(root, "DTD", picture)
    for data_path, split in (("torchvision:DTD", "val"), ("torchvision:DTD?val=test", "test")):
        assert scan_images(data_path, role="val").kind == f"torchvision DTD, {split}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR", "no dataset 'CIFAR': did you mean CIFAR10 or CIFAR100"),
        ("", "no dataset '': Supported are CIFAR10"),
        ("UCF101", "this is a video dataset: expected images"),
        ("STL10?split=tset", "no split 'tset'; its splits are train, unlabeled, train+"),
        ("CIFAR10?size=160px", "no size '160px'; CIFAR10 has only one"),
        ("Imagenette?size=1px", "no size '1px'; available: full, 320px, 160px"),
        ("CIFAR10?folds=1", "no option 'folds'; supported: split, train, val, root, size"),
    ],
)
def test_unsupported_names_are_errors_with_suggestions(name, message):
    with pytest.raises(DataError, match=message):
        scan_images(f"torchvision:{name}")


@pytest.mark.parametrize(
    ("data_path", "location"),
    [
        ("torchvision:CIFAR10", "cifar-10-batches-py"),
        ("torchvision:STL10?split=test", "stl10_binary"),
        ("torchvision:EuroSAT", "eurosat"),
        ("torchvision:Imagenette?size=160px", "imagenette2-160"),
        ("torchvision:EMNIST?split=digits-train", "EMNIST/raw"),
        ("torchvision:INaturalist?split=2021_valid", "2021_valid"),
        ("torchvision:OxfordIIITPet?split=test", "oxford-iiit-pet"),
    ],
)
def test_without_a_network_the_error_names_the_expected_location(
    root, data_path, location, offline
):
    with pytest.raises(DataError) as error:
        scan_images(data_path)
    message = str(error.value)
    assert f"is not in {root}, and it cannot be downloaded" in message
    assert "Name or service not known" in message
    assert f"put {location} there" in message
    assert "\n" not in message
    assert not list((root / "fastdino").glob("*.part"))


def test_wrong_checksum_is_error(root):
    write_cifar(root)
    with pytest.raises(
        DataError, match=r"cifar-10-batches-py is damaged or incomplete .*move it away"
    ):
        scan_images("torchvision:CIFAR10")


def test_incomplete_download_is_discarded(root, monkeypatch, unchecked):
    fails = [True]

    def download(url, folder, **_):
        write_cifar(folder, n=2)
        if fails:
            fails.pop()
            raise urllib.error.URLError("reset")

    monkeypatch.setattr(cifar, "download_and_extract_archive", download)
    with pytest.raises(DataError, match="cannot be downloaded .*reset"):
        scan_images("torchvision:CIFAR10")
    assert not (root / "cifar-10-batches-py").exists()
    assert len(scan_images("torchvision:CIFAR10")) == 10
    assert (root / "cifar-10-batches-py").exists()


def test_failed_conversion_leaves_no_partial_tar(root, monkeypatch, unchecked):
    write_cifar(root)
    add, written = torchvision_sets._add, []

    def fails(archive, name, content):
        written.append(name)
        if len(written) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(archive, name, content)

    monkeypatch.setattr(torchvision_sets, "_add", fails)
    with pytest.raises(DataError, match=r"CIFAR10-train.tar \(No space left.*the disk is full"):
        scan_images("torchvision:CIFAR10")
    assert [p.suffix for p in (root / "fastdino").iterdir()] == [".lock"]
    monkeypatch.setattr(torchvision_sets, "_add", add)
    assert len(scan_images("torchvision:CIFAR10")) == 5 * N


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_killed_conversion_is_restarted(root, unchecked):
    write_cifar(root)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_killed_while_writing)
    child.start()
    child.join()
    assert child.exitcode == -9
    assert (root / "fastdino" / "CIFAR10-train.tar.part").exists()
    assert len(scan_images("torchvision:CIFAR10")) == 5 * N
    assert not list((root / "fastdino").glob("*.part"))


def _killed_while_writing():
    real = torchvision_sets._add

    def kills(archive, name, content):
        real(archive, name, content)
        if name.startswith("0000010"):
            os.kill(os.getpid(), 9)

    torchvision_sets._add = kills
    find_torchvision(parse("torchvision:CIFAR10", ["torchvision"]))


def test_damaged_class_list_is_error(root, unchecked):
    write_cifar(root)
    scan_images("torchvision:CIFAR10")
    (root / "fastdino" / "CIFAR10-train.json").write_text("{")
    with pytest.raises(DataError, match=r"CIFAR10-train.json is damaged .*remove .*train.tar"):
        scan_images("torchvision:CIFAR10")


def test_unwritable_root_is_error(root, monkeypatch, unchecked):
    write_cifar(root)
    (root / "fastdino").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"cannot write .*\?root="):
        scan_images("torchvision:CIFAR10")


def test_old_torchvision_and_missing_package_are_errors(root, monkeypatch):
    monkeypatch.delattr(torchvision.datasets, "EuroSAT")
    with pytest.raises(DataError, match=r"torchvision .* has no EuroSAT: pip install -U"):
        scan_images("torchvision:EuroSAT")

    def no_loader(root, split):
        raise AssertionError

    monkeypatch.setattr(torchvision.datasets, "DTD", no_loader)
    with pytest.raises(DataError, match=r"is too old for DTD .*loader"):
        scan_images("torchvision:DTD")

    def no_scipy(root, split, loader):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(torchvision.datasets, "Flowers102", no_scipy)
    with pytest.raises(DataError, match=r"Flowers102 needs the package scipy: pip install"):
        scan_images("torchvision:Flowers102")


def test_root_is_an_option_a_variable_or_the_cache(root, monkeypatch, tmp_path, unchecked):
    elsewhere = tmp_path / "elsewhere"
    write_cifar(elsewhere)
    assert len(scan_images(f"torchvision:CIFAR10?root={elsewhere}")) == 5 * N
    assert default_root() == root
    monkeypatch.delenv("FASTDINO_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_root() == tmp_path / "cache" / "fastdino"
