from __future__ import annotations

import pytest

from fastdino import cli, demo
from tests.commands import flags_of


@pytest.fixture
def fake_commands(monkeypatch):
    """Return a function that makes every command exit with a status and records the calls."""

    def put(status):
        lines = []
        monkeypatch.setattr(cli, "main", lambda line: lines.append(line) or status)
        return lines

    return put


def test_a_folder_with_a_space_stays_one_argument(fake_commands, tmp_path):
    lines = fake_commands(0)
    demo.run("shapes", "--size 96 --output_dir", tmp_path / "my run")
    assert lines == [["shapes", "--size", "96", "--output_dir", str(tmp_path / "my run")]]


def test_the_demo_stops_at_the_first_failing_command(fake_commands, tmp_path):
    lines = fake_commands(2)
    with pytest.raises(SystemExit) as exit_status:
        demo.main(flags_of(demo, "--output_dir", str(tmp_path)))
    assert exit_status.value.code == 2
    assert [line[0] for line in lines] == ["shapes"]
