"""`fastdino davis` on small datasets in both layouts."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.multiprocessing import ProcessExitedException
from torch.nn import functional as F

from fastdino import cli
from fastdino.data.shapes_clips import davis_palette
from fastdino.errors import CheckpointError, ConfigError
from fastdino.evals import davis
from fastdino.evals.davis import prepare, working_size
from fastdino.evals.davis_dataset import find_sequences, read_mask
from fastdino.evals.davis_scores import Results
from fastdino.evals.label_propagation import hard_labels, one_hot_patches, propagate_video
from fastdino.models.weights import load_backbone
from tests.commands import assert_images_scale, break_pixels, error_of
from tests.processes import locked_elsewhere, run_two

SMALL = "--size 64 --arch vit_nano --patch_size 8 --bs 3 --num_workers 1 --device cpu"
COLORS = ((210, 60, 50), (50, 190, 70), (60, 80, 220))
HEIGHT, WIDTH, FRAMES = 60, 140, 6
IMAGES, MASKS, LIST = "JPEGImages/480p", "Annotations/480p", "ImageSets/2017/val.txt"
TWO = {1: (8, 6, 20), 2: (30, 34, 22)}


def labels_at(time, objects):
    """Return a mask of squares, one below the other, that move to the right."""
    mask = Image.new("L", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(mask)
    for number, (left, top, side) in objects.items():
        x = left + 4 * time
        draw.rectangle((x, top, x + side - 1, top + side - 1), fill=number)
    return np.array(mask)


def palette_mask(labels):
    mask = Image.fromarray(labels)
    mask.putpalette(davis_palette())
    return mask


def write_sequence(root, name, objects, *, frames=FRAMES, to_mask=palette_mask, annotations=FRAMES):
    images, masks = root / IMAGES / name, root / MASKS / name
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    texture = np.random.default_rng(7).integers(100, 130, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for time in range(frames):
        labels = labels_at(time, objects)
        picture = texture.copy()
        for number in objects:
            picture[labels == number] = COLORS[number - 1]
        Image.fromarray(picture).save(images / f"{time:05d}.jpg", quality=95)
        if time < annotations:
            to_mask(labels).save(masks / f"{time:05d}.png")


def write_list(root, folder, lines, split="val"):
    (root / "ImageSets" / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path):
    """A dataset in DAVIS 2017's layout: a sequence of two objects, and one of one object."""
    root = tmp_path / "davis"
    write_sequence(root, "two", TWO)
    write_sequence(root, "one", {1: (16, 16, 30)}, frames=4)
    write_list(root, "2017", ["two", "one"])
    return root


@pytest.fixture
def line(root, tmp_path):
    """Command line of `fastdino davis` with a small network."""
    paths = ["--data_path", str(root), "--output_dir", str(tmp_path / "out")]
    return ["davis", *paths, *SMALL.split()]


@pytest.fixture
def run(line, root):
    def run_command(*flags, data=root):
        return cli.main([*line, "--data_path", str(data), *map(str, flags)])

    return run_command


def results_of(tmp_path):
    return json.loads((tmp_path / "out/davis.json").read_text())


def masks_of(tmp_path, name, folder="out"):
    masks = [Image.open(path) for path in sorted((tmp_path / folder / name).glob("*.png"))]
    for mask in masks:
        mask.load()
    return masks


def test_masks_have_the_benchmarks_layout(run, root, tmp_path):
    assert run() == 0
    written = [".davis.lock", "davis.json", "one", "overlays", "two"]
    assert sorted(os.listdir(tmp_path / "out")) == written
    for name, frames, numbers in (("two", 6, {0, 1, 2}), ("one", 4, {0, 1})):
        masks = masks_of(tmp_path, name)
        assert len(masks) == frames
        for mask in masks:
            assert (mask.mode, mask.size) == ("P", (WIDTH, HEIGHT))
            assert mask.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
            assert set(np.unique(mask)) <= numbers
        assert np.array_equal(masks[0], Image.open(root / MASKS / name / "00000.png"))


def test_batched_masks_match_frames_computed_one_at_a_time(run, root, tmp_path):
    assert run("--n_last_frames", 2, "--size_mask_neighborhood", 3, "--topk", 4) == 0
    torch.manual_seed(0)
    model = load_backbone("", checkpoint_key="teacher", arch="vit_nano", patch_size=8).module
    features = []
    for path in sorted((root / IMAGES / "two").iterdir()):
        frame = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        # The long side is 140 * 64 / 60 = 149.3, rounded down to a multiple of 64.
        with torch.no_grad():
            tokens = model.get_intermediate_layers(prepare(frame, (64, 128)))[0][0, 1:]
        features.append(tokens.unflatten(0, (8, 16)))
    first = np.array(Image.open(root / MASKS / "two" / "00000.png"))
    labels = one_hot_patches(first, 3, (8, 16))
    soft = propagate_video(features, labels, n_last_frames=2, radius=3, topk=4)
    expected = [first, *(hard_labels(one, 8, first.shape) for one in soft)]
    for mask, wanted in zip(masks_of(tmp_path, "two"), expected, strict=True):
        assert (np.array(mask) == wanted).mean() > 0.999  # batches round differently


@pytest.mark.gpu
def test_masks_on_a_gpu_match_the_cpu(run, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert run("--output_dir", tmp_path / "cpu") == 0
    assert run("--device", "cuda") == 0
    expected = masks_of(tmp_path, "two", "cpu")
    for mask, wanted in zip(masks_of(tmp_path, "two"), expected, strict=True):
        assert (np.array(mask) == np.array(wanted)).mean() > 0.99


def test_scores_are_means_over_objects(run, tmp_path, capsys):
    assert run() == 0
    results = results_of(tmp_path)
    two, one, total = (*results["sequences"].values(), results["global"])
    assert list(two["objects"]) == ["1", "2"]
    assert (two["frames"], one["frames"]) == (6, 4)
    objects = [*two["objects"].values(), *one["objects"].values()]
    for measure, key in itertools.product(("J", "F"), ("mean", "recall", "decay")):
        values = [scores[measure][key] for scores in objects]
        assert total[measure][key] == pytest.approx(np.mean(values))
        assert two[measure][key] == pytest.approx(np.mean(values[:2]))
    assert total["J&F"] == pytest.approx((total["J"]["mean"] + total["F"]["mean"]) / 2)
    assert 20 < total["J"]["mean"] <= 100
    printed = capsys.readouterr().out
    assert f"J&F-Mean {total['J&F']:.1f}\nJ-Mean {total['J']['mean']:.1f}  J-Recall" in printed


def test_true_masks_score_100_and_the_first_and_last_frame_are_ignored(root):
    paths = find_sequences(root)[0][0].annotations
    truth = np.stack([read_mask(path, binary=False) for path in paths])
    masks = truth.copy()
    masks[0] = masks[-1] = 0
    scores = davis.score(masks, truth, torch.device("cpu"))
    assert scores["J&F"] == scores["J"]["mean"] == scores["F"]["recall"] == 100
    masks[2][masks[2] == 2] = 0  # one of four frames without object 2
    scores = davis.score(masks, truth, torch.device("cpu"))
    assert scores["objects"]["1"]["J"]["mean"] == 100
    assert scores["objects"]["2"]["J"] == {"mean": 75, "recall": 75, "decay": -50}


def test_still_video_keeps_its_masks(run, tmp_path, root):
    for folder in (root / IMAGES / "one", root / MASKS / "one"):
        first, *others = sorted(folder.iterdir())
        for path in others:
            shutil.copy(first, path)
    assert run("--topk", 1) == 0
    assert results_of(tmp_path)["sequences"]["one"]["J"]["mean"] > 80
    _, *masks = (np.array(mask) for mask in masks_of(tmp_path, "one"))
    assert all(np.array_equal(mask, masks[0]) for mask in masks)  # a patch is nearest to itself


def test_davis_2016_layout_has_one_object(run, tmp_path):
    root = tmp_path / "davis2016"
    write_sequence(root, "bear", TWO, to_mask=lambda a: Image.fromarray(np.uint8(255) * (a > 0)))
    stems = [f"bear/{time:05d}" for time in range(FRAMES)]
    write_list(root, "480p", [f"/{IMAGES}/{stem}.jpg /{MASKS}/{stem}.png" for stem in stems])
    colors = root / MASKS / "bear" / "00003.png"
    Image.open(colors).convert("RGBA").save(colors)  # as some masks of DAVIS 2016
    assert run(data=root) == 0
    results = results_of(tmp_path)
    assert results["settings"]["year"] == "2016"
    assert list(results["sequences"]["bear"]["objects"]) == ["1"]
    for mask in masks_of(tmp_path, "bear"):
        assert mask.mode == "L"
        assert set(np.unique(mask)) <= {0, 255}


def test_year_2016_joins_the_objects_of_2017_masks(run, root, tmp_path):
    write_list(root, "2016", ["two"])
    assert run("--year", 2016, "--overlays", "none") == 0
    assert sorted(os.listdir(tmp_path / "out")) == [".davis.lock", "davis.json", "two"]
    assert list(results_of(tmp_path)["sequences"]) == ["two"]
    assert set(np.unique(masks_of(tmp_path, "two")[0])) == {0, 255}


def test_finished_sequences_are_skipped(run, tmp_path, capsys, monkeypatch):
    assert run() == 0
    before = results_of(tmp_path)
    (tmp_path / "out" / "one" / "00002.png").unlink()
    computed, segment = [], davis.segment
    monkeypatch.setattr(davis, "segment", lambda *a: computed.append(a[1].name) or segment(*a))
    capsys.readouterr()
    assert run("--bs", 2) == 0
    assert computed == ["one"]
    assert "two: already done" in capsys.readouterr().out
    assert results_of(tmp_path)["sequences"]["two"] == before["sequences"]["two"]
    assert run("--seed", 1) == 0  # other weights
    assert computed == ["one", "two", "one"]


def test_interrupted_run_discards_results_of_other_settings(run, tmp_path, monkeypatch):
    assert run() == 0
    with monkeypatch.context() as patch:
        patch.setattr(davis, "segment", None)  # fails when called
        with pytest.raises(TypeError):
            run("--topk", 2)
    results = results_of(tmp_path)
    assert (results["settings"]["topk"], results["sequences"]) == (2, {})


def assert_same_results(results, expected):
    assert results["settings"] == expected["settings"]
    assert list(results["sequences"]) == list(expected["sequences"])
    for name, entry in expected["sequences"].items():
        assert results["sequences"][name]["frames"] == entry["frames"]
        assert results["sequences"][name]["J"] == pytest.approx(entry["J"], abs=0.5)
    for measure in ("J", "F"):
        assert results["global"][measure] == pytest.approx(expected["global"][measure], abs=0.5)


@pytest.fixture
def three(root):
    """A third sequence in the dataset, so that two ranks need two rounds."""
    write_sequence(root, "three", {1: (20, 10, 26)}, frames=5)
    write_list(root, "2017", ["two", "one", "three"])


def test_two_ranks_share_sequences_longest_first_and_match_one(three, line, run, tmp_path):
    run_two(_log_sequences, line, tmp_path)
    assert [(tmp_path / f"{rank}.log").read_text() for rank in "01"] == ["two one ", "three "]
    printed, silent = ((tmp_path / f"{rank}.out").read_text().splitlines() for rank in "01")
    assert [text.split(":")[0] for text in printed[:3]] == ["two", "three", "one"]
    assert printed[3].startswith("J&F-Mean")
    assert silent == []
    two = results_of(tmp_path)
    (tmp_path / "out").rename(tmp_path / "ranks")
    assert run() == 0
    assert_same_results(two, results_of(tmp_path))
    for name in ("two", "one", "three"):
        pairs = zip(masks_of(tmp_path, name, "ranks"), masks_of(tmp_path, name), strict=True)
        assert all((np.array(ours) == np.array(one)).mean() > 0.999 for ours, one in pairs)
    assert len(os.listdir(tmp_path / "ranks/overlays")) == 3


def _log_sequences(line, folder):
    segment, rank = davis.segment, os.environ["RANK"]
    with open(folder / f"{rank}.log", "w") as log, open(folder / f"{rank}.out", "w") as out:

        def logged(model, sequence, *words):
            log.write(f"{sequence.name} ")
            return segment(model, sequence, *words)

        davis.segment = logged
        with redirect_stdout(out):
            assert cli.main(line) == 0


def test_one_rank_resumes_a_run_of_two_killed_ranks(three, line, run, tmp_path, capsys):
    with pytest.raises(ProcessExitedException):
        run_two(_kill_in_second_round, line)
    assert run() == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[:2] == ["two: already done", "three: already done"]
    resumed = results_of(tmp_path)
    (tmp_path / "out/davis.json").unlink()
    assert run() == 0
    assert_same_results(resumed, results_of(tmp_path))


def _kill_in_second_round(line):
    segment = davis.segment

    def kill_or_segment(model, sequence, *words):
        if sequence.name == "one":
            os.kill(os.getpid(), signal.SIGKILL)
        return segment(model, sequence, *words)

    davis.segment = kill_or_segment
    cli.main(line)


def test_error_on_one_rank_ends_both_with_one_line(line, tmp_path):
    run_two(_fail_on_rank_1, line, tmp_path)
    assert (tmp_path / "0").read_text() == ""
    assert (tmp_path / "1").read_text() == "fastdino davis: error: the disk is full\n"


def _fail_on_rank_1(line, folder):
    def fail(*words, **options):
        if os.environ["RANK"] == "1":
            raise CheckpointError("the disk is full")

    davis.write_mask = fail
    with open(folder / os.environ["RANK"], "w") as file, redirect_stderr(file):
        assert cli.main(line) == 2


def test_object_that_leaves_is_scored_and_one_that_appears_is_not(run, root, tmp_path, capsys):
    for path in sorted((root / MASKS / "two").iterdir())[1:]:
        labels = np.array(Image.open(path))
        labels[labels == 2] = 0
        labels[:8, :8] = 3
        palette_mask(labels).save(path)
    assert run() == 0
    entry = results_of(tmp_path)["sequences"]["two"]
    assert (list(entry["objects"]), entry["not_scored"]) == (["1", "2"], [3])
    assert entry["objects"]["2"]["J"]["mean"] in (0, 25, 50, 75, 100)
    assert "objects [3] appear after the first frame: not followed" in capsys.readouterr().out


def test_object_numbers_need_not_be_consecutive(run, root, tmp_path):
    for path in (root / MASKS / "one").iterdir():
        palette_mask(np.array(Image.open(path)) * 7).save(path)
    assert run() == 0
    assert list(results_of(tmp_path)["sequences"]["one"]["objects"]) == ["7"]
    assert set(np.unique(masks_of(tmp_path, "one")[1])) == {0, 7}


def test_sequence_with_only_its_first_annotation_is_not_scored(run, root, tmp_path, capsys):
    write_sequence(root, "test", {1: (8, 8, 24)}, annotations=1)
    write_list(root, "2017", ["test"], split="test-dev")
    assert run("--split", "test-dev", "--overlays", "all") == 0
    results = results_of(tmp_path)
    assert (results["global"], results["sequences"]) == (None, {"test": {"frames": FRAMES}})
    assert len(masks_of(tmp_path, "test")) == FRAMES
    assert len(list((tmp_path / "out/overlays/test").glob("*.jpg"))) == FRAMES
    assert "not scored: only the first is annotated" in capsys.readouterr().out
    assert run("--split", "test-dev") == 0
    assert "test: already done" in capsys.readouterr().out


def test_overlays_tint_and_outline_the_objects(run, root, tmp_path):
    assert run() == 0
    sheet = np.array(Image.open(tmp_path / "out" / "overlays" / "one.png"))
    assert sheet.shape == (2 * HEIGHT + 4, 4 * (WIDTH + 4) - 4, 3)
    frame = np.array(Image.open(root / IMAGES / "one" / "00000.jpg")).astype(int)
    first = sheet[:HEIGHT, :WIDTH].astype(int)
    mask = labels_at(0, {1: (16, 16, 30)}) > 0
    assert (first[~mask] == frame[~mask]).all()
    assert first[20, 20].tolist() == pytest.approx((frame[20, 20] + (128, 0, 0)) / 2, abs=1)
    assert first[45, 30].tolist() == [128, 0, 0]  # its outline


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (lambda mask: mask.convert("RGB"), [0, 1, 2]),
        (lambda mask: Image.fromarray(np.array(mask).astype(np.uint16)), [0, 1, 2]),
        (lambda mask: mask.convert("RGBA"), [0, 1, 2]),
        (lambda mask: Image.fromarray(np.array(mask)), [0, 1, 2]),  # gray numbers
        (lambda mask: Image.fromarray(np.where(np.array(mask) == 2, 255, mask)), [0, 1]),  # void
        (lambda mask: Image.fromarray(np.array(mask) > 0), [0, 1]),
    ],
)
def test_masks_are_read_in_every_image_mode(root, change, numbers):
    path = root / MASKS / "two" / "00000.png"
    before = np.array(Image.open(path))
    change(Image.open(path)).save(path)
    mask = read_mask(path, binary=False)
    assert np.unique(mask).tolist() == numbers
    assert (mask[before == 1] == 1).all()


def test_frames_are_resized_and_normalized_as_in_the_paper():
    frames = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    same = prepare(frames, (20, 30))
    for channel, (mean, std) in enumerate(((0.485, 0.228), (0.456, 0.224), (0.406, 0.225))):
        expected = (frames[:, channel] / 255 - mean) / std
        torch.testing.assert_close(same[:, channel], expected)
    smaller = prepare(frames, (7, 11))
    # Pixel (3, 5) of 7 x 11 is at row 9.5, column 14.5: the mean of the four central pixels.
    middle = (frames[:, :, 9:11, 14:16].float().mean((2, 3)).round() / 255)[:, 0]
    torch.testing.assert_close(smaller[:, 0, 3, 5], (middle - 0.485) / 0.228)
    assert not torch.equal(smaller, F.interpolate(same, (7, 11), mode="bilinear"))


def test_working_sizes_match_the_paper():
    assert working_size((480, 854), 480) == (480, 832)
    assert working_size((854, 480), 480) == (832, 480)
    assert working_size((1080, 1920), 480) == (480, 832)
    assert working_size((500, 500), 480) == (480, 448)
    with pytest.raises(ConfigError, match="--size 40 resizes frames of 60 x 60 px to less"):
        working_size((60, 60), 40)


def save(pixels, path):
    Image.fromarray(pixels).save(path)


BLACK, VOID = (np.full((HEIGHT, WIDTH), value, np.uint8) for value in (0, 255))
COLOR = np.full((HEIGHT, WIDTH, 3), (1, 2, 3), np.uint8)
LARGE = np.full((HEIGHT, WIDTH), 300, np.uint16)


@pytest.mark.parametrize(
    ("damage", "part"),  # damage: of the folders with the frames and masks of the sequence "two"
    [
        (lambda f, m: (f.parents[2] / LIST).unlink(), "no list of DAVIS sequences: expected one o"),
        (lambda f, m: (f.parents[2] / LIST).write_text(" \n\n"), "lists no sequence"),
    ],
)
def test_bad_data_is_reported_before_the_network_is_built(
    run, root, capsys, monkeypatch, damage, part
):
    monkeypatch.setattr(davis, "build_model", None)
    damage(root / "JPEGImages/480p/two", root / "Annotations/480p/two")
    assert run() == 2
    assert part in error_of(capsys)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f, m: (m / "00000.png").unlink(), "1 annotations are missing, e.g. "),
        (lambda f, m: (m / "00003.png").unlink(), "00003.png; expected one of the first frame "),
        (lambda f, m: save(VOID[:20, :10], f / "00004.jpg"), "00004.jpg is 20 x 10 px"),
        (lambda f, m: save(VOID[:20, :10], m / "00004.png"), "00004.png is 20 x 10 px"),
        (lambda f, m: [p.unlink() for p in sorted(f.iterdir())[2:]], "has 2 frames; expected at l"),
        (lambda f, m: shutil.rmtree(f), "sequence two: folder "),
        (lambda f, m: save(BLACK, m / "00000.png"), "marks no object to follow"),
        (lambda f, m: save(VOID, m / "00000.png"), "pass --year 2016)"),
        (lambda f, m: save(COLOR, m / "00000.png"), "color (1, 2, 3) at row 0, column 0 is not in"),
        (lambda f, m: save(LARGE, m / "00000.png"), "00000.png has 300; expected object numbers"),
        (lambda f, m: (f / "00002.jpg").write_text("no image"), "00002.jpg is not an image"),
        (lambda f, m: os.truncate(f / "00002.jpg", 1500), "00002.jpg cannot be decoded: image fil"),
        (lambda f, m: os.truncate(f / "00003.jpg", 1500), "00003.jpg cannot be decoded"),
    ],
)
def test_an_unusable_sequence_is_left_out(run, root, tmp_path, capsys, damage, part):
    damage(root / IMAGES / "two", root / MASKS / "two")
    assert run("--overlays", "none") == 0
    results = results_of(tmp_path)
    assert list(results["sequences"]) == ["one"]
    assert list(results["left_out"]) == ["two"]
    assert part in results["left_out"]["two"]
    assert results["global"]["J&F"] == results["sequences"]["one"]["J&F"]
    err = capsys.readouterr().err
    assert err.startswith("1 sequences left out: ")
    assert part in err


def test_pixels_broken_after_the_headers_leave_out_their_sequence(run, root, tmp_path, capsys):
    frame = root / IMAGES / "two" / "00003.jpg"
    Image.open(frame).save(frame.with_suffix(".png"))
    frame.unlink()
    break_pixels(frame.with_suffix(".png"))
    assert run("--overlays", "none") == 0
    assert "00003.png cannot be decoded" in results_of(tmp_path)["left_out"]["two"]
    assert list(results_of(tmp_path)["sequences"]) == ["one"]
    write_list(root, "2017", ["two"])
    capsys.readouterr()
    assert run("--overlays", "none") == 2
    assert "1 sequences left out: " in error_of(capsys)


def test_deep_frames_are_scaled_on_request(run, root, tmp_path, capsys):
    def result():
        return results_of(tmp_path)["sequences"]

    paths = sorted((root / IMAGES).rglob("*.jpg"))
    assert_images_scale(capsys, paths, lambda *words: run("--overlays", "sheet", *words), result)
    sheets = [Image.open(tmp_path / "out/overlays" / f"{name}.png") for name in ("one", "two")]
    assert all(np.asarray(sheet).mean() > 200 for sheet in sheets), "clipped frames are white"


def test_small_size_is_reported_before_the_network_is_built(run, capsys, monkeypatch):
    monkeypatch.setattr(davis, "build_model", None)
    assert run("--size", 20) == 2
    assert "--size 20 resizes frames of 60 x 140 px to less than 64 px" in error_of(capsys)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--topk 0", "--topk must be at least 1, got 0"),
        ("--bs 0", "--bs must be at least 1"),
        ("--n_last_frames -1", "--n_last_frames must be at least 0, got -1"),
        ("--size_mask_neighborhood -2", "--size_mask_neighborhood must be at least 0"),
        ("--patch_size 0", "--patch_size must be at least 1"),
        ("--patch_size 65", "--size 64 is smaller than a 65 px patch"),
        ("--arch resnet18", "--arch resnet18 gives no patch tokens to compare"),
        ("--year 2016", "no list of DAVIS sequences"),
        ("--pretrained_weights /nowhere.pth", "there is no file /nowhere.pth"),
        ("--output_dir /dev/null/x", "cannot write /dev/null/x"),
    ],
)
def test_invalid_flags_are_reported(run, capsys, flags, part):
    assert run(*flags.split()) == 2
    assert part in error_of(capsys)


@pytest.mark.parametrize("content", ["", "[", "3", '{"settings": 3}', "[" * 100_000])
def test_damaged_results_are_replaced_with_a_warning(tmp_path, capsys, content):
    path = tmp_path / "davis.json"
    path.write_text(content)
    results = Results(path, {"a": 1}, {})
    assert results.sequences == {}
    if content != '{"settings": 3}':  # of other settings
        assert f"warning: {path} cannot be used" in capsys.readouterr().err
    assert json.loads(path.read_text())["settings"] == {"a": 1}
    Results(path, {"a": 1}, {})
    assert capsys.readouterr().err == ""


def test_a_second_run_in_the_folder_is_refused(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with locked_elsewhere(tmp_path / "out" / ".davis.lock"):
        assert run() == 2
        assert "another `fastdino davis` is writing there" in capsys.readouterr().err
        assert os.listdir(tmp_path / "out") == [".davis.lock"]
