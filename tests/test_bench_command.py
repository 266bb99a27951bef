"""`fastdino bench`: which benchmark its flags ask for, and mistakes told before it begins."""

import pytest

from fastdino import cli
from fastdino.bench import command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages"], "--stages goes with --loader"),
        (["--loader", "--scaling"], "--scaling does not go with --loader"),
        (["--loader", "--arch", "vit_tiny"], "--arch does not go with --loader"),
        (["--loader", "--keep_memory", "false"], "--keep_memory does not go with --loader"),
        (["--loader", "--amp_dtype", "bf16"], "--amp_dtype does not go with --loader"),
        (["--loader", "--out_dim", "64"], "--out_dim does not go with --loader"),
        (["--images", "50"], "--images goes with --loader"),
        (["--local_crops_scale", "0.1", "0.3"], "--local_crops_scale goes with --loader"),
        (["--loader", "--output", "/dev/null/here"], "--output /dev/null/here cannot be made"),
        (["--output", "/dev/null/here"], "--output /dev/null/here cannot be made"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(capsys, words, message):
    assert cli.main(["bench", *words]) == cli.EXIT_MISTAKE
    assert message in capsys.readouterr().err


def test_flags_of_both_are_refused_by_neither(monkeypatch):
    """And a flag that says what holds anyway does no harm."""
    ran = []
    monkeypatch.setattr(command.loaders, "main", lambda args: len(ran.append(args) or ""))
    monkeypatch.setattr(command.step, "main", lambda args: len(ran.append(args) or ""))
    shared = ["--num_workers", "1", "--seed", "3", "--rounds", "2", "--local_crops_number", "2"]
    assert cli.main(["bench", "--loader", *shared, "--amp_dtype", "auto"]) == 0
    assert cli.main(["bench", *shared, "--timeout", "120"]) == 0
    assert [args.loader for args in ran] == [True, False]
