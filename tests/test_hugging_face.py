"""Tests of fastdino.data.datasets.hugging_face."""

from __future__ import annotations

import os
import pickle
import struct
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastdino.data.datasets import archives, hugging_face
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
    """A function that makes a dataset of n noise JPEGs in column `image`, and other columns."""

    def build(n=7, image="image", features=types.MappingProxyType({}), **columns):
        pictures = [{"bytes": picture(i, (20 + i, 10)), "path": f"{i}.jpg"} for i in range(n)]
        dataset = datasets.Dataset.from_dict({image: pictures, **columns})
        for name, feature in {image: datasets.Image(), **features}.items():
            dataset = dataset.cast_column(name, feature)
        return dataset

    return build


@pytest.fixture
def labelled(make):
    def build(n=7):
        feature = {"label": datasets.ClassLabel(names=NAMES)}
        return make(n, features=feature, label=[i % 2 for i in range(n)])

    return build


@pytest.fixture
def save(tmp_path):
    """A function that saves a dataset to a folder and returns its --data_path."""

    def write(dataset, name="data", **options):
        dataset.save_to_disk(tmp_path / name, **options)
        return f"hf:{tmp_path / name}"

    return write


def classes_and_labels(data_path):
    dataset = scan_images(data_path)
    return dataset.classes, dataset.labels.tolist()


def assert_images(dataset, picture, indices):
    expected = [picture(i, (20 + i, 10)) for i in indices]
    assert [dataset.read_bytes(i) for i in range(len(dataset))] == expected
    assert dataset.sizes.tolist() == [[10, 20 + i] for i in indices]
    assert dataset.skipped == {}


@pytest.mark.parametrize("form", ["folder", "folders", "parquet", "parquet file"])
def test_images_are_read_in_place_in_every_format(tmp_path, labelled, save, picture, form):
    if form == "folder":
        data_path = save(labelled(), num_shards=3)
    elif form == "folders":
        data_path = save(datasets.DatasetDict({"train": labelled(), "test": labelled(2)}))
    else:
        file = tmp_path / "data" / "train-00000-of-00001.parquet"
        labelled().to_parquet(file)
        data_path = f"hf:{file if form == 'parquet file' else file.parent}"
    dataset = scan_images(data_path)
    assert_images(dataset, picture, range(7))
    assert (dataset.classes, dataset.labels.tolist()) == (NAMES, [0, 1, 0, 1, 0, 1, 0])
    assert dataset.kind == f"Hugging Face {data_path[3:]}, train"
    assert dataset.files != dataset.paths


def test_reading_needs_neither_the_package_nor_a_copy(
    tmp_path, labelled, save, picture, monkeypatch
):
    dataset = pickle.loads(pickle.dumps(scan_images(save(labelled()))))
    monkeypatch.setattr(hugging_face.importlib, "import_module", lambda name: pytest.fail(name))
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(dataset.read_bytes, [6, 0, 3] * 20))
    assert images == [picture(i, (20 + i, 10)) for i in (6, 0, 3)] * 20
    assert not (tmp_path / "home").exists()


def test_saved_selection_keeps_its_order(labelled, save, picture):
    selected = [scan_images(save(labelled().select([5, 2, 2]), name)) for name in ("a", "b")]
    assert_images(selected[0], picture, [5, 2, 2])
    assert selected[0].fingerprint == selected[1].fingerprint, "it is independent of the folder"


def test_splits_are_those_of_the_dataset(labelled, save):
    path = save(datasets.DatasetDict({"train": labelled(5), "validation": labelled(3)}))
    assert len(scan_images(f"{path}?split=validation")) == 3
    assert [len(scan_images(path, role=role)) for role in ("train", "val")] == [5, 3]


def test_image_folders_are_read_as_files(tmp_path, picture):
    for i, name in enumerate(("train/ant/0.jpg", "train/bee/1.png", "test/ant/2.jpg")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    dataset = scan_images(f"hf:{tmp_path}/data")
    assert dataset.files == dataset.paths
    assert (dataset.classes, dataset.labels.tolist()) == (["ant", "bee"], [0, 1])
    assert sorted(dataset.read_bytes(i) for i in range(2)) == sorted([picture(0), picture(1)])


def test_columns_are_chosen_by_option(make, save):
    two = {"fine": datasets.ClassLabel(names=NAMES), "coarse": datasets.ClassLabel(names=["x"])}
    masks = [{"bytes": b"", "path": None}] * 3
    columns = {"fine": [2, 0, 1], "coarse": [0, 0, 0], "mask": masks}
    path = save(make(3, "photo", two | {"mask": datasets.Image()}, **columns))
    assert classes_and_labels(f"{path}?label=fine&image=photo") == (NAMES, [2, 0, 1])
    for options, message in (
        ("label=fine", r"choose the image column with \?image=...: one of photo, mask"),
        ("image=fine", r"choose the image column with \?image=...: one of photo, mask"),
        ("image=photo&label=photo", "'photo' is not a label column; its columns: photo"),
        ("split=dev", "no split 'dev'; its splits are train:"),
    ):
        with pytest.raises(DataError, match=message):
            scan_images(f"{path}?{options}")
    # Training needs no labels, an evaluation does.
    assert scan_images(f"{path}?image=photo").labels.tolist() == [0, 0, 0]
    message = r"choose the label column with \?label=...: one of fine, coarse"
    with pytest.raises(DataError, match=message):
        scan_images(f"{path}?image=photo&train=train", role="train")


@pytest.mark.parametrize("names", [NAMES, None])
@pytest.mark.parametrize("hidden", [-1, None])
def test_images_with_a_hidden_label_are_left_out_of_an_evaluation(make, save, names, hidden):
    features = {"label": datasets.ClassLabel(names=names)} if names else {}
    path = save(make(4, features=features, label=[hidden, 1, 0, hidden]))
    dataset = scan_images(f"{path}?train=train", role="train")
    assert dataset.classes == (names or ["0", "1"])
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.sizes.tolist() == [[10, 21], [10, 22]]
    assert dataset.notes == ("2 images without a label are left out",)
    assert len(scan_images(path)) == 4


@pytest.mark.parametrize("labels", [[-1, -1], None])
def test_a_split_without_labels_is_an_error_of_evaluations_only(make, save, labels):
    path = save(make(2, **({"label": labels} if labels else {})))
    assert scan_images(path).labels.tolist() == [0, 0]
    with pytest.raises(DataError, match=r"val of hf:.* \(Hugging Face .*\) has no labels"):
        scan_images(f"{path}?val=train", role="val")


def test_invalid_labels_do_not_stop_training(make, save, monkeypatch):
    path = save(make(2, label=[0, 7]))
    monkeypatch.setattr(hugging_face, "_choose_columns", lambda *_: ("image", "label"))
    monkeypatch.setattr(
        archives, "number_labels", lambda *_: (_ for _ in ()).throw(DataError("label 7 is odd"))
    )
    dataset = scan_images(path)
    assert dataset.labels.tolist() == [0, 0]
    assert "labels are not used: label 7 is odd" in dataset.notes
    with pytest.raises(DataError, match="label 7 is odd"):
        scan_images(f"{path}?val=train", role="val")


def test_column_image_is_preferred_and_the_cache_is_per_column(tmp_path, make, save, picture):
    masks = [{"bytes": picture(50 + i), "path": None} for i in range(3)]
    path = save(make(3, "image", {"mask": datasets.Image()}, mask=masks))
    cache = tmp_path / "images.npz"
    for _ in range(2):
        assert_images(scan_images(path, cache=cache), picture, range(3))
        assert scan_images(f"{path}?image=mask", cache=cache).read_bytes(1) == picture(51)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["dog", "ant", "dog"], None, (["ant", "dog"], [1, 0, 1])),
        ([10, 9, None], None, (["9", "10", "unlabelled"], [1, 0, 2])),
        ([-1, 1, None], NAMES, ([*NAMES, "unlabelled"], [3, 1, 3])),
        (None, None, (["data"], [0, 0, 0])),
    ],
)
def test_classes_are_text_numbers_or_known_names(make, save, labels, names, expected):
    features = {"label": datasets.ClassLabel(names=names)} if names else {}
    columns = {"label": labels} if labels else {}
    assert classes_and_labels(save(make(3, features=features, **columns))) == expected


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_binary_columns_are_images(save, picture, kind):
    features = datasets.Features({"jpg": datasets.Value(kind)})
    images = [picture(i) for i in range(3)]
    dataset = scan_images(save(datasets.Dataset.from_dict({"jpg": images}, features=features)))
    assert [dataset.read_bytes(i) for i in range(3)] == images


def test_broken_and_missing_images_are_skipped(tmp_path, picture):
    values = [
        {"bytes": picture(0), "path": None},
        {"bytes": b"no image", "path": None},
        {"bytes": None, "path": "gone.jpg"},
        None,
        {"bytes": b"", "path": None},
    ]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": values}, features=features).data.table
    path = str(tmp_path / "data.arrow")
    with arrow.OSFile(path, "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    images = index_arrow(path, image="image", label=None)
    assert images.reasons == {2: "is not in the file, but gone.jpg", 3: "has no image"}
    assert read_part(path, Part(*images.parts[0].tolist())) == picture(0)
    dataset = scan_images(f"hf:{path}", max_bad_share=0.9)
    assert (len(dataset), dataset.broken) == (1, 4)
    with pytest.raises(DataError, match="4 of 5 images cannot be read, more than --max_bad_share"):
        scan_images(f"hf:{path}")


@pytest.mark.parametrize("damage", ["compressed", "truncated"])
def test_compressed_and_truncated_files_are_errors(tmp_path, picture, damage):
    schema = arrow.schema([("image", arrow.binary())])
    batch = arrow.record_batch([[bytes(100_000), picture(1)]], schema=schema)
    path = str(tmp_path / "data.arrow")
    options = arrow.ipc.IpcWriteOptions(compression="lz4" if damage == "compressed" else None)
    with arrow.OSFile(path, "wb") as file, arrow.ipc.new_stream(file, schema, options=options) as w:
        w.write_batch(batch)
    if damage == "truncated":
        os.truncate(path, 50_000)
    message = "compressed columns" if damage == "compressed" else "Expected to be able to read"
    with pytest.raises(DataError, match=f"data.arrow is damaged or compressed: {message}"):
        index_arrow(path, image="image", label=None)


def write_arrow(path, **columns):
    table = arrow.table(columns)
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("column", ["bytes", "path", "label", "large"])
@pytest.mark.parametrize("offset", [0x7FFFFF00, -1, 40])
def test_offsets_that_point_outside_are_an_error_and_not_a_crash(tmp_path, column, offset):
    """Arrow follows them: in a child, because the fault is a segmentation fault."""
    values = {name: [name * (i + 1) for i in range(9)] for name in ("bytes", "path", "label")}
    kinds = {"bytes": arrow.binary(), "path": arrow.string()}
    kinds["label"] = arrow.large_string() if column == "large" else arrow.string()
    arrays = {name: arrow.array(values[name]).cast(kind) for name, kind in kinds.items()}
    image = arrow.StructArray.from_arrays([arrays["bytes"], arrays["path"]], ["bytes", "path"])
    write_arrow(tmp_path / "x.arrow", image=image, label=arrays["label"])
    content = bytearray((tmp_path / "x.arrow").read_bytes())
    name = "label" if column == "large" else column
    code = "<9q" if column == "large" else "<9i"
    ends = struct.pack(code, *(len(name) * i * (i + 1) // 2 for i in range(9)))
    # path and label have equal lengths: label is the last of them in the file.
    place = content.rfind(ends) if name == "label" else content.find(ends)
    assert place > 0
    struct.pack_into("<q" if column == "large" else "<i", content, place + len(ends) // 2, offset)
    (tmp_path / "x.arrow").write_bytes(content)
    child = os.fork()
    if child == 0:
        os.close(2)  # of a crash
        try:
            index_arrow(str(tmp_path / "x.arrow"), image="image", label="label")
        except DataError as error:
            os._exit(10 if "is damaged or compressed" in str(error) else 11)
        finally:
            os._exit(12)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10


def test_arrow_file_without_the_column_is_error(tmp_path, picture):
    path = str(tmp_path / "data.arrow")
    batch = arrow.record_batch([[picture(1)]], names=["image"])
    with arrow.OSFile(path, "wb") as file, arrow.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(DataError, match='data.arrow: Field "photo" does not exist'):
        index_arrow(path, image="photo", label=None)


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        ("hf:user/missing", "not on this machine, and the Hub cannot be reached"),
        ("hf:/none/there", "there is no folder /none/there"),
        ("hf:", "expected hf:NAME or hf:FOLDER"),
    ],
)
def test_missing_dataset_is_one_line_error(data_path, message):
    with pytest.raises(DataError, match=message) as error:
        scan_images(data_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("column", "feature", "message"),
    [
        ("text", "string", r"has no image column; its columns: text \(string\), label \(int64\)"),
        ("clip", "video", r"has videos \(column clip\), not images"),
    ],
)
def test_dataset_without_images_is_error_with_its_columns(save, column, feature, message):
    kind = datasets.Video() if feature == "video" else datasets.Value(feature)
    features = datasets.Features({column: kind, "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({column: [None], "label": [1]}, features=features)
    with pytest.raises(DataError, match=message):
        scan_images(save(dataset))


def test_empty_dataset_is_error(tmp_path, make):
    make(1).select([]).to_parquet(tmp_path / "empty" / "train.parquet")
    with pytest.raises(DataError, match="cannot be loaded: .*no data"):
        scan_images(f"hf:{tmp_path}/empty")


def test_missing_or_old_package_is_error(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(hugging_face.importlib, "import_module", missing)
    with pytest.raises(DataError, match=r'needs the package datasets: pip install -U "fastdino'):
        scan_images("hf:cifar10")
    old = types.SimpleNamespace(__version__="2.14.4")
    monkeypatch.setattr(hugging_face.importlib, "import_module", lambda name: old)
    with pytest.raises(DataError, match=r"needs datasets 3 or newer, found 2.14.4"):
        scan_images("hf:cifar10")
