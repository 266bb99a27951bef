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
import shutil
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


def write_mnist(root, name, splits=("train", "t10k")):
    folder = root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">4i", 0x803, N, 28, 28) + noise(1, N, 28, 28).tobytes()
    labels = struct.pack(">2i", 0x801, N) + bytes(i % 3 for i in range(N))
    for split in splits:
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)


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
        root, "EMNIST", map("emnist-{}".format, SETS["EMNIST"].splits)
    ),
    "CIFAR10": write_cifar,
    "CIFAR100": lambda root: write_cifar(root, "CIFAR100"),
    "STL10": write_stl10,
    "SVHN": write_svhn,
    "MNIST": lambda root: write_mnist(root, "MNIST"),
    "FashionMNIST": lambda root: write_mnist(root, "FashionMNIST"),
    "KMNIST": lambda root: write_mnist(root, "KMNIST"),
}

# Folder of the images, and the classes, of datasets of image files.
LAYOUTS = {
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
}


def write_files(root, name, picture):
    """Write image files, two classes of two per split; return the classes."""
    form, suffix = ("PNG", "png") if name == "RenderedSST2" else ("JPEG", "jpg")
    stem = {"SUN397": "sun_{}", "Flowers102": "image_{:05}"}.get(name, "{}")
    folder, classes = LAYOUTS[name]
    files = {split: [] for split in SETS[name].splits}
    for n in range(4 * len(files)):
        split, label = list(files)[n // 4], classes[n // 2 % 2]
        taxon = label if "2021" in split else f"Plantae/{label[:5]}"
        place = {"folder": {"val": "valid"}.get(split, split), "c": label, "taxon": taxon}
        path = root / folder.format(split=split, **place) / f"{stem.format(n + 1)}.{suffix}"
        path = path.with_suffix(".JPEG") if name == "Imagenette" else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(n + 1, form=form))
        files[split].append((path, label))
    for path, text in list_texts(name, files, classes).items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
    if name == "Flowers102":
        savemat = pytest.importorskip("scipy.io").savemat
        numbers = [[int(p.stem[6:]) for p, _ in pairs] for pairs in files.values()]
        labels = [classes.index(label) + 1 for pairs in files.values() for _, label in pairs]
        savemat(root / "flowers-102/imagelabels.mat", {"labels": [labels]})
        sets = dict(zip(("trnid", "valid", "tstid"), numbers, strict=True))
        savemat(root / "flowers-102/setid.mat", sets)
    named = {"Imagenette": ["tench", "English springer"], "INaturalist": ["0", "1"]}
    return named.get(name, classes)


def list_texts(name, files, classes):
    """Return the contents of a dataset's metadata files."""
    texts = {}
    for split, pairs in files.items():
        if name == "DTD":
            lines = [f"{label}/{path.name}" for path, label in pairs]
            texts[f"dtd/dtd/labels/{split}1.txt"] = "\n".join(lines)
        if name == "FGVCAircraft":
            lines = [f"{path.stem} {label}" for path, label in pairs]
            texts[f"fgvc-aircraft-2013b/data/images_variant_{split}.txt"] = "\n".join(lines)
            texts["fgvc-aircraft-2013b/data/variants.txt"] = "\n".join(classes)
        if name == "Food101":
            listed = {c: [f"{c}/{p.stem}" for p, one in pairs if one == c] for c in classes}
            texts[f"food-101/meta/{split}.json"] = json.dumps(listed)
        if name == "SUN397":
            texts["SUN397/ClassName.txt"] = "\n".join(f"/{label[0]}/{label}" for label in classes)
    return texts


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
    shutil.rmtree(root / "cifar-10-batches-py")
    again = scan_images("torchvision:cifar10?split=train", cache=root / "images.npz")
    assert first.fingerprint == again.fingerprint
    assert again.kind == "torchvision CIFAR10, train"
    assert again.classes == ["airplane", "bird", "cat", "dog"], "in order, also without images"


@pytest.mark.parametrize("damage", ["cut tar", "no tar", "json", "no json", "list", "old json"])
def test_a_damaged_conversion_is_repeated_with_a_warning(root, unchecked, capsys, damage):
    write_cifar(root)
    first = scan_images("torchvision:CIFAR10")
    tar = root / "fastdino" / "CIFAR10-train.tar"
    about = tar.with_suffix(".json")
    if damage == "cut tar":
        os.truncate(tar, tar.stat().st_size // 2)
    elif damage.startswith("no"):
        (tar if damage == "no tar" else about).unlink()
    else:
        about.write_text({"json": "{", "list": "[]", "old json": '{"classes": []}'}[damage])
    assert scan_images("torchvision:CIFAR10").fingerprint == first.fingerprint
    warned = f"warning: {tar} or its .json is damaged" in capsys.readouterr().err
    assert warned == (damage != "no tar")
    shutil.rmtree(root / "cifar-10-batches-py")
    assert scan_images("torchvision:CIFAR10").fingerprint == first.fingerprint


def test_unlabelled_images_are_a_separate_class(root, unchecked):
    write_stl10(root)
    alone = scan_images("torchvision:STL10?split=unlabeled")
    assert (len(alone), len(alone.classes)) == (N, 1)
    both = scan_images("torchvision:STL10?split=train+unlabeled")
    assert both.classes == ["airplane", "bird", "car", "unlabelled"]
    assert both.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] + [3] * N


def test_every_dataset_of_image_files_is_tested():
    assert list(LAYOUTS) == [name for name, one in SETS.items() if not one.arrays]
    assert set(WRITERS) | set(LAYOUTS) == set(SETS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_image_files_are_read_in_place(root, name, picture, unchecked):
    classes = write_files(root, name, picture)
    form = "PNG" if name == "RenderedSST2" else "JPEG"
    for s, split in enumerate(SETS[name].splits):
        dataset = scan_images(f"torchvision:{name}?split={split}")
        assert dataset.files == dataset.paths
        numbers = [int(os.path.basename(p).split(".")[0].split("_")[-1]) for p in dataset.paths]
        assert sorted(numbers) == [4 * s + i + 1 for i in range(4)]
        expected = [picture(number, form=form) for number in numbers]
        assert [dataset.read_bytes(i) for i in range(4)] == expected
        assert dataset.labels.tolist() == [(number - 1) // 2 % 2 for number in numbers]
        assert dataset.classes[:2] == classes
    assert not (root / "fastdino").exists()


def test_evaluation_uses_train_and_val_or_test(root, picture, unchecked):
    write_cifar(root)
    args = argparse.Namespace(data_path="torchvision:CIFAR10", num_workers=1)
    splits = scan_splits(args)
    assert {name: len(one) for name, one in splits.items()} == {"train": 5 * N, "val": N}
    assert splits["val"].kind == "torchvision CIFAR10, test"
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
    assert f"Name or service not known>): put {location} there" in message
    assert "\n" not in message
    assert not list((root / "fastdino").glob("*.part"))


def test_package_missing_for_a_download_is_named_with_its_installation(root, monkeypatch):
    def download(*_, **__):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(cifar, "download_and_extract_archive", download)
    with pytest.raises(DataError, match="the package scipy is missing: .*pip install"):
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
    add = torchvision_sets._add

    def fails(archive, name, content):
        if name.startswith("0000010"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(archive, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(torchvision_sets, "_add", fails)
        with pytest.raises(DataError, match=r"CIFAR10-train.tar \(No space left.*disk is full"):
            scan_images("torchvision:CIFAR10")
    assert [p.suffix for p in (root / "fastdino").iterdir()] == [".lock"]
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


def test_damaged_dataset_and_unwritable_root_are_errors(root, request):
    write_cifar(root)
    message = r"cifar-10-batches-py is damaged or incomplete .*move it away"
    with pytest.raises(DataError, match=message):  # the checksums do not match
        scan_images("torchvision:CIFAR10")
    request.getfixturevalue("unchecked")
    shutil.rmtree(root / "fastdino")
    (root / "fastdino").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"cannot write .*\?root="):
        scan_images("torchvision:CIFAR10")


def no_scipy(root, split, loader):
    raise ModuleNotFoundError("No module named 'scipy'", name="scipy")


@pytest.mark.parametrize(
    ("name", "create", "message"),
    [
        ("EuroSAT", None, "is too old for EuroSAT .*has no attribute"),
        ("DTD", lambda root, split: None, "is too old for DTD .*loader.*pip install -U"),
        ("Flowers102", no_scipy, "Flowers102 needs the package scipy: pip install"),
    ],
)
def test_old_torchvision_and_missing_package_are_errors(monkeypatch, name, create, message):
    if create is None:
        monkeypatch.delattr(torchvision.datasets, name)
    else:
        monkeypatch.setattr(torchvision.datasets, name, create)
    with pytest.raises(DataError, match=message):
        scan_images(f"torchvision:{name}")


def test_root_is_an_option_a_variable_or_the_cache(root, monkeypatch, tmp_path, unchecked):
    elsewhere = tmp_path / "elsewhere"
    write_cifar(elsewhere)
    assert len(scan_images(f"torchvision:CIFAR10?root={elsewhere}")) == 5 * N
    assert default_root() == root
    monkeypatch.delenv("FASTDINO_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_root() == tmp_path / "cache" / "fastdino"
