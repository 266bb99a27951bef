"""fastdino.bench.stages and stage_clock: the crops taken apart are the crops."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.augmentation.pillow import make_crop
from fastdino.bench.photos import photo
from fastdino.bench.stages import RECORDED, STAGES, StageTimes
from fastdino.data import draw_crops

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="Numba is not installed"
)


@pytest.fixture
def drawn(tiny):
    """Crops of six images, (global, local), every stage among them."""
    params = draw_crops(tiny(local_crops_number=8), 0, range(6), [(375, 500)] * 6)
    for name in ("flip", "jitter", "gray", "solarize"):
        assert {False, True} <= set(
            torch.cat([getattr(p, name) for p in params], 1).flatten().tolist()
        )
    return params


@needs_numba
def test_both_ways_make_the_crops_and_book_every_stage(drawn):
    from fastdino.augmentation.cpu import normalized_levels
    from fastdino.augmentation.pillow import MEAN, STD
    from fastdino.bench.stage_clock import Laps, by_fused, by_pillow

    levels = normalized_levels(MEAN, STD, torch.float32, torch.device("cpu"))
    sizes = (32, 16)
    pillow, fused = Laps(), Laps()
    for b in range(6):
        image = photo(b)
        crops = [
            (crop, size)
            for params, size in zip(drawn, sizes, strict=True)
            for crop in params.of_sample(b)
        ]
        expected = [make_crop(image, crop, size) for crop, size in crops]
        outs = [torch.full((n, 3, size, size), torch.nan) for n, size in ((2, 32), (8, 16))]
        by_fused(outs, np.asarray(image), [p.pack()[b] for p in drawn], levels, fused)
        ours = [crop for out in outs for crop in out]
        theirs = by_pillow(image, crops, pillow)
        for one, other, third in zip(expected, ours, theirs, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, third)
    for laps in (pillow, fused):
        assert set(STAGES[1:]) <= set(laps.seconds)
        assert all(laps.seconds[stage] > 0 for stage in STAGES[1:])


def test_what_passes_between_is_no_stages(monkeypatch):
    pytest.importorskip("numba")
    from fastdino.bench import stage_clock

    now = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(stage_clock.time, "process_time", lambda: next(now))
    lap = stage_clock.Laps()
    lap("hue")
    lap.start()
    lap("hue")
    assert lap.seconds == {"hue": 6.0}


def test_times_are_compared_with_the_recorded_shares():
    times = StageTimes(
        images=2,
        rounds=3,
        pillow=dict.fromkeys(STAGES, 10.0),
        fused=dict.fromkeys(STAGES, 2.0) | {"blur": 0.0},
        whole=9.0,
    )
    assert times.times("hue") == 5
    assert times.recorded_times("hue") == pytest.approx(5.0 / 1.3)
    assert times.of_c("hue") == pytest.approx(5.0 / 1.3 / 5)
    assert (times.times("blur"), times.of_c("blur")) == (None, None)
    record = times.as_json()
    assert record["by_stage"]["decode"]["of_c"] == pytest.approx(1.8 / 0.8 / 5)
    assert set(record["by_stage"]) == set(RECORDED) == set(STAGES)


def test_photos_cost_what_photographs_do(tmp_path):
    from fastdino.bench.photos import QUALITY, SIZE, write_photos

    write_photos(tmp_path, 4)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{n:05}.jpg" for n in range(4)]
    assert all(55_000 < file.stat().st_size < 85_000 for file in files)
    pixels = [np.asarray(Image.open(file)) for file in files]
    assert {p.shape for p in pixels} == {(SIZE[1], SIZE[0], 3)}
    assert len({p.tobytes() for p in pixels}) == 4
    (tmp_path / "again").mkdir()
    write_photos(tmp_path / "again", 1)
    assert (tmp_path / "again" / "00000.jpg").read_bytes() == files[0].read_bytes()
    assert QUALITY == 90
