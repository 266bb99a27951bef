"""Effects of the flags of commands: a table of two runs per flag, and checks of many commands.

Flags that cannot change the result, such as the batch size, change how it is computed: the checks
observe that, and that the result is the same up to rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastdino import cli
from tests.command_data import write_all, write_weights
from tests.command_runs import Ran, close, run_command, same

Check = Callable[[Ran, Ran], None]
TWO_RANKS = {
    "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}  # fmt: skip
RANK_1 = {"RANK": "1"}


@dataclass(frozen=True)
class Flag:
    """A flag: words of the second of two runs, words of both, and what the runs must show."""

    words: str
    check: Check
    base: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def changed(first: Ran, second: Ran) -> None:
    assert not same(first.answer, second.answer)
    assert not close(first.answer, second.answer)


def unchanged(first: Ran, second: Ran) -> None:
    assert same(first.answer, second.answer)


def in_batches_of(size: int) -> Check:
    def check(first: Ran, second: Ran) -> None:
        assert max(second.batch_sizes()) == size < max(first.batch_sizes())
        assert sum(second.batch_sizes()) == sum(first.batch_sizes())
        assert close(first.answer, second.answer)

    return check


def loaded_by_a_worker(first: Ran, second: Ran) -> None:
    assert (set(first.workers), set(second.workers)) == ({0}, {1})
    assert close(first.answer, second.answer)


def compared_on_the_cpu(first: Ran, second: Ran) -> None:
    assert (first.compared_on, second.compared_on) == (["cuda"], ["cpu"])
    unchanged(first, second)


def refused_without_a_gpu(_: Ran, second: Ran) -> None:
    assert second.status == 2
    assert "--device cuda: PyTorch sees no GPU" in second.err


def ranks_meet_at_the_url(_: Ran, second: Ran) -> None:
    assert second.status == 2
    assert "cannot join the others by gloo at nowhere://url" in second.err


def waits_as_long_for_rank_0(_: Ran, second: Ran) -> None:
    assert second.status == 2
    assert "rank 1 of 2 cannot join" in second.err
    assert "no answer for 0.3 s" in second.err


def writes(*names: str) -> Check:
    def check(first: Ran, second: Ran) -> None:
        assert set(names) <= set(second.files) - set(first.files)

    return check


def takes_images_of(*sides: tuple[int, int]) -> Check:
    """Check the sizes of the images that the network takes."""

    def check(first: Ran, second: Ran) -> None:
        sizes = [{tuple(images.shape[-2:]) for images in one.images} for one in (first, second)]
        assert set(sides) <= sizes[1]
        assert not set(sides) <= sizes[0]
        changed(first, second)

    return check


def network_flags(data: str, folder: str, *, exif: bool = True) -> dict[str, Flag]:
    """Return the flags of options.add_network_flags and add_conversion_flags.

    Args:
        data: the flag of the images.
        folder: their folder; <folder>-turned and <folder>-deep have changed images.
    """
    untrained = "--pretrained_weights ''"
    flags = {
        "arch": Flag("--arch vit_tiny", changed, untrained),
        "patch_size": Flag("--patch_size 16", changed, untrained),
        "pretrained_weights": Flag("--pretrained_weights {other}", changed),
        "checkpoint_key": Flag("--checkpoint_key student", changed, "--pretrained_weights {both}"),
        "seed": Flag("--seed 1", changed, untrained),
        "device": Flag("--device cuda", refused_without_a_gpu),
        "image_range": Flag("--image_range scale", changed, f"{data} {{{folder}-deep}}"),
    }
    if exif:
        turned = f"{data} {{{folder}-turned}}"
        flags["exif_orientation"] = Flag("--exif_orientation true", changed, turned)
    return flags


NANO = "--pretrained_weights {nano} --arch vit_nano --patch_size 8 --device cpu"
PROCESSES = {
    "num_workers": Flag("--num_workers 1", loaded_by_a_worker),
    "dist_url": Flag("--dist_url nowhere://url", ranks_meet_at_the_url, environment=TWO_RANKS),
    "dist_timeout_minutes": Flag(
        "--dist_timeout_minutes 0.005", waits_as_long_for_rank_0, environment=TWO_RANKS | RANK_1
    ),
    "local_rank": Flag("--local_rank 1", unchanged),  # accepted from old launchers and not used
}


def extraction_flags(batch: int) -> dict[str, Flag]:
    return PROCESSES | {
        "batch_size_per_gpu": Flag(f"--batch_size_per_gpu {batch}", in_batches_of(batch)),
        "use_cuda": Flag("--use_cuda false", compared_on_the_cpu),
        "output": Flag("--output {out}/other.json", writes("other.json")),
    }


@dataclass(frozen=True)
class Command:
    """The flags of a command.

    Attributes:
        line: words of every run.
        flags: by name, without dashes.
        usual: more words, left out where the base has `mark`.
    """

    line: str
    flags: dict[str, Flag]
    usual: str = ""
    mark: str = "{}"


class Commands:
    """Datasets, weights, and runs of commands on them; equal runs are made once."""

    def __init__(self, root: Path, nano_weights: Path) -> None:
        (root / "data").mkdir()
        self.root = root
        self.places = write_all(root / "data") | write_weights(root / "weights", nano_weights)
        self._known: dict[str, Ran] = {}

    def run(self, command: Command, words: str, environment: dict[str, str] | None = None) -> Ran:
        usual = "" if command.mark in words else command.usual
        line = f"{command.line} {usual} {words.replace(command.mark, '')}"
        for name, path in self.places.items():
            line = line.replace(f"{{{name}}}", path)
        if line not in self._known:
            folder = self.root / str(len(self._known))
            folder.mkdir()
            self._known[line] = run_command(line, folder, environment, self.places)
        return self._known[line]

    def check(self, command: Command, flag: Flag) -> None:
        """Run the command without and with a flag, and check its effect."""
        if flag.check is refused_without_a_gpu and torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        first = self.run(command, flag.base)
        flag.check(first, self.run(command, f"{flag.base} {flag.words}", flag.environment))


def flags_of(command: str) -> set[str]:
    """Return the flags that a command's parser has, and its arguments without dashes."""
    parser = argparse.ArgumentParser(add_help=False)
    import_module(cli.COMMANDS[command].module).configure(parser)
    return {action.dest for action in parser._actions}


def cases(commands: dict[str, Command]) -> list[object]:
    """Return pytest's parameters (command, flag's name) of a table."""
    return [
        pytest.param(command, name, id=f"{command} {name}")
        for command, table in commands.items()
        for name in table.flags
    ]
