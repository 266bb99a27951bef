"""Checks of two pretraining runs that differ in one setting, for test_settings_effect.py."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdino import TrainConfig
from fastdino.errors import ConfigError, DataError, NonFiniteError
from fastdino.evals.transforms import center_crop_picture
from tests.loaders import build_loader, scan_images
from tests.tiny_runs import TinyRun

Check = Callable[[TinyRun, TinyRun], None]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def crops_of(run: TinyRun) -> list[Tensor]:
    return [crop for step in run.steps for crop in step.crops]


def same_crops(run: TinyRun, other: TinyRun) -> bool:
    pairs = zip(crops_of(run), crops_of(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def losses(run: TinyRun) -> list[float]:
    return [step.loss for step in run.steps]


def weights_have_width(_: TinyRun, run: TinyRun) -> None:
    assert run.weights["backbone.pos_embed"].shape[2] == 48  # of the tests' vit_tiny


def patches_have_the_size(_: TinyRun, run: TinyRun) -> None:
    assert run.weights["backbone.patch_embed.proj.weight"].shape == (32, 3, 16, 16)
    assert run.weights["backbone.pos_embed"].shape == (1, 5, 32)


def branches_are_dropped(none: TinyRun, run: TinyRun) -> None:
    # The rate rises from 0 to that of the last block, whose attention and MLP are dropped for some
    # images: the first losses differ, of the same networks and crops.
    assert none.steps[0].loss != run.steps[0].loss
    assert same_crops(none, run)
    assert equal(none.trainer.initial, run.trainer.initial)
    assert run.trainer.student.backbone.drop_path_rates == [0, 0.9]


def prototypes_are_counted(_: TinyRun, run: TinyRun) -> None:
    assert run.weights["head.last_layer.weight_v"].shape == (96, 16)


def head_has_batch_norm(without: TinyRun, run: TinyRun) -> None:
    added = {name for name in run.weights.keys() - without.weights.keys() if "running_mean" in name}
    assert len(added) == 2


def magnitudes_are_trained(fixed: TinyRun, run: TinyRun) -> None:
    name = "head.last_layer.weight_g"
    assert torch.equal(fixed.weights[name], torch.ones(64, 1))
    assert (run.weights[name] != 1).any()


def backbone_is_that_of_the_file(_: TinyRun, run: TinyRun) -> None:
    saved = torch.load(run.config.init_from, weights_only=True)
    for networks in (run.steps[0].student, run.steps[0].teacher):  # after a step with lr 0
        for name, tensor in saved.items():
            assert torch.equal(networks[f"backbone.{name}"], tensor)


def only_epochs_change(*changed: int) -> Check:
    """Check which epochs have another loss, in runs whose weights do not change."""

    def check(run: TinyRun, other: TinyRun) -> None:
        pairs = zip(run.log, other.log, strict=True)
        different = [
            i for i, (a, b) in enumerate(pairs) if a["train_entropy"] != b["train_entropy"]
        ]
        assert different == list(changed)
        assert same_crops(run, other)

    return check


def targets_are_balanced(centered: TinyRun, run: TinyRun) -> None:
    assert centered.steps[0].loss != run.steps[0].loss
    assert "--centering sinkhorn" in run.printed


def koleo_is_added(without: TinyRun, run: TinyRun) -> None:
    first, own = without.log[0], run.log[0]
    assert "train_koleo" not in first
    assert own["train_loss"] == pytest.approx(own["train_dino"] + 0.3 * own["train_koleo"])
    assert not equal(without.steps[1].student, run.steps[1].student)


def teacher_stays(_: TinyRun, run: TinyRun) -> None:
    # Momentum 1: the teacher is never updated.
    assert equal(run.steps[-1].teacher, run.trainer.initial)
    assert not equal(run.steps[-1].student, run.trainer.initial)


def teacher_is_the_average(run: TinyRun, changed: TinyRun) -> None:
    for one in (run, changed):
        base, first = one.config.momentum_teacher, one.steps[0]
        for name, start in one.trainer.initial.items():
            expected = base * start + (1 - base) * first.student[name]
            torch.testing.assert_close(first.teacher[name], expected)
    assert not equal(run.steps[0].teacher, changed.steps[0].teacher)


def moments_are_of_sgd(adamw: TinyRun, run: TinyRun) -> None:
    assert set(adamw.optimizer["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(run.optimizer["state"][0]) == {"momentum_buffer"}
    assert not equal(adamw.weights, run.weights)


def moments_are_of_lars(adamw: TinyRun, run: TinyRun) -> None:
    assert set(run.optimizer["state"][0]) == {"mu"}
    assert not equal(adamw.weights, run.weights)


def log_has_an_epoch_more(run: TinyRun, longer: TinyRun) -> None:
    assert (len(run.log), len(longer.log)) == (2, 3)
    assert (len(run.steps), len(longer.steps)) == (4, 6)


def batch_and_rate_are_doubled(run: TinyRun, double: TinyRun) -> None:
    assert [len(step.crops[0]) for step in run.steps] == [4] * 4
    assert [len(step.crops[0]) for step in double.steps] == [8] * 2
    assert [rates(run), rates(double)] == [run.rate("lr"), double.rate("lr")]


def forward_passes_are_doubled(run: TinyRun, double: TinyRun) -> None:
    batch_and_rate_are_doubled(run, double)
    # Student and 2 passes per step, each as large as before.
    assert [len(step.first_rows) for step in run.steps] == [1] * 4
    assert [len(step.first_rows) for step in double.steps] == [2] * 2
    assert double.steps[0].first_rows == 2 * run.steps[0].first_rows


def cosine(base: float, final: float, steps: int, warmup: int = 0) -> list[float]:
    """Return the paper's schedule, as its utils.cosine_scheduler."""
    ramp = np.linspace(0, base, warmup)
    i = np.arange(steps - warmup)
    return [*ramp, *(final + 0.5 * (base - final) * (1 + np.cos(math.pi * i / len(i))))]


def epoch_means(values: list[float], epochs: int) -> Any:
    return pytest.approx(np.reshape(values, (epochs, -1)).mean(1).tolist())


def rates(run: TinyRun) -> Any:
    """Return the learning rates that the log should have."""
    config, steps = run.config, len(run.steps)
    peak = config.lr * config.split_batch(1).images_per_step / 256
    warmup = config.warmup_epochs * steps // config.epochs
    return epoch_means(cosine(peak, config.min_lr, steps, warmup), config.epochs)


def decays(run: TinyRun) -> Any:
    config = run.config
    values = cosine(config.weight_decay, config.weight_decay_end, len(run.steps))
    return epoch_means(values, config.epochs)


def rates_follow_the_schedule(run: TinyRun, other: TinyRun) -> None:
    assert [run.rate("lr"), other.rate("lr")] == [rates(run), rates(other)]
    assert [run.rate("wd"), other.rate("wd")] == [decays(run), decays(other)]
    assert run.rate("lr") + run.rate("wd") != other.rate("lr") + other.rate("wd")
    assert not equal(run.weights, other.weights)


def changes_are_clipped(free: TinyRun, run: TinyRun) -> None:
    # The first step of SGD without decay moves a parameter by lr times its gradient.
    peak = run.config.lr * run.config.batch_size_per_gpu / 256
    norms, clipped = (
        torch.tensor([
            ((after - one.trainer.initial[name]).norm() / peak).item()
            for name, after in one.steps[0].student.items()
        ])
        for one in (free, run)
    )  # fmt: skip
    assert (norms > 0.01).any()
    torch.testing.assert_close(clipped, norms.clamp(max=0.01), rtol=1e-2, atol=1e-4)


def last_layer_is_frozen(trained: TinyRun, run: TinyRun) -> None:
    name = "head.last_layer.weight_v"
    assert torch.equal(run.steps[1].student[name], run.trainer.initial[name])
    assert not torch.equal(run.steps[2].student[name], run.trainer.initial[name])
    assert not torch.equal(trained.steps[1].student[name], trained.trainer.initial[name])


def a_bad_batch_is_skipped(stopped: TinyRun, run: TinyRun) -> None:
    assert isinstance(stopped.error, NonFiniteError)
    assert not (stopped.folder / "checkpoint.pth").exists()
    assert run.error is None
    assert len(run.log) == 2
    assert 0 in run.saves


def sides(run: TinyRun) -> list[int]:
    return [crop.shape[-1] for crop in run.steps[0].crops]


def crops_have_sides(*expected: int) -> Check:
    def check(_: TinyRun, run: TinyRun) -> None:
        assert sides(run) == list(expected)

    return check


def only_global_crops_change(run: TinyRun, other: TinyRun) -> None:
    for step, changed in zip(run.steps, other.steps, strict=True):
        same = [torch.equal(a, b) for a, b in zip(step.crops, changed.crops, strict=True)]
        assert same == [False, False, True, True]


def only_local_crops_change(run: TinyRun, other: TinyRun) -> None:
    for step, changed in zip(run.steps, other.steps, strict=True):
        same = [torch.equal(a, b) for a, b in zip(step.crops, changed.crops, strict=True)]
        assert same == [True, True, False, False]


def another_backend_makes_the_same_crops(run: TinyRun, other: TinyRun) -> None:
    assert run.resolved["crops"]["value"] == run.config.crops
    assert other.resolved["crops"]["value"] == other.config.crops
    assert run.resolved["loader"].split()[0] != other.resolved["loader"].split()[0]
    assert same_crops(run, other)


def dali_makes_similar_crops(run: TinyRun, other: TinyRun) -> None:
    assert other.resolved["crops"]["value"] == "dali"
    assert not same_crops(run, other)
    differences = [
        (a - b).abs().mean() for a, b in zip(crops_of(run), crops_of(other), strict=True)
    ]
    assert max(differences) < 0.5


def images_change(run: TinyRun, other: TinyRun) -> None:
    assert not any(torch.equal(a, b) for a, b in zip(crops_of(run), crops_of(other), strict=True))


def workers_load(run: TinyRun, other: TinyRun) -> None:
    assert run.resolved["loader"].endswith("0 workers")
    assert other.resolved["loader"].endswith("1 workers")
    assert same_crops(run, other)


def dali_decodes_the_same_pixels(run: TinyRun, other: TinyRun) -> None:
    assert "decoded by Pillow" in run.resolved["loader"]
    assert "decoded by DALI" in other.resolved["loader"]
    assert same_crops(run, other)


def crops_are_of(change: Callable[[Image.Image], Image.Image]) -> Check:
    """Check that the second run has the crops of changed images, which need no setting."""

    def check(run: TinyRun, other: TinyRun) -> None:
        assert not same_crops(run, other)
        source = Path(run.config.data_path)
        target = source.with_name(source.name + "-changed")
        target.mkdir()
        for path in source.iterdir():
            with Image.open(path) as image:
                change(image).save(target / path.name, format="PNG")  # lossless
        loader = build_loader(run.config, scan_images(target))
        for crops, step in zip(loader.epoch(0), other.steps, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(crops, step.crops, strict=True))

    return check


def turned(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.ROTATE_270)


def with_8_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))


def last_batch_is_filled(run: TinyRun, padded: TinyRun) -> None:
    assert [len(run.steps), len(padded.steps)] == [2 * (9 // 4), 2 * math.ceil(9 / 4)]


def no_image_is_repeated(_: TinyRun, dropped: TinyRun) -> None:
    # The two differ if the number of ranks does not divide that of the images.
    steps = []
    for last_batch in ("paper", "drop"):
        config = dataclasses.replace(dropped.config, last_batch=last_batch, batch_size_per_gpu=5)
        dataset = scan_images(config.data_path)
        steps.append(_steps(config, dataset))
    assert steps == [1, "9 images give 4 per epoch on each of 2 ranks"]


def _steps(config: TrainConfig, dataset: Any) -> int | str:
    try:
        return build_loader(config, dataset, world_size=2).steps_per_epoch
    except DataError as error:
        return str(error).partition(",")[0]


def too_many_bad_images_stop_the_run(run: TinyRun, strict: TinyRun) -> None:
    assert run.error is None
    assert run.log[0]["skipped_images"] == 1
    assert isinstance(strict.error, DataError)
    assert "--max_bad_share" in str(strict.error)


# Speed and memory: the mechanism; same_result below checks the results.


def update_is_fused(parity: TinyRun, fast: TinyRun) -> None:
    assert type(parity.trainer.optimizer).__name__ == "AdamW"
    assert type(fast.trainer.optimizer).__name__ == "AdamWEMA"


def logits_are_bf16(run: TinyRun, half: TinyRun) -> None:
    assert {step.dtype for step in run.steps} == {torch.float32}
    assert {step.dtype for step in half.steps} == {torch.bfloat16}


def crop_sizes_pass_apart(packed: TinyRun, apart: TinyRun) -> None:
    # 4 images: 2 global crops of 17 tokens and 2 local ones of 5.
    assert packed.steps[0].first_rows == [8 * 17 + 8 * 5]
    assert apart.steps[0].first_rows == [8 * 17, 8 * 5]


def last_block_computes_all(cls: TinyRun, every: TinyRun) -> None:
    assert cls.steps[0].last_rows == [8 + 8]
    assert every.steps[0].last_rows == [8 * 17 + 8 * 5]


def less_is_saved(kept: TinyRun, recomputed: TinyRun) -> None:
    assert all(b.saved < 0.9 * a.saved for a, b in zip(kept.steps, recomputed.steps, strict=True))


# Files and logs.


def files_are_elsewhere(run: TinyRun, other: TinyRun) -> None:
    assert other.config.output_dir.endswith("/elsewhere")
    assert (other.folder / "log.txt").exists()
    assert equal(run.weights, other.weights)


def checkpoints_are_kept(none: TinyRun, run: TinyRun) -> None:
    kept = [[p.name for p in sorted(one.folder.glob("checkpoint*.pth"))] for one in (none, run)]
    assert kept == [["checkpoint.pth"], ["checkpoint.pth", "checkpoint0000.pth"]]


def saves_are_more_frequent(run: TinyRun, often: TinyRun) -> None:
    assert (run.saves, often.saves) == ([2, 4], [1, 2, 3, 4])
    assert equal(run.weights, often.weights)


def training_waits_for_saves(run: TinyRun, waiting: TinyRun) -> None:
    assert (run.saves, run.stopped_for) == ([2, 4], [])
    assert (waiting.saves, waiting.stopped_for) == ([2, 4], [2, 4])
    assert equal(run.weights, waiting.weights)


def entropy_is_measured_less_often(run: TinyRun, rarely: TinyRun) -> None:
    assert [step.measured for step in run.steps] == [True] * 4
    assert [step.measured for step in rarely.steps] == [True, False, True, True]  # 0, 2, 3
    assert equal(run.weights, rarely.weights)


def everything_is_drawn_anew(run: TinyRun, other: TinyRun) -> None:
    images_change(run, other)
    assert not equal(run.trainer.initial, other.trainer.initial)


# Monitoring, which does not change the training.


def accuracies(run: TinyRun) -> list[float | None]:
    """Return knn_top1 of each epoch, in percent; None if it was not measured."""
    return [line.get("knn_top1") for line in run.log]


def accuracies_are_of_knn_data(run: TinyRun, wrong: TinyRun) -> None:
    """Compare with a dataset of the same images, but wrong labels of the validation images."""
    assert accuracies(run) == [100, 100]
    assert accuracies(wrong) == [0, 0]
    assert equal(run.weights, wrong.weights)


def accuracy_is_measured_more_often(run: TinyRun, often: TinyRun) -> None:
    assert accuracies(run)[0] is None
    assert accuracies(often)[0] is not None
    assert accuracies(often)[1] == accuracies(run)[1]
    assert equal(run.weights, often.weights)


def maps(run: TinyRun) -> dict[str, np.ndarray[Any, Any]]:
    """Return the pictures of attention maps by file name, uint8 [height, width, 3]."""
    return {path.name: np.asarray(Image.open(path)) for path in run.folder.glob("attention/*")}


def maps_are_drawn_after_epochs(*epochs: int) -> Check:
    def check(none: TinyRun, run: TinyRun) -> None:
        assert not (none.folder / "attention").exists()
        assert maps(run).keys() == {f"{epoch:04}.png" for epoch in epochs}
        assert equal(none.weights, run.weights)

    return check


def maps_show(run: TinyRun, paths: list[Path]) -> bool:
    """Return True if the first column has the center crops of these images."""
    (picture,) = maps(run).values()
    rows = picture.reshape(len(paths), 226, -1, 3)[:, 1:-1, 1:225]  # without the margins
    crop = center_crop_picture(256, 224)
    pairs = zip(rows, paths, strict=True)
    return all((row == np.asarray(crop(Image.open(path)))).all() for row, path in pairs)


def maps_show_knn_data(run: TinyRun, other: TinyRun) -> None:
    assert maps_show(run, [Path(run.config.data_path, f"{i}.jpg") for i in range(4)])
    names = ["blue/0.png", "green/0.png", "red/0.png", "blue/1.png"]
    assert maps_show(other, [Path(other.config.knn_data, "val", name) for name in names])


def curves_in_the_table(run: TinyRun) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in (run.folder / "metrics.csv").read_text().splitlines()[1:]:
        iteration, name, value = row.split(",")
        curves.setdefault(name, []).append((int(iteration), float(value)))
    return curves


def curves_on_the_board(run: TinyRun) -> dict[str, list[tuple[int, float]]]:
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = (
        importlib.import_module(module).EventAccumulator(str(run.folder / "tensorboard")).Reload()
    )
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def losses_are_logged(*loggers: str) -> Check:
    """Check that only these loggers have written, and which curves."""

    def check(none: TinyRun, run: TinyRun) -> None:
        for one, names in ((none, ()), (run, loggers)):
            assert (one.folder / "metrics.csv").exists() is ("csv" in names)
            assert (one.folder / "tensorboard").exists() is ("tensorboard" in names)
            assert one.resolved["loggers"] == list(names)
        for name in loggers:
            curves = curves_in_the_table(run) if name == "csv" else curves_on_the_board(run)
            iterations, values = zip(*curves["train/loss"], strict=True)
            assert list(iterations) == [0, 1, 2, 3]
            assert list(values) == losses(run)
        assert equal(none.weights, run.weights)

    return check


def without_a_gpu_the_run_is_refused(_: TinyRun, run: TinyRun) -> None:
    assert isinstance(run.error, ConfigError)
    assert str(run.error).startswith("--device cuda: PyTorch sees no GPU")
