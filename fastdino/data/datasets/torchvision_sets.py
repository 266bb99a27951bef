"""torchvision's image classification datasets, torchvision:NAME: found on disk, or downloaded.

Datasets of image files are read in place. Those stored as arrays, or whose class does not expose
file paths, are converted once to an uncompressed tar of lossless images.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torchvision
from tqdm import tqdm

from fastdino.data.datasets.data_path import DataPath
from fastdino.data.datasets.file_list import FileList, common_base
from fastdino.data.datasets.splits import choose_split
from fastdino.data.datasets.tars import index_tar
from fastdino.errors import DataError
from fastdino.files import atomic_write, file_lock
from fastdino.terminal import print_err

ROOT_VARIABLE = "FASTDINO_DATA"
CONVERTED = "fastdino"  # folder below the root for converted datasets, locks and downloads
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_INSTALL = 'pip install -U "fastdino[data]"'


class TorchvisionSet(NamedTuple):
    """A dataset of torchvision.

    splits: arguments of its class for each split.
    location: its file or folder below the root, with placeholders {size} and those arguments.
    arrays: its class returns pixels without file paths.
    sizes: values of the option `size`.
    """

    splits: dict[str, dict[str, Any]]
    location: str
    arrays: bool = False
    sizes: tuple[str, ...] = ()


def _splits(names: str, argument: str = "split") -> dict[str, dict[str, Any]]:
    return {name: {argument: name} for name in names.split()}


_TRAIN_TEST: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_ALL: dict[str, dict[str, Any]] = {"all": {}}
_EMNIST: dict[str, dict[str, Any]] = {
    f"{kind}-{part}": {"split": kind, **argument}
    for kind in ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
    for part, argument in _TRAIN_TEST.items()
}
_INATURALIST = _splits("2017 2018 2019 2021_train 2021_train_mini 2021_valid", "version")
# fmt: off
SETS = {
    "CIFAR10": TorchvisionSet(_TRAIN_TEST, "cifar-10-batches-py", arrays=True),
    "CIFAR100": TorchvisionSet(_TRAIN_TEST, "cifar-100-python", arrays=True),
    "EMNIST": TorchvisionSet(_EMNIST, "EMNIST/raw", arrays=True),
    "FashionMNIST": TorchvisionSet(_TRAIN_TEST, "FashionMNIST/raw", arrays=True),
    "KMNIST": TorchvisionSet(_TRAIN_TEST, "KMNIST/raw", arrays=True),
    "MNIST": TorchvisionSet(_TRAIN_TEST, "MNIST/raw", arrays=True),
    "OxfordIIITPet": TorchvisionSet(_splits("trainval test"), "oxford-iiit-pet", arrays=True),
    "STL10": TorchvisionSet(
        _splits("train unlabeled train+unlabeled test"), "stl10_binary", arrays=True),
    "SVHN": TorchvisionSet(_splits("train extra test"), "{split}_32x32.mat", arrays=True),
    "Country211": TorchvisionSet(_splits("train valid test"), "country211"),
    "DTD": TorchvisionSet(_splits("train val test"), "dtd"),
    "EuroSAT": TorchvisionSet(_ALL, "eurosat"),
    "FGVCAircraft": TorchvisionSet(_splits("train val trainval test"), "fgvc-aircraft-2013b"),
    "Flowers102": TorchvisionSet(_splits("train val test"), "flowers-102"),
    "Food101": TorchvisionSet(_splits("train test"), "food-101"),
    "Imagenette": TorchvisionSet(
        _splits("train val"), "imagenette2{size}", sizes=("full", "320px", "160px")),
    "INaturalist": TorchvisionSet(_INATURALIST, "{version}"),
    "RenderedSST2": TorchvisionSet(_splits("train val test"), "rendered-sst2"),
    "SUN397": TorchvisionSet(_ALL, "SUN397"),
}
# fmt: on
_VIDEOS = ("HMDB51", "Kinetics", "MovingMNIST", "UCF101")


def find_torchvision(data_path: DataPath) -> FileList:
    """Return the image files of a split, or the tar it was converted to.

    Raises: DataError: no such dataset, split or size; it is missing and cannot be downloaded; it
        cannot be written.
    """
    name = _match_name(data_path)
    split = choose_split(data_path, list(SETS[name].splits))
    arguments = SETS[name].splits[split] | _size_argument(data_path, name)
    root = Path(data_path.options.get("root") or default_root()).expanduser()
    kind = f"torchvision {name}, {split}"
    if not SETS[name].arrays:
        # With os.fspath as the loader, the "image" of a sample is the path of its file.
        dataset = _open(data_path, name, root, arguments | {"loader": os.fspath})
        return _list_files(kind, dataset, root)
    tar = root / CONVERTED / f"{name}-{split}.tar"
    metadata = tar.with_suffix(".json")
    classes = _converted_classes(tar, metadata)
    if classes is None:
        with _locked(root / CONVERTED / f"{name}.lock", tar, data_path):
            classes = _converted_classes(tar, metadata)  # another process may have converted it
            if classes is None:
                if tar.exists():
                    print_err(f"warning: {tar} or its .json is damaged and is converted again")
                _convert(_open(data_path, name, root, arguments), tar, metadata)
                classes = _converted_classes(tar, metadata)
    assert classes is not None
    return FileList(
        kind, str(tar.parent), [tar.name], classes=classes, archive="tar", index=index_tar
    )


def _converted_classes(tar: Path, metadata: Path) -> list[str] | None:
    """Return the classes of a converted dataset; None if it is missing, cut off or damaged."""
    try:
        about = json.loads(metadata.read_text())
        if tar.stat().st_size != about["bytes"]:
            return None
        return [str(one) for one in about["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def default_root() -> Path:
    """Return the folder for datasets unless the option `root` names one."""
    given = os.environ.get(ROOT_VARIABLE)
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastdino")


def _match_name(data_path: DataPath) -> str:
    """Return the name of the dataset, ignoring case."""
    names = {name.lower(): name for name in SETS}
    if data_path.path.lower() in names:
        return names[data_path.path.lower()]
    if data_path.path in _VIDEOS:
        raise data_path.error("this is a video dataset: expected images")
    similar = difflib.get_close_matches(data_path.path.lower(), names, n=3)
    hint = f"did you mean {' or '.join(names[one] for one in similar)}? " if similar else ""
    raise data_path.error(f"no dataset {data_path.path!r}: {hint}Supported are {', '.join(SETS)}")


def _size_argument(data_path: DataPath, name: str) -> dict[str, Any]:
    sizes = SETS[name].sizes
    size = {key: value for key, value in data_path.options.items() if key == "size"}
    if set(size.values()) <= set(sizes):
        return size
    available = f"available: {', '.join(sizes)}" if sizes else f"{name} has only one"
    raise data_path.error(f"no size {size['size']!r}; {available}")


def _open(data_path: DataPath, name: str, root: Path, arguments: dict[str, Any]) -> Any:
    """Return torchvision's dataset, downloaded first if it is not below the root.

    Raises: DataError: it is damaged, cannot be downloaded, or this torchvision does not support it.
    """
    location = root / _location(name, arguments)
    try:
        create = getattr(torchvision.datasets, name)
        return create(root, **arguments)
    except ModuleNotFoundError as error:
        raise DataError(f"torchvision:{name} needs the package {error.name}: {_INSTALL}") from error
    except (AttributeError, TypeError) as error:
        raise DataError(
            f"torchvision {torchvision.__version__} is too old for {name} ({error}): {_INSTALL}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        if location.exists():
            raise DataError(
                f"torchvision:{name}: {location} is damaged or incomplete ({error}): move it away, "
                "and it is downloaded again"
            ) from error
    with _locked(root / CONVERTED / f"{name}.download.lock", location, data_path):
        if not location.exists():
            _download(create, name, root, arguments)
    return create(root, **arguments)


def _download(create: Any, name: str, root: Path, arguments: dict[str, Any]) -> None:
    """Download to a temporary folder and move the complete dataset to the root.

    torchvision would accept a partially unpacked folder as complete.
    """
    part = root / CONVERTED / f"{name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        print_err(f"torchvision:{name}: downloading to {root}")
        create(part, download=True, **arguments)
        for entry in part.iterdir():
            os.replace(entry, root / entry.name)
        part.rmdir()
    except Exception as error:  # of any type: from the network, an archive or the disk
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            reason = f"the package {error.name} is missing: {_INSTALL}"
        raise DataError(
            f"torchvision:{name} is not in {root}, and it cannot be downloaded ({reason}): put "
            f"{_location(name, arguments)} there as distributed, or name its folder with "
            f"?root=... or ${ROOT_VARIABLE}"
        ) from error


def _location(name: str, arguments: dict[str, Any]) -> str:
    """Return the dataset's file or folder below the root."""
    size = arguments.get("size", "full").removesuffix("px")
    return SETS[name].location.format(**arguments | {"size": "" if size == "full" else f"-{size}"})


def _list_files(kind: str, dataset: Any, root: Path) -> FileList:
    # Sorted because some of torchvision's datasets list files in the order of the file system.
    samples = sorted(dataset[i] for i in range(len(dataset)))
    if not samples:
        raise DataError(f"no images in {root}: {kind} is empty")
    base, files = common_base([path for path, _ in samples])
    labels = [int(label) for _, label in samples]
    return FileList(kind, base, files, labels, _class_names(dataset, max(labels) + 1))


def _class_names(dataset: Any, number: int) -> list[str]:
    """Return the names of the classes, or numbers if torchvision has no names."""
    names = getattr(dataset, "classes", None) or range(number)
    return [str(one[0] if isinstance(one, tuple) else one) for one in names]


def _convert(dataset: Any, tar: Path, metadata: Path) -> None:
    """Write images as KEY.ppm or KEY.pgm, class numbers as KEY.cls, and the class names.

    The tar is renamed last: if it exists, the conversion is complete.
    """
    largest = -1
    with atomic_write(tar) as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for i in tqdm(range(len(dataset)), f"writing {tar.name}", disable=None, leave=False):
                image, label = dataset[i]
                pixels = io.BytesIO()
                image.save(pixels, "PPM")
                _add(archive, f"{i:07}.{'pgm' if image.mode == 'L' else 'ppm'}", pixels.getvalue())
                if label is not None and label >= 0:
                    _add(archive, f"{i:07}.cls", str(int(label)).encode())
                    largest = max(largest, int(label))
        names = {"classes": _class_names(dataset, largest + 1), "images": len(dataset)}
        names["bytes"] = file.tell()
        with atomic_write(metadata) as json_file:
            json_file.write(json.dumps(names).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@contextmanager
def _locked(lock: Path, target: Path, data_path: DataPath) -> Iterator[None]:
    """Hold a lock file while `target` is written; turn a failed write into a DataError."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(lock, wait=True):
            yield
    except OSError as error:
        is_full = error.errno in _DISK_FULL
        advice = "the disk is full: make room" if is_full else "link it into a writable folder"
        raise data_path.error(
            f"cannot write {target} ({error.strerror or error}): {advice}, or name another folder "
            f"with ?root=... or ${ROOT_VARIABLE}"
        ) from error
