"""Tests of fastdino.data.datasets.hugging_face."""

from __future__ import annotations

import os
import pickle
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastdino.data.datasets import hugging_face
from fastdino.data.datasets.hugging_face import index_arrow
from fastdino.data.image_dataset import scan_images
from fastdino.data.image_files import Part, read_part
from fastdino.errors import DataError

datasets = pytest.importorskip("datasets")
arrow = pytest.importorskip("pyarrow")

NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No network, and an empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def make(picture):
    """Builds a dataset of n noise JPEGs in column `image`, and of other columns."""

    def build(n=7, image="image", features=types.MappingProxyType({}), **columns):
        pictures = [{"bytes": picture(i, (20 + i, 10)), "path": f"{i}.jpg"} for i in range(n)]
        columns = {image: pictures, **columns} if image else columns
        one = datasets.Dataset.from_dict(columns)
        for name, feature in {**({image: datasets.Image()} if image else {}), **features}.items():
            one = one.cast_column(name, feature)
        return one

    return build


@pytest.fixture
def labelled(make):
    def build(n=7, first=0):
        labels = [(first + i) % 2 for i in range(n)]
        return make(n, features={"label": datasets.ClassLabel(names=NAMES)}, label=labels)

    return build


def assert_images(dataset, picture, n):
    assert [dataset.read_bytes(i) for i in range(n)] == [picture(i, (20 + i, 10)) for i in range(n)]
    assert dataset.sizes.tolist() == [[10, 20 + i] for i in range(n)]
    assert (len(dataset), dataset.skipped) == (n, {})


@pytest.mark.parametrize("form", ["folder", "folders", "parquet", "parquet file"])
def test_images_are_read_in_place_in_every_format(tmp_path, labelled, picture, form):
    path = tmp_path / "data"
    if form == "folder":
        labelled().save_to_disk(path, num_shards=3)
    elif form == "folders":
        both = {"train": labelled(), "test": labelled(2)}
        datasets.DatasetDict(both).save_to_disk(path)
    else:
        labelled().to_parquet(path / "train-00000-of-00001.parquet")
        path = path / "train-00000-of-00001.parquet" if form == "parquet file" else path
    dataset = scan_images(f"hf:{path}")
    assert_images(dataset, picture, 7)
    assert (dataset.classes, dataset.labels.tolist()) == (NAMES, [0, 1, 0, 1, 0, 1, 0])
    assert dataset.kind == f"Hugging Face {path}, train"
    assert dataset.files != dataset.paths


def test_reading_needs_neither_the_package_nor_a_copy(tmp_path, labelled, picture, monkeypatch):
    labelled().save_to_disk(tmp_path / "data")
    dataset = pickle.loads(pickle.dumps(scan_images(f"hf:{tmp_path}/data")))
    monkeypatch.setattr(hugging_face.importlib, "import_module", lambda name: pytest.fail(name))
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(dataset.read_bytes, [6, 0, 3] * 20))
    assert images == [picture(i, (20 + i, 10)) for i in (6, 0, 3)] * 20
    assert not (tmp_path / "home").exists()


def test_saved_selection_keeps_its_order(tmp_path, labelled, picture):
    labelled().select([5, 2, 2]).save_to_disk(tmp_path / "data")
    dataset = scan_images(f"hf:{tmp_path}/data")
    assert [dataset.read_bytes(i) for i in range(3)] == [
        picture(i, (20 + i, 10)) for i in (5, 2, 2)
    ]


def test_splits_are_those_of_the_dataset(tmp_path, labelled):
    splits = {"train": labelled(5), "validation": labelled(3)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    path = f"hf:{tmp_path}/data"
    assert len(scan_images(f"{path}?split=validation")) == 3
    assert [len(scan_images(path, role=role)) for role in ("train", "val")] == [5, 3]
    with pytest.raises(DataError, match="no split 'dev'; its splits are train, validation"):
        scan_images(f"{path}?split=dev")


def test_image_folders_are_read_as_files(tmp_path, picture):
    for i, name in enumerate(("train/ant/0.jpg", "train/bee/1.png", "test/ant/2.jpg")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    dataset = scan_images(f"hf:{tmp_path}/data")
    assert dataset.files == dataset.paths
    assert (dataset.classes, dataset.labels.tolist()) == (["ant", "bee"], [0, 1])
    assert sorted(dataset.read_bytes(i) for i in range(2)) == sorted([picture(0), picture(1)])


def test_columns_are_detected_by_type_or_chosen_by_option(tmp_path, make):
    two = {"fine": datasets.ClassLabel(names=NAMES), "coarse": datasets.ClassLabel(names=["x"])}
    make(3, "photo", two, fine=[2, 0, 1], coarse=[0, 0, 0]).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"choose the label column with \?label=.*fine, coarse"):
        scan_images(f"hf:{tmp_path}/two")
    dataset = scan_images(f"hf:{tmp_path}/two?label=fine&image=photo")
    assert (dataset.classes, dataset.labels.tolist()) == (NAMES, [2, 0, 1])
    with pytest.raises(DataError, match="choose the image column .* one of photo"):
        scan_images(f"hf:{tmp_path}/two?image=fine")
    with pytest.raises(DataError, match="'photo' is not a label column; its columns: photo"):
        scan_images(f"hf:{tmp_path}/two?label=photo")


def test_column_image_is_preferred(tmp_path, make, picture):
    masks = [{"bytes": picture(50 + i), "path": None} for i in range(3)]
    for name in ("image", "left"):
        one = make(3, name, {"mask": datasets.Image()}, mask=masks)
        one.save_to_disk(tmp_path / name)
    assert_images(scan_images(f"hf:{tmp_path}/image"), picture, 3)
    only_masks = scan_images(f"hf:{tmp_path}/image?image=mask")
    assert only_masks.read_bytes(1) == picture(51)
    with pytest.raises(DataError, match=r"with \?image=...: one of left, mask"):
        scan_images(f"hf:{tmp_path}/left")


def test_cache_is_not_reused_for_another_column(tmp_path, make, picture):
    masks = [{"bytes": picture(50 + i), "path": None} for i in range(3)]
    make(3, "image", {"mask": datasets.Image()}, mask=masks).save_to_disk(tmp_path / "d")
    cache = tmp_path / "images.npz"
    for _ in range(2):
        assert scan_images(f"hf:{tmp_path}/d", cache=cache).read_bytes(0) == picture(0)
        assert scan_images(f"hf:{tmp_path}/d?image=mask", cache=cache).read_bytes(0) == picture(50)


def test_text_and_integer_labels_are_classes(tmp_path, make):
    make(3, label=["dog", "ant", "dog"]).save_to_disk(tmp_path / "text")
    dataset = scan_images(f"hf:{tmp_path}/text")
    assert (dataset.classes, dataset.labels.tolist()) == (["ant", "dog"], [1, 0, 1])
    make(3, label=[10, 9, None]).save_to_disk(tmp_path / "number")
    dataset = scan_images(f"hf:{tmp_path}/number")
    assert (dataset.classes, dataset.labels.tolist()) == (["10", "9", "unlabelled"], [0, 1, 2])
    make(3).save_to_disk(tmp_path / "none")
    assert scan_images(f"hf:{tmp_path}/none").classes == ["none"]


def test_hidden_labels_are_a_separate_class(tmp_path, make):
    feature = {"label": datasets.ClassLabel(names=NAMES)}
    make(3, features=feature, label=[-1, 1, None]).save_to_disk(tmp_path / "d")
    dataset = scan_images(f"hf:{tmp_path}/d")
    assert (dataset.classes, dataset.labels.tolist()) == ([*NAMES, "unlabelled"], [3, 1, 3])


@pytest.mark.parametrize("wide", [False, True])
def test_binary_columns_are_images(tmp_path, picture, wide):
    kind = "large_binary" if wide else "binary"
    features = datasets.Features({"jpg": datasets.Value(kind)})
    one = datasets.Dataset.from_dict({"jpg": [picture(i) for i in range(3)]}, features=features)
    one.save_to_disk(tmp_path / "d")
    dataset = scan_images(f"hf:{tmp_path}/d")
    assert [dataset.read_bytes(i) for i in range(3)] == [picture(i) for i in range(3)]


def test_broken_and_missing_images_are_skipped(tmp_path, picture):
    values = [
        {"bytes": picture(0), "path": None},
        {"bytes": b"no image", "path": None},
        {"bytes": None, "path": "gone.jpg"},
        None,
        {"bytes": b"", "path": None},
    ]
    features = datasets.Features({"image": datasets.Image()})
    one = datasets.Dataset.from_dict({"image": values}, features=features)
    schema = one.data.schema
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "data.arrow"
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, schema) as writer:
        writer.write_table(one.data.table)
    images = index_arrow(str(path), image="image", label=None)
    assert images.reasons == {2: "is not in the file, but gone.jpg", 3: "has no image"}
    assert read_part(str(path), Part(*images.parts[0].tolist())) == picture(0)
    dataset = scan_images(f"hf:{path}", max_bad_share=0.9)
    assert (len(dataset), dataset.broken) == (1, 4)
    with pytest.raises(DataError, match="4 of 5 images cannot be read, more than --max_bad_share"):
        scan_images(f"hf:{path}")


def test_compressed_and_truncated_files_are_errors(tmp_path, picture):
    schema = arrow.schema([("image", arrow.binary())])
    batch = arrow.record_batch([[bytes(100_000), picture(1)]], schema=schema)
    path = str(tmp_path / "data.arrow")
    options = arrow.ipc.IpcWriteOptions(compression="lz4")
    with arrow.OSFile(path, "wb") as file, arrow.ipc.new_stream(file, schema, options=options) as w:
        w.write_batch(batch)
    with pytest.raises(DataError, match="data.arrow is compressed"):
        index_arrow(path, image="image", label=None)
    with arrow.OSFile(path, "wb") as file, arrow.ipc.new_stream(file, schema) as writer:
        writer.write_batch(batch)
    os.truncate(path, 50_000)
    with pytest.raises(DataError, match="data.arrow is damaged or truncated"):
        index_arrow(path, image="image", label=None)


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        ("hf:nobody/none", "not on this machine, and the Hub cannot be reached"),
        ("hf:/none/there", "there is no folder /none/there"),
        ("hf:", "expected hf:NAME or hf:FOLDER"),
    ],
)
def test_missing_dataset_is_one_line_error(data_path, message):
    with pytest.raises(DataError, match=message) as error:
        scan_images(data_path)
    assert "\n" not in str(error.value)


def test_dataset_without_images_is_error_with_its_columns(tmp_path, make):
    make(image=None, text=["a"], label=[1]).save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match=r"has no image column; its columns: text \(string\), l"):
        scan_images(f"hf:{tmp_path}/text")
    features = datasets.Features({"clip": datasets.Video(), "label": datasets.Value("int64")})
    one = datasets.Dataset.from_dict({"clip": [None], "label": [1]}, features=features)
    one.save_to_disk(tmp_path / "video")
    with pytest.raises(DataError, match=r"has videos \(column clip\), not images"):
        scan_images(f"hf:{tmp_path}/video")
    make(1).select([]).to_parquet(tmp_path / "empty" / "train.parquet")
    with pytest.raises(DataError, match="cannot be loaded: .*no data"):
        scan_images(f"hf:{tmp_path}/empty")


def test_missing_or_old_package_is_error(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(hugging_face.importlib, "import_module", missing)
    with pytest.raises(DataError, match=r'needs the package datasets: pip install -U "fastdino'):
        scan_images("hf:cifar10")
    old = types.SimpleNamespace(__version__="2.14.4")
    monkeypatch.setattr(hugging_face.importlib, "import_module", lambda name: old)
    with pytest.raises(DataError, match=r"needs datasets 3 or newer, found 2.14.4"):
        scan_images("hf:cifar10")


def test_fingerprint_is_independent_of_the_folder(tmp_path, labelled):
    prints = []
    for name in ("a", "b"):
        labelled().save_to_disk(tmp_path / name)
        prints.append(scan_images(f"hf:{tmp_path}/{name}").fingerprint)
    assert prints[0] == prints[1]
