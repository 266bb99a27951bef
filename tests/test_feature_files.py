from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open

from fastdino.errors import CheckpointError, ConfigError
from fastdino.evals import feature_files
from fastdino.evals.feature_files import (
    SUFFIXES,
    FeatureTable,
    check_path,
    name_texts,
    read_metadata,
    write_features,
)

SHAPES = {"cls": (3,), "patch": (2, 2, 3)}
ROWS = [3, 0, 2]
NAMES = ["a/0.png", "ä/\u2028 x.png", "日本/2.png", "\U0001f600.png", "a,b\n.png"]
METADATA = {"classes": ["ä", "b"], "key": "k"}


def table(dtype="<f4", names=NAMES):
    rng = np.random.default_rng(0)
    values = {
        name: rng.standard_normal((5, *shape)).astype(dtype) for name, shape in SHAPES.items()
    }
    ends = np.cumsum([0, *ROWS])

    def read(part, name):
        return values[name][ends[part] : ends[part + 1]]

    labels = np.array([0, 1, -1, 1, 0])
    return FeatureTable(names, labels, SHAPES, np.dtype(dtype), ROWS, read, METADATA), values


def load(path, shapes=SHAPES):
    """Read a file of features with the library of its format."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        return {**found, "names": found["names"].tolist(), "metadata": str(found["metadata"])}
    if path.suffix == ".safetensors":
        with safe_open(path, "numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()["metadata"]
        names = found["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
        return {**found, "names": names, "metadata": metadata}
    parquet = pytest.importorskip("pyarrow.parquet")
    read = parquet.read_table(path)
    arrays = {
        name: read[name].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
        for name, shape in shapes.items()
    }
    metadata = read.schema.metadata[b"metadata"].decode()
    names, labels = read["name"].to_pylist(), read["label"].to_numpy()
    return {**arrays, "names": names, "labels": labels, "metadata": metadata}


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_read_back_by_the_library_of_its_format(tmp_path, suffix, dtype):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"new/x{suffix}"
    features, values = table(dtype)
    write_features(path, features)
    found = load(path)
    for name, array in values.items():
        assert found[name].dtype == np.dtype(dtype)
        assert np.array_equal(found[name], array)
    assert found["names"] == NAMES
    assert found["labels"].tolist() == [0, 1, -1, 1, 0]
    assert json.loads(found["metadata"]) == METADATA == read_metadata(path)
    first = path.read_bytes()
    write_features(path, features)
    assert path.read_bytes() == first


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_that_are_no_text_are_kept_or_escaped(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    names = name_texts(["a\udcff.png", *NAMES[1:]])
    path = tmp_path / f"x{suffix}"
    write_features(path, table(names=names)[0])
    expected = "a\\udcff.png" if suffix == ".parquet" else "a\udcff.png"
    assert load(path)["names"] == [expected, *NAMES[1:]]


def test_the_npz_has_the_bytes_of_its_arrays_only(tmp_path):
    """Its members are those of np.savez."""
    features, values = table()
    write_features(tmp_path / "x.npz", features)
    np.savez(tmp_path / "y.npz", **values)
    with np.load(tmp_path / "x.npz") as ours, np.load(tmp_path / "y.npz") as numpys:
        for name in values:
            assert ours.zip.read(f"{name}.npy") == numpys.zip.read(f"{name}.npy")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_memory_holds_one_part(tmp_path, suffix):
    rows, shape, parts = 64, (16, 16, 32), 12
    part_bytes = 4 * rows * 16 * 16 * 32

    def read(part, name):
        return np.full((rows, *shape), part, np.float32)

    names = [str(i) for i in range(rows * parts)]
    labels = np.zeros(len(names), np.int64)
    features = FeatureTable(
        names, labels, {"patch": shape}, np.dtype("<f4"), [rows] * parts, read, {}
    )
    tracemalloc.start()
    write_features(tmp_path / f"x{suffix}", features)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * part_bytes


@pytest.mark.parametrize("name", ["x.csv", "x", "x.NPZ", ".npz", "x.npz.gz"])
def test_other_suffixes_are_an_error(tmp_path, name):
    with pytest.raises(ConfigError, match="expected a file that ends in .npz, .parquet, .safet"):
        check_path(tmp_path / name)


def test_a_folder_is_no_output(tmp_path):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(ConfigError, match="is not a file"):
        check_path(tmp_path / "x.npz")


def test_a_missing_pyarrow_is_reported_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs pyarrow: pip install "fastdino\[parquet\]"'):
        check_path(tmp_path / "x.parquet")
    check_path(tmp_path / "x.npz")


def test_more_metadata_than_safetensors_reads_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "_SAFETENSORS_HEADER", 100)
    with pytest.raises(ConfigError, match="write .npz or .parquet"):
        write_features(tmp_path / "x.safetensors", table()[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\xff" * 100])
def test_metadata_of_other_files_is_an_error(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no file of features: "):
        read_metadata(path)
