"""Tests of fastdino.data.datasets.yfcc."""

from __future__ import annotations

import bz2
import hashlib
import sqlite3
import zipfile
from contextlib import closing

import pytest

from fastdino.data.datasets import yfcc
from fastdino.data.datasets.yfcc import photo_key, read_metadata
from fastdino.data.image_dataset import scan_images
from fastdino.errors import DataError

NUMBERS = [6985418911, 3551599565, 24821, 4121519420, 777]
VIDEO = 777


def address(number):
    return f"http://farm8.staticflickr.com/7205/{number}_df7747990d.jpg"


def key(number):
    return photo_key(address(number))


def path_of(number):
    name = key(number)
    return f"data/images/{name[:3]}/{name[3:6]}/{name}.jpg"


def row(number, *, columns):
    """Return a row of the first release (23 columns), or of a later one (25)."""
    values = [f"field {i}" for i in range(23)]
    values[0], values[14] = str(number), address(number)
    values[22] = "1" if number == VIDEO else "0"
    if columns == 25:
        digest = hashlib.md5(address(number).encode()).hexdigest()
        values = ["8", values[0], digest, *values[1:]]
    return "\t".join(values)


def write_sqlite(path):
    with closing(sqlite3.connect(path)) as base:
        columns = "photoid integer, title text, downloadurl text, marker integer"
        base.execute(f"create table yfcc100m_dataset ({columns})")
        values = [(n, "x", address(n), int(n == VIDEO)) for n in NUMBERS]
        base.executemany("insert into yfcc100m_dataset values (?, ?, ?, ?)", values)
        base.commit()
    return path


def write_metadata(folder, kind):
    photos = [n for n in NUMBERS if n != VIDEO]
    path = folder / ("yfcc100m_dataset.bz2" if kind == "bz2" else "yfcc100m_dataset")
    if kind == "sqlite":
        return write_sqlite(folder / "yfcc100m_dataset.sql")
    if kind == "subset":
        lines = [f"{i}\t{n}\t{key(n)}" for i, n in enumerate(photos)]
    elif kind == "numbers":
        lines = map(str, photos)
    elif kind == "header":
        lines = [f"x\t{int(n == VIDEO)}\t{n}\t{address(n)}" for n in NUMBERS]
        lines = ["title\tmarker\tphotoid\tdownloadurl", *lines]
    else:
        lines = [row(n, columns=25 if kind == "25" else 23) for n in NUMBERS]
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(bz2.compress(text) if kind == "bz2" else text)
    return path


def test_photo_key_is_the_md5_of_the_url_without_leading_zeros_per_byte():
    urls = [f"http://x/{n}" for n in range(99)]
    url = next(u for u in urls if hashlib.md5(u.encode()).digest()[0] < 16)
    digest = hashlib.md5(url.encode()).digest()
    assert photo_key(url) == "".join(map("{:x}".format, digest))
    assert len(photo_key(url)) < 32


@pytest.mark.parametrize("kind", ["23", "25", "bz2", "sqlite", "header", "subset", "numbers"])
def test_photos_are_matched_by_number_and_key_in_every_format(tmp_path, kind):
    photos = read_metadata(str(write_metadata(tmp_path, kind)))
    assert photos.number == 4
    assert photos.videos == (0 if kind in ("subset", "numbers") else 1)
    files = [f"a/{n}.jpg" for n in NUMBERS] + ["a/12345.jpg", "a/jpg"]
    assert photos.indices(files).tolist() == [0, 1, 2, 3]
    assert photos.summarize(files).startswith("0 of the photos in")
    assert photos.summarize(files[1:3]).startswith("2 of")
    if kind != "numbers":
        assert photos.indices([path_of(n) for n in NUMBERS]).tolist() == [0, 1, 2, 3]
        one_photo_twice = [path_of(NUMBERS[0]), f"{NUMBERS[0]}.jpg"]
        assert photos.summarize(one_photo_twice).startswith("3 of")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\tb\n", r"begins with \['a', 'b'\], 2 tab-separated columns: expected YFCC"),
        (b"not a number\n", "1 tab-separated columns"),
        (b"", "lists no photo"),
        (row(VIDEO, columns=23).encode(), r"lists no photo \(1 videos\)"),
        (row(24821, columns=23).encode() + b"\n5\t6\n", "fewer columns in line 2 than before: 2"),
        (b"SQLite format 3\0" + b"x" * 5000, "metadata .* cannot be read"),
        (bz2.compress(row(24821, columns=23).encode() * 9)[:-9], "cannot be read"),
        (None, "cannot be read: .*No such file"),
        (["yfcc100m_dataset (title text)"], "no column photoid in yfcc100m_dataset; it has title"),
        (["a (photoid)", "b (photoid)"], "no table yfcc100m_dataset; it has: a, b"),
    ],
)
def test_other_or_damaged_file_is_error(tmp_path, text, message):
    path = tmp_path / "m.bz2"
    if isinstance(text, list):
        with closing(sqlite3.connect(path)) as base:
            for table in text:
                base.execute(f"create table {table}")
    elif text is not None:
        packed = text.startswith((b"BZh", b"SQLite"))
        path.write_bytes(text if packed else bz2.compress(text))
    with pytest.raises(DataError, match=message):
        read_metadata(str(path))


@pytest.fixture
def dump(tmp_path, picture):
    """The same images as a folder and as zips: three photos, a frame of a video, another image."""
    members = {path_of(n): picture(i) for i, n in enumerate(NUMBERS[:3])}
    members |= {path_of(VIDEO): picture(7), "data/images/123/456/123456.jpg": picture(8)}
    (tmp_path / "zips").mkdir()
    for name, data in members.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        with zipfile.ZipFile(tmp_path / "zips" / f"{name[12:15]}.zip", "a") as archive:
            archive.writestr(name, data)
    return tmp_path, members


@pytest.mark.parametrize("kind", ["folder", "zips", "tar"])
def test_metadata_selects_photos_of_folders_and_archives(dump, kind, make_tar):
    root, members = dump
    metadata = write_metadata(root / "folder", "sqlite")
    path = root / kind if kind != "tar" else make_tar(root / "t.tar", members)
    data_path = f"{path}?metadata={metadata}"
    if kind == "folder":
        data_path = str(path)  # contains the metadata under its usual name
    dataset = scan_images(data_path)
    assert {dataset.read_bytes(i) for i in range(len(dataset))} == {
        members[path_of(n)] for n in NUMBERS[:3]
    }
    assert (len(dataset), len(dataset.classes), set(dataset.labels.tolist())) == (3, 1, {0})
    assert dataset.kind.startswith("YFCC100M")
    assert dataset.notes == (
        "yfcc100m_dataset.sql lists 4 photos (and 1 videos, which are not used)",
        "1 of the photos in yfcc100m_dataset.sql are missing",
    )


def test_cache_is_not_reused_for_other_metadata(dump, tmp_path):
    root, _ = dump
    cache = tmp_path / "images.npz"
    (root / "some").write_text(f"1\t{NUMBERS[0]}\t{key(NUMBERS[0])}\n")
    (root / "all").write_text("\n".join(f"1\t{n}\t{key(n)}" for n in NUMBERS))
    names = ("some", "all", "all")
    datasets = [scan_images(f"{root}/zips?metadata={root / n}", cache=cache) for n in names]
    assert [len(dataset) for dataset in datasets] == [1, 4, 4]
    assert datasets[1].fingerprint == datasets[2].fingerprint != datasets[0].fingerprint


def test_no_photo_is_error(dump):
    root, _ = dump
    (root / "m").write_text("1\n2\n")
    with pytest.raises(DataError, match="none of the 2 photos .* named after a photo's number"):
        scan_images(f"{root}/folder?metadata={root}/m")
    with pytest.raises(DataError, match="no images in .*2 of the photos in m are missing"):
        scan_images(f"{root}/zips?metadata={root}/m")


def test_metadata_is_detected_by_its_usual_names(tmp_path):
    assert yfcc.find_metadata(str(tmp_path)) is None
    (tmp_path / "yfcc100m_subset_data.tsv.bz2").touch()
    assert yfcc.find_metadata(str(tmp_path)) == str(tmp_path / "yfcc100m_subset_data.tsv.bz2")


@pytest.mark.parametrize("line", [b"24821\n", b"\n"])
def test_a_compressed_table_without_end_is_an_error(tmp_path, monkeypatch, line):
    """A few kB of bzip2 hold any number of lines."""
    monkeypatch.setattr(yfcc, "_MOST_ROWS", 1000)
    path = tmp_path / "yfcc100m_dataset.bz2"
    path.write_bytes(bz2.compress(line * 2000))
    with pytest.raises(DataError, match="has more than 1000 rows"):
        read_metadata(str(path))
    path.write_bytes(bz2.compress(bytes(1 << 22)))
    with pytest.raises(DataError, match="bytes in line 1"):
        read_metadata(str(path))


def test_a_database_with_endless_rows_or_values_is_an_error(tmp_path, monkeypatch):
    path = str(tmp_path / "x.db")
    write_sqlite(path)
    monkeypatch.setattr(yfcc, "_MOST_ROWS", 3)
    with pytest.raises(DataError, match="has more than 3 rows"):
        read_metadata(path)
    monkeypatch.setattr(yfcc, "_MOST_ROWS", 100)
    with closing(sqlite3.connect(path)) as base:
        base.execute("update yfcc100m_dataset set downloadurl = zeroblob(20000000)")
        base.commit()
    if hasattr(sqlite3.Connection, "setlimit"):
        with pytest.raises(DataError, match="cannot be read: string or blob too big"):
            read_metadata(path)
