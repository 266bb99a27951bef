"""TensorBoard events: curves, pictures, resumed curves, and failures to write them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from fastdino.training.loggers import Loggers
from fastdino.training.metric_logger import Origin
from fastdino.training.tensorboard import Board

SETTINGS = {"arch": "vit_nano", "commit": "abc"}


@pytest.fixture
def board(tmp_path):
    """Loggers with a board in tmp_path/tensorboard, and the list of its warnings."""
    pytest.importorskip("torch.utils.tensorboard")
    warnings = []
    made = Loggers({"tensorboard": Board(Origin(tmp_path, SETTINGS, print))}, warnings.append)
    made.restart(0, new=True)
    yield made, warnings
    made.close()


def add_and_flush(board, iteration):
    board.add({"train/loss": 1.0 + iteration}, iteration)
    board.flush(iteration + 1)


def read(folder):
    """Return the events as TensorBoard shows them."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module).EventAccumulator(str(folder))
    return accumulator.Reload()


def delete(folder):
    shutil.rmtree(folder)


def replace_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("a file")


def test_curves_pictures_and_settings_are_written(tmp_path, board):
    made, _ = board
    add_and_flush(made, 3)
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    made.add_image("attention", pixels, 3)
    made.close()
    events = read(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 4.0)]
    (image,) = events.Images("attention")
    assert (image.step, image.height, image.width) == (3, 2, 3)
    (text,) = events.Tensors("settings/text_summary")
    assert b'"commit": "abc"' in text.tensor_proto.string_val[0]


def test_resumed_board_hides_the_later_events_of_the_interrupted_run(tmp_path, board):
    made, warnings = board
    for iteration in range(4):
        add_and_flush(made, iteration)
    made.restart(2, new=False)
    made.add({"train/loss": 50.0}, 2)
    made.close()
    shown = [(e.step, e.value) for e in read(tmp_path / "tensorboard").Scalars("train/loss")]
    assert shown == [(0, 1.0), (1, 2.0), (2, 50.0)]
    assert not warnings


@pytest.mark.parametrize("fault", [delete, replace_by_file])
def test_vanished_folder_is_reported_once_and_opened_again(tmp_path, board, capfd, fault):
    made, warnings = board
    folder = tmp_path / "tensorboard"
    add_and_flush(made, 0)
    assert len(list(folder.iterdir())) == 1
    fault(folder)
    for iteration in range(1, 4):
        add_and_flush(made, iteration)
    assert len(warnings) == 1
    assert f"TensorBoard events cannot be written to {folder} (" in warnings[0]
    if folder.is_file():
        folder.unlink()
    for iteration in range(4, 6):
        add_and_flush(made, iteration)
    assert sum(path.stat().st_size for path in folder.glob("events*")) > 0
    assert len(warnings) == 1
    assert capfd.readouterr().err == ""
