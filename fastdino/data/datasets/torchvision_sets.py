"""torchvision's sets for image classification, `torchvision:NAME`: found, or downloaded.

Sets that are files of images are read where they lie. Those that are arrays, or whose class tells
no files, are written once as a tar of the pixels, lossless and not compressed, of which any image
can be read on its own.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from tqdm import tqdm

from fastdino.data.datasets.data_path import SPLIT_OPTIONS, Found, Place, common_base
from fastdino.data.datasets.tars import index_tar
from fastdino.data.image_files import EXTENSIONS
from fastdino.errors import DataError
from fastdino.files import atomic_write, file_lock

OPTIONS = (*SPLIT_OPTIONS, "root", "size")
ROOT_VARIABLE = "FASTDINO_DATA"
WRITTEN = "fastdino"  # the folder below the root that has what is written here
INSTALL = 'pip install -U "fastdino[data]"'


@dataclass(frozen=True)
class Set:
    """A set: what its class takes for each split, and the folder or file that it is on disk.

    lies_in: with {size}, and {split} or what else its class takes, where these have their own.
    arrays: its class gives pixels alone. sizes: of which it comes in several.
    """

    splits: dict[str, dict[str, Any]]
    lies_in: str
    arrays: bool = False
    sizes: tuple[str, ...] = field(default=())


def _named(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


_BOTH: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_WHOLE: dict[str, dict[str, Any]] = {"all": {}}
SETS = {
    "CIFAR10": Set(_BOTH, "cifar-10-batches-py", arrays=True),
    "CIFAR100": Set(_BOTH, "cifar-100-python", arrays=True),
    "EMNIST": Set(
        {
            f"{kind}-{part}": {"split": kind, **which}
            for kind in ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
            for part, which in _BOTH.items()
        },
        "EMNIST/raw",
        arrays=True,
    ),
    "FashionMNIST": Set(_BOTH, "FashionMNIST/raw", arrays=True),
    "KMNIST": Set(_BOTH, "KMNIST/raw", arrays=True),
    "MNIST": Set(_BOTH, "MNIST/raw", arrays=True),
    "OxfordIIITPet": Set(_named("trainval", "test"), "oxford-iiit-pet", arrays=True),
    "STL10": Set(
        _named("train", "unlabeled", "train+unlabeled", "test"), "stl10_binary", arrays=True
    ),
    "SVHN": Set(_named("train", "extra", "test"), "{split}_32x32.mat", arrays=True),
    "Country211": Set(_named("train", "valid", "test"), "country211"),
    "DTD": Set(_named("train", "val", "test"), "dtd"),
    "EuroSAT": Set(_WHOLE, "eurosat"),
    "FGVCAircraft": Set(_named("train", "val", "trainval", "test"), "fgvc-aircraft-2013b"),
    "Flowers102": Set(_named("train", "val", "test"), "flowers-102"),
    "Food101": Set(_named("train", "test"), "food-101"),
    "Imagenette": Set(
        _named("train", "val"), "imagenette2{size}", sizes=("full", "320px", "160px")
    ),
    "INaturalist": Set(
        {
            name: {"version": name}
            for name in ("2017", "2018", "2019", "2021_train", "2021_train_mini", "2021_valid")
        },
        "{version}",
    ),
    "RenderedSST2": Set(_named("train", "val", "test"), "rendered-sst2"),
    "SUN397": Set(_WHOLE, "SUN397"),
}
_VIDEOS = ("HMDB51", "Kinetics", "MovingMNIST", "UCF101")


def find_torchvision(place: Place) -> Found:
    """The files of a set's split, or the tar that was written of it.

    Raises: DataError: no such set, split or size; it is not there and cannot be downloaded; it
        cannot be written.
    """
    name = _name(place)
    chosen = SETS[name]
    split = place.choose_split(list(chosen.splits))
    arguments = chosen.splits[split] | _size(place, name)
    root = Path(place.options.get("root") or default_root()).expanduser()
    kind = f"torchvision {name}, {split}"
    if not chosen.arrays:
        dataset = _open(place, name, root, arguments | {"loader": _path_itself})
        return _image_files(kind, dataset, root)
    tar = root / WRITTEN / f"{name}-{split}.tar"
    about = tar.with_suffix(".json")
    if not tar.exists():
        with _locked(root / WRITTEN / f"{name}.lock", place):
            if not tar.exists():
                _write(_open(place, name, root, arguments), tar, about, place)
    try:
        classes = [str(one) for one in json.loads(about.read_text())["classes"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"--data_path {place.text}: {about} is damaged ({error}): remove {tar}, which is "
            "then written anew"
        ) from error
    index = partial(index_tar, extensions=EXTENSIONS)
    return Found(kind, str(tar.parent), [tar.name], classes=classes, archive="tar", index=index)


def default_root() -> Path:
    """Where sets are looked for, and downloaded to, unless the option `root` says otherwise."""
    given = os.environ.get(ROOT_VARIABLE)
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastdino")


def _name(place: Place) -> str:
    """The set that is meant, however its letters are written."""
    names = {name.lower(): name for name in SETS}
    if place.path.lower() in names:
        return names[place.path.lower()]
    if place.path in _VIDEOS:
        raise DataError(f"--data_path {place.text} is a set of videos: expected images")
    near = difflib.get_close_matches(place.path.lower(), names, n=3)
    hint = f"did you mean {' or '.join(names[one] for one in near)}? " if near else ""
    raise DataError(
        f"--data_path {place.text}: there is no set {place.path!r}: {hint}Known are "
        f"{', '.join(SETS)}"
    )


def _size(place: Place, name: str) -> dict[str, Any]:
    size, sizes = place.options.get("size"), SETS[name].sizes
    if size is None:
        return {}
    if size not in sizes:
        has = f"it has {', '.join(sizes)}" if sizes else "it has one"
        raise DataError(f"--data_path {place.text}: there is no size {size!r}; {has}")
    return {"size": size}


def _open(place: Place, name: str, root: Path, arguments: dict[str, Any]) -> Any:
    """Torchvision's dataset, downloaded first where it is not below the root.

    Raises: DataError: it can be neither found nor downloaded, or this torchvision does not have it.
    """
    make = getattr(torchvision.datasets, name, None)
    if make is None:
        raise DataError(f"torchvision {torchvision.__version__} has no {name}: {INSTALL}")
    try:
        return make(root, **arguments)
    except ModuleNotFoundError as error:
        raise DataError(f"torchvision:{name} needs the package {error.name}: {INSTALL}") from error
    except TypeError as error:
        raise DataError(
            f"torchvision {torchvision.__version__} is too old for {name} ({error}): {INSTALL}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        lies = root / _lies_in(name, arguments)
        if lies.exists():
            raise DataError(
                f"torchvision:{name}: {lies} is damaged, or not all of it is there ({error}): "
                "move it away to have it downloaded anew"
            ) from error
    with _locked(root / WRITTEN / f"{name}.download.lock", place):
        if not (root / _lies_in(name, arguments)).exists():
            _download(make, name, root, arguments)
    return make(root, **arguments)


def _download(make: Any, name: str, root: Path, arguments: dict[str, Any]) -> None:
    """Downloads beside the root's sets, and moves in what is complete.

    (torchvision takes a folder that was unpacked in part for the whole set.)
    """
    part = root / WRITTEN / f"{name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        print(f"torchvision:{name}: downloading to {root}", file=sys.stderr)
        make(part, download=True, **arguments)
        for entry in part.iterdir():
            os.replace(entry, root / entry.name)
        part.rmdir()
    except Exception as error:  # Whatever networks, archives and disks make torchvision raise.
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"the disk of {root} is full"
        elif isinstance(error, ModuleNotFoundError):
            why = f"the package {error.name} is missing, {INSTALL}"
        else:
            text = " ".join(str(error).split()) or type(error).__name__
            why = f"it cannot be downloaded ({text})"
        raise DataError(
            f"torchvision:{name} is not in {root}, and {why}: put {_lies_in(name, arguments)} "
            "there as it is distributed, or name the folder that has it by ?root=... or "
            f"${ROOT_VARIABLE}"
        ) from error


def _lies_in(name: str, arguments: dict[str, Any]) -> str:
    """What of the root is the set, or of one in files the split."""
    size = arguments.get("size", "full").removesuffix("px")
    return SETS[name].lies_in.format(**arguments | {"size": "" if size == "full" else f"-{size}"})


def _path_itself(path: Any) -> str:
    """In place of torchvision's loader: a sample's image is then the path of its file."""
    return os.fspath(path)


def _image_files(kind: str, dataset: Any, root: Path) -> Found:
    # Sorted: some of torchvision's sets come in the order of the file system.
    samples = sorted(dataset[i] for i in range(len(dataset)))
    if not samples:
        raise DataError(f"no images in {root}: {kind} has none there")
    base, files = common_base([path for path, _ in samples])
    labels = [int(label) for _, label in samples]
    return Found(kind, base, files, labels, _classes(dataset, max(labels) + 1))


def _classes(dataset: Any, number: int) -> list[str]:
    """The names of classes; numbers where torchvision has none."""
    names = getattr(dataset, "classes", None) or range(number)
    return [str(one[0] if isinstance(one, tuple) else one) for one in names]


def _write(dataset: Any, tar: Path, about: Path, place: Place) -> None:
    """Writes the images of arrays, KEY.ppm or .pgm, and the numbers of their classes, KEY.cls.

    The tar comes last: where it is, all is.
    """
    with _explained(tar, place), atomic_write(tar) as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            most = _add_all(archive, dataset, f"writing {tar.name}")
        names = {"classes": _classes(dataset, most + 1), "images": len(dataset)}
        with atomic_write(about) as beside:
            beside.write(json.dumps(names).encode())


def _add_all(archive: tarfile.TarFile, dataset: Any, title: str) -> int:
    """Adds all images with their labels; returns the largest label, -1 where there is none."""
    most = -1
    for i in tqdm(range(len(dataset)), desc=title, disable=None, leave=False):
        picture, label = dataset[i]
        pixels = io.BytesIO()
        picture.save(pixels, "PPM")
        suffix = "pgm" if picture.mode == "L" else "ppm"
        _add(archive, f"{i:07}.{suffix}", pixels.getvalue())
        if label is not None and label >= 0:
            _add(archive, f"{i:07}.cls", str(int(label)).encode())
            most = max(most, int(label))
    return most


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@contextmanager
def _locked(path: Path, place: Place) -> Iterator[None]:
    """Keep other processes out of the block, waiting for the one that is in it."""
    with ExitStack() as stack:
        with _explained(path, place):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(path, wait=True))
        yield


@contextmanager
def _explained(path: Path, place: Place) -> Iterator[None]:
    """Turns a failed write into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        todo = "link the set into a folder that can be written"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            todo = "the disk is full: make room"
        raise DataError(
            f"--data_path {place.text}: cannot write {path} ({error.strerror or error}): {todo}, "
            f"or name another folder by ?root=... or ${ROOT_VARIABLE}"
        ) from error
