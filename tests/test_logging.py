"""Logging of a run: log.txt, progress bar, warnings of a collapse."""

from __future__ import annotations

import json
import math
import resource
import sys

import pytest

from fastdino.files import append
from fastdino.training.logging import Progress

STEPS, EPOCHS, K = 4, 3, 64


@pytest.fixture
def progress(tmp_path):
    """Build the Progress of a run of 3 epochs of 4 steps of 16 images."""
    made = []

    def make(**settings):
        sizes = {"epochs": EPOCHS, "steps_per_epoch": STEPS, "images_per_step": 16}
        one = Progress(output_dir=tmp_path, **{**sizes, "prototypes": K, **settings})
        made.append(one)
        return one

    yield make
    for one in made:
        one.__exit__(None, None, None)


def values_of(iteration):
    return {"loss": 4.0 + math.sin(iteration), "lr": 1e-3 * iteration, "wd": 0.04}


def log_steps(progress, iterations):
    """Log steps and epochs like a run with --print_freq 2."""
    for i in iterations:
        entropy = 3.0 + 0.1 * math.cos(i) if i % 2 == 0 else None
        progress.step(i, values_of(i), entropy=entropy)
        if (i + 1) % STEPS == 0:
            progress.close_epoch(i // STEPS, images_per_second=100.0)
            progress.write_epoch()


def lines_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]


def test_log_line_has_the_papers_keys_and_the_means_of_the_epoch(progress, tmp_path):
    run = progress()
    run.restart(0, None)
    log_steps(run, range(2 * STEPS))
    lines = lines_of(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert list(lines[0])[:3] == ["train_loss", "train_lr", "train_wd"]
    assert set(lines[0]) - set(list(lines[0])[:3]) == {
        "train_entropy", "train_kl", "epoch", "images_per_second"}  # fmt: skip
    for epoch, line in enumerate(lines):
        steps = range(epoch * STEPS, (epoch + 1) * STEPS)
        losses = [values_of(i)["loss"] for i in steps]
        assert line["train_loss"] == pytest.approx(sum(losses) / STEPS)
        entropies = {i: 3.0 + 0.1 * math.cos(i) for i in steps if i % 2 == 0}
        assert line["train_entropy"] == pytest.approx(sum(entropies.values()) / 2)
        kls = [values_of(i)["loss"] - entropy for i, entropy in entropies.items()]
        assert line["train_kl"] == pytest.approx(sum(kls) / 2)


def test_terms_of_the_loss_are_logged_and_kl_is_that_of_the_dino_loss(
    progress, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = progress()
    run.restart(0, None)
    values = {"loss": 4.25, "lr": 0.1, "wd": 0.04, "dino": 4.0, "koleo": 2.5}
    for i in range(STEPS):
        run.step(i, values, entropy=3.0 if i == 0 else None)
    run.close_epoch(0)
    run.write_epoch()
    run.__exit__(None, None, None)
    (line,) = lines_of(tmp_path)
    assert list(line) == [
        "train_loss", "train_lr", "train_wd", "train_dino", "train_koleo", "train_entropy",
        "train_kl", "epoch",
    ]  # fmt: skip
    assert [line[f"train_{name}"] for name in ("dino", "koleo", "kl")] == [4.0, 2.5, 1.0]
    assert "loss 4.250, KoLeo 2.500, lr 1.00e-01" in capsys.readouterr().err


def test_resumed_run_drops_later_and_incomplete_lines(progress, tmp_path):
    lines = [json.dumps({"train_loss": 5.0 - epoch, "epoch": epoch}) for epoch in range(3)]
    text = "\n".join(lines) + '\n{"train_loss": 1.0, "epo'
    (tmp_path / "log.txt").write_text(text)
    progress().restart(2 * STEPS + 1, None)
    assert (tmp_path / "log.txt").read_text() == "\n".join(lines[:2]) + "\n"
    run = progress()
    run.restart(STEPS, None)
    log_steps(run, range(STEPS, 2 * STEPS))
    assert [line["epoch"] for line in lines_of(tmp_path)] == [0, 1]
    assert lines_of(tmp_path)[1]["train_loss"] != 4.0, "written by the resumed run"


def test_foreign_and_undecodable_lines_are_kept_in_another_file(progress, tmp_path):
    lines = [json.dumps({"epoch": epoch}).encode() + b"\n" for epoch in range(3)]
    foreign = [
        b"Zo\xeb\n",
        "a note".encode("utf-16") + b"\n",
        b"[1]\n",
        b'{"epoch": "one"}\n',
        b"\n",
    ]
    for line in foreign:
        (tmp_path / "log.txt").write_bytes(b"".join([lines[0], line, *lines[1:]]))
        progress().restart(2 * STEPS, {})
        assert (tmp_path / "log.txt").read_bytes() == b"".join(lines[:2])
    assert (tmp_path / "log.old.txt").read_bytes() == b"".join(foreign)
    (tmp_path / "log.txt").write_bytes(b"[2]\n")
    progress().restart(0, None)
    assert (tmp_path / "log.old.txt").read_bytes() == b"".join([*foreign, b"[2]\n"])
    (tmp_path / "log.txt").write_bytes(b"".join(lines).rstrip())
    progress().restart(3 * STEPS, {})
    assert (tmp_path / "log.txt").read_bytes() == b"".join(lines)
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "log.old.txt"}


def test_lines_that_cannot_be_written_are_written_later(progress, tmp_path, capsys):
    log = tmp_path / "log.txt"
    run = progress()
    run.restart(0, None)
    log_steps(run, range(STEPS))
    log.rename(tmp_path / "log")
    log.mkdir()
    log_steps(run, range(STEPS, 2 * STEPS))
    warning = f"warning: cannot write {log} (Is a directory): the run continues"
    assert warning in capsys.readouterr().err
    state = json.loads(json.dumps(run.state_dict()))
    log.rmdir()
    (tmp_path / "log").rename(log)
    log_steps(run, range(2 * STEPS, 3 * STEPS))
    whole = lines_of(tmp_path)
    assert [line["epoch"] for line in whole] == [0, 1, 2]
    assert "unwritten" not in run.state_dict()
    resumed = progress()
    resumed.restart(2 * STEPS, state)
    assert [line["epoch"] for line in lines_of(tmp_path)] == [0]
    log_steps(resumed, range(2 * STEPS, 3 * STEPS))
    assert lines_of(tmp_path) == whole


def test_failed_append_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * 900)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"No space|too large"):
            append(bytes(500), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"x" * 900
    append(b"end", path)
    assert path.read_bytes() == b"x" * 900 + b"end"


@pytest.mark.parametrize("at", [STEPS + 1, STEPS + 3, 2 * STEPS])
def test_resumed_epoch_has_the_means_of_an_uninterrupted_one(progress, tmp_path, at):
    run = progress()
    run.restart(0, None)
    log_steps(run, range(EPOCHS * STEPS))
    whole = (tmp_path / "log.txt").read_text()
    run.restart(0, None)
    assert (tmp_path / "log.old.txt").read_text() == whole
    assert not (tmp_path / "log.txt").exists()
    log_steps(run, range(at))
    state = json.loads(json.dumps(run.state_dict()))
    log_steps(run, range(at, at + 1))  # after the save, so repeated by the resumed run
    resumed = progress()
    resumed.restart(at, state)
    log_steps(resumed, range(at, EPOCHS * STEPS))
    assert (tmp_path / "log.txt").read_text() == whole


ONE = "puts all its weight on one prototype"
UNIFORM = "is uniform over the prototypes"


@pytest.mark.parametrize(
    ("shares", "prototypes", "problems"),
    [
        ([0.0099], K, [ONE]),
        ([0.9951], K, [UNIFORM]),
        ([0.0, 1.0], K, [ONE, UNIFORM]),
        ([0.0101, 0.5, 0.9949], K, []),
        ([0.0], 1, []),
    ],
)
def test_collapse_is_reported_once_per_epoch(progress, capsys, shares, prototypes, problems):
    run = progress(prototypes=prototypes)
    run.restart(0, None)
    for i in range(2 * STEPS):
        run.step(i, values_of(i), entropy=shares[i % len(shares)] * math.log(K))
    warnings = capsys.readouterr().err.splitlines()
    expected = [f"warning: epoch {epoch}: the teacher {p}" for epoch in (1, 2) for p in problems]
    for warning, start in zip(warnings, expected, strict=True):
        assert warning.startswith(start)
        assert f"of {math.log(K):.2f} nats): the training is collapsing" in warning
        assert "--teacher_temp" in warning


def test_output_without_a_terminal_is_one_line_per_epoch(progress, capsys):
    run = progress()
    run.restart(0, None)
    log_steps(run, range(2 * STEPS))
    captured = capsys.readouterr()
    assert captured.err == ""
    first, second = captured.out.splitlines()
    assert first.startswith(f"epoch 1/{EPOCHS}: loss 4.")
    assert second.startswith(f"epoch 2/{EPOCHS}: ")
    for part in ("lr 0.0015", "wd 0.04", "entropy 3.029", "kl 1.4"):
        assert part in first


def test_terminal_has_a_bar_and_no_line_per_epoch(progress, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = progress()
    run.restart(STEPS, None)
    run.step(STEPS, {"loss": 4.0, "lr": 2e-3, "wd": 0.04}, entropy=3.25)
    run.info("a line of the run")
    run.warn("something odd")
    for i in range(STEPS + 1, 2 * STEPS):
        run.step(i, values_of(i))
    run.close_epoch(1)
    run.write_epoch()
    run.__exit__(None, None, None)
    captured = capsys.readouterr()
    assert captured.out.strip("\r\n ") == "a line of the run"
    assert "warning: something odd" in captured.err
    shown = captured.err.split("\r")
    with_values = [text for text in shown if "images/s" in text]
    for part in (f"epoch 2/{EPOCHS}", "loss 4.000, lr 2.00e-03",
                 f"teacher entropy 3.25/{math.log(K):.2f}", "KL 0.750"):  # fmt: skip
        assert part in with_values[0]
    assert any(f"|{2 * STEPS}/{EPOCHS * STEPS} " in text for text in shown)


def test_names_do_not_reach_the_terminal_as_they_are(progress, capsys):
    run = progress()
    run.info("resumed \x1b[2J")
    run.warn("skipped a\nwarning: b.jpg")
    captured = capsys.readouterr()
    assert captured.out == "resumed \\x1b[2J\n"
    assert captured.err == "warning: skipped a\\nwarning: b.jpg\n"


def test_disabled_progress_writes_nothing_but_counts(progress, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (tmp_path / "log.txt").write_text('{"epoch": 7}\n')
    run = progress(enabled=False)
    with run:
        run.restart(0, None)
        run.info("hello")
        run.warn("oh")
        log_steps(run, range(STEPS + 2))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 7}\n'
    shown = progress()
    shown.restart(0, None)
    log_steps(shown, range(STEPS + 2))
    assert run.state_dict() == shown.state_dict()
    assert run.state_dict()["counts"] == {"loss": 2, "lr": 2, "wd": 2, "entropy": 1, "kl": 1}
