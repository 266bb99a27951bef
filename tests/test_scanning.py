"""Tests of fastdino.data.scanning: reading headers, reusing images.npz."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import threading

import pytest

from fastdino.data import image_files, manifest, scanning
from fastdino.data.datasets import archives
from fastdino.data.image_dataset import scan_images
from fastdino.errors import DataError


@pytest.fixture
def folder(tmp_path, picture):
    root = tmp_path / "data" / "k"
    root.mkdir(parents=True)
    for n in range(5):
        (root / f"{n}.jpg").write_bytes(picture(n, (20 + n, 10)))
    (root / "5.jpg").write_text("no image")
    return root.parent


@pytest.fixture
def tars(tmp_path, picture, make_tar):
    for n in range(3):
        members = {f"{i}.jpg": picture(10 * n + i, (20 + n, 10 + i)) for i in range(3)}
        make_tar(tmp_path / "data" / f"c{n}.tar", members | {"bad.jpg": b"no image"})
    return tmp_path / "data"


@pytest.fixture
def read(monkeypatch):
    """The names of files whose headers are read, and of tars that are indexed."""
    names = []

    def header(path, part=None):
        names.append(os.path.basename(path))
        return image_files.read_header(path, part)

    def index(path):
        names.append(f"index of {os.path.basename(path)}")
        return index_tar(path)

    index_tar = archives.INDEX["tar"]
    monkeypatch.setattr(scanning, "read_header", header)
    monkeypatch.setitem(archives.INDEX, "tar", index)
    return names


def scanned(root, cache, **options):
    return scan_images(root, max_bad_share=0.5, cache=cache, **options)


def assert_same(one, other):
    for name in ("paths", "labels", "sizes"):
        assert list(map(str, getattr(one, name))) == list(map(str, getattr(other, name)))
    for name in ("skipped", "classes", "broken", "fingerprint", "kind"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_second_scan_opens_no_file_and_gives_the_same_dataset(kind, request, read, tmp_path):
    root, cache = request.getfixturevalue(kind), tmp_path / "images.npz"
    first = scanned(root, cache)
    assert len(read) == {"folder": 6, "tars": 15}[kind]
    read.clear()
    before = cache.read_bytes()
    second = scanned(root, cache)
    assert (read, first.notes, second.notes) == ([], (), ())
    assert cache.read_bytes() == before
    assert_same(second, first)
    assert_same(scanned(root, None), first)
    read.clear()
    moved = scanned(shutil.move(root, tmp_path / "elsewhere"), cache)
    assert read == []
    assert moved.fingerprint == first.fingerprint


def test_only_as_many_threads_start_as_there_are_tasks(folder, monkeypatch):
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: [started.append(thread), start(thread)]
    )
    scanned(folder, None, workers=1000)
    assert 0 < len(started) < 10


def test_only_changed_files_are_read_again_with_a_note(folder, read, tmp_path, picture):
    cache = tmp_path / "images.npz"
    scanned(folder, cache)
    read.clear()
    (folder / "k" / "1.jpg").write_bytes(picture(1, (99, 98)))
    (folder / "k" / "2.jpg").unlink()
    os.utime(folder / "k" / "3.jpg", ns=(0, 0))
    (folder / "k" / "0b.jpg").write_bytes(picture())
    dataset = scanned(folder, cache)
    assert sorted(read) == ["0b.jpg", "1.jpg", "3.jpg"]
    assert "3 of 6 images are new or changed" in dataset.notes[0]
    assert_same(dataset, scanned(folder, None))
    assert scanned(folder, cache).notes == ()


def test_only_changed_tar_is_indexed_again(tars, read, tmp_path, picture, make_tar):
    cache = tmp_path / "images.npz"
    scanned(tars, cache)
    read.clear()
    make_tar(tars / "c1.tar", {"new.jpg": picture(5, (50, 60))})
    dataset = scanned(tars, cache)
    assert sorted(read) == ["c1.tar", "index of c1.tar"]
    assert "1 of 3 tars are new or changed" in dataset.notes[0]
    assert_same(dataset, scanned(tars, None))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + b"x" * 100])
def test_damaged_cache_is_rebuilt_with_a_note(folder, tmp_path, content):
    cache = tmp_path / "images.npz"
    first = scanned(folder, cache)
    cache.write_bytes(content)
    again = scanned(folder, cache)
    assert "images.npz cannot be used (" in again.notes[0]
    assert_same(again, first)
    assert scanned(folder, cache).notes == ()


def test_cache_of_image_files_is_not_used_for_tars_or_the_reverse(folder, tars, tmp_path):
    cache = tmp_path / "images.npz"
    scanned(folder / "k", cache)
    pattern = str(tars / "c*.tar")
    assert_same(scanned(pattern, cache), scanned(pattern, None))
    assert_same(scanned(folder / "k", cache), scanned(folder / "k", None))
    scanned(pattern, cache)
    (folder / "list.txt").write_text("c0.tar\t1\nk/0.jpg\t2\n")
    assert scanned(folder / "list.txt", cache).broken == 1


def test_unwritable_cache_is_noted(folder, tmp_path):
    dataset = scanned(folder, tmp_path / "no" / "images.npz")
    assert "cannot be written" in dataset.notes[0]
    assert len(dataset) == 5


def test_transient_failure_is_not_cached(folder, tars, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "PAUSES", ())
    cache = tmp_path / "images.npz"

    def fails(path):
        if str(path).endswith("3.jpg"):
            raise OSError(errno.EIO, "Input/output error", path)
        return open(path, "rb")

    monkeypatch.setattr(image_files, "open_file", fails)
    dataset = scanned(folder, cache)
    assert dataset.broken == 2
    assert manifest.load(cache).stamps[3].tolist() == [-1, -1]
    monkeypatch.undo()
    assert scanned(folder, cache).broken == 1


def test_unreadable_tar_is_error(tars, monkeypatch):
    def fails(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setitem(archives.INDEX, "tar", fails)
    with pytest.raises(DataError, match=r"c0.tar cannot be read: Permission denied"):
        scan_images(tars)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_bars_are_shown_on_a_terminal_only(tars, monkeypatch, is_terminal):
    terminal = io.StringIO()
    terminal.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(scanning, "BAR_AFTER", 0.0)
    scan_images(tars, max_bad_share=0.5)
    for part in ("reading tars: ", "/3 [", "reading image headers: ", "/12 ["):
        assert (part in terminal.getvalue()) == is_terminal
