import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data import shapes, shapes_clips, shapes_drawing, shapes_stills
from fastdino.errors import DataError
from tests.commands import flags_of

SMALL = {"train_per_class": 2, "val_per_class": 1, "size": 64, "clips": 1, "frames": 5}


def digests(root: Path) -> dict[str, str]:
    """Map the relative path of every file in root to its digest."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "small"
    shapes.write_shapes(root, **SMALL, workers=1)
    return root


@pytest.fixture(scope="module")
def stills():
    """Images [N, 32, 32, 3], object labels and classes: 20 per class, then 12 per class."""
    parts = []
    for split, count in enumerate((20, 12)):
        drawn = [
            (*shapes_stills.still(form, 32, np.random.default_rng([split, label, i]), 0), label)
            for label, form in enumerate(shapes_drawing.CLASSES)
            for i in range(count)
        ]
        parts.append([np.stack(column) for column in zip(*drawn, strict=True)])
    return parts


def knn_accuracy(train, train_labels, val, val_labels, k=20):
    """Return the k-NN accuracy (L2 distance, majority vote) of the validation rows."""
    distance = (train**2).sum(1) - 2 * val @ train.T
    votes = train_labels[np.argsort(distance, axis=1)[:, :k]]
    chosen = np.array([np.bincount(row).argmax() for row in votes])
    return float(np.mean(chosen == val_labels))


def test_layout_is_an_image_folder_with_masks_and_a_davis_folder(small_set):
    assert len(shapes_drawing.CLASSES) >= 10
    expected = {"shapes.json"}
    for split, count in (("train", 2), ("val", 1)):
        for form in shapes_drawing.CLASSES:
            for i in range(count):
                expected.add(f"{split}/{form}/{form}_{i:05d}.jpg")
                expected.add(f"masks/{split}/{form}/{form}_{i:05d}.png")
    for frame in range(5):
        expected.add(f"davis/JPEGImages/480p/shapes_00/{frame:05d}.jpg")
        expected.add(f"davis/Annotations/480p/shapes_00/{frame:05d}.png")
    expected |= {"davis/ImageSets/2017/train.txt", "davis/ImageSets/2017/val.txt"}
    assert set(digests(small_set)) == expected
    assert (small_set / "davis/ImageSets/2017/val.txt").read_text() == "shapes_00\n"
    assert json.loads((small_set / "shapes.json").read_text()) == {"version": 2, "seed": 0} | SMALL


def test_files_open_in_the_right_mode_and_size(small_set):
    for path in small_set.glob("train/*/*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    for path in small_set.glob("masks/*/*/*.png"):
        with Image.open(path) as mask:
            assert (mask.mode, mask.size) == ("L", (64, 64))
            assert set(np.unique(np.asarray(mask))) == {0, 255}
    for path in small_set.glob("davis/JPEGImages/480p/*/*.jpg"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (854, 480))


def test_number_of_workers_does_not_change_the_bytes(small_set, tmp_path):
    shapes.write_shapes(tmp_path / "again", **SMALL, workers=2)
    assert digests(tmp_path / "again") == digests(small_set)


def test_larger_dataset_contains_the_smaller_and_another_seed_differs(small_set, tmp_path):
    fewer = SMALL | {"train_per_class": 1, "clips": 0}
    shapes.write_shapes(tmp_path / "fewer", **fewer, workers=1)
    shapes.write_shapes(tmp_path / "other", **fewer, seed=1, workers=1)
    whole, fewer_files = digests(small_set), digests(tmp_path / "fewer")
    other_files = digests(tmp_path / "other")
    pictures = [name for name in fewer_files if name.endswith((".jpg", ".png"))]
    assert len(pictures) == 4 * len(shapes_drawing.CLASSES)
    assert all(fewer_files[name] == whole[name] for name in pictures)
    assert not any(fewer_files[name] == other_files[name] for name in pictures if "jpg" in name)


def test_masks_cover_the_objects_and_only_the_objects():
    for label, form in enumerate(shapes_drawing.CLASSES):
        image, objects = shapes_stills.still(form, 96, np.random.default_rng(label), 0)
        scenery = shapes_stills._scenery(96, np.random.default_rng(label), 0)
        changed = (image != scenery).any(axis=2)
        assert changed[objects > 0].mean() > 0.99
        # Pixels that an object covers by less than a half are its anti-aliased edge.
        edge = np.zeros_like(changed)
        padded = np.pad(objects > 0, 1)
        for row in range(3):
            for column in range(3):
                edge |= padded[row : row + 96, column : column + 96]
        assert changed[~edge].mean() < 0.01, form  # tips thinner than a pixel


def hues(pixels):
    """Return the hue in turns of pixels [N, 3]."""
    r, g, b = pixels.T.astype(np.float64)
    return np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b) / (2 * np.pi)


def test_class_decides_hue_and_pattern_and_the_scenery_has_neither():
    for label, form in enumerate(shapes_drawing.CLASSES):
        middle = shapes_stills.HUES[label % 4]
        image, objects = shapes_stills.still(form, 96, np.random.default_rng(label), 0)
        away = (hues(image[objects > 0]) - middle + 0.5) % 1 - 0.5
        assert np.median(np.abs(away)) < 0.03, form
        scenery = shapes_stills._scenery(96, np.random.default_rng(label), 0)
        others = hues(scenery.reshape(-1, 3)) % 1
        assert np.quantile(others, 0.05) > 0.15
        assert np.quantile(others, 0.95) < 0.68
        texture = shapes_stills._texture(form, np.random.default_rng(label))
        assert texture.kind in {0: ("flat", "gradient"), 1: ("stripes",), 2: ("dots",)}[label // 4]
        lumas = [float(color @ shapes_drawing.LUMA) for color in texture.colours]
        assert label < 4 or abs(lumas[0] - lumas[1]) == pytest.approx(0.35, abs=1e-3)


def test_scenery_is_cut_from_few_patchworks_that_depend_on_the_seed_alone():
    first = shapes_stills._patchwork(1, 32, 0)
    assert first.shape == (64, 64, 3)
    assert not np.array_equal(first, shapes_stills._patchwork(1, 32, 1))
    assert not np.array_equal(first, shapes_stills._patchwork(0, 32, 0))
    shapes_stills._patchwork.cache_clear()
    assert np.array_equal(first, shapes_stills._patchwork(1, 32, 0))
    corners = set()  # of the unturned, unmirrored part, if any
    for seed in range(64):
        part = shapes_stills._scenery(32, np.random.default_rng(seed), 0)
        works = [shapes_stills._patchwork(i, 32, 0) for i in range(shapes_stills.SCENERIES)]
        for turn in range(8):
            view = np.rot90(part[:, ::-1] if turn % 2 else part, turn // 2)
            for index, work in enumerate(works):
                for top, left in np.argwhere((work[:33, :33] == view[0, 0]).all(axis=2)).tolist():
                    if np.array_equal(work[top : top + 32, left : left + 32], view):
                        corners.add((seed, index))
    assert {seed for seed, _ in corners} == set(range(64))
    assert {index for _, index in corners} == set(range(shapes_stills.SCENERIES))


def test_no_brightness_threshold_finds_the_objects(stills):
    images, objects, _ = stills[0]
    luma, truth = images @ np.array(shapes_drawing.LUMA), objects > 0
    scores = []
    for threshold in np.linspace(0, 1, 41):
        for mask in (luma > threshold, luma <= threshold):
            both = (mask & truth).sum((1, 2)) / (mask | truth).sum((1, 2))
            scores.append(both.mean())
    assert max(scores) < 0.3  # measured: 0.2, near the objects' share of the images


def test_image_has_several_separate_objects_of_bounded_size(stills):
    counts = set()
    for _, pictures, _ in stills:
        for objects in pictures:
            counts.add(int(objects.max()))
            boxes = []
            for i in range(1, objects.max() + 1):
                rows, columns = np.nonzero(objects == i)
                longer = max(np.ptp(rows), np.ptp(columns)) + 1
                assert 0.18 * 32 - 2 <= longer <= 0.26 * 32 + 1
                boxes.append((columns.min(), rows.min(), columns.max(), rows.max()))
            for n, (x0, y0, x1, y1) in enumerate(boxes):
                for u0, v0, u1, v1 in boxes[:n]:
                    assert x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0  # a pixel shared at most
    assert max(counts) == shapes_stills.MOST_OBJECTS
    assert min(counts) >= 2


def test_raw_pixels_do_not_reveal_the_class(stills):
    (train, _, train_labels), (val, _, val_labels) = stills
    by_pixels = knn_accuracy(
        train.reshape(len(train), -1), train_labels, val.reshape(len(val), -1), val_labels
    )
    assert by_pixels < 0.25


def test_forms_are_normalized_and_differ():
    masks = {}
    for form in shapes_drawing.CLASSES:
        points = shapes_drawing.outline(form, np.random.default_rng(0))
        assert np.abs(points).max() == pytest.approx(0.5)
        masks[form] = _silhouette(points)
    for a in shapes_drawing.CLASSES:
        for b in shapes_drawing.CLASSES:
            if a < b:
                overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
                assert overlap < 0.85, (a, b)


def _silhouette(points):
    canvas = np.zeros((64, 64, 3), np.float32)
    white = (np.ones(3, np.float32),) * 2
    lattice = np.zeros((8, 8), np.float32)
    texture = shapes_drawing.Texture("flat", white, 1.0, 0.0, (0.0, 0.0), lattice)
    return shapes_drawing.paint(canvas, points, shapes_drawing.Pose(32, 32, 60), texture) >= 0.5


def test_painted_area_is_exact_with_anti_aliased_edges():
    points = shapes_drawing.outline("disk", np.random.default_rng(0))
    canvas = np.zeros((64, 64, 3), np.float32)
    paints = shapes_drawing.Paints((0.5, 0.5), (1, 1))
    texture = shapes_drawing.Texture.draw(np.random.default_rng(0), paints, (1, 2))
    pose = shapes_drawing.Pose(31.3, 32.6, 40, 0.5)
    cover = shapes_drawing.paint(canvas, points, pose, texture)
    assert cover.sum() == pytest.approx(shapes_drawing.area(points) * 40**2, rel=0.03)
    assert ((cover > 0.1) & (cover < 0.9)).sum() > 30
    assert np.all(canvas[cover == 0] == 0)


def test_clip_annotations_have_the_palette_and_every_object_in_the_first_frame(small_set):
    folder = small_set / "davis/Annotations/480p/shapes_00"
    seen = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as annotation:
            assert (annotation.mode, annotation.size) == ("P", (854, 480))
            palette = annotation.getpalette()
            seen.append(set(np.unique(np.asarray(annotation)).tolist()))
        assert palette[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert seen[0] in ({0, 1, 2}, {0, 1, 2, 3})
    assert all(ids <= seen[0] for ids in seen)


@pytest.mark.parametrize("index", range(4))
def test_objects_of_a_clip_occlude_each_other_and_stay_visible(index):
    frames = [labels for _, labels in shapes_clips.draw_clip(index, 5, seed=0)]
    ids = np.unique(frames[0])[1:]
    areas = np.array([[(labels == i).sum() for i in ids] for labels in frames])
    assert np.all(areas > 0)
    hidden = 1 - areas / areas.max(axis=0)
    assert hidden[2].max() > 0.15  # more than the change of scale explains


def test_complete_dataset_is_not_rewritten(small_set, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}
    shapes.write_shapes(small_set, **SMALL)
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    assert shapes.main(flags_of(shapes, f"--output_dir={small_set}", *flags)) == 0
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in small_set.rglob("*")} == stamps


def test_interrupted_run_is_completed_by_the_next(tmp_path):
    tiny = {"train_per_class": 1, "val_per_class": 1, "size": 32, "clips": 0}

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shapes.write_shapes(tmp_path, **tiny, workers=1, progress=interrupt)
    assert not (tmp_path / "shapes.json").exists()
    steps = []
    shapes.write_shapes(tmp_path, **tiny, workers=1, progress=lambda *at: steps.append(at))
    assert steps[-1] == (24, 24)
    assert (tmp_path / "shapes.json").exists()
    assert not (tmp_path / "shapes.json.part").exists()


def test_other_settings_and_other_folders_are_refused(small_set, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        shapes.write_shapes(small_set, **SMALL, seed=1)
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no shapes dataset"):
        shapes.write_shapes(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="holds no shapes dataset"):
        shapes.write_shapes(tmp_path / "holiday.jpg", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_unwritable_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--output_dir .*file/new cannot be .*Not a directory"):
        shapes.write_shapes(tmp_path / "file" / "new", **SMALL)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes, "_write_stills", full)
    with pytest.raises(DataError, match="--output_dir .*new cannot be .*No space left on device"):
        shapes.write_shapes(tmp_path / "new", **SMALL, workers=1)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train_per_class", 0),
        ("val_per_class", -1),
        ("size", 16),
        ("size", 64.0),
        ("clips", -1),
        ("frames", 1),
        ("seed", -1),
        ("workers", 0),
        ("seed", True),
    ],
)
def test_values_out_of_range_are_refused(flag, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{flag} is {value!r}; allowed: an integer from \d+"):
        shapes.write_shapes(tmp_path / "new", **{flag: value})
    assert not (tmp_path / "new").exists()


def test_command_writes_the_dataset_and_prints_one_line(tmp_path, capsys):
    flags = ["--train_per_class=1", "--val_per_class=1", "--size=32", "--clips=0"]
    flags.append(f"--output_dir={tmp_path / 'new'}")
    assert shapes.main(flags_of(shapes, *flags)) == 0
    out, err = capsys.readouterr()
    assert "12 training and 12 validation images of 32 px" in out
    assert out.count("\n") == 1
    assert err == ""
    assert (tmp_path / "new/shapes.json").exists()


def test_of_two_runs_in_one_folder_one_waits_and_changes_nothing(tmp_path, monkeypatch):
    root = tmp_path / "set"
    write, calls = shapes._write_images, []

    def write_images(*words):
        calls.append(words[0])
        write(*words)

    monkeypatch.setattr(shapes, "_write_images", write_images)
    options = {"train_per_class": 1, "val_per_class": 1, "size": 32, "clips": 0}
    settings = shapes._Settings(**options)
    assert shapes.write_shapes(root, workers=1, **options)
    # As if both had found the folder empty: this one gets the lock after the other is done.
    shapes._write_dataset(root, settings, 1, lambda done, total: None)
    assert calls == [root]
    assert sorted(p.name for p in root.iterdir() if p.is_file()) == ["shapes.json"]
    with pytest.raises(DataError, match="with other settings"):
        shapes._write_dataset(
            root, dataclasses.replace(settings, seed=1), 1, lambda done, total: None
        )
