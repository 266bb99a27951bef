"""Every flag of the commands for maps and masks reaches its effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastdino.evals.attention_maps import attention_maps, fit_to_patches
from fastdino.evals.davis import prepare
from fastdino.evals.davis_dataset import read_frame
from fastdino.evals.label_propagation import hard_labels, one_hot_patches
from fastdino.evals.transforms import to_input
from fastdino.evals.video_io import open_frames, video_writer
from tests.command_runs import Ran, close
from tests.flag_effects import (
    NANO,
    PROCESSES,
    Check,
    Command,
    Flag,
    cases,
    changed,
    flags_of,
    in_batches_of,
    loaded_by_a_worker,
    network_flags,
    takes_images_of,
    writes,
)  # fmt: skip

# attention


def masks_keep(share: float) -> Check:
    """Check the share of patches in each head's mask against the paper's code."""

    def check(first: Ran, second: Ran) -> None:
        assert any(name.endswith(f"mask_th{share:g}_head2.png") for name in second.files)
        assert not any("mask" in name for name in first.files)
        model = second.nano()
        for entry in second.json("attention.json")["images"]:
            with Image.open(entry["image"]) as image:
                picture = fit_to_patches(image, [32, 40], 8)
            for head, map_ in zip(
                entry["heads"],
                attention_maps(model, to_input(picture)[None])[0],
                strict=True,
            ):
                values, _ = map_.flatten().double().sort()
                kept = (values / values.sum()).cumsum(0) > 1 - share
                assert head["kept_patches"] == pytest.approx(kept.double().mean().item())

    return check


def scores_differ_by_threshold(first: Ran, second: Ran) -> None:
    scores = [one.json("jaccard.json")["trained"]["best_head"] for one in (first, second)]
    assert scores[0] != scores[1]


def other_images_are_scored(first: Ran, second: Ran) -> None:
    counts = [one.json("jaccard.json")["images"] for one in (first, second)]
    assert counts == [3, 2]


def random_weights_are_not_scored(first: Ran, second: Ran) -> None:
    pairs = [one.json("jaccard.json") for one in (first, second)]
    assert ["untrained" in scores for scores in pairs] == [True, False]
    assert pairs[0]["trained"] == pairs[1]["trained"]
    assert len(second.images) < len(first.images)


MASKED = "{scores} --data_path {masked}"
ATTENTION = {
    **network_flags("--image_path", "pictures"),
    "image_size": Flag("--image_size 24 24", takes_images_of((24, 24))),
    "output_dir": Flag("--output_dir {out}/deeper", writes("deeper/attention.json")),
    "threshold": Flag("--threshold 0.5", masks_keep(0.5)),
    "image_path": Flag("--image_path {pictures-moved}", changed),
    "data_path": Flag("--data_path {masked-moved}", changed, MASKED),
    "split": Flag("--split train", other_images_are_scored, MASKED),
    "baseline": Flag("--baseline false", random_weights_are_not_scored, MASKED),
    "batch_size_per_gpu": Flag("--batch_size_per_gpu 2", in_batches_of(2), MASKED),
    "num_workers": Flag("--num_workers 1", loaded_by_a_worker, MASKED),
}

# video


def frames_of(ran: Ran, name: str = "video.mp4") -> Any:
    return open_frames(str(ran.folder / name))


def has_fps(first: Ran, second: Ran) -> None:
    for ran, fps in ((first, 30), (second, 60)):
        times = [seconds for _, seconds in frames_of(ran).timed()]
        assert times == pytest.approx([i / fps for i in range(5)], abs=1e-3)


def has_panels(first: Ran, second: Ran) -> None:
    height, width = frames_of(first).size
    assert frames_of(second).size == (height, width // 3 * 2)


def shows_the_frames_alone(_: Ran, second: Ran) -> None:
    assert not second.images
    assert frames_of(second).size == (34, 50)


def masks_are_smaller(first: Ran, second: Ran) -> None:
    kept = [
        np.mean([h["kept_patches"] for h in one.json("video.json")["heads"]])
        for one in (first, second)
    ]
    assert kept[1] < kept[0]
    pictures = [np.asarray(next(iter(frames_of(one)))).astype(float) for one in (first, second)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 1


def other_frames(first: Ran, second: Ran) -> None:
    assert not any(torch.equal(a, b) for a, b in zip(first.images, second.images, strict=True))


VIDEO = {
    **network_flags("--input_path", "frames"),
    "input_path": Flag("--input_path {frames-moved}", other_frames),
    "output_path": Flag("--output_path {out}/new.avi", writes("new.avi", "new.json")),
    "video_format": Flag("--video_format avi", writes("video.avi")),
    "fps": Flag("--fps 60", has_fps),
    "resize": Flag("--resize 24 40", takes_images_of((24, 40))),
    "threshold": Flag("--threshold 0.2", masks_are_smaller),
    "video_only": Flag("--video_only", shows_the_frames_alone, "{no network}"),
    "show": Flag("--show overlay heads", has_panels),
    "batch_size_per_gpu": Flag("--batch_size_per_gpu 2", in_batches_of(2)),
}

# davis


@torch.no_grad()
def propagated(
    ran: Ran, *, last: int = 2, radius: int = 3, topk: int = 4
) -> list[np.ndarray[Any, Any]]:
    """Return the masks of the sequence "two", as the paper's eval_video_segmentation.py."""
    root, model = Path(ran.places["davis"]), ran.nano()
    h, w = 8, 16  # the frames are 60 x 140 px, resized to 64 x 128
    features = []
    for path in sorted((root / "JPEGImages/480p/two").iterdir()):
        tokens = model.get_intermediate_layers(prepare(read_frame(path)[None], (64, 128)))[0]
        features.append(F.normalize(tokens[0, 1:], dim=-1))
    with Image.open(root / "Annotations/480p/two/00000.png") as image:
        first = np.asarray(image)
    labels = [one_hot_patches(first, 3, (h, w)).flatten(1)]
    rows, columns = torch.arange(h * w) // w, torch.arange(h * w) % w
    near = ((rows[:, None] - rows).abs() <= radius) & ((columns[:, None] - columns).abs() <= radius)
    masks = [first]
    for i in range(1, len(features)):
        context = [0, *range(max(1, i - last), i)]
        keys = torch.cat([features[j] for j in context])
        allowed = near.repeat(1, len(context)) if radius else torch.tensor(True)
        affinity = (features[i] @ keys.T / 0.1).exp() * allowed
        least = affinity.topk(topk, dim=1).values[:, -1:]
        affinity = affinity * (affinity >= least)
        affinity = affinity / affinity.sum(1, keepdim=True)
        labels.append(torch.cat([labels[j] for j in context], 1) @ affinity.T)
        masks.append(hard_labels(labels[-1].unflatten(1, (h, w)), 8, first.shape))
    return masks


def masks_of(ran: Ran) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(Image.open(path)) for path in sorted((ran.folder / "two").glob("*.png"))]


def masks_are(**settings: int) -> Check:
    def check(first: Ran, second: Ran) -> None:
        for mask, expected in zip(masks_of(second), propagated(second, **settings), strict=True):
            assert (mask == expected).mean() > 0.999
        changed(first, second)

    return check


def every_frame_is_drawn(first: Ran, second: Ran) -> None:
    drawn = [[n for n in one.files if n.startswith("overlays/")] for one in (first, second)]
    assert [len(names) for names in drawn] == [1, 1 + 5]


def objects_are_joined(_: Ran, second: Ran) -> None:
    assert set(np.unique(masks_of(second)[0])) == {0, 255}


DAVIS = {
    **network_flags("--data_path", "davis", exif=False),
    **PROCESSES,
    "data_path": Flag("--data_path {davis-moved}", changed),
    "split": Flag("--split train", writes("one/00000.png")),
    "year": Flag("--year 2016", objects_are_joined),
    "output_dir": Flag("--output_dir {out}/deeper", writes("deeper/davis.json")),
    "overlays": Flag("--overlays all", every_frame_is_drawn),
    "size": Flag("--size 72", takes_images_of((72, 128))),
    "n_last_frames": Flag("--n_last_frames 0", masks_are(last=0)),
    "size_mask_neighborhood": Flag("--size_mask_neighborhood 1", masks_are(radius=1)),
    "topk": Flag("--topk 1", masks_are(topk=1)),
    "bs": Flag("--bs 2", in_batches_of(2)),
}


# pca


def picture_is_wider(first: Ran, second: Ran) -> None:
    widths = []
    for ran in (first, second):
        with Image.open(ran.folder / "0-pca.png") as image:
            widths.append(image.width)
    assert widths[1] == 2 * widths[0]  # four panels instead of two


def patches_are_drawn(first: Ran, second: Ran) -> None:
    assert "fitted to 8 patches" in second.out
    assert "fitted to 8 patches" not in first.out
    changed(first, second)


def frames_pass_in_batches(first: Ran, second: Ran) -> None:
    assert [max(one.batch_sizes()) for one in (first, second)] == [4, 2]
    assert close(first.answer, second.answer)


PCA = {
    **network_flags("--input_path", "pictures"),
    "patch_size": Flag("--patch_size 16", changed, "--pretrained_weights '' --foreground none"),
    "input_path": Flag("--input_path {pictures-moved}", changed),
    "image_size": Flag("--image_size 24 24", takes_images_of((24, 24))),
    "batch_size_per_gpu": Flag(
        "--batch_size_per_gpu 2", frames_pass_in_batches, "--input_path {clip}"
    ),
    "fit_on": Flag("--fit_on {pictures-moved}", changed),
    "fit_patches": Flag("--fit_patches 8", patches_are_drawn, "--foreground none"),
    "foreground": Flag("--foreground none", changed),
    "threshold": Flag("--threshold 1.5", changed),
    "save_pca": Flag("--save_pca {out}/components.npz", writes("components.npz")),
    "load_pca": Flag("--load_pca {components}", changed),
    "output_dir": Flag("--output_dir {out}/deeper", writes("deeper/pca.json")),
    "show": Flag("--show image pca overlay foreground", picture_is_wider),
    "video_format": Flag("--video_format avi", writes("clip-pca.avi"), "--input_path {clip}"),
}

COMMANDS = {
    "pca": Command(
        f"pca {NANO} --input_path {{pictures}} --image_size 32 40 --output_dir {{out}}", PCA
    ),
    "attention": Command(
        f"attention {NANO} --image_size 32 40 --num_workers 0 --output_dir {{out}}",
        ATTENTION,
        usual="--image_path {pictures}",
        mark="{scores}",
    ),
    "video": Command(
        "video --device cpu --input_path {frames} --output_path {out}",
        VIDEO,
        usual=NANO,
        mark="{no network}",
    ),
    "davis": Command(
        f"davis {NANO} --data_path {{davis}} --size 64 --num_workers 0 --bs 3 --n_last_frames 2 "
        "--size_mask_neighborhood 3 --topk 4 --output_dir {out}",
        DAVIS,
    ),
}


@pytest.fixture(scope="module")
def more(commands) -> None:
    """Add a video, and components of other images, to the data of commands."""
    clip, components = commands.root / "clip.mkv", commands.root / "components.npz"
    with video_writer(clip, 10) as write:
        for number, path in enumerate(sorted(Path(commands.places["frames"]).iterdir())):
            with Image.open(path) as image:
                write(np.asarray(image), number / 10)
    commands.places.update(clip=str(clip), components=str(components))
    words = f"--input_path {commands.places['pictures-moved']} --save_pca {components}"
    assert commands.run(COMMANDS["pca"], words).status == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_an_effect_in_the_table(command):
    assert sorted(COMMANDS[command].flags) == sorted(flags_of(command))


@pytest.mark.parametrize(("command", "name"), cases(COMMANDS))
def test_flag_reaches_its_effect(command, name, commands, more):
    commands.check(COMMANDS[command], COMMANDS[command].flags[name])
