"""Every setting of a pretraining run reaches its effect: runs that differ in one setting.

The settings of the group "Speed and memory" change how a step is computed: these tests observe the
mechanism, and that the results are the same up to rounding.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdino import TrainConfig
from tests import setting_effects as effects
from tests.commands import rotate_names, write_colours
from tests.loaders import needs_dali
from tests.tiny_runs import TinyRun, train_tiny, write_pictures


@dataclass(frozen=True)
class Effect:
    """An effect of a setting.

    value: of the setting in the second run; the first has the value in `base`, or that of the
        tiny runs.
    check: compares the two runs.
    base: settings of both runs.
    """

    value: Any
    check: effects.Check
    base: dict[str, Any] = field(default_factory=dict)


STILL = {
    "lr": 0.0, "min_lr": 0.0, "warmup_epochs": 0, "warmup_teacher_temp": 0.02,
    "teacher_temp": 0.06, "warmup_teacher_temp_epochs": 1,
}  # fmt: skip
ONE_STEP = {"batch_size_per_gpu": 8, "epochs": 1, "warmup_epochs": 0}
PLAIN_SGD = ONE_STEP | {
    "optimizer": "sgd", "weight_decay": 0.0, "weight_decay_end": 0.0, "clip_grad": 0.0, "lr": 0.1,
}  # fmt: skip
# For several ranks or a GPU: test_settings_effect_devices.py.
ELSEWHERE = {
    "hw_decoder_load", "use_fp16", "compile", "attention", "onednn", "cuda_graph", "fsdp",
    "dist_url", "dist_timeout_minutes",
}  # fmt: skip
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="refused without a GPU")

EFFECTS: dict[str, Effect | tuple[Effect, ...]] = {
    "arch": Effect("vit_tiny", effects.weights_have_width),
    "patch_size": Effect(16, effects.patches_have_the_size),
    "drop_path_rate": Effect(0.9, effects.branches_are_dropped),
    "out_dim": Effect(96, effects.prototypes_are_counted),
    "use_bn_in_head": Effect(True, effects.head_has_batch_norm),
    "norm_last_layer": Effect(False, effects.magnitudes_are_trained),
    "init_from": Effect(
        "{weights}", effects.backbone_is_that_of_the_file, {"lr": 0.0, "min_lr": 0.0}
    ),
    "teacher_temp": Effect(0.08, effects.only_epochs_change(1), STILL),
    "warmup_teacher_temp": Effect(0.03, effects.only_epochs_change(0), STILL),
    "warmup_teacher_temp_epochs": Effect(0, effects.only_epochs_change(0), STILL),
    "centering": Effect("sinkhorn", effects.targets_are_balanced),
    "koleo_weight": Effect(0.3, effects.koleo_is_added),
    "momentum_teacher": (
        Effect(1.0, effects.teacher_stays),
        Effect(0.7, effects.teacher_is_the_average, {"warmup_epochs": 0}),
    ),
    "optimizer": (
        Effect("sgd", effects.moments_are_of_sgd),
        Effect("lars", effects.moments_are_of_lars),
    ),
    "epochs": Effect(3, effects.log_has_an_epoch_more),
    "batch_size_per_gpu": Effect(8, effects.batch_and_rate_are_doubled),
    "grad_accum": Effect(2, effects.forward_passes_are_doubled),
    "global_batch_size": Effect(8, effects.forward_passes_are_doubled),
    "lr": Effect(0.25, effects.rates_follow_the_schedule),
    "warmup_epochs": Effect(0, effects.rates_follow_the_schedule),
    "min_lr": Effect(1e-4, effects.rates_follow_the_schedule),
    "weight_decay": Effect(0.3, effects.rates_follow_the_schedule),
    "weight_decay_end": Effect(0.9, effects.rates_follow_the_schedule),
    "clip_grad": Effect(0.01, effects.changes_are_clipped, PLAIN_SGD),
    "freeze_last_layer": Effect(1, effects.last_layer_is_frozen, {"warmup_epochs": 0}),
    "on_nonfinite": Effect("rollback", effects.a_bad_batch_is_skipped),
    "global_crops_size": Effect(40, effects.crops_have_sides(40, 40, 16, 16)),
    "global_crops_scale": Effect((0.2, 0.3), effects.only_global_crops_change),
    "local_crops_number": Effect(3, effects.crops_have_sides(32, 32, 16, 16, 16)),
    "local_crops_size": Effect(24, effects.crops_have_sides(32, 32, 24, 24)),
    "local_crops_scale": Effect((0.5, 0.6), effects.only_local_crops_change),
    "crops": (
        Effect("fused", effects.another_backend_makes_the_same_crops),
        Effect("dali", effects.dali_makes_similar_crops),
    ),
    "data_path": Effect("{others}", effects.images_change),
    "num_workers": Effect(1, effects.workers_load),
    "decode": Effect(
        "cpu", effects.dali_decodes_the_same_pixels, {"crops": "fused", "decode": "pillow"}
    ),
    "exif_orientation": Effect(
        True, effects.crops_are_of(effects.turned), {"data_path": "{turned}"}
    ),
    "image_range": Effect(
        "scale", effects.crops_are_of(effects.with_8_bits), {"data_path": "{deep}"}
    ),
    "last_batch": (
        Effect("pad", effects.last_batch_is_filled),
        Effect("drop", effects.no_image_is_repeated),
    ),
    "max_bad_share": Effect(
        0.01,
        effects.too_many_bad_images_stop_the_run,
        {"data_path": "{broken}", "max_bad_share": 0.5},
    ),
    "mode": Effect("fast", effects.update_is_fused),
    "amp_dtype": Effect("bf16", effects.logits_are_bf16),
    "packing": Effect("off", effects.crop_sizes_pass_apart),
    "last_block": Effect("all", effects.last_block_computes_all),
    "recompute": Effect("on", effects.less_is_saved),
    "output_dir": Effect("{tmp}/elsewhere", effects.files_are_elsewhere),
    "saveckp_freq": Effect(2, effects.checkpoints_are_kept),
    "saveckp_every_steps": Effect(1, effects.saves_are_more_frequent),
    "saveckp_in_background": Effect(False, effects.training_waits_for_saves),
    "saveckp_every_minutes": Effect(1e-9, effects.saves_are_more_frequent),
    "print_freq": Effect(3, effects.entropy_is_measured_less_often),
    "seed": Effect(1, effects.everything_is_drawn_anew),
    "device": Effect("cuda", effects.without_a_gpu_the_run_is_refused),
    "knn_data": (
        Effect(
            "{mislabelled}",
            effects.accuracies_are_of_knn_data,
            {"knn_data": "{labelled}", "knn_every": 1},
        ),
        Effect("{labelled}", effects.maps_show_knn_data, {"attention_every": 2}),
    ),
    "knn_every": Effect(
        1, effects.accuracy_is_measured_more_often, {"knn_data": "{labelled}", "knn_every": 2}
    ),
    "attention_every": (
        Effect(1, effects.maps_are_drawn_after_epochs(0, 1)),
        Effect(2, effects.maps_are_drawn_after_epochs(1)),
    ),
    "logger": (
        Effect("csv", effects.losses_are_logged("csv"), {"logger": "none"}),
        Effect("tensorboard", effects.losses_are_logged("tensorboard"), {"logger": "none"}),
        Effect(
            "tensorboard,csv", effects.losses_are_logged("tensorboard", "csv"), {"logger": "none"}
        ),
    ),
}
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
MARKS = {
    "decode": needs_dali, "crops-0": needs_numba, "crops-1": needs_dali, "device": no_gpu,
    "logger-1": needs_tensorboard, "logger-2": needs_tensorboard,
}  # fmt: skip


def cases() -> list[Any]:
    parameters = []
    for name, one_or_more in EFFECTS.items():
        several = one_or_more if isinstance(one_or_more, tuple) else (one_or_more,)
        for i, effect in enumerate(several):
            key = f"{name}-{i}" if len(several) > 1 else name
            parameters.append(pytest.param(name, effect, id=key, marks=MARKS.get(key, ())))
    return parameters


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Folders of images, and a file of backbone weights."""
    root = tmp_path_factory.mktemp("settings")
    folders = {name: write_pictures(root / name, seed=i) for i, name in enumerate(NAMES)}
    for path in folders["turned"].iterdir():
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(path, format="PNG", exif=exif)
    for path in folders["deep"].iterdir():
        with Image.open(path) as image:
            values = np.asarray(image.convert("L")).astype(np.uint16) * 257
        Image.fromarray(values).save(path, format="PNG")
    (folders["broken"] / "0.jpg").write_text("no image")
    folders["labelled"] = write_colours(root / "labelled")
    folders["mislabelled"] = write_colours(root / "mislabelled")
    rotate_names(folders["mislabelled"] / "val")
    return {name: str(folder) for name, folder in folders.items()} | {"tmp": str(root)}


NAMES = ("images", "others", "turned", "deep", "broken")


@pytest.fixture(scope="module")
def run(places, tmp_path_factory) -> Callable[..., TinyRun]:
    """A function that returns the run of some settings; effects.equal runs are made once."""
    known: dict[str, TinyRun] = {}

    def fill(value: Any) -> Any:
        return value.format(**places) if isinstance(value, str) else value

    def nan_in_step_1(trainer: Any, crops: list[Tensor]) -> list[Tensor]:
        return [crop * math.nan for crop in crops] if trainer.iteration == 1 else crops

    def make(settings: dict[str, Any], *, damaged: bool = False) -> TinyRun:
        key = repr((sorted(settings.items()), damaged))
        if key not in known:
            output = tmp_path_factory.mktemp("run")
            filled = {name: fill(value) for name, value in settings.items()}
            change = {"before_step": nan_in_step_1} if damaged else {}
            with pytest.MonkeyPatch.context() as patch:
                known[key] = train_tiny(patch, Path(places["images"]), output, filled, **change)
        return known[key]

    first = make({})
    places["weights"] = str(tmp_path_factory.mktemp("weights") / "backbone.pth")
    backbone = first.trainer.teacher.backbone.state_dict()
    torch.save({name: 2 * tensor for name, tensor in backbone.items()}, places["weights"])
    return make


def test_every_setting_has_an_effect_in_the_table():
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    assert sorted([*EFFECTS, *ELSEWHERE]) == sorted(names)


@pytest.mark.parametrize(("name", "effect"), cases())
def test_setting_reaches_its_effect(name, effect, run):
    damaged = name == "on_nonfinite"
    first, second = (
        run(effect.base, damaged=damaged),
        run(effect.base | {name: effect.value}, damaged=damaged),
    )
    assert getattr(first.config, name) != getattr(second.config, name)
    effect.check(first, second)
    if TrainConfig.__dataclass_fields__[name].metadata["group"].startswith("Speed"):
        assert_same_result(first, second)


def assert_same_result(first: TinyRun, second: TinyRun) -> None:
    """Check that the losses of all steps agree up to rounding, for the same crops."""
    half = torch.bfloat16 in {step.dtype for step in (*first.steps, *second.steps)}
    assert effects.losses(second) == pytest.approx(
        effects.losses(first), rel=0.02 if half else 1e-4
    )
    assert effects.same_crops(first, second)
