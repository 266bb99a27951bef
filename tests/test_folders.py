"""fastdino.data.datasets.folders: the order of images and classes is ImageFolder's."""

from __future__ import annotations

import os

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from fastdino.data.image_dataset import scan_images

# Names that a natural order, an order by length, and one that ignores case sort differently.
NAMES = ("10.png", "2.png", "1.png", "B.png", "a.png", "a-1.png", "a_1.png", "Z/0.png", "a/0.png")
CLASSES = ("n2", "n10", "N3", "n-1")


class Entries(list):
    """A result of os.scandir, in an order of its own."""

    def __init__(self, entries):
        super().__init__(entries)
        self.iterator = iter(self)

    def __next__(self):
        return next(self.iterator)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(params=[False, True], ids=["sorted", "reversed"])
def listing(request, monkeypatch):
    """A file system lists folders in any order; here in either of two."""
    scandir = os.scandir

    def listed(folder):
        entries = sorted(scandir(folder), key=lambda entry: entry.name, reverse=request.param)
        return Entries(entries)

    monkeypatch.setattr(os, "scandir", listed)


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)


def test_images_and_classes_are_in_the_order_of_imagefolder(tmp_path, listing, monkeypatch):
    for folder in CLASSES:
        for name in NAMES:
            write(tmp_path / folder / name)
    dataset = scan_images(tmp_path)
    monkeypatch.undo()
    theirs = ImageFolder(str(tmp_path))
    assert dataset.classes == theirs.classes
    assert list(zip(dataset.paths, dataset.labels.tolist(), strict=True)) == theirs.samples


def test_images_of_a_flat_folder_are_in_the_order_of_their_names(tmp_path, listing):
    names = [name for name in NAMES if "/" not in name]
    for name in names:
        write(tmp_path / name)
    assert [os.path.basename(path) for path in scan_images(tmp_path).paths] == sorted(names)
