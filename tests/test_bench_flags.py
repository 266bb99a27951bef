"""`fastdino bench`: the flags of its two benchmarks."""

import pytest

from fastdino import cli
from fastdino.bench import flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--timeout 5", "--timeout goes with --loader"),
        ("--images 50", "--images goes with --loader"),
        ("--local_crops_scale 0.1 0.3", "--local_crops_scale goes with --loader"),
        ("--loader --scaling", "--scaling does not go with --loader"),
        ("--loader --arch vit_tiny", "--arch does not go with --loader"),
        ("--loader --keep_memory false", "--keep_memory does not go with --loader"),
        ("--loader --amp_dtype bf16", "--amp_dtype does not go with --loader"),
        ("--loader --out_dim 64", "--out_dim does not go with --loader"),
        ("--loader --output /dev/null/x", "--output /dev/null/x cannot be created"),
        ("--output /dev/null/x", "--output /dev/null/x cannot be created"),
    ],
)
def test_mistakes_are_reported_before_measuring(capsys, words, message):
    assert cli.main(["bench", *words.split()]) == cli.EXIT_MISTAKE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--arms", "--baselines"])
def test_shared_flags_and_defaults_are_accepted_by_both_benchmarks(monkeypatch, flag):
    calls = []
    monkeypatch.setattr(flags.loader_benchmark, "main", lambda args: len(calls.append(args) or ""))
    monkeypatch.setattr(flags.step_benchmark, "main", lambda args: len(calls.append(args) or ""))
    shared = ["--num_workers", "1", "--seed", "3", "--rounds", "2", "--local_crops_number", "2"]
    assert cli.main(["bench", "--loader", *shared, "--amp_dtype", "auto", flag, "paper"]) == 0
    assert cli.main(["bench", *shared, "--timeout", "120", flag, "paper"]) == 0
    assert [args.loader for args in calls] == [True, False]
    assert [args.baselines for args in calls] == ["paper", "paper"]
