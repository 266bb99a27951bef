"""Errors that are raised on every rank, and collectives."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fastdino import distributed, waiting
from fastdino.errors import ConfigError, NonFiniteError, UserError
from tests.commands import write_colours
from tests.processes import run_commands_in_two, run_two

CPU = torch.device("cpu")


@pytest.mark.parametrize("failing", [[], [0], [1], [0, 1]])
@pytest.mark.parametrize("kind", [NonFiniteError, KeyError])
def test_error_on_one_rank_is_raised_on_all_and_reported_once(tmp_path, failing, kind):
    run_two(_fail_together, failing, kind, tmp_path)
    raised = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    if not failing:
        assert raised == [None, None]
        return
    own, other = raised[failing[0]], raised[1 - failing[0]]
    assert own == [kind.__name__, f"of {failing[0]}", False]
    if kind is NonFiniteError:
        assert other == ["NonFiniteError", f"of {failing[0]}", True]
    else:
        assert other == ["UserError", f"KeyError('of {failing[0]}')", True]


def _fail_together(failing, kind, folder):
    rank = int(os.environ["RANK"])
    raised = None
    with distributed.process_group(CPU, "env://"):
        try:
            with distributed.fail_together():
                if rank in failing:
                    raise kind(f"of {rank}")
        except (UserError, KeyError) as error:
            raised = [type(error).__name__, error.args[0], getattr(error, "reported", False)]
        assert distributed.gather(rank) == [0, 1], "later collectives still match"
    (folder / f"{rank}.json").write_text(json.dumps(raised))


def test_from_main_shares_results_and_errors_and_total_sums_in_slices(tmp_path):
    run_two(_call_collectives, tmp_path)
    sums = [[0.0, 3.0], [6.0, 9.0], [12.0, 15.0], [18.0, 21.0]]
    for rank in (0, 1):
        results = json.loads((tmp_path / str(rank)).read_text())
        assert results == ["made by 0", "no", rank == 1, sums, 3]


def _call_collectives(folder):
    rank = int(os.environ["RANK"])
    distributed.SLICE_ELEMENTS = 3
    with distributed.process_group(CPU, "env://"):
        made = distributed.from_main(lambda: f"made by {rank}")
        with pytest.raises(ConfigError) as error:
            distributed.from_main(_refuse)
        values = (rank + 1) * torch.arange(8.0).view(4, 2)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            summed = distributed.total(values).tolist()
    results = [made, str(error.value), error.value.reported, summed, reduced.call_count]
    (folder / str(rank)).write_text(json.dumps(results))


def _refuse():
    raise ConfigError("no")


@pytest.mark.parametrize("late", [0, 1])
def test_process_joins_groups_one_after_the_other(tmp_path, late):
    """One rank may enter the next group before the other has left the last one."""
    run_two(_join_groups, tmp_path, late)
    for rank in (0, 1):
        assert json.loads((tmp_path / str(rank)).read_text()) == [[10 * i, 10 * i + 1]
                                                                 for i in range(3)]  # fmt: skip


def _join_groups(folder, late):
    rank = int(os.environ["RANK"])
    results = []
    for i in range(3):
        with distributed.process_group(CPU, "env://"):
            results.append(distributed.gather(10 * i + rank))
            if rank == late:
                time.sleep(0.5)
    (folder / str(rank)).write_text(json.dumps(results))


def test_a_rank_that_fails_does_not_wait_for_its_threads(tmp_path):
    """They may be in calls of gloo; `exit_process` then leaves them behind."""
    run_two(_fail_on_all, tmp_path)
    for rank in (0, 1):
        assert json.loads((tmp_path / str(rank)).read_text()) == [False, True]


def _fail_on_all(folder):
    abandoned = []
    for fault in (None, KeyError("fault")):
        with contextlib.suppress(KeyError), distributed.process_group(CPU, "env://"):
            distributed.gather(None)
            if fault:
                raise fault
        abandoned.append(waiting._abandoned.is_set())
    (folder / os.environ["RANK"]).write_text(json.dumps(abandoned))


def test_without_the_second_group_the_first_one_is_left(tmp_path):
    """Else the next call of train() would take it for a group of the caller."""
    run_two(_fail_in_second_group, tmp_path)
    for rank in (0, 1):
        text, initialised = json.loads((tmp_path / str(rank)).read_text())
        assert text.startswith(f"rank {rank} of 2 cannot join the others by gloo at env:// (no")
        assert not initialised


def _fail_in_second_group(folder):
    rank = os.environ["RANK"]

    def fail(**options):
        dist.barrier()  # rank 0 serves the store in which the first group is made
        raise RuntimeError("no interface")

    with (
        mock.patch.object(dist, "new_group", fail),
        pytest.raises(ConfigError) as error,
        distributed.process_group(CPU, "env://"),
    ):
        pass
    (folder / rank).write_text(json.dumps([str(error.value), dist.is_initialized()]))


def test_user_error_on_all_ranks_is_printed_once(tmp_path):
    images = write_colours(tmp_path / "images")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth").touch()
    network = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu"]
    linear = ["linear", *network, "--data_path", str(images), "--crop", "16", "--output_dir"]
    mistakes = {
        "no file": [
            ["knn", *network, "--load_features", str(tmp_path / "none")],
            [*linear, str(tmp_path / "new"), "--evaluate"],
            ["train", *network, "--data_path", str(images / "train"), "--init_from", "none",
             "--output_dir", str(tmp_path / "trained"), "--batch_size_per_gpu", "2",
             "--out_dim", "16", "--global_crops_size", "16", "--local_crops_size", "8",
             "--num_workers", "0"],
        ],
        "there are 3 classes": [[*linear, str(tmp_path / "new"), "--num_labels", "2"]],
        "holds a pretraining run": [[*linear, str(tmp_path / "run")]],
        "of another probe": [[*linear, str(tmp_path / "probe"), "--epochs", "2"]],
    }  # fmt: skip
    probe = [*linear, str(tmp_path / "probe"), "--epochs", "1", "--num_workers", "0"]
    run_commands_in_two(probe)
    lines = [(line, message) for message, lines in mistakes.items() for line in lines]
    run_two(_make_mistakes, [line for line, _ in lines], tmp_path)
    printed, silent = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")
    for (_, message), text in zip(lines, printed, strict=True):
        assert message in text
    assert silent == [""] * len(lines)


def _make_mistakes(lines, folder):
    from fastdino import cli

    printed = []
    for line in lines:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            assert cli.main(line) == 2
        printed.append(stderr.getvalue())
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(printed))


def test_errors_in_a_single_process_are_unchanged():
    with pytest.raises(KeyError), distributed.fail_together():
        raise KeyError
    with pytest.raises(ConfigError) as error:
        distributed.from_main(_refuse)
    assert not error.value.reported


@pytest.mark.parametrize("url", ["env://", "nonsense", "gopher://host", "tcp://127.0.0.1", "taken"])
def test_ranks_that_cannot_meet_are_a_mistake_of_the_user(monkeypatch, url):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": port}
        if url == "taken":
            url = f"tcp://127.0.0.1:{port}"
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(
                ConfigError, match=r"rank 0 of 2 cannot join the others by gloo at .*: c"
            ),
            distributed.process_group(torch.device("cpu"), url),
        ):
            pass
