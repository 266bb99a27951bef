from __future__ import annotations

import re

import numpy as np
import pytest

from fastdino.errors import CheckpointError, ConfigError
from fastdino.evals import feature_parts
from fastdino.evals.feature_parts import FeatureParts

SHAPES = {"cls": (3,), "patch": (2, 2, 3)}
FP32 = np.dtype("<f4")


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A function that makes the parts of 10 images, 4 per part, in batches of 2."""
    monkeypatch.setattr(feature_parts, "PART_IMAGES", 5)

    def make(key="k", dtype=FP32, shapes=SHAPES):
        return FeatureParts(tmp_path / "parts", key, shapes, dtype, 10, 2)

    return make


def write(parts, part, seed=0):
    rows = list(parts.batches(part)[0])
    rng = np.random.default_rng([seed, part])
    arrays = {
        name: rng.standard_normal((len(rows), *shape)).astype(parts.dtype)
        for name, shape in parts.shapes.items()
    }
    parts.write(part, arrays, np.array(rows), {rows[-1] + 1: "is empty"})
    return arrays


@pytest.mark.parametrize(
    ("batch", "images", "bytes_", "size"),
    [(2, 5, 1 << 20, 4), (2, 4, 1 << 20, 4), (7, 5, 1 << 20, 7), (1, 1000, 600, 10), (3, 9, 1, 3)],
)
def test_parts_are_whole_batches_within_the_limits(
    monkeypatch, tmp_path, batch, images, bytes_, size
):
    monkeypatch.setattr(feature_parts, "PART_IMAGES", images)
    monkeypatch.setattr(feature_parts, "PART_BYTES", bytes_)
    parts = FeatureParts(tmp_path, "k", SHAPES, FP32, 23, batch)
    assert parts.bytes_per_image == 4 * 15
    assert parts.size == size
    batches = [batch for part in range(len(parts)) for batch in parts.batches(part)]
    assert [i for indices in batches for i in indices] == list(range(23))
    assert [len(batch) for batch in batches[:-1]] == [batch] * (len(batches) - 1)


def test_finished_parts_are_read_back_and_not_computed_again(parts):
    assert parts().open(overwrite=False) == [0, 1, 2]
    written = write(parts(), 1)
    again = parts()
    assert again.open(overwrite=False) == [0, 2]
    for name, array in written.items():
        assert np.array_equal(again.read(1, name), array)
    assert again.indices(1).tolist() == [4, 5]
    assert again.reasons(1) == {6: "is empty"}
    again.remove()
    assert not again.folder.exists()


def test_parts_of_other_settings_are_kept_unless_overwritten(parts):
    parts().open(overwrite=False)
    write(parts(), 0)
    with pytest.raises(ConfigError, match="has parts of a run with other weights, images or sett"):
        parts("other").open(overwrite=False)
    assert parts().open(overwrite=False) == [1, 2]
    assert parts().open(overwrite=True) == [1, 2], "the same settings"
    assert parts("other").open(overwrite=True) == [0, 1, 2]


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "empty",
        "text",
        "encrypted",
        "dtype",
        "shape",
        "rows",
        "array",
    ],
)
def test_damaged_parts_are_computed_again_with_a_warning(parts, capsys, damage):
    parts().open(overwrite=False)
    path = parts().folder / "part-000000.npz"
    if damage == "dtype":
        write(parts(dtype=np.dtype("<f2")), 0)
    elif damage in ("shape", "array"):
        shapes = {"shape": {"cls": (4,), "patch": (2, 2, 3)}, "array": {"cls": (3,)}}[damage]
        write(parts(shapes=shapes), 0)
    elif damage == "rows":
        arrays = {name: np.zeros((5, *shape), FP32) for name, shape in SHAPES.items()}
        parts().write(0, arrays, np.arange(5), {})
    else:
        write(parts(), 0)
        data = path.read_bytes()
        flagged = rb"\g<1>" + b"\1"  # in the index of the zip
        encrypted = re.sub(rb"(?s)(PK\x01\x02.{4})\0", flagged, data)
        path.write_bytes(
            {"cut": data[:-30], "empty": b"", "text": b"no", "encrypted": encrypted}[damage]
        )
        assert path.read_bytes() != data
    assert parts().open(overwrite=False) == [0, 1, 2]
    assert f"warning: {path} is damaged" in capsys.readouterr().err


def test_flipped_features_are_noticed_when_they_are_read(parts):
    large = {"cls": (30_000,)}  # zipfile reads a small array, and its checksum, with the header
    first = parts(shapes=large)
    first.open(overwrite=False)
    write(first, 0)
    path = first.folder / "part-000000.npz"
    data = bytearray(path.read_bytes())
    data[100_000] ^= 1
    path.write_bytes(data)
    assert parts(shapes=large).open(overwrite=False) == [1, 2]
    with pytest.raises(CheckpointError, match="is damaged .* and was removed: run the same"):
        parts(shapes=large).read(0, "cls")
    assert parts(shapes=large).open(overwrite=False) == [0, 1, 2]


def test_a_part_that_another_machine_wrote_elsewhere_is_missing(parts):
    parts().open(overwrite=False)
    with pytest.raises(CheckpointError, match="is missing: all ranks must see one folder"):
        parts().indices(0)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    parts = FeatureParts(tmp_path / "file/parts", "k", SHAPES, FP32, 10, 2)
    with pytest.raises(CheckpointError, match=r"cannot write .*file/parts \(Not a directory"):
        parts.open(overwrite=False)


def test_other_files_in_the_folder_of_the_parts_are_kept(parts):
    ours = parts()
    ours.folder.mkdir()
    own = ours.folder / "notes.txt"
    own.write_text("mine")
    ours.open(overwrite=True)
    write(ours, 0)
    ours.remove()
    assert list(ours.folder.iterdir()) == [own]
    own.unlink()
    ours.open(overwrite=True)
    write(ours, 0)
    ours.remove()
    assert not ours.folder.exists()
