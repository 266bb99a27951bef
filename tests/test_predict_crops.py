"""The prediction of multi_crop's time follows the work and the order of the programs."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import predict_crops
from benchmarks.gpu.predict_crops import SMS, Launch, Program


def seconds(programs, slots=1):
    return Launch(programs, slots, 16).microseconds() - predict_crops.LAUNCH_US


def test_time_of_a_launch_is_that_of_its_slowest_program():
    small, large = Program(1000, 0), Program(8000, 0)
    assert seconds([small] * SMS) == seconds([small])
    assert seconds([large] + [small] * (SMS - 1)) == pytest.approx(8 * seconds([small]))
    assert seconds([small] * (SMS + 1)) == pytest.approx(2 * seconds([small]))
    last = [small] * SMS + [large]
    assert seconds(last) == pytest.approx(9 * seconds([small]))
    assert seconds(last[::-1]) == pytest.approx(8 * seconds([small]))


def test_loads_limit_a_program_with_few_instructions():
    assert seconds([Program(10, 5000)]) == pytest.approx(5000 / predict_crops.GHZ / 1000)


def test_work_grows_with_each_operation_and_with_the_box():
    def work(**changes):
        off = False
        crop = predict_crops.Crop(0, 0, 300, 400, off, off, [2, 1, 0, 3], [1.0] * 4, off, 0, off)
        crop = crop._replace(**changes)
        kernels = predict_crops.resize, predict_crops.color, predict_crops.blur
        made = sum((kernel(crop, 224, 224).instructions for kernel in kernels), 0.0)
        return made, predict_crops.before(crop, 224).instructions, predict_crops.work_of(crop, 224)

    plain = work()
    for heavier in ({"jitter": True}, {"blur_radius": 1.0}, {"height": 375, "width": 500}):
        assert all(a > b for a, b in zip(work(**heavier), plain, strict=True))


def test_page_has_every_version(tmp_path, capsys):
    assert predict_crops.main(["--images", "2", "--write", str(tmp_path)]) == 0
    page = (tmp_path / "predictions_crops.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
    assert "Nothing here is a measurement" in page
    for name in predict_crops.VERSIONS:
        assert f"| {name} | " in page
