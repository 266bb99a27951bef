"""The command `fastdino`: exit statuses, messages and help."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastdino
from fastdino import cli
from fastdino.errors import CheckpointError, ConfigError, DataError, NonFiniteError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch):
    """Register a command `try` with the given main function and flags."""

    def register(run, flags=()):
        module = types.ModuleType("a_command")
        module.configure = lambda parser: [parser.add_argument(flag) for flag in flags]
        module.main = run
        monkeypatch.setitem(sys.modules, "a_command", module)
        monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("a_command", "tries"))

    return register


def python(*words):
    """Run a Python process that can import the packages of the checkout."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, *words], env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("status", [0, 75])
def test_exit_status_is_that_of_the_command(command, status):
    command(lambda args: status)
    assert cli.main(["try"]) == status


def test_flags_reach_the_command(command):
    seen = []
    command(lambda args: seen.append((args.one, args.two)) or 0, ["--one", "--two"])
    assert cli.main(["try", "--one", "a", "--two=knn"]) == 0
    assert seen == [("a", "knn")]


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, NonFiniteError])
@pytest.mark.parametrize("other_rank", [False, True])
def test_user_errors_print_one_line_on_one_rank_and_exit_with_2(command, capsys, kind, other_rank):
    def fail(args):
        error = kind("--lr is -1: it must be at least 0")
        error.reported = other_rank
        raise error

    command(fail)
    assert cli.main(["try"]) == 2
    line = "fastdino try: error: --lr is -1: it must be at least 0\n"
    assert capsys.readouterr() == ("", "" if other_rank else line)


def test_names_in_an_error_do_not_reach_the_terminal_as_they_are(command, capsys):
    def fail(args):
        raise DataError("\x1b[2J\n.jpg is empty")

    command(fail)
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "fastdino try: error: \\x1b[2J\\n.jpg is empty\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "\x1b[2Jx"), r"\x1b[2Jx: File name too"),
        (PermissionError(errno.EACCES, "Permission denied", b"x"), "b'x': Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
    ],
)
def test_errors_of_the_operating_system_print_one_line(command, capsys, error, line):
    def fail(_args):
        raise error

    command(fail)
    assert cli.main(["try"]) == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("flags", ["--pretrained_weights", "--data_path", "--load_features"])
def test_paths_that_are_too_long_are_reported_in_one_line(flags, capsys):
    assert cli.main(["knn", "--device", "cpu", "--arch", "vit_nano", flags, "x" * 300]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bugs_keep_their_traceback_and_ctrl_c_exits_with_130(command):
    def run(args):
        raise error

    command(run)
    error: BaseException = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["try"])
    error = KeyboardInterrupt()
    assert cli.main(["try"]) == 130


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        (["--version"], 0, f"fastdino {fastdino.__version__}\n"),
        (["--help"], 0, "weighted k-NN accuracy"),
        ([], 2, "the following arguments are required: COMMAND"),
        (["trian"], 2, "invalid choice: 'trian'"),
        (["--what", "try"], 2, "unrecognized arguments: --what"),
        (["try", "--what"], 2, "unrecognized arguments: --what"),
    ],
)
def test_help_version_and_usage_errors(command, capsys, words, status, part):
    command(lambda args: 1)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == status
    captured = capsys.readouterr()
    assert part in (captured.err if status else captured.out)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: fastdino {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "knn vit_small 16", "linear vit_small 16", "attention vit_small 8", "video vit_small 8",
        "davis vit_small 16", "retrieval vit_small 16", "copydays vit_base 8",
        "embed vit_small 16", "pca vit_small 8",
    ],
)  # fmt: skip
def test_default_networks_are_those_of_the_papers_scripts(command, capsys):
    name, *defaults = command.split()
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for default in defaults:
        assert f"(default: from the checkpoint, else {default})" in shown


def test_help_does_not_import_torch():
    done = python(
        "-c",
        "import sys; from fastdino.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'torchvision'} & set(sys.modules)))",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: fastdino" in done.stdout


def test_info_reports_choices_and_available_backends():
    done = python("-m", "fastdino", "info")
    assert done.returncode == 0, done.stderr
    facts = {line[:20].strip(): line[21:] for line in done.stdout.splitlines()}
    assert facts["fastdino"] == fastdino.__version__
    assert facts["torch"][0].isdigit()
    assert {"attention", "device", "precision", "kernels", "crops", "gpu"} <= set(facts)
    assert facts["attention"].startswith(("sdpa (", "varlen (", "xformers ("))
    assert facts["attention varlen"].startswith(("available", "not available: "))
    assert facts["kernels"].startswith(("torch (", "triton ("))
    assert facts["crops"].startswith("fused (the paper's crops, exact")
    assert facts["crops fused"] == facts["crops torchvision"] == "available"
    assert facts["crops dali"].startswith(("available", "not available: DALI "))
    assert facts["decode"].startswith(("cpu (Pillow's pixels", "pillow (DALI "))
    assert facts["decode gpu"].startswith(("available", "not available: "))


def test_missing_packages_are_reported_with_the_install_command(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(cli, "import_module", missing)
    assert cli.main(["knn"]) == 2
    err = capsys.readouterr().err
    assert err == ("fastdino knn: error: No module named 'timm': pip install \"fastdino[train]\"\n")
