"""fastdino.data.datasets.tars: images at the end of a file, and sparse ones."""

from __future__ import annotations

import io
import tarfile

import pytest

from fastdino.data.datasets.tars import index_tar
from fastdino.data.image_dataset import scan_images


@pytest.mark.parametrize("size", [(20, 10), (64, 48)])
@pytest.mark.parametrize("missing", [-512, -1, 0, 1, 2])
def test_an_image_is_whole_up_to_its_last_byte(tmp_path, make_tar, picture, missing, size):
    """The tar ends `missing` bytes before the end of its last image."""
    images = {f"{n}.jpg": picture(n, size) for n in range(3)}
    path = make_tar(tmp_path / "a.tar", images)
    offset, length, _ = index_tar(str(path)).parts[2].tolist()
    path.write_bytes(path.read_bytes()[: offset + length - missing])
    index = index_tar(str(path))
    assert list(index.members) == list(images)
    assert set(index.reasons) == ({2} if missing > 0 else set())
    dataset = scan_images(path, max_bad_share=0.5)
    assert [dataset.read_bytes(i) for i in range(len(dataset))] == [*images.values()][
        : 2 if missing > 0 else 3
    ]


@pytest.mark.parametrize("size", [(20, 10), (64, 48)])
@pytest.mark.parametrize("missing", [0, 1])
def test_the_last_image_of_a_tar_in_a_tar_is_whole_up_to_its_last_byte(
    tmp_path, make_tar, picture, missing, size
):
    """Its offset is in the outer file, and the inner one ends within the outer one."""
    images = {f"{n}.jpg": picture(n, size) for n in range(2)}
    inner = make_tar(tmp_path / "inner" / "k.tar", images)
    offset, length, _ = index_tar(str(inner)).parts[1].tolist()
    cut = inner.read_bytes()[: offset + length - missing]
    outer = make_tar(tmp_path / "outer.tar", {"a.jpg": picture(7, size), "k.tar": cut})
    index = index_tar(str(outer))
    names = ["a.jpg", "k.tar/0.jpg", "k.tar/1.jpg", "k.tar"]  # the last has a reason: it is cut
    assert list(index.members) == names
    assert set(index.reasons) == ({2, 3} if missing else {3})
    data = outer.read_bytes()
    for part, image in zip(index.parts[1:3].tolist(), images.values(), strict=True):
        whole = data[part[0] : part[0] + part[1]]
        assert whole[: len(image) - missing] == image[: len(image) - missing]


def test_a_sparse_member_is_no_byte_range_of_an_image(tmp_path, picture):
    """Its zeros are left out, so that the bytes of the tar are not those of the file."""
    data = picture(1)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (("sparse.jpg", tarfile.GNUTYPE_SPARSE), ("whole.jpg", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(data)
            tar.addfile(member, io.BytesIO(data))
    index = index_tar(str(tmp_path / "a.tar"))
    assert list(index.members) == ["sparse.jpg", "whole.jpg"]
    assert list(index.reasons) == [0]
    assert "sparse member of the tar" in index.reasons[0]
