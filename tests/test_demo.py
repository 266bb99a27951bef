"""`fastdino demo`: how it hands its work to the other commands."""

from __future__ import annotations

import pytest

from fastdino import cli, demo
from tests.commands import flags_of


@pytest.fixture
def answer(monkeypatch):
    """Makes every command end with a status; returns the list of the command lines."""

    def put(status):
        lines = []
        monkeypatch.setattr(cli, "main", lambda line: lines.append(line) or status)
        return lines

    return put


def test_a_folder_with_a_space_is_one_word(answer, tmp_path):
    lines = answer(0)
    assert demo.run("shapes", "--size 96 --output_dir", tmp_path / "my run") == 0
    assert lines == [["shapes", "--size", "96", "--output_dir", str(tmp_path / "my run")]]


def test_the_demo_ends_with_the_first_command_that_fails(answer, tmp_path):
    lines = answer(2)
    assert demo.main(flags_of(demo, "--output_dir", str(tmp_path))) == 2
    assert [line[0] for line in lines] == ["shapes"]
