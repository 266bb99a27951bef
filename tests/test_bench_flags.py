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
        ("--output /dev/null/x", "--output /dev/null/x cannot be created"),
        ("--arms paper,mine", "--baselines mine: expected some of paper, "),
        ("--baselines dino", "--baselines dino cannot run: no --dino_repo was given"),
        ("--baselines ours,ours-graph", "ours-graph cannot run: CUDA graphs need a GPU"),
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--seconds nan", "--seconds must be a finite number above 0, got nan"),
        ("--scaling --step_ms 5", "--step_ms and --backward_ms must be given together"),
        ("--step_ms 5 --backward_ms 3", "with --scaling"),
        ("--scaling --step_ms 5 --backward_ms 6", "--backward_ms 6 is longer than the step"),
        ("--arch resnet50", "--arch resnet50: expected one of vit_nano, "),
        ("--out_dim 0", "--out_dim must be a finite number of at least 1, got 0"),
        ("--loader --scaling", "--scaling does not go with --loader"),
        ("--loader --arch vit_tiny", "--arch does not go with --loader"),
        ("--loader --keep_memory false", "--keep_memory does not go with --loader"),
        ("--loader --amp_dtype bf16", "--amp_dtype does not go with --loader"),
        ("--loader --out_dim 64", "--out_dim does not go with --loader"),
        ("--loader --output /dev/null/x", "--output /dev/null/x cannot be created"),
        ("--loader --arms paper,ffcv", "--baselines ffcv: expected some of paper, lightly"),
        ("--loader --baselines kernel", "--baselines kernel cannot run: it needs a GPU"),
        ("--loader --images 3", "3 images are fewer than a batch of 64"),
        ("--loader --images 0", "--images must be at least 1, got 0"),
        ("--loader --num_workers 0", "--num_workers must be at least 1, got 0"),
        ("--loader --rounds 0", "--rounds must be at least 1"),
        ("--loader --seconds nan", "--seconds must be a finite number above 0, got nan"),
        ("--loader --timeout 0", "--timeout must be a finite number above 0"),
        ("--loader --images 1 --local_crops_scale 0.5 0.1", "must be 0 < smallest"),
        ("--loader --data_path /nowhere", "/nowhere"),
    ],
)
def test_mistakes_are_reported_in_one_line_before_measuring(capsys, words, message):
    assert cli.main(["bench", "--device", "cpu", *words.split()]) == cli.EXIT_MISTAKE
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastdino bench: error: ")
    assert message in error


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
