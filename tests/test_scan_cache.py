"""The cache of a scan holds exactly the files of the last one."""

from __future__ import annotations

import os

from fastdino.data import manifest, scanning
from fastdino.data.image_dataset import scan_images


def test_removed_files_leave_the_cache(tmp_path, picture):
    folder, cache = tmp_path / "photos", tmp_path / "images.npz"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(picture(n))
    scan_images(folder, cache=cache)
    os.remove(folder / "1.jpg")
    dataset = scan_images(folder, cache=cache)
    assert [os.path.basename(path) for path in dataset.paths] == ["0.jpg", "2.jpg"]
    assert manifest.load(cache).files == ["0.jpg", "2.jpg"]
    assert any("is outdated: 0 of 2 images" in note for note in dataset.notes)
    assert scan_images(folder, cache=cache).notes == ()


def test_files_of_unknown_size_are_read_again(tmp_path, picture, monkeypatch):
    """Two unknown sizes are not the same size."""
    monkeypatch.setattr(scanning, "_stamp", lambda path: (-1, -1))
    folder, cache = tmp_path / "photos", tmp_path / "images.npz"
    folder.mkdir()
    for size in ((20, 10), (8, 6)):
        (folder / "a.jpg").write_bytes(picture(1, size))
        assert scan_images(folder, cache=cache).sizes.tolist() == [[size[1], size[0]]]
