"""The cache of a scan holds exactly the files of the last one."""

from __future__ import annotations

import os

from fastdino.data import manifest
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
