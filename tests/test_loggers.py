"""Loggers: what they write, resumed curves, failures, and libraries that are not installed."""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from fastdino import cli
from fastdino.errors import ConfigError
from fastdino.training import loggers
from fastdino.training.csv_logger import CsvLogger
from fastdino.training.loggers import Loggers, build_loggers, resolve_names
from fastdino.training.loop import train
from fastdino.training.metric_logger import Origin, Position, new_values
from tests.commands import error_of, write_colours

SETTINGS = {"arch": "vit_nano", "lr": 0.05, "local_crops_scale": [0.05, 0.4], "commit": "abc"}
PIXELS = np.arange(24 * 30 * 3, dtype=np.uint8).reshape(24, 30, 3)


@pytest.fixture
def origin(tmp_path):
    return Origin(tmp_path, SETTINGS, lambda text: None)


@pytest.fixture
def table(origin, tmp_path):
    """A CSV logger, and a function that returns its rows."""
    return CsvLogger(origin), lambda: (tmp_path / "metrics.csv").read_text().splitlines()


def add_steps(logger, iterations):
    for i in iterations:
        logger.add({"train/loss": i / 3, "train/lr": 0.5}, i)


def test_table_has_one_exact_value_per_row(table):
    logger, rows = table
    logger.restart(0, new=True)
    add_steps(logger, [1])
    logger.add({"knn/top1": 1e-20}, 4)
    logger.add_image("attention", PIXELS, 4)
    assert rows() == [
        "iteration,name,value", "1,train/loss,0.3333333333333333", "1,train/lr,0.5",
        "4,knn/top1,1e-20",
    ]  # fmt: skip


def test_resumed_table_has_no_row_twice(table, tmp_path):
    logger, rows = table
    logger.restart(0, new=True)
    add_steps(logger, range(5))
    whole = rows()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("\n1,of another table\n5,train/lo")  # killed
    logger.restart(3, new=False)
    assert rows() == whole[: 1 + 2 * 3]
    add_steps(logger, range(3, 5))
    assert rows() == whole


def test_table_of_another_run_is_renamed(table, tmp_path):
    logger, rows = table
    logger.restart(0, new=True)
    add_steps(logger, range(2))
    whole = rows()
    logger.restart(0, new=True)
    assert rows() == ["iteration,name,value"]
    assert (tmp_path / "metrics.old.csv").read_text().splitlines() == whole


def test_position_sends_each_iteration_of_a_kind_once(tmp_path):
    position = Position(tmp_path / "service.json")
    position.load()
    assert position.run_id == ""
    position.begin("abc")
    assert new_values(position, {"train/loss": 1.0, "train/lr": 2.0}, 0) != {}
    assert position.advance("train", 10)
    after = Position(tmp_path / "service.json")
    after.load()
    assert after.run_id == "abc"
    values = {"train/loss": 1.0, "knn/top1": 3.0}
    assert new_values(after, values, 10) == {"knn/top1": 3.0}
    assert new_values(after, values, 10) == {}
    assert new_values(after, values, 11) == values
    after.begin()
    assert after.run_id not in ("", "abc")
    assert after.advance("train", 0)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"run_id": 3}', '{"run_id": "a", "sent": {"t": "x"}}']
)
def test_damaged_position_is_that_of_a_new_run(tmp_path, content):
    (tmp_path / "service.json").write_text(content)
    position = Position(tmp_path / "service.json")
    position.load()
    assert position.run_id == ""
    assert position.advance("train", 0)


class Failing:
    """A logger that fails in its n-th calls of `add`."""

    problem = "the service cannot log"

    def __init__(self, *failures):
        self.failures, self.calls, self.received = failures, 0, []

    def restart(self, iteration, *, new):
        if -1 in self.failures:
            raise RuntimeError("no\nconnection")

    def add(self, values, iteration):
        self.calls += 1
        if self.calls in self.failures:
            raise TimeoutError("timed out")
        self.received.append(iteration)

    def add_image(self, name, pixels, iteration):
        raise TimeoutError("timed out")

    def flush(self, iteration):
        pass

    def close(self):
        raise TimeoutError("timed out")


def test_failing_logger_warns_once_and_is_tried_again_after_a_save(origin):
    warnings, failing, sound = [], Failing(2, 3), Failing()
    both = Loggers({"wandb": failing, "csv": sound}, warnings.append)
    both.restart(0, new=True)
    for iteration in range(8):
        both.add({"train/loss": 1.0}, iteration)
        if iteration in (3, 5):
            both.flush(iteration + 1)
    both.add_image("attention", PIXELS, 8)
    both.close()
    assert failing.received == [0, 6, 7], "1 fails, 2 and 3 are left out, 4 fails, 5 is left out"
    assert sound.received == list(range(8))
    message = (
        "the service cannot log (timed out): the run continues, and tries again after each save"
    )
    assert warnings == [message] * 2, "one of each"


def test_logger_that_cannot_start_is_an_error():
    with pytest.raises(ConfigError, match=r"--logger wandb: the service .* \(no connection\)"):
        Loggers({"wandb": Failing(-1)}).restart(0, new=True)


def test_auto_is_tensorboard_if_it_is_installed(monkeypatch):
    pytest.importorskip("tensorboard")
    assert resolve_names(["auto"]) == ("tensorboard",)
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert resolve_names(["auto"]) == ()
    assert resolve_names(["none"]) == ()
    assert resolve_names(["csv"]) == ("csv",)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_library_is_one_line_with_the_command(
    tiny, pictures, capsys, monkeypatch, tmp_path, name
):
    monkeypatch.setitem(sys.modules, name, None)
    line = ["train", "--data_path", str(pictures), "--output_dir", str(tmp_path / "run"),
            "--device", "cpu", "--logger", f"csv,{name}"]  # fmt: skip
    assert cli.main(line) == 2
    extra = "train" if name == "tensorboard" else name
    error = error_of(capsys)
    assert f"--logger {name} needs the package {name}, which is not installed" in error
    assert f'pip install "fastdino[{extra}]"' in error


def test_library_that_cannot_be_imported_is_an_error(origin, monkeypatch):
    def broken(name, origin):
        raise ImportError("libx.so is missing")

    monkeypatch.setattr(loggers, "_build", broken)
    with pytest.raises(ConfigError, match=r"--logger wandb: .* \(libx.so is missing\)"):
        build_loggers(["wandb"], origin, pytest.fail)


@pytest.mark.parametrize(
    ("name", "file", "problem"),
    [
        ("csv", "metrics.csv", "{path} cannot be written ([Errno 2] "),
        (
            "tensorboard",
            "tensorboard",
            "TensorBoard events cannot be written to {path} ([Errno 17] ",
        ),
    ],
)
def test_unwritable_output_is_an_error_before_the_first_step(config, tmp_path, name, file, problem):
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    path = tmp_path / "run" / file
    path.parent.mkdir()
    path.symlink_to(tmp_path / "no/folder")
    start = f"--logger {name}: " + problem.format(path=path)
    with pytest.raises(ConfigError, match=f"^{re.escape(start)}.*: check the folder's permissions"):
        train(config(logger=name))
    assert not (tmp_path / "run/log.txt").exists()


def test_a_logger_that_auto_chose_and_cannot_start_is_a_warning(config, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    path = tmp_path / "run/tensorboard"
    path.parent.mkdir()
    path.symlink_to(tmp_path / "no/folder")
    assert train(config(epochs=1)) == "finished"
    assert capsys.readouterr().err.count(f"TensorBoard events cannot be written to {path}") == 1
    assert (tmp_path / "run/log.txt").exists()


@pytest.fixture
def config(tiny, tmp_path):
    """Build the config of a run of 3 epochs of 3 steps with k-NN and attention maps."""
    root = write_colours(tmp_path / "colours")

    def make(**overrides):
        settings = {
            "data_path": str(root / "train"), "knn_data": str(root), "knn_every": 1,
            "attention_every": 1, "print_freq": 1, "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        return tiny(**(settings | overrides))

    return make


def run_and_resume(config, tmp_path):
    """Train 1 of 2 epochs, then lose the last save and continue; return the lines of log.txt."""
    run = tmp_path / "run"
    train(config(epochs=1))
    old = (run / "checkpoint.pth").read_bytes()
    train(config(epochs=2))
    (run / "checkpoint.pth").write_bytes(old)  # as if killed before the second save
    train(config(epochs=2))
    return [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]


def records_of(path):
    """Return the records of a .wandb file, in LevelDB's log format after a header of 7 bytes."""
    protobuf = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # no room for a header in this block
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(protobuf.Record.FromString(parts))
            parts = b""
    return records


@pytest.fixture
def service():
    """End wandb's service process, which keeps the environment of its start."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    yield wandb
    wandb.teardown()


@pytest.mark.usefixtures("small_networks")
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_folder_has_each_value_once(config, tmp_path, monkeypatch, capsys, service):
    monkeypatch.setenv("WANDB_MODE", "offline")
    lines = run_and_resume(lambda **changes: config(logger="wandb", **changes), tmp_path)
    service.teardown()  # it may still write
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime)
    assert len(files) == 3, "one per start"
    assert len({path.name for path in files}) == 1, "of one run"
    histories = []
    for path in files:
        records = records_of(path)
        (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert run.project == "fastdino"
        assert run.display_name == "run"
        assert settings["arch"] == "vit_nano"
        assert settings["commit"] == json.loads((tmp_path / "run/config.json").read_text())[
            "resolved"]["commit"]  # fmt: skip
        for record in records:
            if record.WhichOneof("record_type") == "history":
                items = {
                    (i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item
                }
                histories.append({key: json.loads(value) for key, value in items.items()})
    curves = {}
    for row in histories:
        for key in ("train/loss", "knn/top1", "attention/path"):
            if key in row:
                curves.setdefault(key, []).append((row["_step"], row[key]))
    assert [step for step, _ in curves["train/loss"]] == list(range(6)), "none twice"
    assert curves["knn/top1"] == [(2, lines[0]["knn_top1"]), (5, lines[1]["knn_top1"])]
    assert [step for step, _ in curves["attention/path"]] == [2, 5]
    assert len(list((tmp_path / "run/wandb").rglob("media/images/attention*.png"))) == 2
    assert "wandb: offline, in " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_wandb_that_cannot_start_is_one_line(config, monkeypatch, service):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    with pytest.raises(ConfigError) as error:
        train(config(logger="wandb"))
    assert "\n" not in str(error.value)
    assert "WANDB_MODE=offline" in str(error.value)


@pytest.mark.usefixtures("small_networks")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_store_has_each_value_once(config, tmp_path, monkeypatch, capsys):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines = run_and_resume(lambda **changes: config(logger="mlflow", **changes), tmp_path)
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/run/mlflow.db")
    experiment = client.get_experiment_by_name("fastdino")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["arch"] == "vit_nano"
    commit = json.loads((tmp_path / "run/config.json").read_text())["resolved"]["commit"]
    assert run.data.tags["mlflow.source.git.commit"] == commit
    loss = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in loss] == list(range(6))
    knn = client.get_metric_history(run.info.run_id, "knn/top1")
    expected = [(2, lines[0]["knn_top1"]), (5, lines[1]["knn_top1"])]
    assert [(metric.step, metric.value) for metric in knn] == expected
    names = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")}
    assert len([name for name in names if name.endswith(".png")]) == 2
    text = client.download_artifacts(run.info.run_id, "settings.json", str(tmp_path))
    assert json.loads(Path(text).read_text())["lr"] == 0.05
    assert f"mlflow: run {run.info.run_id} at sqlite:///" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_mlflow_file_store_works_where_mlflow_allows_it(origin, tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    made = build_loggers(["mlflow"], origin, pytest.fail)
    made.restart(0, new=True)
    made.add({"train/loss": 0.25}, 7)
    made.close()
    client = tracking.MlflowClient(tracking_uri=f"file://{tmp_path}/mlruns")
    run_id = json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    (metric,) = client.get_metric_history(run_id, "train/loss")
    assert (metric.step, metric.value) == (7, 0.25)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_that_cannot_start_is_one_line(config, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    with pytest.raises(ConfigError, match=r"MLflow cannot log to sqlite") as error:
        train(config(logger="mlflow"))
    assert "\n" not in str(error.value)
