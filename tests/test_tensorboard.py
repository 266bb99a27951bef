"""TensorBoard events: failures to write them are reported once and do not stop a run."""

from __future__ import annotations

import shutil
import sys

import pytest

from fastdino.training.tensorboard import Board


@pytest.fixture
def board(tmp_path):
    """A board in tmp_path/tensorboard, and the list of its warnings."""
    pytest.importorskip("torch.utils.tensorboard")
    warnings = []
    made = Board(tmp_path / "tensorboard", 0, warnings.append)
    yield made, warnings
    made.close()


def add_and_flush(board, iteration):
    board.add({"train/loss": 1.0}, iteration)
    board.flush(iteration + 1)


def delete(folder):
    shutil.rmtree(folder)


def replace_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("a file")


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


def test_board_without_tensorboard_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    made = Board(tmp_path / "tensorboard", 0, pytest.fail)
    add_and_flush(made, 0)
    made.close()
    assert list(tmp_path.iterdir()) == []
